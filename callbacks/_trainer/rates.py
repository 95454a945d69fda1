"""Learning rates of an optimizer's groups: read, set, or scaled around each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from autotune.errors import ConfigurationError, UnsupportedSetupError


def initial_rates(optimizer: Any) -> list[float]:
    """The rate each group was built with; under a scheduler, its peak where the scheduler names one."""
    names = ("max_lr", "initial_lr", "lr")
    return [float(next(group[name] for name in names if group.get(name) is not None)) for group in _groups(optimizer)]


def ratios(rates: list[float]) -> list[float]:
    """Each group's rate in units of the first group's.

    Raises:
        ConfigurationError: The first group's rate is 0 while another's is not: there is no ratio to keep.
    """
    if rates[0] == 0.0:
        if any(rates):
            raise ConfigurationError(
                f"the first parameter group has learning rate 0, others have {rates[1:]}: AutoLRS tunes the first "
                "group's rate and keeps the ratios; put a group that trains first, or freeze by requires_grad=False"
            )
        return [1.0] * len(rates)
    return [rate / rates[0] for rate in rates]


def averages_weights(optimizer: Any) -> bool:
    """Whether it is a schedule-free optimizer: it evaluates an average of its weights, so that no decay is wanted.

    They are known by their modes, ``train()`` and ``eval()``, which exchange the weights for the average and back.
    """
    switched = all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))
    return switched and all("train_mode" in group for group in _groups(optimizer))


@contextmanager
def averaged(optimizers: Sequence[Any]) -> Iterator[None]:
    """Schedule-free optimizers show their average here, whoever else switches them, and are as they were afterwards."""
    switched = [one for one in optimizers if averages_weights(one) and all(g["train_mode"] for g in _groups(one))]
    for optimizer in switched:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in switched:
            optimizer.train()


def current_rates(optimizer: Any) -> list[float]:
    """The groups' rates now."""
    return [float(group["lr"]) for group in _groups(optimizer)]


def set_rates(optimizer: Any, rates: list[float]) -> None:
    """Sets the groups' rates; a rate that is a tensor (capturable optimizers) is written in place."""
    for group, rate in zip(_groups(optimizer), rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _groups(optimizer: Any) -> list[dict[str, Any]]:
    return optimizer.param_groups  # type: ignore[no-any-return]


class RateDriver:
    """Sets an optimizer's rates: its own where there is no scheduler, a multiplier on the user's where there is one.

    Args:
        optimizer: The trainer's.
        peaks: Each group's rate as it was built, or where a user's schedule is highest.
        scheduled: Whether the user has a scheduler.
        ratios_: Each group's rate in units of the first group's; those of ``peaks`` when None.
        reference: The first group's of ``peaks`` as it was when the run began, where it goes on: schedulers may have
            lowered it since. That of ``peaks`` when None.

    Attributes:
        reference: The same.

    Raises:
        ConfigurationError: The first group's rate is 0 while another's is not, or is a scheduler's, which no
            multiplier takes anywhere.
    """

    def __init__(
        self,
        optimizer: Any,
        peaks: list[float],
        *,
        scheduled: bool,
        ratios_: list[float] | None = None,
        reference: float | None = None,
    ) -> None:
        self._optimizer = optimizer
        self.reference = peaks[0] if reference is None else reference
        self.ratios = ratios(peaks) if ratios_ is None else list(ratios_)
        if scheduled and not self.reference > 0.0:
            raise ConfigurationError(
                f"the scheduler's learning rate is {self.reference:g} at its highest, and so is the one that the "
                "optimizer was built with; a multiplier on it is what is tuned: build the optimizer with a rate above "
                "0, e.g. lr=1e-3"
            )
        self._wanted: float | None = None
        self._scaled = ScaledSteps(optimizer) if scheduled else None
        self._handle: Any = None
        with suppress(AttributeError):  # a wrapper that is no torch optimizer in all respects is not watched
            self._handle = optimizer.register_step_pre_hook(self._check)

    @property
    def scheduled(self) -> bool:
        """Whether rates are multipliers on a user's scheduler."""
        return self._scaled is not None

    def level(self, shape: float) -> float:
        """The share of its peak at which the rate stands now: the scheduler's, or ``shape``."""
        if self._scaled is None:
            return shape
        return current_rates(self._optimizer)[0] / self.reference

    def apply(self, peak: float, shape: float) -> None:
        """Makes the next update run at ``peak``, times ``shape`` or times what the scheduler makes of it."""
        if self._scaled is None:
            self._set([peak * shape * ratio for ratio in self.ratios])
        else:
            self._scaled.multiplier = peak / self.reference

    def trial(self, rates: list[float] | None) -> None:
        """Makes the next steps run at exactly ``rates``, one a group; None ends that."""
        if self._scaled is not None:
            self._grouped(len(self.ratios))
            self._scaled.override(rates)
        elif rates is not None:
            self._set(rates)

    def _set(self, rates: list[float]) -> None:
        self._grouped(len(rates))
        set_rates(self._optimizer, rates)
        self._wanted = rates[0]

    def _grouped(self, groups: int) -> None:
        if len(_groups(self._optimizer)) != groups:
            raise UnsupportedSetupError(
                f"the optimizer has {len(_groups(self._optimizer))} parameter groups and had {groups} when training "
                "started, so that there is no ratio for the new ones' rates; make all groups in configure_optimizers "
                "(requires_grad=False keeps a part frozen)"
            )

    def _check(self, *_: Any) -> None:
        # A rate that is a tensor lies on a device: to compare it would wait for that.
        rate = _groups(self._optimizer)[0]["lr"]
        if self._wanted is not None and not isinstance(rate, Tensor) and rate != self._wanted:
            raise UnsupportedSetupError(
                f"the step runs at a learning rate of {rate:.4g} where {self._wanted:.4g} was set: something between "
                "writes param_groups' lr (the module's optimizer_step, or a callback), so that no trial tells rates "
                "apart; remove it, or return it as a scheduler from configure_optimizers, whose rate is multiplied"
            )

    @property
    def last(self) -> float:
        """The first group's rate in the last update."""
        if self._scaled is not None and self._scaled.effective:
            return self._scaled.effective[0]
        # Not the group's, which a module may have written since.
        return current_rates(self._optimizer)[0] if self._wanted is None else self._wanted

    def remove(self) -> None:
        """Takes hooks off the optimizer."""
        if self._handle is not None:
            self._handle.remove()
        if self._scaled is not None:
            self._scaled.remove()


class ScaledSteps:
    """Multiplies the rates a user's scheduler sets, only while ``optimizer.step`` runs.

    A value written into a group would be the base of the next scheduler step; so the scheduled rates are put back
    as soon as the step is done, or was broken off. Lightning runs the module's step inside it: a checkpoint that is
    written there has the scheduled rates too.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._scheduled: list[float] | None = None  # while a step runs
        self._override: list[float] | None = None
        self.multiplier = 1.0
        self.effective: list[float] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._saved),
        ]

    def override(self, rates: list[float] | None) -> None:
        """Uses exactly ``rates`` (a trial's) until called with None."""
        self._override = rates

    def remove(self) -> None:
        """Takes the hooks off the optimizer."""
        self._after()
        for handle in self._handles:
            handle.remove()

    def _before(self, *_: Any) -> None:
        self._after()  # a step that raised has not got there
        self._scheduled = current_rates(self._optimizer)
        scaled = [rate * self.multiplier for rate in self._scheduled]
        self.effective = scaled if self._override is None else self._override
        set_rates(self._optimizer, self.effective)

    def _after(self, *_: Any) -> None:
        if self._scheduled is not None:
            set_rates(self._optimizer, self._scheduled)
            self._scheduled = None

    def _saved(self, _: Any, state: dict[str, Any]) -> None:
        if self._scheduled is not None:
            for group, rate in zip(state["param_groups"], self._scheduled, strict=True):
                group["lr"] = torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate

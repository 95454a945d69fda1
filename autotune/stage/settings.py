"""What a user sets of the learning-rate controller, checked when it is set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from autotune.arguments import is_count, is_number
from autotune.errors import ConfigurationError

Objective = Literal["annealed", "forecast"]
SearchWhen = Literal["on_evidence", "every_stage"]
Mode = Literal["min", "max"]
Proposals = Literal["bayesian", "grid"]

#: The interval that is searched where the user names no bounds.
LOWEST_LR, HIGHEST_LR = 1e-6, 10.0


@dataclass(frozen=True)
class LRSettings:
    """The arguments of ``AutoLRS``.

    Raises:
        ConfigurationError: Naming the argument, what was given, and a call that would be right.
    """

    min_lr: float | None = None
    max_lr: float | None = None
    search_budget: float = 0.1
    objective: Objective = "annealed"
    search: SearchWhen = "on_evidence"
    monitor: str | None = None
    mode: Mode = "min"
    seed: int = 0
    proposals: Proposals = "bayesian"
    stop_early: bool = True
    climb: bool = True
    forecasts: bool = True

    def __post_init__(self) -> None:
        for name in ("min_lr", "max_lr"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0.0):
                raise ConfigurationError(
                    f"AutoLRS({name}={value!r}): a learning rate above 0, e.g. {name}=1e-5, or None"
                )
        if self.low >= self.high:
            raise ConfigurationError(
                f"AutoLRS(min_lr={self.min_lr!r}, max_lr={self.max_lr!r}): min_lr must be below max_lr "
                f"(unset bounds are {LOWEST_LR:g} and {HIGHEST_LR:g}), e.g. AutoLRS(min_lr=1e-5, max_lr=1.0)"
            )
        if not (is_number(self.search_budget) and 0.0 < self.search_budget < 1.0):
            raise ConfigurationError(
                f"AutoLRS(search_budget={self.search_budget!r}): the share of the run that searching may cost, "
                "strictly between 0 and 1, e.g. search_budget=0.1"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                choices = ", ".join(repr(item) for item in allowed)
                raise ConfigurationError(f"AutoLRS({name}={getattr(self, name)!r}): one of {choices}")
        if self.monitor is not None and not (isinstance(self.monitor, str) and self.monitor):
            raise ConfigurationError(
                f"AutoLRS(monitor={self.monitor!r}): the name of a value that validation_step logs, e.g. "
                "monitor='val_loss', or None to find it"
            )
        if not is_count(self.seed, least=0) or self.seed >= 2**32:
            raise ConfigurationError(f"AutoLRS(seed={self.seed!r}): an integer from 0 to 2**32 - 1, e.g. seed=0")
        for name in ("stop_early", "climb", "forecasts"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"AutoLRS({name}={getattr(self, name)!r}): True or False")

    @property
    def low(self) -> float:
        """The lowest rate to search."""
        return LOWEST_LR if self.min_lr is None else float(self.min_lr)

    @property
    def high(self) -> float:
        """The highest rate to search."""
        return HIGHEST_LR if self.max_lr is None else float(self.max_lr)

    def clip(self, lr: float) -> float:
        """The nearest rate between :attr:`low` and :attr:`high`."""
        return min(max(lr, self.low), self.high)

    def to_dict(self) -> dict[str, Any]:
        """The settings as primitives."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


_CHOICES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "search": get_args(SearchWhen),
    "mode": get_args(Mode),
    "proposals": get_args(Proposals),
}

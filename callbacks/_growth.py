"""What goes with a growth step: the learning rate, and the way back when the loss explodes after it."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from autotune.batch.scaling import scaled_settings
from autotune.callbacks._trainer.facts import callbacks_named
from autotune.callbacks._trainer.rates import ScaledSteps, current_rates, set_rates
from autotune.noise.ranks import Ranks
from autotune.snapshot import OptimizerState, Weights

#: Updates of history behind the usual loss, and updates for which a growth is watched.
HISTORY = 32
WATCHED = 16
#: Losses that are averaged before they count as an explosion.
RECENT = 3
#: Before its time is over a growth is only given up where the loss is so many times as far off as would do at its end.
HOPELESS = 20.0


class WayBack:
    """Weights, optimizer state and scaled group settings of one moment; learning rates stay with who schedules them.

    Args:
        module: The user's.
        optimizer: Its optimizer.
        saved: :meth:`state_dict` of the moment; None takes the present one.
    """

    def __init__(self, module: nn.Module, optimizer: Any, saved: dict[str, Any] | None = None) -> None:
        self._optimizer = optimizer
        self._weights, self._state = Weights(module), OptimizerState(optimizer, hooks=False)
        if saved is not None:
            self._groups: list[dict[str, Any]] = saved["groups"]
            self._weights.load_state_dict(saved["weights"])
            self._state.load_state_dict(saved["optimizer"])
            return
        self._groups = scaled_settings(optimizer)
        self._weights.capture()
        self._state.capture()

    def go(self) -> None:
        """Goes back."""
        rates = current_rates(self._optimizer)
        self._weights.restore()
        self._state.restore()
        set_rates(self._optimizer, rates)
        for group, before in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(before)

    def state_dict(self) -> dict[str, Any]:
        """As primitives and tensors: it makes a checkpoint about twice as large."""
        groups = [{**group} for group in self._groups]
        return {"weights": self._weights.state_dict(), "optimizer": self._state.state_dict(), "groups": groups}


class Watch:
    """The losses before a growth, and the way back."""

    def __init__(self) -> None:
        self._losses: deque[Tensor] = deque(maxlen=HISTORY)
        self._window: list[Tensor] = []
        self._back: WayBack | None = None
        self._usual = (math.nan, math.nan)
        self._since: list[float] = []

    def note(self, outputs: Any, accumulate: int) -> None:
        """Takes one micro-batch's loss in; it stays on the device."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._window.append(loss.detach().float() * accumulate)

    @property
    def active(self) -> bool:
        """Whether a growth is being watched."""
        return self._back is not None

    def begin(self, module: nn.Module, optimizer: Any) -> None:
        """The first update of a larger batch is about to run: remembers weights, optimizer and the usual loss."""
        losses = torch.stack(list(self._losses)).tolist() if self._losses else []
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in finite) / max(len(finite) - 1, 1)) if finite else math.nan
        self._usual, self._since = (mean, spread), []
        self._back = WayBack(module, optimizer)

    def update_done(self, ranks: Ranks | None) -> bool:
        """An update is done; True where the loss has exploded since :meth:`begin`."""
        if not self._window:
            return False
        loss = torch.stack(self._window).mean()
        if ranks is not None:
            # Judged against the past and with the same verdict on every rank: a NaN on one is a NaN on all.
            loss = ranks.add(loss) / ranks.size
        self._window = []
        self._losses.append(loss)
        if not self.active:
            return False
        self._since.append(float(loss))
        exploded = self._exploded()
        if not exploded and len(self._since) >= WATCHED:
            self._back = None
        return exploded

    def _exploded(self) -> bool:
        """A loss that shoots up may come back, as it often does after a rise of the rate: it gets the whole time."""
        if not math.isfinite(self._since[-1]):
            return True
        mean, spread = self._usual
        if math.isnan(mean) or len(self._since) < RECENT:
            return False
        recent = sum(self._since[-RECENT:]) / RECENT
        patience = 1.0 if len(self._since) >= WATCHED else HOPELESS
        return recent > mean + patience * (0.5 * abs(mean) + 4 * spread)

    @property
    def losses(self) -> dict[str, float]:
        """The numbers behind the verdict."""
        return {"loss_before": self._usual[0], "loss_spread": self._usual[1], "loss_after": self._since[-1]}

    def undo(self) -> None:
        """Weights and optimizer go back; learning rates stay with whoever schedules them."""
        assert self._back is not None
        self._back.go()
        self._back = None
        self._losses.clear()

    def state_dict(self) -> dict[str, Any]:
        """Losses and, while a growth is watched, the way back."""
        return {
            "losses": [float(loss) for loss in self._losses],
            "window": [float(loss) for loss in self._window],
            "usual": list(self._usual),
            "since": list(self._since),
            "back": None if self._back is None else self._back.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], module: nn.Module, optimizer: Any) -> None:
        """The inverse of :meth:`state_dict`."""
        device = next(module.parameters()).device
        self._losses.extend(torch.tensor(loss, device=device) for loss in state["losses"])
        self._window = [torch.tensor(loss, device=device) for loss in state["window"]]
        self._usual, self._since = (state["usual"][0], state["usual"][1]), list(state["since"])
        if state["back"] is not None:
            self._back = WayBack(module, optimizer, state["back"])


def auto_lrs(trainer: Any) -> Any:
    """The run's ``AutoLRS``, or None."""
    return next(iter(callbacks_named(trainer, "AutoLRS")), None)


#: Growth since the last search of a learning rate after which another is asked for.
SEARCH_AGAIN = 4.0


class Rates:
    """Scales the learning rate with the batch: through ``AutoLRS`` where it drives the rate, else around each step."""

    def __init__(self) -> None:
        self.multiplier = 1.0
        self._steps: ScaledSteps | None = None
        self._auto: Any = None
        self._searches = 0
        self._searched_at = 0
        self._batch = 0
        self._leveled = 0
        self._peak = 0.0
        self.base = 0

    def attach(self, trainer: Any, batch: int) -> None:
        """Finds out who drives the rate; ``batch`` is the global batch at the start."""
        self._auto = auto_lrs(trainer)
        self._searched_at = self._batch = self.base = batch
        if self._auto is None:
            self._steps = ScaledSteps(trainer.optimizers[0])

    def level(self, trainer: Any) -> float | None:
        """The scheduled rate in units of its highest so far, which was meant for :attr:`base`; None without a schedule.

        Where a search of ``AutoLRS`` sets a rate, it is that of the batch as it is: base and peak are of that moment.
        """
        if self._auto is not None:
            now = self._auto.level
            if self._searched() != self._leveled:
                self._leveled, self._peak, self.base = self._searched(), 0.0, self._batch
        else:
            now = current_rates(trainer.optimizers[0])[0] if trainer.lr_scheduler_configs else None
        if now is None:
            return None
        self._peak = max(self._peak, now)
        return now / self._peak if self._peak > 0 else 1.0

    def _searched(self) -> int:
        return sum((decision.kind, decision.action) == ("search", "set_lr") for decision in self._auto.decisions)

    def detach(self) -> None:
        """Takes the hooks off the optimizer."""
        if self._steps is not None:
            self._steps.remove()
            self._steps = None

    def scale(self, factor: float) -> None:
        """Multiplies the rate from the next update on."""
        self.multiplier *= factor
        if self._steps is not None:
            self._steps.multiplier = self.multiplier
        elif self._auto is not None:
            self._auto.rescale(factor)

    def grown(self, batch: int) -> None:
        """Asks for a search once the batch is four times that of the last one."""
        if self._auto is None:
            return
        searches = self._searched()
        if searches != self._searches:
            # A search since the last growth has found the rate of the batch as it was then.
            self._searches, self._searched_at = searches, self._searched_at if searches == 1 else self._batch
        if batch >= SEARCH_AGAIN * self._searched_at:
            self._auto.request_search(f"the batch has grown from {self._searched_at} to {batch} examples")
            self._searched_at = batch
        self._batch = batch

    def state_dict(self) -> dict[str, float]:
        """Primitives."""
        return {
            "multiplier": self.multiplier,
            "searches": self._searches,
            "searched_at": self._searched_at,
            "batch": self._batch,
            "leveled": self._leveled,
            "peak": self._peak,
            "base": self.base,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; ``AutoLRS`` restores its own rate."""
        self.multiplier = state["multiplier"]
        self._searches, self._searched_at, self._batch = state["searches"], state["searched_at"], state["batch"]
        self._leveled, self._peak, self.base = state["leveled"], state["peak"], state["base"]
        if self._steps is not None:
            self._steps.multiplier = self.multiplier

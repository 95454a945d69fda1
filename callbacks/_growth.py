"""Watches a growth step: when the loss explodes after it, weights and optimizer go back to where it began."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor, nn

from autotune.callbacks._trainer.rates import current_rates, set_rates
from autotune.noise.ranks import Ranks
from autotune.snapshot import OptimizerState, Snapshot, Weights

#: Updates of history behind the usual loss, and updates for which a growth is watched.
HISTORY = 32
WATCHED = 16
#: Losses that are averaged before they count as an explosion.
RECENT = 3


class Watch:
    """The losses before a growth, and the way back."""

    def __init__(self) -> None:
        self._losses: deque[Tensor] = deque(maxlen=HISTORY)
        self._window: list[Tensor] = []
        self._snapshot: Snapshot | None = None
        self._optimizer: Any = None
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
        return self._snapshot is not None

    def begin(self, module: nn.Module, optimizer: Any) -> None:
        """The first update of a larger batch is about to run: remembers weights, optimizer and the usual loss."""
        losses = torch.stack(list(self._losses)).tolist() if self._losses else []
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean = sum(finite) / len(finite) if finite else math.nan
        spread = math.sqrt(sum((loss - mean) ** 2 for loss in finite) / max(len(finite) - 1, 1)) if finite else math.nan
        self._usual, self._since, self._optimizer = (mean, spread), [], optimizer
        self._snapshot = Snapshot([Weights(module), OptimizerState(optimizer)])
        self._snapshot.capture()

    def update_done(self, ranks: Ranks | None) -> bool:
        """An update is done; True where the loss has exploded since :meth:`begin`."""
        if not self._window:
            return False
        loss = torch.stack(self._window).mean()
        self._window = []
        self._losses.append(loss)
        if not self.active:
            return False
        value = float(loss)
        if ranks is not None:
            # NaN compares as nothing: infinity speaks for it on every rank.
            value = ranks.worst(value if math.isfinite(value) else math.inf, loss.device)
        self._since.append(value)
        exploded = self._exploded()
        if not exploded and len(self._since) >= WATCHED:
            self._snapshot = None
        return exploded

    def _exploded(self) -> bool:
        if not math.isfinite(self._since[-1]):
            return True
        mean, spread = self._usual
        if math.isnan(mean) or len(self._since) < RECENT:
            return False
        recent = sum(self._since[-RECENT:]) / RECENT
        return recent > mean + 0.5 * abs(mean) + 4 * spread

    @property
    def losses(self) -> dict[str, float]:
        """The numbers behind the verdict."""
        return {"loss_before": self._usual[0], "loss_spread": self._usual[1], "loss_after": self._since[-1]}

    def undo(self) -> None:
        """Weights and optimizer go back; learning rates stay with whoever schedules them."""
        assert self._snapshot is not None
        rates = current_rates(self._optimizer)
        self._snapshot.restore()
        set_rates(self._optimizer, rates)
        self._snapshot = None
        self._losses.clear()

"""Watching the training losses of a run: read in lots, kept as a trace, judged for trouble."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from autotune.forecast.trace import LossTrace

#: Losses are read from the device in lots: one wait for it in so many updates.
LOT = 10


class LossWatch:
    """The training losses since the stage began, and whether something is wrong with them.

    Attributes:
        trace: Of the stage, by real step.
        first: Median of the run's first lot (NaN until then).
        trouble: Why the run has to go back; empty while all is well.
        broken: Why the stage has to be looked at now; empty while all is well.
        window: The losses read since it was last emptied; what is not finite is only counted, in ``in_window``.
        in_window: How many were read.
    """

    def __init__(self) -> None:
        self.trace = LossTrace()
        self.first = math.nan
        self.trouble = ""
        self.broken = ""
        self.window = LossTrace(bins=1)
        self.in_window = 0
        self._lowest = math.inf
        self._pending: list[tuple[int, Tensor | float]] = []
        self._limits: list[list[float]] = []

    def begin_stage(self) -> None:
        """A new trace; what is expected of the old stage no longer counts."""
        self.trace = LossTrace()
        self.broken = ""
        self._limits = []

    def expect(self, limits: tuple[tuple[float, float], ...]) -> None:
        """From now on the loss is expected to be at most so high at such steps."""
        self._limits = [list(limit) for limit in limits]

    def add(self, step: int, loss: Tensor) -> None:
        """Takes in the loss of an update, on all ranks; it stays on its device until the lot is full."""
        self._pending.append((step, loss.detach()))
        if len(self._pending) >= LOT:
            self.read()

    def recent(self) -> float:
        """Mean loss over the last quarter of the stage's trace (at least two lots)."""
        bins = len(self.trace)
        return self.trace.recent(max(2 * LOT, bins // 4))[0] if bins else math.nan

    def empty_window(self) -> tuple[float, float]:
        """Mean of the window's losses and its standard error (NaN below two of them); the next window begins."""
        window, self.window, self.in_window = self.window, LossTrace(bins=1), 0
        return window.recent(1)

    def read(self) -> None:
        """Reads what is pending and judges it."""
        values = [(step, float(loss)) for step, loss in self._pending]
        self._pending = []
        self.in_window += len(values)
        for step, value in values:
            self.trace.add(step, value)
            self.window.add(step, value)
        if not values:
            return
        bad = [step for step, value in values if not math.isfinite(value)]
        if len(bad) > len(values) // 2:
            self.trouble = f"the training loss is not finite from step {bad[0]}"
            return
        finite = sorted(value for _, value in values if math.isfinite(value))
        middle = finite[len(finite) // 2]
        if math.isnan(self.first):
            self.first = middle
        self._lowest = min(self._lowest, middle)
        if middle > self.first + max(self.first - self._lowest, 0.5 * abs(self.first)):
            self.trouble = f"the training loss has risen to {middle:.4g}, from {self.first:.4g} at the start"
            return
        self._compare_with_limits(values[-1][0])

    def _compare_with_limits(self, step: int) -> None:
        passed = [high for place, high in self._limits if place <= step]
        if not passed:
            return
        self._limits = [limit for limit in self._limits if limit[0] > step]
        recent, error = self.trace.recent(2 * LOT)
        if math.isfinite(error) and recent - 3.0 * error > passed[-1]:
            self.broken = f"the training loss {recent:.4g} has left the forecast's interval (up to {passed[-1]:.4g})"

    def state_dict(self) -> dict[str, Any]:
        """As primitives; reading the pending losses changes nothing, judging them waits for the full lot."""
        return {
            "trace": self.trace.state_dict(),
            "window": self.window.state_dict(),
            "in_window": self.in_window,
            "first": self.first,
            "trouble": self.trouble,
            "broken": self.broken,
            "lowest": self._lowest,
            "pending": [[step, float(loss)] for step, loss in self._pending],
            "limits": [list(limit) for limit in self._limits],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.trace.load_state_dict(saved["trace"])
        self.window.load_state_dict(saved["window"])
        self.in_window = int(saved["in_window"])
        self.first, self._lowest = saved["first"], saved["lowest"]
        self.trouble, self.broken = saved["trouble"], saved["broken"]
        self._pending = [(int(step), float(loss)) for step, loss in saved["pending"]]
        self._limits = [list(limit) for limit in saved["limits"]]

"""Stops a trial that cannot win, and one that has blown up.

Notation:
    l_t, b_t  running training loss of this trial and of the best finished one at the same batch, shape (t,)
    d_t       l_t - b_t; the batches are shared, so their noise largely cancels                 | units of the loss
    L0        loss before any step
    P         progress of the best trial: L0 minus its mean loss over the same window           | units of the loss
    T         steps of a whole trial
    window    the latest fifth of a trial, at least 5 steps

Rules, in this order:
1. *Divergence*, at any step: a loss that is not finite; or the median of the last five losses lies above
   L0 + 3 |L0 - lowest loss| and above L0 by 8 robust deviations of the batch noise. The first term scales with the
   progress that has been shown to be possible: a trial three times as far above the start as anyone got below it does
   not come back within a trial, while a warm-up bump does. The second keeps a noisy loss near its start alive: a median
   of five normal losses exceeds 8 deviations never. The median of five shrugs off two bad batches.
2. *Paired*, at 40, 60 and 80 % of the way: the mean of d over the window is above 3 of its standard errors and above
   15 % of P. The standard error allows for correlation between successive d.
3. *Forecast*, at 60 and 80 %: even the low end of the forecast for step T lies above the best trial's last window by
   15 % of P, after granting this trial the drop that the best one showed beyond *its* forecast from the same point:
   a falling learning rate takes noise out at the end, which no exponential fitted before it foresees.

Sources: the paired rule and its constants are this project's measurements; the forecast rule goes back to AutoLRS
(arXiv 2105.10762), which forecasts every candidate and stops none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from autotune.errors import ConfigurationError
from autotune.forecast.curve import Forecast, fit_curve

_Array = NDArray[np.float64]
_RECENT = 5
_FEWEST = 3  # one bad batch at the start is no explosion
_BLOWN_UP_PROGRESS = 3.0
_BLOWN_UP_DEVIATIONS = 8.0
_WINDOW_SHARE = 0.2
_FORECAST_FROM = 0.6


@dataclass(frozen=True)
class Verdict:
    """Whether to stop, why, and as what.

    Attributes:
        stop: True ends the trial.
        reason: A sentence.
        status: ``"running"``, ``"stopped"`` (hopeless) or ``"diverged"``: the trial's status if it ends here.
    """

    stop: bool
    reason: str
    status: str = "running"


@dataclass(frozen=True)
class TrialStopper:
    """The three rules; holds no state.

    Args:
        checkpoints: Shares of a trial at which the paired and the forecast rule look, in (0, 1), ascending.
        standard_errors: By which a trial must be behind.
        margin: Share of the best trial's progress by which it must be behind.
        lower_bound: Of the loss, for the forecast; None for a loss that may be negative.

    Raises:
        ConfigurationError: A value is out of range.
    """

    checkpoints: tuple[float, ...] = (0.4, 0.6, 0.8)
    standard_errors: float = 3.0
    margin: float = 0.15
    lower_bound: float | None = 0.0

    def __post_init__(self) -> None:
        if list(self.checkpoints) != sorted(self.checkpoints) or not all(0 < c < 1 for c in self.checkpoints):
            raise ConfigurationError(
                f"TrialStopper: checkpoints ascend inside (0, 1), such as (0.4, 0.6, 0.8); got {self.checkpoints!r}"
            )
        if not (self.standard_errors >= 0 and self.margin >= 0):
            raise ConfigurationError("TrialStopper: standard_errors and margin must be at least 0")

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """Steps of a trial after which the paired and forecast rules have something new to say."""
        return tuple(math.ceil(share * total_steps) for share in self.checkpoints)

    def judge(
        self,
        curve: Sequence[float] | _Array,
        best_curve: Sequence[float] | _Array | None,
        total_steps: int,
        initial_loss: float,
    ) -> Verdict:
        """Whether a trial should go on.

        Args:
            curve: Its training losses so far, one a step.
            best_curve: All training losses of the best finished trial of the search, on the same batches.
            total_steps: T.
            initial_loss: L0, as a *training* loss; one that is not finite switches the rules that need it off.

        Returns:
            A verdict that depends on the losses up to the latest checkpoint only (rule 1: on all of them), so that it
            does not matter how often it is asked for.
        """
        own = np.asarray(curve, dtype=np.float64)
        best = np.asarray([] if best_curve is None else best_curve, dtype=np.float64)
        if not np.isfinite(best).all():
            best = best[:0]
        with np.errstate(all="ignore"):
            blown = _blown_up(own, best, initial_loss)
            if blown is not None:
                return Verdict(True, blown, "diverged")
            passed = [s for s in self.steps(total_steps) if 0 < s <= own.size]
            if not passed or best.size < total_steps or not math.isfinite(initial_loss):
                return Verdict(False, "nothing to compare with yet")
            return self._hopeless(own[: passed[-1]], best[:total_steps], initial_loss)

    def _hopeless(self, own: _Array, best: _Array, initial_loss: float) -> Verdict:
        total = best.size
        window = min(own.size, max(_RECENT, round(_WINDOW_SHARE * total)))
        difference = (own - best[: own.size])[-window:]
        progress = initial_loss - float(best[own.size - window : own.size].mean())
        if not progress > 0:
            return Verdict(False, "the best trial has made no progress to compare with")
        behind, error = float(difference.mean()), _standard_error(difference)
        if behind > self.standard_errors * error and behind > self.margin * progress:
            return Verdict(
                True,
                f"behind the best trial by {behind:.3g} on the same batches, {behind / progress:.0%} of its progress",
                "stopped",
            )
        if own.size >= _FORECAST_FROM * total:
            return self._forecast(own, best, window, progress)
        return Verdict(False, "not far enough behind")

    def _forecast(self, own: _Array, best: _Array, window: int, progress: float) -> Verdict:
        mine, rival = (
            _forecast(losses.tobytes(), best.size - 1, self.lower_bound) for losses in (own, best[: own.size])
        )
        if not (mine.trusted and rival.trusted):
            return Verdict(False, "not far enough behind, and no forecast to trust")
        end = float(best[-window:].mean())
        unforeseen = max(rival.value - end, 0.0)
        if mine.low - unforeseen > end + self.margin * progress:
            return Verdict(
                True, f"forecast at least {mine.low:.3g}, where the best trial ended at {end:.3g}", "stopped"
            )
        return Verdict(False, "may still win")


@lru_cache(maxsize=32)
def _forecast(curve: bytes, step: int, lower_bound: float | None) -> Forecast:
    """Of the curve itself; kept, because every step between two checkpoints asks the same."""
    losses = np.frombuffer(curve).tolist()
    return fit_curve(range(len(losses)), losses, lower_bound=lower_bound).predict(step, noisy=False)


def _blown_up(own: _Array, best: _Array, initial_loss: float) -> str | None:
    """Rule 1, as a sentence or None."""
    if own.size == 0:
        return None
    if not np.isfinite(own).all():
        return "a loss is not finite"
    if not math.isfinite(initial_loss):
        return None
    if own.size < _FEWEST:
        return None
    recent = float(np.median(own[-_RECENT:]))
    lowest = min(float(own.min()), float(best.min()) if best.size else math.inf)
    progress = max(initial_loss - lowest, 0.0)
    if progress == 0.0:
        # Nothing below the start to scale by: four times the start, for losses that have a natural zero.
        progress = abs(initial_loss)
    # Of the best trial where there is one: an exploding trial's own differences explode with it.
    quiet = best if best.size > _RECENT else own[: max(2, own.size // 2)]
    deviation = 1.4826 * float(np.median(np.abs(np.diff(quiet)))) / math.sqrt(2.0) if quiet.size > 1 else 0.0
    limit = initial_loss + max(_BLOWN_UP_PROGRESS * progress, _BLOWN_UP_DEVIATIONS * deviation)
    if recent > limit:
        return f"loss {recent:.3g} is far above the start, {initial_loss:.3g} (limit {limit:.3g})"
    return None


def _standard_error(d: _Array) -> float:
    """Of the mean of correlated values: lag-1 autocorrelation r leaves n (1 - r) / (1 + r) of n values."""
    centred = d - d.mean()
    energy = float(centred @ centred)
    if energy == 0.0:
        return 0.0
    r = min(max(float(centred[1:] @ centred[:-1]) / energy, 0.0), 0.9)
    return math.sqrt(energy / (d.size - 1) / d.size * (1 + r) / (1 - r))

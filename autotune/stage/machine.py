"""The stage machine: when to search, when to predict, when to go back.

A run is cut into stages on a doubling clock, as in AutoLRS (Jin et al., ICLR 2021); unlike there, the rate inside a
stage follows one base shape for the whole run, a search is repeated on evidence rather than at every stage, and a
stage that made things worse is undone. The machine is pure: ``due`` says what to do next, one method per outcome
returns the next state and what follows from it. It never touches a model.

=============  ========================================================  ===============================
symbol         meaning                                                   unit
=============  ========================================================  ===============================
``progress``   share of the run that is done (unbounded without an end)  1
``loss``       the monitored value on the probe batches, lower = better  as the user's (sign-flipped for
                                                                         ``mode="max"``)
``worth``      the loss before the first update minus the best so far    as ``loss``
=============  ========================================================  ===============================
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from autotune.stage.probe import Probe, compare

Due = Literal["search", "forecast", "end"]
Verdict = Literal["train", "search", "roll_back", "decay", "lower"]


@dataclass(frozen=True)
class StageState:
    """What evolves; primitives only, so that a checkpoint can hold it (:meth:`to_dict`).

    Attributes:
        lr: Peak of the rate; None before the first search.
        searches: Made or given up.
        index: Of the present stage, from 1; 0 before the first.
        start: Progress at which it began.
        end: Progress at which it ends.
        start_step: Real updates at its start.
        start_probe: The probe there.
        initial_loss: Probe loss before the first update.
        best_probe: The best probe so far; where a rollback goes.
        best_step: Real updates there.
        best_train: Mean training loss before it.
        first_train: Mean training loss of the first updates.
        bad: Checks in a row that were bad.
        late: Whether the last check was made when the rate had come down, or at the run's end: then one bad one counts.
        prediction: Value, low, high for the stage's end.
        forecast_due: Progress at which the end is to be predicted.
        strikes: Rollbacks in a row.
        request: Why somebody asks for a search; empty without.
        promised: What the trial at this rate ended at, until the run has come as far; NaN where nothing is owed.
    """

    lr: float | None = None
    searches: int = 0
    index: int = 0
    start: float = 0.0
    end: float = 0.0
    start_step: int = 0
    start_probe: Probe | None = None
    initial_loss: float = math.nan
    best_probe: Probe | None = None
    best_step: int = 0
    best_train: float = math.nan
    first_train: float = math.nan
    bad: int = 0
    late: bool = False
    prediction: tuple[float, float, float] | None = None
    forecast_due: float = math.inf
    strikes: int = 0
    request: str = ""
    promised: float = math.nan

    def to_dict(self) -> dict[str, Any]:
        """The state as a dictionary of primitives."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> StageState:
        """The inverse of :meth:`to_dict`."""
        prediction = saved["prediction"]
        probes = {name: Probe.from_dict(saved[name]) for name in ("start_probe", "best_probe")}
        return cls(**{**saved, **probes, "prediction": None if prediction is None else tuple(prediction)})


@dataclass(frozen=True)
class StageMachine:
    """Configuration of the machine.

    Attributes:
        search: ``"on_evidence"`` or ``"every_stage"``.
        known_end: Whether progress 1 is the end of the run.
        first: Length of the first stage, in progress.
        growth: Each stage is this much longer than the one before.
        longest: Cap on a stage's length where the end is not known.
        forecast_at: Share of a stage after which its end is predicted.
        guard: Whether stages can be undone at all.
        lowering: Factor on the rate after a rollback.
        decay: Factor on the rate on a plateau where the end is not known.
        worse: A check is bad when the probe is worse than the best one by this share of what the run has gained
            (and by two standard errors of the paired difference) ...
        fitted: ... while the training loss has fallen by this share of what it has fallen by in all. The second
            condition tells overfitting, which does not heal, from the spikes of a high rate, which the decay heals.
        bad_checks: Bad checks in a row that undo a stage.
        settled: Where the rate has come down to this share of its peak a check is late. There is little noise left
            that the decay could still take out, so a loss that is worse than the best is bad whatever the training loss
            does, ...
        worse_late: ... by this share of what the run has gained, and by the same two errors as far as the probe leaves
            examples out: its share of the validation set is what the run will be judged by and no guess (a sample
            without replacement, whose error is sqrt(1 - share) of one with). It is undone at once: the rest of the
            decay is of more use to the best weights. Where these errors are not known a check is never late, ...
        nearly_all: ... unless the probe is of this share of the validation set.
        behind: The rate is lowered when a stage, which is longer than the trials were, ends worse than the trial at
            its rate had ended, by this share of that trial's progress: a rate too high for a long run shows so ...
        warm: ... while the rate is at this share of its peak or above ...
        owed_until: ... in a stage before this one ...
        telling: ... where the trial had taken this share off the loss.
        patience: Rollbacks in a row before the machine keeps what it has.
    """

    search: str = "on_evidence"
    known_end: bool = True
    first: float = 0.04
    growth: float = 2.0
    longest: float = 0.4
    forecast_at: float = 0.6
    guard: bool = True
    lowering: float = 10**-0.5
    decay: float = 0.3
    worse: float = 0.05
    fitted: float = 0.05
    bad_checks: int = 2
    settled: float = 0.5
    worse_late: float = 0.025
    nearly_all: float = 0.9
    behind: float = 0.1
    warm: float = 0.8
    owed_until: int = 3
    telling: float = 0.05
    patience: int = 3

    def due(self, state: StageState, progress: float) -> Due | None:
        """What has to be done before the next update."""
        if state.lr is None or state.index == 0 or state.request:
            return "search"
        if progress >= state.end and not (self.known_end and state.end >= 1.0):
            return "end"
        return "forecast" if progress >= state.forecast_due else None

    def searched(self, state: StageState, lr: float, promised: float = math.nan) -> StageState:
        """A search has been made, or given up; ``lr`` is the peak to go on with, ``promised`` where its trial ended."""
        promised = promised if state.index == 0 else math.nan
        return replace(state, lr=lr, searches=state.searches + 1, request="", promised=promised)

    def begun(self, state: StageState, progress: float, step: int, probe: Probe | None, train: float) -> StageState:
        """A stage begins, with the probe of the weights it begins with and the mean training loss before it."""
        length = self.length(state.index)
        end = progress + length
        if self.known_end and end + 0.5 * length >= 1.0:
            end = 1.0
        state = replace(
            state,
            index=state.index + 1,
            start=progress,
            end=end,
            start_step=step,
            start_probe=probe,
            prediction=None,
            forecast_due=progress + self.forecast_at * (end - progress),
        )
        if probe is None or not math.isfinite(probe.loss):
            return state
        if math.isnan(state.initial_loss):
            state = replace(state, initial_loss=probe.loss)
        return _with_best(state, probe, train, step)

    def predicted(self, state: StageState, forecast: tuple[float, float, float] | None) -> StageState:
        """The stage's end has been predicted (value, low, high), or the forecaster refused (None)."""
        return replace(state, prediction=forecast, forecast_due=math.inf)

    def checked(self, state: StageState, probe: Probe, train: float, step: int, level: float = 1.0) -> StageState:
        """A probe has been made within or at the end of a stage.

        Args:
            state: Before it.
            probe: Of the present weights.
            train: The recent mean training loss.
            step: Real updates done.
            level: Share of its peak to which the rate has come down; 0 at the run's end, whatever the rate is.
        """
        best = state.best_probe
        # Where the noise cannot be told, nothing but the training loss tells a setback from it.
        told = best is not None and (probe.share >= self.nearly_all or math.isfinite(compare(probe, best)[1]))
        late = level <= self.settled
        bad = self._is_bad(state, probe, train, late and told)
        state = replace(state, bad=state.bad + 1 if bad else 0, late=late and (told or level == 0.0))
        return state if best is None else _with_best(state, probe, train, step)

    def noted(self, state: StageState, probe: Probe, train: float, step: int) -> StageState:
        """A probe has been made that says nothing but which weights are best."""
        return _with_best(state, probe, train, step)

    def lost(self, state: StageState) -> bool:
        """Whether the checks so far call for going back."""
        return self.guard and state.bad >= (1 if state.late else self.bad_checks)

    def ended(self, state: StageState, probe: Probe, level: float = 1.0) -> tuple[StageState, Verdict, tuple[str, ...]]:
        """A stage's clock has run out, or it was broken off: what now, and on what evidence. Call ``checked`` first.

        Args:
            state: Before it.
            probe: Of the present weights.
            level: Share of its peak at which the rate stands; where a user's schedule has it far below nothing is owed.
        """
        evidence = self._evidence(state, probe)
        if not math.isfinite(probe.loss) or self.lost(state):
            state, verdict = self.failed(state)
            return state, verdict, evidence
        state = replace(state, strikes=0)
        if probe.loss <= state.promised or state.index >= self.owed_until:
            state = replace(state, promised=math.nan)
        if level >= self.warm and self._is_behind(state, probe) and state.lr is not None:
            owed = f"behind: {probe.loss:.4g} after the stage, {state.promised:.4g} after the trial at this rate"
            return replace(state, lr=state.lr * self.lowering), "lower", (owed, *evidence)
        plateau = any(item.startswith("plateau") for item in evidence)
        if plateau and not self.known_end and state.index > 1 and state.lr is not None:
            return replace(state, lr=state.lr * self.decay), "decay", evidence
        if self.search == "every_stage" or evidence:
            return state, "search", evidence
        return state, "train", evidence

    def failed(self, state: StageState, *, last: bool = False) -> tuple[StageState, Verdict]:
        """The run diverged or lost ground: go back and lower, until patience runs out; at the run's end in any case."""
        kept = state.strikes >= self.patience and not last
        if not self.guard or kept or state.lr is None or state.best_probe is None:
            return replace(state, strikes=0, bad=0), "train"
        return replace(state, lr=state.lr * self.lowering, strikes=state.strikes + 1, bad=0), "roll_back"

    def asked(self, state: StageState, reason: str) -> StageState:
        """Somebody else (a grown batch, say) has a reason to search again."""
        return replace(state, request=reason) if state.index else state

    def cut(self, state: StageState, progress: float) -> StageState:
        """The stage is over now, whatever its clock says."""
        return replace(state, end=min(state.end, progress)) if state.index else state

    def length(self, index: int) -> float:
        """Length of the stage after ``index`` stages, in progress."""
        length = self.first * self.growth**index
        return length if self.known_end else min(length, self.longest)

    def _is_bad(self, state: StageState, probe: Probe, train: float, late: bool) -> bool:
        if not math.isfinite(probe.loss):
            return True
        if state.best_probe is None:
            return False
        difference, error = compare(probe, state.best_probe)
        margin = (self.worse_late if late else self.worse) * max(state.initial_loss - state.best_probe.loss, 0.0)
        rest = math.sqrt(1.0 - probe.share) if late else 1.0
        noise = 2.0 * error * rest if math.isfinite(error) else 0.0
        if difference <= max(margin, noise, 1e-12):
            return False
        if late:
            return True
        fallen, in_all = state.best_train - train, state.first_train - train
        return fallen > self.fitted * in_all > 0.0

    def _is_behind(self, state: StageState, probe: Probe) -> bool:
        progress = state.initial_loss - state.promised  # NaN where nothing is owed: then every comparison is false
        return (
            self.guard
            and progress > self.telling * abs(state.initial_loss)
            and probe.loss > state.promised + self.behind * progress
        )

    def _evidence(self, state: StageState, probe: Probe) -> tuple[str, ...]:
        found: list[str] = []
        if not math.isfinite(probe.loss):
            return ("divergence: the loss is not finite",)
        if state.bad and state.late and state.best_probe is not None:
            found.append(
                f"worse: it was {state.best_probe.loss:.4g} at step {state.best_step}, before the rate came down"
            )
        elif state.bad:
            found.append(f"overfitting: {state.bad} checks in a row were worse than the best while training got better")
        if state.prediction is not None and probe.loss > state.prediction[2]:
            found.append(f"forecast broken: {probe.loss:.4g} came where at most {state.prediction[2]:.4g} was expected")
        if state.start_probe is not None and math.isfinite(state.start_probe.loss):
            difference, error = compare(probe, state.start_probe)
            if -difference <= (2.0 * error if math.isfinite(error) else 0.0):
                found.append(f"plateau: the stage changed the loss by {difference:+.3g} with a noise of {error:.2g}")
        return tuple(found)


def _with_best(state: StageState, probe: Probe, train: float, step: int) -> StageState:
    if state.best_probe is not None and not probe.loss < state.best_probe.loss:
        return state
    return replace(state, best_probe=probe, best_step=step, best_train=train)

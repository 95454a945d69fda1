"""What a search knows and what it answers: frozen records of primitives, shared by every optimizer.

Notation: as in :mod:`autotune.search.surrogate`; losses in units of the loss, log learning rates in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Protocol

from autotune.errors import ConfigurationError, StateError
from autotune.search.acquisition import Proposal
from autotune.search.observation import Observation, Status

STATUSES = ("finished", "stopped", "diverged")

_HARMLESS = 0.01  # share of the starting loss by which a trial that did no harm may end above it


@dataclass(frozen=True)
class Outcome:
    """What became of a trial.

    Attributes:
        log_lr: Natural logarithm of its learning rate.
        horizon_steps: Steps it was meant to run.
        loss: Probe loss at its end; at the stop for a stopped trial (NaN if it was not measured).
        steps: Steps it did run.
        status: ``"finished"``, ``"stopped"`` or ``"diverged"``.
        curve: Running training losses, one a step.
        initial_loss: Loss before its first step; None for that of its search.
    """

    log_lr: float
    horizon_steps: int
    loss: float
    steps: int = 0
    status: Status = "finished"
    curve: tuple[float, ...] = ()
    initial_loss: float | None = None

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ConfigurationError(f"Outcome: status must be one of {STATUSES}; got {self.status!r}")
        if not math.isfinite(self.log_lr):
            raise ConfigurationError(f"Outcome: log_lr must be finite; got {self.log_lr!r}")
        if not self.horizon_steps > 0:
            raise ConfigurationError(f"Outcome: horizon_steps must be above 0; got {self.horizon_steps!r}")
        object.__setattr__(self, "curve", tuple(float(v) for v in self.curve))

    @property
    def observation(self) -> Observation:
        """What the surrogate reads of it."""
        return Observation(self.log_lr, self.horizon_steps, self.loss, self.status, self.initial_loss)


class PosteriorRow(NamedTuple):
    """One line of the table that goes to the log: learning rate, and u at the trials' horizon."""

    lr: float
    mean: float
    sd: float
    acquisition: float


@dataclass(frozen=True)
class SearchState:
    """A search under way.

    Attributes:
        initial_loss: Loss before any step of its trials.
        horizon_steps: Of its trials.
        target_horizon_steps: Of the training that follows.
        current_log_lr: In use before it; None at the first search.
        history: Trials of earlier searches, each with its own ``initial_loss``, without curves.
        outcomes: Trials of this one, in order.
        hyperparameters: Length scale, signal and noise of the last good fit.
        fit: Rung of the ladder they came from.
        loss_noise: Standard deviation of a trial's result, in units of the loss; 0 where it was not measured.
    """

    initial_loss: float
    horizon_steps: int
    target_horizon_steps: int
    current_log_lr: float | None = None
    history: tuple[Outcome, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    hyperparameters: tuple[float, float, float] | None = None
    fit: str = "prior"
    loss_noise: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers; a checkpoint that holds it loads with ``weights_only=True``."""
        record = asdict(self)
        for name in ("history", "outcomes"):
            record[name] = [{**outcome, "curve": list(outcome["curve"])} for outcome in record[name]]
        if self.hyperparameters is not None:
            record["hyperparameters"] = list(self.hyperparameters)
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SearchState:
        """The inverse of :meth:`to_dict`.

        Raises:
            StateError: The record does not have the fields of this version.
        """
        try:
            fields = dict(record)
            for name in ("history", "outcomes"):
                fields[name] = tuple(Outcome(**outcome) for outcome in fields[name])
            if fields["hyperparameters"] is not None:
                length, signal, noise = fields["hyperparameters"]
                fields["hyperparameters"] = (length, signal, noise)
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as failure:
            raise StateError(f"not a search's state of this version: {failure}") from failure

    @property
    def earlier(self) -> tuple[Outcome, ...]:
        """All trials so far, for the next search's ``history``: each knows its own start, curves are left out."""
        own = tuple(
            replace(o, curve=(), initial_loss=self.initial_loss if o.initial_loss is None else o.initial_loss)
            for o in self.outcomes
        )
        return self.history + own

    @property
    def best(self) -> Outcome | None:
        """The finished trial with the lowest loss."""
        done = [o for o in self.outcomes if o.status == "finished" and math.isfinite(o.loss)]
        return min(done, key=lambda o: o.loss, default=None)


@dataclass(frozen=True)
class Recommendation:
    """What a search advises.

    Attributes:
        log_lr_trial_optimum: Best log learning rate at the trials' horizon; NaN if nothing is known.
        log_lr: The same for the target horizon, inside the space; NaN if nothing is known.
        mean: Expected u there.
        sd: Its standard deviation.
        progress: Whether the trials made enough progress to be believed.
        progress_fraction: (L0 - best) / |L0|.
        gap: Expected u of the current learning rate minus that of ``log_lr``, at the target horizon; above 0
            when a change promises something; NaN without a current one.
        gap_sd: Its standard deviation.
        reason: A sentence.
        table: The posterior over the space, for the log.
        trial_gap: As ``gap``, at the trials' horizon against ``log_lr_trial_optimum``: what the trials themselves
            say, without what is not known about the drift; NaN without a current learning rate.
        trial_gap_sd: Its standard deviation.
    """

    log_lr_trial_optimum: float
    log_lr: float
    mean: float
    sd: float
    progress: bool
    progress_fraction: float
    gap: float
    gap_sd: float
    reason: str
    table: tuple[PosteriorRow, ...] = ()
    trial_gap: float = math.nan
    trial_gap_sd: float = math.nan


#: What a search advises when no trial finished.
NOTHING = Recommendation(math.nan, math.nan, math.nan, math.nan, False, 0.0, math.nan, math.nan, "no trial finished")


class Search(Protocol):
    """What every optimizer of this package answers to."""

    def init(
        self,
        initial_loss: float,
        horizon_steps: int,
        target_horizon_steps: int,
        current_log_lr: float | None = None,
        history: tuple[Outcome, ...] = (),
        loss_noise: float = 0.0,
    ) -> SearchState:
        """A search with no trial yet."""
        ...

    def ask(self, state: SearchState) -> Proposal | None:
        """The next trial, or None when the search is done."""
        ...

    def tell(self, state: SearchState, outcome: Outcome) -> SearchState:
        """The state after a trial."""
        ...

    def recommend(self, state: SearchState) -> Recommendation:
        """What the trials say."""
        ...


def begin(
    initial_loss: float,
    horizon_steps: int,
    target_horizon_steps: int,
    current_log_lr: float | None,
    history: tuple[Outcome, ...],
    loss_noise: float = 0.0,
) -> SearchState:
    """A validated state without trials.

    Raises:
        ConfigurationError: A horizon is not above 0, or the current learning rate not finite. The loss may be
            anything: a NaN is a search that will see no progress.
    """
    for name, value in (("horizon_steps", horizon_steps), ("target_horizon_steps", target_horizon_steps)):
        if not value > 0:
            raise ConfigurationError(f"init: {name} must be above 0; got {value!r}")
    if current_log_lr is not None and not math.isfinite(current_log_lr):
        raise ConfigurationError(f"init: current_log_lr must be finite or None; got {current_log_lr!r}")
    lean = tuple(replace(o, curve=()) for o in history)
    # A noise that is not a finite number was not measured.
    noise = max(float(loss_noise), 0.0) if math.isfinite(loss_noise) else 0.0
    return SearchState(float(initial_loss), horizon_steps, target_horizon_steps, current_log_lr, lean, loss_noise=noise)


def record(state: SearchState, outcome: Outcome) -> SearchState:
    """``state`` with one more trial."""
    return replace(state, outcomes=(*state.outcomes, outcome))


def progress_fraction(state: SearchState) -> float:
    """(L0 - best) / |L0|; 0 when no trial finished below the start."""
    if state.best is None or not state.best.loss < state.initial_loss:
        return 0.0
    drop = state.initial_loss - state.best.loss
    return drop / abs(state.initial_loss) if state.initial_loss else math.inf


def highest_harmless(outcomes: Iterable[Outcome], initial_loss: float) -> float:
    """The highest log learning rate whose trial did no harm, below all that did; -inf where there is none.

    Harm is an end more than a hundredth of the starting loss above it, one that was not measured, or an explosion.
    """
    bound = initial_loss + _HARMLESS * abs(initial_loss)
    harmed = [(o.log_lr, o.status == "diverged" or not o.loss <= bound) for o in outcomes]
    lowest = min((log_lr for log_lr, harm in harmed if harm), default=math.inf)
    return max((log_lr for log_lr, harm in harmed if not harm and log_lr < lowest), default=-math.inf)

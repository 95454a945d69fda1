"""Searches: candidates tried on the trainer's own model, from one saved state, on the same batches.

Everything a search changes is put back before the next real update: tensors, generators, counters and loaders by
:class:`~autotune.snapshot.Snapshot`, the trainer's inside by :func:`~autotune.callbacks._trainer.side_loop.side_loop`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from autotune.callbacks._probe import ProbePlan, ProbeSet
from autotune.callbacks._trainer.accumulation import is_out_of_memory, release_memory
from autotune.callbacks._trainer.bar import SearchBar
from autotune.callbacks._trainer.batches import Replay
from autotune.callbacks._trainer.data import DataState, second_loader
from autotune.callbacks._trainer.facts import surroundings, validation_loader, warn
from autotune.callbacks._trainer.ranks import Agreement
from autotune.callbacks._trainer.side_loop import SideLoop, side_loop
from autotune.callbacks._trial import PlannedLeg, run_trial
from autotune.pystate import Attributes, longest_container
from autotune.search import Outcome, Recommendation
from autotune.snapshot import Part, Snapshot
from autotune.stage.probe import Probe
from autotune.stage.settings import LRSettings

#: Steps made to learn how long one takes; the median leaves the first, slow ones out.
_TIMING_STEPS = 5
#: Seconds that remembering the training state may take without a word where a container is long: it is done for every
#: probe.
_SLOW, _LONG = 0.1, 10_000


@dataclass
class SearchResult:
    """What a search found and what it cost.

    Attributes:
        recommendation: None where no candidate could be tried.
        outcomes: One a candidate, in order.
        start: The probe before any trial.
        trial_steps: Optimizer steps made.
        cost: The same plus evaluations at their price.
        seconds: Wall time.
        problem: What broke the search off; empty where nothing did.
    """

    start: Probe
    recommendation: Recommendation | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    trial_steps: int = 0
    cost: float = 0.0
    seconds: float = 0.0
    problem: str = ""


class Trials:
    """Runs searches and probes for one fit.

    Args:
        trainer: In a running fit.
        module: Its module.
        set_rates: Makes the optimizer use these rates (one a group) in the next step; None ends that.
        ratios: Each group's rate in units of the first group's.
        seed: Chooses trial and probe batches.
    """

    def __init__(
        self,
        trainer: Any,
        module: Any,
        *,
        set_rates: Callable[[list[float] | None], None],
        ratios: Sequence[float],
        seed: int,
    ) -> None:
        self._trainer = trainer
        self._ranks = Agreement(trainer)
        self._set_rates = set_rates
        self._ratios = list(ratios)
        self._seed = seed
        self._module = module
        self._snapshot = self._new_snapshot()
        self.probe_set: ProbeSet | None = None
        self._told = False

    def _new_snapshot(self) -> Snapshot:
        trainer = self._trainer
        extras: list[Part] = [DataState(trainer), Attributes(surroundings(trainer))]
        return Snapshot.of_training(self._module, trainer.optimizers[0], extras)

    def prepare_probe(self, settings: LRSettings, *, steps: float, saved: dict[str, Any] | None = None) -> None:
        """Chooses the probe batches, once a fit; those of a ``saved`` run again where it goes on."""
        if self.probe_set is None:
            plan = ProbePlan.of(self._trainer, steps) if saved is None else ProbePlan(**saved)
            if not plan.training:
                validation_loader(self._trainer)  # set up by now, so that its data sets are among what is put back
            with self._snapshot.rolled_back():
                self.probe_set = ProbeSet(
                    self._trainer, plan=plan, monitor=settings.monitor, mode=settings.mode, seed=self._seed
                )

    def enlarge_probe(self, steps: float) -> bool:
        """Evaluates on more batches from now on, if ``steps`` optimizer steps pay for more; whether it does."""
        assert self.probe_set is not None
        with self._snapshot.rolled_back():
            return self.probe_set.enlarge(steps)

    @property
    def monitor(self) -> list[str | None]:
        """The monitored name (None: the training loss) and how it was found; empty before the first probe."""
        probe = self.probe_set
        return [] if probe is None or not probe.why else [probe.monitor, probe.why]

    def monitored(self, metrics: Mapping[str, Any]) -> Any:
        """The monitored tensor of the trainer's own validation; see :meth:`ProbeSet.monitored`."""
        return None if self.probe_set is None else self.probe_set.monitored(metrics)

    def lower_is_better(self, value: Any) -> float | None:
        """A monitored tensor as a loss; None for None."""
        return None if self.probe_set is None or value is None else self.probe_set.lower_is_better(value)

    def validate(self) -> float | None:
        """The monitored value on all that the trainer validates on, without a trace; None where there is none."""
        assert self.probe_set is not None
        with self._sealed() as loop:
            return self.probe_set.whole(loop)

    @property
    def probe_cost(self) -> float:
        """What one probe costs, in steps."""
        return 0.0 if self.probe_set is None else self.probe_set.cost

    def probe(self) -> Probe:
        """Evaluates the present weights on the probe batches and leaves no trace."""
        assert self.probe_set is not None
        with self._sealed() as loop:
            return self.probe_set(loop)

    def _capture(self) -> None:
        began = time.monotonic()
        self._snapshot.capture()
        seconds = time.monotonic() - began
        if seconds < _SLOW or self._told:
            return
        self._told = True
        name, length = longest_container(self._module.modules())
        if length > _LONG:
            warn(
                f"remembering what a trial may change takes {seconds:.1f} s each time, for every search and probe, and "
                f"{name} is a container of {length} entries: keep what no step changes on an object of a class of "
                "your own, which is kept by reference, and save what a step does change in on_trial_snapshot"
            )

    @contextmanager
    def _sealed(self) -> Iterator[SideLoop]:
        self._capture()
        try:
            with side_loop(self._trainer, self._training_state) as loop:
                yield loop
        finally:
            self._set_rates(None)
            self._snapshot.restore()

    @contextmanager
    def _training_state(self) -> Iterator[None]:
        """In a trial: the training state for a moment, then the trial's again."""
        trial = self._new_snapshot()
        with trial.rolled_back():
            self._snapshot.restore()
            yield

    def time_a_step(self, rate: float) -> tuple[float, int]:
        """Seconds one optimizer step takes, and the steps that were spent on timing it."""
        with self._sealed() as loop:
            source = iter(self._replay(self._seed + 15485863))
            self._set_rates([rate * ratio for ratio in self._ratios])
            times = []
            for _ in range(_TIMING_STEPS):
                began = time.monotonic()
                loop.train_step(list(islice(source, self._window())))
                times.append(time.monotonic() - began)
        return self._ranks.of_zero(max(sorted(times)[len(times) // 2], 1e-6)), _TIMING_STEPS

    def search(self, legs: Sequence[PlannedLeg], *, index: int, allowance: float) -> SearchResult:
        """Tries the candidates of one leg after the other, each leg knowing the trials of those before.

        Args:
            legs: At least one.
            index: The search's number in the run, from 0; chooses its batches.
            allowance: Steps the whole search may cost; a candidate that might not fit in is not begun.
        """
        assert self.probe_set is not None
        began = time.monotonic()
        bar = SearchBar(self._trainer, [(leg.candidates, leg.shape.steps) for leg in legs])
        batches = self._replay(self._seed + 104729 * (index + 1))
        try:
            with self._sealed() as loop:
                result = SearchResult(self.probe_set(loop), cost=self.probe_set.cost)
                self._snapshot.restore()
                for number, leg in enumerate(legs if math.isfinite(result.start.loss) else ()):
                    self._run_leg(loop, leg, number, batches, result, bar, allowance)
                    if result.problem:
                        break
        finally:
            bar.clear()
        result.seconds = time.monotonic() - began
        return result

    def _run_leg(
        self,
        loop: SideLoop,
        leg: PlannedLeg,
        number: int,
        batches: Replay,
        result: SearchResult,
        bar: SearchBar,
        allowance: float,
    ) -> None:
        searcher = leg.searcher(result.recommendation)
        state = leg.begin(searcher, result.start, tuple(result.outcomes))
        best: Outcome | None = None
        tried = 0
        # Rank zero proposes and recommends: two machines' fits may differ in the last bit.
        while (proposal := self._ranks.of_zero(searcher.ask(state))) is not None:
            if result.cost + leg.shape.steps + max(1, leg.evaluations) * self.probe_cost > allowance:
                break
            bar.trial(number, tried)
            tried += 1
            tried_out = self._if_it_fits(loop, proposal.log_lr, leg, batches, best, bar)
            if tried_out is None:
                result.problem = "memory ran out in a trial"
                result.cost += leg.shape.steps
                break
            outcome, reason = tried_out
            self._snapshot.restore()
            loop.rewind()
            result.outcomes.append(outcome)
            result.reasons.append(reason or proposal.reason)
            result.trial_steps += outcome.steps
            result.cost += outcome.steps + leg.probes_made(outcome.steps) * self.probe_cost
            state = searcher.tell(state, outcome)
            if outcome.status == "finished" and (best is None or outcome.loss < best.loss):
                best = outcome
        if tried and not result.problem and any(outcome.status != "diverged" for outcome in result.outcomes):
            result.recommendation = self._ranks.of_zero(searcher.recommend(state))

    def _if_it_fits(self, *trial: Any) -> tuple[Outcome, str] | None:
        try:
            return self._trial(*trial)
        except Exception as error:
            # Only alone: several ranks wait for one another in the backward pass, and there is no way on.
            if self._ranks.size > 1 or not is_out_of_memory(error):
                raise
        # Out of the except block: the exception holds the dead pass's frames, and so its activations.
        release_memory()
        return None

    def _trial(
        self, loop: SideLoop, log_lr: float, leg: PlannedLeg, batches: Replay, best: Outcome | None, bar: SearchBar
    ) -> tuple[Outcome, str]:
        probe_set, source = self.probe_set, iter(batches)
        assert probe_set is not None

        def step(rate: float) -> float:
            self._set_rates([rate * ratio for ratio in self._ratios])
            return self._ranks.mean([loop.train_step(list(islice(source, self._window())))])[0]

        return run_trial(leg, log_lr, best, step, lambda: probe_set(loop).loss, bar)

    def _window(self) -> int:
        return int(min(self._trainer.accumulate_grad_batches, self._trainer.num_training_batches))

    def _replay(self, seed: int) -> Replay:
        combined = self._trainer.fit_loop._combined_loader
        limits = list(combined.limits)

        def open_stream() -> Iterator[Any]:
            return (batch for batch, _, _ in second_loader(combined, seed, limits))

        return Replay(open_stream)

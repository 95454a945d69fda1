"""How the steps that searching may cost are divided.

The first search has two legs. The coarse one tries rates over all decades on trials of a few steps, which only tell
the decade, and costs next to nothing. The fine one walks from there on trials a forty-fifth of the run long: a few
long trials say more of a whole run than many short ones. Both teach one surrogate. What they leave over, because a
tenth is kept and hopeless trials are stopped, pays for probes of the run itself. These have to show whether the run
overfits, so they are as large as what is left allows. Later searches need evidence, and trials long against what has
been trained: a short trial late in a run ranks rates as if the decay came next, and always says "lower". Figures:
``examples/benchmark/FINDINGS.md``.

A run that is too short for both legs has the fine one only, around what is usual for its optimizer: six trials of
three steps and one of eight tell less than three of eight. A shorter one still (below some 230 updates) has the coarse
leg only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Leg:
    """Trials of one length.

    Attributes:
        candidates: How many.
        steps: Optimizer steps of each.
        walk: Whether those of a first search walk from a centre instead of looking everywhere.
    """

    candidates: int
    steps: int
    walk: bool = False


@dataclass(frozen=True)
class SearchPolicy:
    """Shares of the whole budget, which by default is a tenth of the run.

    Attributes:
        coarse: Candidates of the coarse leg.
        coarse_trial: Length of one of its trials, as a share of the budget.
        fine: Candidates of the fine leg.
        local: Candidates of a later search.
        fine_trial: Length of one of its trials, as a share of the budget.
        shortest_coarse: Trials below this many steps say nothing.
        shortest_fine: The same for the fine leg.
        reserve: Share of the budget that is kept for probes of the run itself, at least.
        probe_share: What one probe of a trial may cost, as a share of the budget.
        checks: Probes that a first search leaves over: the one that the run begins with, its stages', one to spare.
        stage_checks: Two a stage.
        ranking: A later search's trials last at least this share of the updates made so far.
    """

    coarse: int = 6
    coarse_trial: float = 1.0 / 32.0
    fine: int = 3
    local: int = 3
    fine_trial: float = 1.0 / 4.5
    shortest_coarse: int = 3
    shortest_fine: int = 5
    reserve: float = 0.1
    probe_share: float = 0.01
    checks: int = 12
    stage_checks: int = 10
    ranking: float = 1.0 / 3.0

    def probe_steps(self, budget: float) -> float:
        """What one probe of a trial may cost in steps."""
        return self.probe_share * budget

    def check_steps(self, left: float, first: float) -> float:
        """What one probe of the run itself may cost, in steps.

        Args:
            left: Steps that the first search has left over.
            first: Steps that the run will have earned when the first two of these probes are due.
        """
        return min(left / self.checks, first / 2.0)

    def first(self, budget: float, probe: float, *, centred: bool = True, idle: int = 0) -> list[Leg]:
        """The legs of the first search; none where the budget does not pay for three trials.

        Args:
            budget: Optimizer steps that searching may cost in the whole run.
            probe: Steps one probe costs (one before the search, one after each trial).
            centred: Whether there is a rate to walk from without a coarse leg.
            idle: First steps of a trial that say nothing; each trial is longer by these.

        >>> SearchPolicy().first(200.0, 1.0)
        [Leg(candidates=6, steps=6, walk=False), Leg(candidates=3, steps=44, walk=True)]
        >>> SearchPolicy().first(40.0, 1.0), SearchPolicy().first(5.0, 1.0)
        ([Leg(candidates=3, steps=8, walk=True)], [])
        """
        left = (1.0 - self.reserve) * budget - probe
        telling = max(self.shortest_coarse, round(self.coarse_trial * budget))
        steps = telling + idle
        coarse = Leg(min(self.coarse, int(left / (steps + probe))), steps)
        fine = self._fine(left - coarse.candidates * (steps + probe), budget, probe, 2 * telling, idle)
        if centred and telling <= self.shortest_coarse and (fine is None or fine.candidates < self.fine):
            alone = self._fine(left, budget, probe, self.shortest_fine, idle)
            if alone is not None and alone.candidates == self.fine:
                return [alone]
        if coarse.candidates < 3:
            return []
        return [coarse] if fine is None else [coarse, fine]

    def _fine(self, left: float, budget: float, probe: float, shortest: int, idle: int) -> Leg | None:
        for count in range(self.fine, 0, -1):
            steps = int(min(self.fine_trial * budget + idle, left / count - probe))
            if steps - idle >= max(self.shortest_fine, shortest):
                return Leg(count, steps, walk=True)
        return None

    def later_leg(self, left: float, done: int, probe: float, *, at_any_length: bool = False) -> Leg | None:
        """A later search's leg; None where trials long enough to be fair cannot be paid.

        Args:
            left: Steps that may still be spent now.
            done: Updates made so far.
            probe: Steps one probe costs.
            at_any_length: Search even with trials too short to rank fairly (``search="every_stage"``).
        """
        steps = int((left - probe) / self.local - probe)
        enough = self.shortest_fine if at_any_length else max(self.shortest_fine, self.ranking * done)
        return Leg(self.local, steps) if steps >= enough else None

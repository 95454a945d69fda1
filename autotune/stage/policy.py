"""How a search's steps are divided: candidates and horizons, from what it may cost.

A first search has two legs. The coarse one tries many rates over all decades on trials so short that they only tell
the hopeless from the rest; the fine one tries a few of what is left on trials ten times as long, whose ranking is that
of the run. Both teach one surrogate, which learns from the two horizons how the best rate drifts with the horizon.
A later search has one leg around the current rate. The figures behind the shares are in
``examples/benchmark/FINDINGS.md``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Leg:
    """Trials of one length.

    Attributes:
        candidates: How many.
        steps: Optimizer steps of each.
    """

    candidates: int
    steps: int


@dataclass(frozen=True)
class SearchPolicy:
    """Shares of a search's allowance.

    Attributes:
        coarse: Candidates of the coarse leg.
        coarse_share: Its share of the allowance.
        fine: Candidates of the fine leg.
        local: Candidates of a later search, the current rate among them.
        shortest: Trials below this many steps say nothing; there are fewer of them instead.
        probe_share: What one probe may cost, as a share of a fine trial.
        first_share: Share of the whole budget that the first search may take; the rest pays for probes and later
            searches.
        drift: Prior mean of the drift of the best rate with the horizon (see :mod:`autotune.search.surrogate`).
        drift_sd: Its standard deviation.
        offset_sd: How far the levels of two horizons' bowls may lie apart, in u.
    """

    coarse: int = 7
    coarse_share: float = 0.25
    fine: int = 3
    local: int = 4
    shortest: int = 3
    probe_share: float = 0.1
    first_share: float = 0.85
    drift: float = 0.0
    drift_sd: float = 0.15
    offset_sd: float = 0.1

    def probe_steps(self, allowance: float) -> float:
        """What one probe may cost in steps, given what the first search may."""
        return max(1.0, self.probe_share * (1.0 - self.coarse_share) * allowance / self.fine)

    def first(self, allowance: float, probe: float) -> list[Leg]:
        """The legs of a first search.

        Args:
            allowance: Optimizer steps it may cost.
            probe: Steps one probe costs (one before the search, one after each trial).

        Returns:
            No leg where the allowance is too small for three trials.

        >>> SearchPolicy().first(200.0, 1.0)
        [Leg(candidates=7, steps=6), Leg(candidates=3, steps=48)]
        >>> SearchPolicy().first(5.0, 1.0)
        []
        """
        allowance -= probe
        coarse = self._leg(self.coarse, self.coarse_share * allowance, probe)
        if coarse is None:
            only = self._leg(self.coarse, allowance, probe)
            return [] if only is None else [only]
        left = allowance - coarse.candidates * (coarse.steps + probe)
        fine = self._leg(self.fine, left, probe)
        return [coarse] if fine is None or fine.steps <= coarse.steps else [coarse, fine]

    def later(self, allowance: float, probe: float, at_least: int) -> list[Leg]:
        """The leg of a later search; none where trials of ``at_least`` steps cannot be paid."""
        steps = int((allowance - probe) / self.local - probe)
        return [Leg(self.local, steps)] if steps >= max(at_least, self.shortest) else []

    def _leg(self, candidates: int, allowance: float, probe: float) -> Leg | None:
        for count in range(candidates, 2, -1):
            steps = int(allowance / count - probe)
            if steps >= self.shortest:
                return Leg(count, steps)
        return None

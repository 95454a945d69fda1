"""Synthetic responses of a loss to a learning rate, with a known optimum at every horizon.

Notation: x log learning rate, h horizon in steps, s drift: the optimum lies at ``centre - s log(h / 100)``.
``curve(x, h)`` is the noiseless loss at the end of an annealed run of h steps; infinite where it diverges.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

from autotune.search import Outcome

START = 5.0


@dataclass(frozen=True)
class Response:
    kind: str
    centre: float
    drift: float
    noise: float = 0.03  # of a trial, as a share of the progress

    def optimum(self, h: float) -> float:
        return self.centre - self.drift * math.log(h / 100.0)

    def left(self, x: float, h: float) -> float:
        """Share of the possible progress that is left; infinite where it diverges."""
        d = x - self.optimum(h)
        low = 1.0 - math.exp(-0.5 * (d / 2.2) ** 2)
        if self.kind == "cliff":  # slow descent to the left, explosion soon to the right
            return low if d < 0 else math.inf if d > 1.3 else 0.15 * d**2
        if self.kind == "saturating":  # to the right the loss stays where it started
            return low if d < 0 else 1.0 - math.exp(-0.5 * (d / 1.4) ** 2)
        if self.kind == "flat":  # three decades that hardly differ
            return 1.0 - math.exp(-((abs(d) / 4.0) ** 4))
        if self.kind == "threshold":  # nothing happens at all below a learning rate
            return 1.0 / (1.0 + math.exp(3.0 * (d + 2.0))) if d < 0 else 0.0025 + 0.4 * d**2 if d < 1.6 else math.inf
        raise ValueError(self.kind)

    def loss(self, x: float, h: float) -> float:
        reached = START - 3.0 * (1.0 - (1.0 + h / 50.0) ** -0.4)
        return START - (START - reached) * (1.0 - self.left(x, h))

    def regret(self, x: float, h: float) -> float:
        """Share of the progress that is lost by using x instead of the best, at most 1."""
        grid = [self.optimum(h) + 0.02 * k for k in range(-100, 60)]
        return min(self.left(x, h) - min(self.left(g, h) for g in grid), 1.0)

    def trial(self, x: float, h: int, rng: random.Random) -> Outcome:
        loss = self.loss(x, h)
        if not math.isfinite(loss):
            return Outcome(x, h, math.nan, h // 10, "diverged")
        return Outcome(x, h, loss + self.noise * (START - self.loss(self.optimum(h), h)) * rng.gauss(0, 1), h)


KINDS = ("cliff", "saturating", "flat", "threshold")
CENTRES = (-9.0, -6.5, -4.0, -1.5)
DRIFTS = (-0.4, -0.2, 0.0, 0.1, 0.2, 0.4)
BANK = [Response(k, c, s) for k, c, s in itertools.product(KINDS, CENTRES, DRIFTS)]


def run(search, response: Response, seed: int, *, horizon=100, target=4000, current=None, history=()):
    """A whole search; the last state."""
    rng = random.Random(f"{response}:{seed}")
    state = search.init(START, horizon, target, current, history)
    while (proposal := search.ask(state)) is not None:
        state = search.tell(state, response.trial(proposal.log_lr, horizon, rng))
    return state

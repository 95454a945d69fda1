"""How long an optimizer's steps are next to its rate: the first ones of a run, which trials are made of, and the rest.

RMSprop divides by a mean of squared gradients that begins at zero and is not corrected for it, and Adagrad by their
growing sum, so their first steps are many times as long as those that the same rate makes later. A trial of a few
dozen steps would find a rate that is too low for the run by as much, as it did by half a decade and more
(``examples/benchmark/FINDINGS.md``, 11:10). A trial's steps are therefore made shorter, to what the run's are in the
mean. Under Adam, whose means are corrected, and SGD nothing changes: steps that momentum makes *longer* with time are
left alone, because what bounds a trial's rate is its longest step.

RAdam holds its first steps back on purpose: the first five go by the gradient itself, as if it were SGD at Adam's rate,
and the fiftieth is a seventh of what Adam would make. A trial of such steps found rates thirty times too high (the same
file, "optimizers that no other set has"), so there the first ones are left out, and those after them are as long as the
run's.

=============  ===============================================================  =====
symbol         meaning                                                          unit
=============  ===============================================================  =====
``strides``    length of a step over its rate, by a gradient that stays at 1    1
``shape``      the rate as a share of its peak, by progress                     1
=============  ===============================================================  =====
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

#: Places at which the mean of a longer run's strides is taken.
_PLACES = 10_000


def _rmsprop(steps: NDArray[np.float64], options: Mapping[str, Any]) -> NDArray[np.float64]:
    """Tieleman and Hinton 2012: the mean of squares is ``1 - alpha^t`` of what it comes to."""
    alpha = min(max(options.get("alpha", 0.99), 1e-12), 1.0 - 1e-12)
    return np.asarray(1.0 / np.sqrt(-np.expm1(steps * np.log(alpha))))


def _adagrad(steps: NDArray[np.float64], options: Mapping[str, Any]) -> NDArray[np.float64]:
    """Duchi, Hazan and Singer 2011: the sum of squares is ``t``; what it begins at is not known in these units."""
    return np.asarray(1.0 / (np.sqrt(steps) * (1.0 + (steps - 1.0) * options.get("lr_decay", 0.0))))


def _radam(steps: NDArray[np.float64], options: Mapping[str, Any]) -> NDArray[np.float64]:
    """Liu et al. 2020 (arXiv 1908.03265), r of algorithm 2; 0 where torch does not rectify yet (its bound is 5)."""
    beta = min(max(float(options.get("betas", (0.9, 0.999))[1]), 0.0), 1.0 - 1e-12)
    longest = 2.0 / (1.0 - beta) - 1.0
    if longest <= 5.0:
        return np.ones_like(steps)  # never rectified
    powers = beta**steps
    length = longest - 2.0 * steps * powers / (1.0 - powers)
    known = np.maximum(length, 5.0)
    squares = (known - 4.0) * (known - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * known)
    return np.asarray(np.where(length > 5.0, np.sqrt(squares), 0.0))


_STRIDES = {"rmsprop": _rmsprop, "adagrad": _adagrad, "radam": _radam}
#: Optimizers whose first steps are made longer where they are shorter than the run's: they are held back on purpose.
_HELD_BACK = frozenset({"radam"})
#: Steps among which the first one that is no idle one is looked for.
_SOON = 100


def steps_made(optimizer: torch.optim.Optimizer) -> int:
    """The most steps that any weight's state says were made; 0 where no state counts them."""
    states = (state for state in optimizer.state.values() if isinstance(state, Mapping))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def idle_steps(optimizer: str, options: Mapping[str, Any], made: int = 0) -> int:
    """The next steps that say nothing of a rate, because those that follow do not go by the same rule.

    Args:
        optimizer: Name of its class.
        options: Of its first group: ``betas`` of RAdam.
        made: Steps that the optimizer has made before.

    >>> idle_steps("RAdam", {"betas": (0.9, 0.999)}), idle_steps("RAdam", {}, made=3), idle_steps("Adam", {})
    (5, 2, 0)
    """
    strides = _STRIDES.get(optimizer.lower())
    if strides is None:
        return 0
    return int(np.argmax(strides(made + np.arange(1.0, _SOON + 1.0), options) > 0.0))


def trial_shares(
    optimizer: str,
    options: Mapping[str, Any],
    trial: int,
    run: int,
    *,
    made: int = 0,
    shape: Callable[[float], float] = lambda progress: 1.0,
) -> tuple[float, ...]:
    """What to multiply a trial's rates by, so that no step is longer than the run's are in the mean at the same peak.

    Args:
        optimizer: Name of its class.
        options: Of its first group: ``alpha`` and ``momentum`` of RMSprop, ``lr_decay`` of Adagrad, ``betas`` of RAdam.
        trial: Steps of the trial.
        run: Steps that the run has left, at least one.
        made: Steps that the optimizer has made before.
        shape: Of the run's rate over these steps, by which the mean is weighted.

    Returns:
        A factor for each step of the trial: in (0, 1], or under RAdam 0 for a step that says nothing
        (:func:`idle_steps`) and mostly above 1 for the others; none where an optimizer's first steps are as long as the
        later ones.

    >>> trial_shares("Adam", {}, 3, 1000)
    ()
    >>> [round(share, 2) for share in trial_shares("RMSprop", {"alpha": 0.99}, 3, 100_000)]
    [0.1, 0.14, 0.17]
    >>> [round(share, 2) for share in trial_shares("Adagrad", {}, 3, 100)]
    [0.19, 0.26, 0.32]
    >>> [round(share, 1) for share in trial_shares("RAdam", {}, 7, 2000)]
    [0.0, 0.0, 0.0, 0.0, 0.0, 23.1, 18.2]
    """
    strides = _STRIDES.get(optimizer.lower())
    if strides is None:
        return ()
    places = (np.arange(min(run, _PLACES)) + 0.5) / min(run, _PLACES)
    weights = np.array([shape(place) for place in places])
    level = np.average(strides(made + np.ceil(places * run), options), weights=weights)
    first = strides(made + np.arange(1.0, trial + 1.0), options)
    if made == 0 and 0.0 < (momentum := options.get("momentum", 0.0)) < 1.0:
        # In the run the buffer is as good as full; in a trial before it, it fills from nothing.
        grown = itertools.accumulate(first, lambda buffer, stride: momentum * buffer + stride)
        first = np.fromiter(grown, float) * (1.0 - momentum)
    told = first > 0.0
    shares = np.where(told, level / np.where(told, first, 1.0), 0.0)
    held_back = optimizer.lower() in _HELD_BACK
    return tuple(float(share) for share in (shares if held_back else np.minimum(1.0, shares)))

"""How long an optimizer's steps are next to its rate: the first ones of a run, which trials are made of, and the rest.

RMSprop divides by a mean of squared gradients that begins at zero and is not corrected for it, and Adagrad by their
growing sum, so their first steps are many times as long as those that the same rate makes later. A trial of a few
dozen steps would find a rate that is too low for the run by as much, as it did by half a decade and more
(``examples/benchmark/FINDINGS.md``, 11:10). A trial's steps are therefore made shorter, to what the run's are in the
mean. Under Adam, whose means are corrected, and SGD nothing changes: steps that momentum makes *longer* with time are
left alone, because what bounds a trial's rate is its longest step.

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


_STRIDES = {"rmsprop": _rmsprop, "adagrad": _adagrad}


def steps_made(optimizer: torch.optim.Optimizer) -> int:
    """The most steps that any weight's state says were made; 0 where no state counts them."""
    states = (state for state in optimizer.state.values() if isinstance(state, Mapping))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


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
        options: Of its first group: ``alpha`` and ``momentum`` of RMSprop, ``lr_decay`` of Adagrad.
        trial: Steps of the trial.
        run: Steps that the run has left, at least one.
        made: Steps that the optimizer has made before.
        shape: Of the run's rate over these steps, by which the mean is weighted.

    Returns:
        A factor in (0, 1] for each step of the trial; none where an optimizer's steps are as long at first as later.

    >>> trial_shares("Adam", {}, 3, 1000)
    ()
    >>> [round(share, 2) for share in trial_shares("RMSprop", {"alpha": 0.99}, 3, 100_000)]
    [0.1, 0.14, 0.17]
    >>> [round(share, 2) for share in trial_shares("Adagrad", {}, 3, 100)]
    [0.19, 0.26, 0.32]
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
    return tuple(float(share) for share in np.minimum(1.0, level / first))

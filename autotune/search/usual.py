"""Learning rates that are usual for an optimizer's family: what is known before a single trial.

Peaks of annealed runs, not constants of long ones: 0.1 is what SGD is commonly begun with, Adam and its kin are
commonly begun between 1e-3 and 1e-2. A search gives them the weight of a doubtful trial, and its answer then goes half
of the way back to them (:mod:`autotune.search.bracket`): a rate here that is off by half a decade takes answers with it
by a quarter. With the first alone, and 1e-3 or 6e-3 for Adam, the benchmark's workloads ended 1.5 % worse and as well.
"""

from __future__ import annotations

_ADAM = 3e-3
_RATES = {
    "sgd": 0.1,
    "asgd": 0.1,
    "adagrad": 3e-2,
    "adadelta": 1.0,
    "adafactor": 1e-2,
    "muon": 2e-2,
    "lion": 3e-4,
    **dict.fromkeys(("adam", "adamw", "adamax", "nadam", "radam", "rmsprop", "lamb"), _ADAM),
}


def usual_lr(optimizer: str) -> float | None:
    """The usual peak for an optimizer's class name; None for one that is not known.

    >>> usual_lr("AdamW"), usual_lr("SGD"), usual_lr("Sophia")
    (0.003, 0.1, None)
    """
    return _RATES.get(optimizer.lower())


def cautious_lr(optimizer: str) -> float:
    """A third of it, for a run in which nothing can be tried.

    >>> cautious_lr("Adam")
    0.001
    """
    return (usual_lr(optimizer) or _ADAM) / 3.0

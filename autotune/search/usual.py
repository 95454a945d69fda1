"""Learning rates that are usual for an optimizer's family: what is known before a single trial.

Peaks of annealed runs, not constants of long ones: 0.1 is what SGD is commonly begun with, Adam and its kin are
commonly begun between 1e-3 and 1e-2. A search gives them the weight of a doubtful trial, and its answer then goes half
of the way back to them (:mod:`autotune.search.bracket`): a rate here that is off by half a decade takes answers with it
by a quarter. With the first alone, and 1e-3 or 6e-3 for Adam, the benchmark's workloads ended 1.5 % worse and as well.
"""

from __future__ import annotations

import re

from torch.optim import Optimizer

_ADAM = 3e-3
_RATES = {
    "sgd": 0.1,
    "asgd": 0.1,
    "adagrad": 3e-2,
    "adadelta": 1.0,
    "adafactor": 1e-2,
    "adamax": 1e-2,  # divides by the largest of some thousand gradients, three deviations and more of them
    "muon": 2e-2,
    "lion": 3e-4,
    **dict.fromkeys(("adam", "adamw", "sparseadam", "nadam", "radam", "rmsprop", "lamb"), _ADAM),
}
#: What names of the same optimizer have besides in apex, DeepSpeed and bitsandbytes.
_AFFIXES = re.compile(r"^(Fused|Paged|DeepSpeedCPU)|(8|32)bit$")


def family_of(optimizer: Optimizer) -> str:
    """Name of the class that an optimizer's steps are those of: its own, or that of the nearest base which is known.

    >>> import torch
    >>> class Mine(torch.optim.AdamW): ...
    >>> class FusedAdam(torch.optim.Optimizer): ...
    >>> weights = [torch.zeros(1)]
    >>> family_of(Mine(weights)), family_of(FusedAdam(weights, {})), family_of(torch.optim.LBFGS(weights))
    ('AdamW', 'Adam', 'LBFGS')
    """
    names = [_AFFIXES.sub("", kind.__name__) for kind in type(optimizer).__mro__]
    return next((name for name in names if usual_lr(name) is not None), type(optimizer).__name__)


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

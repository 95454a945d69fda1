"""Trials' results, and what a surrogate can compare: progress left, in u.

Notation: as in :mod:`autotune.search.surrogate`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Status = Literal["finished", "stopped", "diverged"]

_CLIP = 1.2
_STOPPED_FLOOR = 0.15  # the stopping rule's own margin: a stopped trial was at least this much behind
_STOPPED_UNKNOWN = 0.6


@dataclass(frozen=True)
class Observation:
    """One trial's result.

    Attributes:
        log_lr: Natural logarithm of its learning rate.
        horizon_steps: Steps it was meant to run.
        loss: At its end; for a stopped trial where it stopped, for a diverged one anything.
        status: ``"finished"``, ``"stopped"`` (hopeless) or ``"diverged"``.
        initial_loss: Loss before its first step; None for that of the search at hand.
    """

    log_lr: float
    horizon_steps: int
    loss: float
    status: Status = "finished"
    initial_loss: float | None = None


@dataclass(frozen=True)
class Data:
    """Observations as the model sees them."""

    log_lr: Tensor  # (n,)
    log_ratio: Tensor  # (n,) log(h / H_ref)
    group: Tensor  # (n,)
    u: Tensor  # (n,)
    extra_sd: Tensor  # (n,)


@dataclass(frozen=True)
class Noise:
    """Noise known beforehand, beside the learned one.

    Attributes:
        measured: Standard deviation of a result of the search at hand, in units of the loss.
        horizon_u: Per nat by which a group's horizon is farther from the target than the nearest one's, in u.
        stopped_u: Of a stopped trial, in u.
    """

    measured: float
    horizon_u: float
    stopped_u: float


Key = tuple[int, float]


def grouped(
    observations: Sequence[Observation], initial_loss: float, horizon_steps: int
) -> dict[Key, list[Observation]]:
    """Trials by horizon and starting loss; None stands for the start of the search at hand."""
    groups: dict[Key, list[Observation]] = {}
    for o in observations:
        start = initial_loss if o.initial_loss is None else o.initial_loss
        if math.isfinite(o.log_lr):
            groups.setdefault((o.horizon_steps, start), []).append(o)
    return groups


def best_loss(group: Sequence[Observation]) -> float:
    """Lowest loss of a finished trial, else of a stopped one, else NaN."""
    for status in ("finished", "stopped"):
        losses = [o.loss for o in group if o.status == status and math.isfinite(o.loss)]
        if losses:
            return min(losses)
    return math.nan


def made_progress(group: Sequence[Observation], start: float) -> bool:
    """Whether some trial ended below a finite start."""
    return best_loss(group) < start < math.inf


def standardised(
    groups: dict[Key, list[Observation]],
    current: Key,
    target_steps: int,
    noise: Noise,
) -> Data | None:
    """All groups that made progress, in u."""
    kept = {key: group for key, group in groups.items() if made_progress(group, key[1])}
    if not kept:
        return None
    distance = {key: abs(math.log(key[0] / target_steps)) for key in kept}
    nearest = min(distance.values())
    rows = []
    for index, (key, group) in enumerate(kept.items(), start=1):
        best = best_loss(group)
        farther = noise.horizon_u * (distance[key] - nearest)
        # Halved as in _progress_left; a noise beyond the clip says no more than one at it.
        measured = min(noise.measured / 2 / (key[1] / 2 - best / 2), _CLIP)
        for o in group:
            u, stopped = _progress_left(o, key[1], best)
            extra = math.hypot(farther, noise.stopped_u if stopped else 0.0, measured if key == current else 0.0)
            label = 0 if key == current else index
            rows.append((o.log_lr, math.log(key[0] / current[0]), label, u, extra))
    return Data(*torch.tensor(rows, dtype=torch.float64).unbind(dim=1))


def _progress_left(o: Observation, start: float, best: float) -> tuple[float, bool]:
    """Progress left of one trial, and whether it is only a bound."""
    if o.status == "diverged" or (o.status == "finished" and not math.isfinite(o.loss)):
        return _CLIP, False
    if not math.isfinite(o.loss):
        return _STOPPED_UNKNOWN, True
    # Halved before they are subtracted: differences of the largest floats overflow.
    u = (o.loss / 2 - best / 2) / (start / 2 - best / 2)
    u = _CLIP if not math.isfinite(u) else min(u, _CLIP)
    return (max(u, _STOPPED_FLOOR), True) if o.status == "stopped" else (u, False)

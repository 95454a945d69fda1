"""Noise from two consecutive updates: the last resort, where an update is one indivisible chunk.

======  ============================================  =====
symbol  meaning                                       shape
======  ============================================  =====
``a``   gradient of the update before, ``b_a``        P
``g``   gradient of this update, ``b_g`` examples     P
======  ============================================  =====

BatchNorm couples the examples of a batch, so per-example gradients are another function's; with one
micro-batch on one rank there is no second chunk either. Two updates in a row are two independent batches at
nearly the same weights, and stand in for two chunks (differenced gradients, as in AdaptDL, Qiao et al.
2021, section 4). It is biased by what the step between them changed: ``E|a - g|^2`` also holds ``|G_a -
G_g|^2``, which matters at learning rates near the edge of stability, so it is used only where nothing else
serves, and the record's user is told. Memory: one copy of the gradient, between the two updates of a
measurement.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotune.noise.parameters import Metric, ParameterSet, squared_norm, weighted
from autotune.noise.statistics import ChunkSums, GradientRecord


class ConsecutiveMeter:
    """Keeps one update's gradient and compares the next one's with it.

    Args:
        parameters: What is measured.
    """

    def __init__(self, parameters: ParameterSet) -> None:
        self.parameters = parameters
        self._before: list[Tensor | None] | None = None
        self._size = 0
        self._metric: Metric | None = None

    @property
    def armed(self) -> bool:
        """Whether a first gradient is kept."""
        return self._before is not None

    def keep(self, size: int, metric: Metric | None = None, scale: float | Tensor = 1.0) -> None:
        """Copies ``.grad`` (``g = scale * .grad``) of an update of ``size`` examples."""
        self._metric = metric
        self._size = size
        self._before = [
            None if parameter.grad is None else weighted(parameter.grad, parameter, metric).detach() * scale
            for parameter in self.parameters.parameters
        ]

    def drop(self) -> None:
        """Forgets the copy."""
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """The kept gradient, on the CPU; call only while :attr:`armed`, and without a metric."""
        assert self._before is not None
        return {"size": self._size, "before": [None if one is None else one.cpu() for one in self._before]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        pairs = zip(saved["before"], self.parameters.parameters, strict=True)
        self._size = saved["size"]
        self._before = [None if one is None else one.to(parameter.device) for one, parameter in pairs]

    def close(self, size: int, scale: float | Tensor = 1.0) -> GradientRecord:
        """The record of the two updates, as two chunks whose joined gradient is their weighted mean."""
        if self._before is None:
            raise RuntimeError("ConsecutiveMeter.close() comes after keep()")
        total = self._size + size
        first: list[Tensor | None] = []
        second: list[Tensor | None] = []
        joined: list[Tensor | None] = []
        for parameter, before in zip(self.parameters.parameters, self._before, strict=True):
            if parameter.grad is None or before is None:
                for norms in (first, second, joined):
                    norms.append(None)
                continue
            now = weighted(parameter.grad, parameter, self._metric).detach() * scale
            first.append(squared_norm(before))
            second.append(squared_norm(now))
            joined.append(squared_norm(torch.lerp(before, now, size / total)))
        squares = torch.stack([self.parameters.gather(first), self.parameters.gather(second)])
        record = ChunkSums.of([self._size, size], squares).close(self.parameters.gather(joined))
        self.drop()
        return record

"""Noise from the chunks an update is made of anyway: micro-batches of a window, on every rank.

======  ======================================================  =====  =================================
symbol  meaning                                                 shape  unit
======  ======================================================  =====  =================================
``h``   what reaches a parameter in one backward pass           P      gradient of the loss as scaled
``c``   ``scale``: ``g_m = c h``                                --     1
======  ======================================================  =====  =================================

A hook on a leaf tensor sees one backward pass's gradient, every use of the parameter added up, before it is
added to ``.grad`` and before a distributed wrapper averages it. So one pass over the gradient while it is
warm in cache is the whole cost: no copy, no second backward pass, no sync with the host. The hooks exist on
measured windows only and return nothing, so that training is bit for bit what it was.

``c`` undoes what the loop did to the loss: the factor 1/k of an accumulation window, mixed precision's loss
scale, and, for a loss that *sums* over its examples, the number of examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotune.noise.parameters import Metric, ParameterSet, squared_norm, weighted
from autotune.noise.ranks import Ranks
from autotune.noise.statistics import ChunkSums, GradientRecord, kish_effective


@dataclass(frozen=True)
class Extras:
    """What costs memory and is computed only for the rules that ask.

    Attributes:
        inner: Keep every chunk's gradient until the update's is known, for ``g_m . g`` (M x P floats).
        coordinate: Keep ``sum_m b_m g_m^2`` by coordinate (P floats).
        quantile: Which quantile over coordinates of ``V_j / g_j^2`` is reported; 1 is the maximum, as
            published.
    """

    inner: bool = False
    coordinate: bool = False
    quantile: float = 1.0


class ChunkMeter:
    """Collects one update's chunks: ``begin``, for each chunk ``listen`` … ``end_chunk``, then ``close``.

    Args:
        parameters: What is measured.
        extras: Further statistics that were asked for.
    """

    def __init__(self, parameters: ParameterSet, extras: Extras | None = None) -> None:
        self.parameters = parameters
        self.extras = extras or Extras()
        self.metric: Metric | None = None
        self._handles: list[Any] = []
        self._norms: list[Tensor | None] = []
        self._chunk: list[Tensor | None] = []
        self._sizes: list[int] = []
        self._squares: list[Tensor] = []
        self._kept: list[list[Tensor | None]] = []
        self._coordinate: list[Tensor | None] = []

    def begin(self, metric: Metric | None = None) -> None:
        """Forgets what was collected; a new update's chunks follow."""
        self.stop()
        self.metric = metric
        self._sizes, self._squares, self._kept = [], [], []
        self._coordinate = [None] * len(self.parameters.parameters)

    def listen(self) -> None:
        """Hooks the parameters for the backward pass that comes."""
        self.stop()
        self._norms = [None] * len(self.parameters.parameters)
        self._chunk = [None] * len(self.parameters.parameters)
        for index, parameter in enumerate(self.parameters.parameters):
            if parameter.requires_grad:  # it may have been frozen since
                self._handles.append(parameter.register_hook(self._hook(index)))  # type: ignore[no-untyped-call]

    def _hook(self, index: int) -> Any:
        parameter = self.parameters.parameters[index]
        keep = self.extras.inner or self.extras.coordinate

        def hook(gradient: Tensor) -> None:
            value = weighted(gradient.detach(), parameter, self.metric)
            norm = squared_norm(value)
            before = self._norms[index]
            # A second pass within one chunk (a loss with two backward calls) cannot be told apart: spoil it.
            self._norms[index] = norm if before is None else torch.full_like(norm, torch.nan)
            if keep:
                self._chunk[index] = value.clone()

        return hook

    def stop(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def end_chunk(self, size: int, scale: float | Tensor = 1.0) -> None:
        """The backward pass is over.

        Args:
            size: ``b_m``, in examples.
            scale: ``c``.
        """
        self.stop()
        self._sizes.append(size)
        self._squares.append(self.parameters.gather(self._norms) * scale**2)
        if self.extras.coordinate:
            self._add_coordinates(size, scale)
        if self.extras.inner:
            self._kept.append([None if value is None else value.mul_(scale) for value in self._chunk])
        self._chunk = []

    def _add_coordinates(self, size: int, scale: float | Tensor) -> None:
        for index, value in enumerate(self._chunk):
            if value is not None:
                square = (value * scale).square_().mul_(size)
                before = self._coordinate[index]
                self._coordinate[index] = square if before is None else before.add_(square)

    @property
    def sizes(self) -> Sequence[int]:
        """``b_m`` of the chunks so far."""
        return tuple(self._sizes)

    def sums(self) -> ChunkSums:
        """This process's part so far; :meth:`close` adds what needs the final gradient."""
        return ChunkSums.of(self._sizes, torch.stack(self._squares))

    def close(
        self, ranks: Ranks | None = None, weights: Sequence[float] | None = None, scale: float | Tensor = 1.0
    ) -> GradientRecord:
        """Reads the update's gradient from ``.grad``: accumulated, averaged, unscaled, not yet clipped.

        Args:
            ranks: How to join with the other processes; None when there is one.
            weights: ``w_m`` of this process's chunks as the loop weighted them; None for ``b_m / B``.
            scale: ``g = scale * .grad``.
        """
        inner = self._inner(scale) if self.extras.inner else None
        sums = ChunkSums.of(self._sizes, torch.stack(self._squares), inner)
        world = 1
        if ranks is not None:
            sums, world = ranks.join(sums), ranks.size
        mean_sq = self.parameters.gradient_squares(self.metric) * scale**2
        effective = None if weights is None else kish_effective(weights, self._sizes) * world
        coordinate = self._coordinate_ratio(sums, ranks, scale) if self.extras.coordinate else None
        self._kept, self._coordinate = [], []
        return sums.close(mean_sq, effective, coordinate)

    def _inner(self, scale: float | Tensor) -> Tensor:
        finals = [
            None if parameter.grad is None else weighted(parameter.grad, parameter, self.metric).reshape(-1)
            for parameter in self.parameters.parameters
        ]
        rows = []
        for chunk in self._kept:
            pairs = [(a, b) for a, b in zip(chunk, finals, strict=True) if a is not None and b is not None]
            rows.append(torch.stack([torch.dot(a.reshape(-1), b) for a, b in pairs]).sum())
        return torch.stack(rows) * scale

    def _coordinate_ratio(self, sums: ChunkSums, ranks: Ranks | None, scale: float | Tensor) -> Tensor:
        ratios = []
        for parameter, squares in zip(self.parameters.parameters, self._coordinate, strict=True):
            if parameter.grad is None or squares is None:
                continue
            total = squares if ranks is None else ranks.add(squares)
            mean_sq = (weighted(parameter.grad, parameter, self.metric) * scale).square()
            ratios.append(coordinate_ratio(total, mean_sq, sums.examples, sums.chunks))
        return upper_quantile(torch.cat(ratios), self.extras.quantile)


def coordinate_ratio(squares: Tensor, mean_sq: Tensor, examples: Tensor, chunks: Tensor) -> Tensor:
    """``V_j / g_j^2`` flattened, in examples; infinite where ``g_j = 0 < V_j``, 0 where both vanish."""
    variance = ((squares - examples * mean_sq) / (chunks - 1)).clamp_min_(0).reshape(-1)
    return torch.where(variance > 0, variance / mean_sq.reshape(-1), torch.zeros_like(variance))


def upper_quantile(values: Tensor, quantile: float) -> Tensor:
    """The smallest value that ``quantile`` of all do not exceed; ``torch.quantile`` stops at 16M values."""
    rank = max(1, min(len(values), int(-(-quantile * len(values) // 1))))
    return values.max() if rank == len(values) else values.kthvalue(rank).values

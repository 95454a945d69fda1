"""Copies of tensors in buffers that are kept: what a snapshot's rollback costs is a memory copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from autotune.pystate import written_once
from autotune.sharding import laid_out, local, whole


class TensorCopies:
    """Copies of a list of tensors in buffers that are allocated once and used again."""

    def __init__(self) -> None:
        self._originals: list[Tensor] = []
        self._tensors: list[Tensor] = []
        self._buffers: list[Tensor] = []

    def save(self, tensors: Iterable[Tensor]) -> None:
        """Copies ``tensors``; buffers of earlier calls serve again where the layout is the same."""
        self._originals = list(tensors)
        self._tensors = [written_once(local(tensor)) for tensor in self._originals]
        spare = self._buffers
        self._buffers = [
            spare[index] if index < len(spare) and _same_layout(spare[index], tensor) else _buffer_for(tensor)
            for index, tensor in enumerate(self._tensors)
        ]
        _copy(self._buffers, self._tensors)

    def load(self) -> None:
        """Writes the copies back into the tensors they were taken from."""
        _copy(self._tensors, self._buffers)

    @property
    def buffers(self) -> list[Tensor]:
        """The copies, in the order of the tensors."""
        return self._buffers

    def wholes(self) -> list[Tensor]:
        """The copies on the CPU, in the order of the tensors; collective where those are sharded."""
        pairs = zip(self._buffers, self._originals, strict=True)
        return [whole(buffer, like).detach().cpu().clone() for buffer, like in pairs]

    def take(self, wholes: Sequence[Tensor]) -> None:
        """The inverse of :meth:`wholes`: from now on these are what is remembered."""
        pairs = zip(wholes, self._originals, strict=True)
        _copy(self._buffers, [local(laid_out(full, like)) for full, like in pairs])


def _same_layout(buffer: Tensor, tensor: Tensor) -> bool:
    return buffer.shape == tensor.shape and buffer.dtype == tensor.dtype


def _buffer_for(tensor: Tensor) -> Tensor:
    try:
        return torch.empty_like(tensor, requires_grad=False)
    except torch.OutOfMemoryError:
        # Device memory is short: pinned host memory keeps the copy asynchronous and the run alive.
        return torch.empty_like(tensor, device="cpu", pin_memory=True, requires_grad=False)


@torch.no_grad()
def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)

"""Sharded tensors (FSDP2, tensor parallelism): what of one lies on this rank, and the whole of it.

Copies that stay in memory are of local tensors, which costs no communication; a checkpoint holds whole ones, because
it may be written by one rank and read by all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What lies on this rank; all of a tensor that is not sharded.

    >>> local(torch.ones(2, requires_grad=True))
    tensor([1., 1.])
    """
    sharded: Any = tensor
    # .data, not detach(): a checkpoint saved in the middle of a backward pass puts the training state back for a
    # moment, and autograd, which counts writes, would refuse to go on though every value is the same again.
    return sharded.to_local().data if is_sharded(tensor) else tensor.data


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    return hasattr(tensor, "to_local")


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every rank hands over a ``part``, laid out as ``like``; collective where that is sharded."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    laid: Any = like
    shape, stride = laid.shape, laid.stride()
    sharded = DTensor.from_local(part, laid.device_mesh, laid.placements, run_check=False, shape=shape, stride=stride)
    return sharded.full_tensor()


def laid_out(full: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`whole`: ``full`` as ``like`` is laid out. Collective where that is sharded."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    laid: Any = like
    return distribute_tensor(full.to(laid.device), laid.device_mesh, laid.placements)


def reshard(module: nn.Module) -> None:
    """Binds the shards to their names again.

    FSDP2 leaves the outermost modules whole after a forward pass without a backward pass (an evaluation): what their
    names are bound to then is a copy, which a rollback of the shards would leave as it is, and the next pass would use.
    """
    parts: list[Any] = [part for part in module.modules() if _is_fsdp(part)]
    for part in parts:
        part.reshard()


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)

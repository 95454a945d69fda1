"""Per-example gradients of single layers, from a layer's input and the gradient of its output.

======  ==================================================================  =====================
symbol  meaning                                                             shape
======  ==================================================================  =====================
``N``   examples in the batch                                               --
``T``   positions of one example (sequence, pixels); 1 without any          --
``a``   input, one row a position (unfolded for convolutions)               N, groups, T, d
``e``   gradient of the loss in the output                                  N, groups, T, p
======  ==================================================================  =====================

The gradient of example i in a weight is ``sum_t e_it a_it^T``. Its squared norm is either read off the
*ghost* ``sum_ts (a_t . a_s)(e_t . e_s)``, which never forms the gradient (Goodfellow 2015; Li et al. 2021,
arXiv 2110.05679), or taken of the gradient, *instantiated*: the ghost holds 2 T^2 numbers an example, the
gradient d p, and the smaller is taken. Nothing is scaled here: ``e`` is of the loss as it was
back-propagated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotune.noise import attention

#: Instantiated gradients: parameter name within the layer -> (N, *parameter shape).
Instances: TypeAlias = "dict[str, Tensor]"
Rows: TypeAlias = "tuple[Tensor, Tensor]"

_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_coupled(layer: nn.Module) -> bool:
    """Whether its output for one example depends on the others, in the mode in which it is."""
    # Without running statistics those of the batch are used in evaluation mode as well.
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None)


def is_supported(layer: nn.Module) -> bool:
    """Whether the layer's own parameters can be told apart by example."""
    if "forward" in vars(layer):  # replaced on this one
        return False
    if type(layer) is nn.Embedding:
        return not (layer.sparse or layer.scale_grad_by_freq or layer.max_norm is not None)
    if isinstance(layer, _CONVOLUTIONS):
        return layer.padding_mode == "zeros" and type(layer) in _CONVOLUTIONS
    # A subclass may compute something else in forward: exact types only.
    return type(layer) in (nn.Linear, *_NORMS) or attention.is_supported(layer)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's parameters by name; an attention layer runs its output matrix itself."""
    return dict(layer.named_parameters(recurse=isinstance(layer, nn.MultiheadAttention)))


def has_examples(layer: nn.Module, e: Tensor) -> bool:
    """Whether the output, whose gradient is ``e``, has an axis before those that the layer needs."""
    if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        return e.ndim > len(layer.normalized_shape)
    if isinstance(layer, _CONVOLUTIONS):
        return e.ndim == len(layer.kernel_size) + 2
    return e.ndim >= (3 if isinstance(layer, nn.MultiheadAttention) else 2)


def first_axis_examples(layer: nn.Module, e: Tensor) -> Tensor:
    """The output's gradient with the examples first."""
    turned = isinstance(layer, nn.MultiheadAttention) and not layer.batch_first and e.ndim == 3
    return e.transpose(0, 1) if turned else e


def rows(layer: nn.Module, a: Tensor, e: Tensor) -> Rows:
    """Input and output gradient of a matrix layer, (N, groups, T, d) and (N, groups, T, p), at least float32."""
    a, e = widen(a), widen(e)
    if isinstance(layer, nn.Linear):
        return (
            a.reshape(a.shape[0], 1, -1, a.shape[-1]),
            e.reshape(e.shape[0], 1, -1, e.shape[-1]),
        )
    assert isinstance(layer, _CONVOLUTIONS)
    patches = _unfold(layer, a)
    count, groups = a.shape[0], layer.groups
    columns = patches.reshape(count, groups, patches.shape[1] // groups, -1).transpose(2, 3)
    return columns, e.reshape(count, groups, layer.out_channels // groups, -1).transpose(2, 3)


def _unfold(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, a: Tensor) -> Tensor:
    """Patches, shape (N, C_in k.., T); built dimension by dimension, so that it serves 1, 2 and 3 of them."""
    dims = a.ndim - 2
    padding = layer.padding
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        pads = [(span // 2, span - span // 2) for span in spans]
    elif padding == "valid":
        pads = [(0, 0)] * dims
    else:
        pads = [(int(p), int(p)) for p in padding]
    a = F.pad(a, [side for pair in reversed(pads) for side in pair])
    for axis in range(dims):
        kernel, stride, dilation = layer.kernel_size[axis], layer.stride[axis], layer.dilation[axis]
        # (..., positions, window): after the loop all windows stand behind all positions.
        a = a.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    count, channels = a.shape[:2]
    positions, windows = a.shape[2 : 2 + dims], a.shape[2 + dims :]
    order = [0, 1, *range(2 + dims, 2 + 2 * dims), *range(2, 2 + dims)]
    return a.permute(order).reshape(count, channels * windows.numel(), positions.numel())


def widen(tensor: Tensor) -> Tensor:
    """Half-precision tensors in float32; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def weight_squares(a: Tensor, e: Tensor) -> Tensor:
    """Squared norms of the per-example weight gradients, shape (N,), by the cheaper way."""
    positions, d, p = a.shape[2], a.shape[3], e.shape[3]
    if positions == 1:
        return (a.square().sum(3) * e.square().sum(3)).sum((1, 2))
    if 2 * positions * positions <= d * p:
        return ((a @ a.transpose(2, 3)) * (e @ e.transpose(2, 3))).sum((1, 2, 3))
    return (e.transpose(2, 3) @ a).square().sum((1, 2, 3))


def embedding_squares(layer: nn.Embedding, ids: Tensor, e: Tensor) -> Tensor:
    """Squared norms for a look-up table, shape (N,): rows of equal token add up before they are squared."""
    count = ids.shape[0]
    flat, e = ids.reshape(count, -1), widen(e).reshape(count, -1, layer.embedding_dim)
    if layer.padding_idx is not None:
        e = e * (flat != layer.padding_idx).unsqueeze(2)
    example = torch.arange(count, device=ids.device).unsqueeze(1).expand_as(flat)
    keys, inverse = torch.unique((example * layer.num_embeddings + flat).reshape(-1), return_inverse=True)
    table = torch.zeros(len(keys), e.shape[2], dtype=e.dtype, device=e.device)
    table.index_add_(0, inverse, e.reshape(-1, e.shape[2]))
    owner = torch.div(keys, layer.num_embeddings, rounding_mode="floor")
    return torch.zeros(count, dtype=e.dtype, device=e.device).index_add_(0, owner, table.square().sum(1))


def squares(layer: nn.Module, a: Any, e: Tensor) -> dict[str, Tensor]:
    """Squared norms of the per-example gradients of each of the layer's parameters, shape (N,) each."""
    if isinstance(layer, nn.Embedding):
        return {"weight": embedding_squares(layer, a, e)}
    if isinstance(layer, (*_NORMS, nn.MultiheadAttention)):
        return {name: grad.flatten(1).square().sum(1) for name, grad in instances(layer, a, e).items()}
    inputs, outputs = rows(layer, a, e)
    found = {"weight": weight_squares(inputs, outputs)}
    if layer.bias is not None:
        found["bias"] = outputs.sum(2).flatten(1).square().sum(1)
    return found


def instances(layer: nn.Module, a: Any, e: Tensor) -> Instances:
    """The per-example gradients themselves, (N, *shape) for each of the layer's parameters."""
    if isinstance(layer, nn.MultiheadAttention):
        return attention.instances(layer, a, e)
    if isinstance(layer, nn.Embedding):
        count = a.shape[0]
        flat, e = a.reshape(count, -1), widen(e).reshape(count, -1, layer.embedding_dim)
        if layer.padding_idx is not None:
            e = e * (flat != layer.padding_idx).unsqueeze(2)
        table = torch.zeros(count, *layer.weight.shape, dtype=e.dtype, device=e.device)
        return {"weight": table.scatter_add_(1, flat.unsqueeze(2).expand_as(e), e)}
    if isinstance(layer, _NORMS):
        return _normalisation(layer, widen(a), widen(e))
    inputs, outputs = rows(layer, a, e)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    found = {"weight": (outputs.transpose(2, 3) @ inputs).reshape(-1, *weight.shape)}
    if layer.bias is not None:
        found["bias"] = outputs.sum(2).flatten(1)
    return found


def _normalisation(layer: nn.Module, a: Tensor, e: Tensor) -> Instances:
    count = a.shape[0]
    if isinstance(layer, nn.GroupNorm):
        hat = F.group_norm(a, layer.num_groups, eps=layer.eps)
        grads = {"weight": (hat * e).reshape(*e.shape[:2], -1).sum(2), "bias": e.reshape(*e.shape[:2], -1).sum(2)}
        return {name: grad for name, grad in grads.items() if getattr(layer, name) is not None}
    assert isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    shape = tuple(layer.normalized_shape)
    if isinstance(layer, nn.LayerNorm):
        hat = F.layer_norm(a, shape, eps=layer.eps)
        bias = layer.bias is not None
    else:
        hat, bias = F.rms_norm(a, shape, eps=layer.eps), False
    grads = {"weight": (hat * e).reshape(count, -1, *shape).sum(1)}
    if bias:
        grads["bias"] = e.reshape(count, -1, *shape).sum(1)
    return grads


#: What turns a layer's (input, output gradient) into named per-example tensors.
Reader: TypeAlias = Callable[[nn.Module, Any, Tensor], "dict[str, Tensor]"]

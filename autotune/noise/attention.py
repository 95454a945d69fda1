"""Per-example gradients of ``nn.MultiheadAttention``, which runs its matrices without their layers' hooks.

======  ================================================================  =====================
symbol  meaning                                                           shape
======  ================================================================  =====================
``N``   examples in the batch                                             --
``e``   gradient of the loss in the layer's output                        N, T, d (batch first)
======  ================================================================  =====================

The layer is run once more, one example at a time (``vmap``), and its output's gradient is pulled back to its
parameters: one forward and backward pass of the layer more, and N gradients of it at once. Dropout inside the layer
would draw other masks, so a layer that drops out is left out by name; so is one whose attention weights the loss uses.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


@dataclass(frozen=True)
class Inputs:
    """What the layer was given; ``shape`` is that of the query with the examples first."""

    query: Tensor
    key: Tensor
    value: Tensor
    padding: Tensor | None
    mask: Tensor | None
    causal: bool

    @property
    def shape(self) -> torch.Size:
        """(N, T, d)."""
        return self.query.shape

    @property
    def ndim(self) -> int:
        """3, or 2 where no axis holds examples."""
        return self.query.ndim


def is_supported(layer: nn.Module) -> bool:
    """Whether it is that layer, and repeating it gives the same."""
    if type(layer) is not nn.MultiheadAttention or (layer.dropout > 0.0 and layer.training):
        return False
    # It reads the output matrix's weights itself: a wrapped or parametrized one is another function.
    return type(layer.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """The call's arguments, examples first."""
    assert isinstance(layer, nn.MultiheadAttention)
    bound = _SIGNATURE.bind(layer, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments

    def first(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor if layer.batch_first or tensor.ndim != 3 else tensor.transpose(0, 1)

    mask = given["attn_mask"]
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, layer.num_heads))
    q, k, v = (first(given[name]) for name in ("query", "key", "value"))
    return Inputs(q, k, v, given["key_padding_mask"], mask, bool(given["is_causal"]))


def instances(layer: nn.MultiheadAttention, inputs: Inputs, e: Tensor) -> dict[str, Tensor]:
    """The gradients of every example, (N, *shape) for each of the layer's parameters; ``e`` has the examples first."""
    bare = _bare(layer)
    parameters = {name: parameter.detach().float() for name, parameter in layer.named_parameters()}
    separate = inputs.mask is not None and inputs.mask.ndim == 4
    axes = (0, 0, 0, None if inputs.padding is None else 0, 0 if separate else None, 0)

    def of_one(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, e_: Tensor) -> Any:
        def along(parameters_: dict[str, Tensor]) -> Tensor:
            padding_ = None if padding is None else padding.unsqueeze(0)
            # With weights: without them it takes the fused kernel, which cannot be batched.
            options = {"key_padding_mask": padding_, "attn_mask": mask, "need_weights": True}
            rows = (q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))
            out: Tensor = functional_call(bare, parameters_, rows, {**options, "is_causal": inputs.causal})[0]
            return (out * e_.unsqueeze(0)).sum()

        return grad(along)(parameters)

    given = (inputs.query.float(), inputs.key.float(), inputs.value.float(), inputs.padding, inputs.mask, e.float())
    with torch.enable_grad(), torch.autocast(e.device.type, enabled=False):
        found: dict[str, Tensor] = vmap(of_one, in_dims=axes)(*given)
    return {name: gradient.detach() for name, gradient in found.items()}


def _bare(layer: nn.MultiheadAttention) -> nn.Module:
    """The layer without anybody's hooks, examples first, in the mode that never takes the fused inference path."""
    bare: nn.Module = _without_hooks(layer)
    bare._modules = {name: child and _without_hooks(child) for name, child in layer._modules.items()}
    vars(bare).update(batch_first=True, dropout=0.0, training=True)
    return bare


def _without_hooks(module: nn.Module) -> Any:
    clone: Any = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") and isinstance(value, OrderedDict):
            vars(clone)[name] = OrderedDict()
    clone._parameters = dict(module._parameters)
    return clone

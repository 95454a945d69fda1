"""Which parameters are measured, in which groups, in which metric.

======  ==================================================  =====  ==========================
symbol  meaning                                             shape  unit
======  ==================================================  =====  ==========================
``p``   ``metric``: what a gradient is multiplied by        P      1 / gradient for Adam
``G``   number of groups                                    --     count
======  ==================================================  =====  ==========================
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autotune.errors import ConfigurationError

#: A preconditioner: one tensor in the parameter's own shape. Parameters without an entry keep the raw metric.
Metric = Mapping[nn.Parameter, Tensor]


@dataclass(frozen=True)
class ParameterSet:
    """The trainable parameters of a module, each once, with the group it belongs to.

    Attributes:
        names: Qualified names.
        parameters: The parameters, in the order of ``names``.
        groups: Group index of each.
        group_names: ``("all",)``, or the owning modules' names.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    groups: tuple[int, ...]
    group_names: tuple[str, ...] = field(default=("all",))

    @classmethod
    def of(
        cls, module: nn.Module, by_module: bool = False, only: Collection[nn.Parameter] | None = None
    ) -> ParameterSet:
        """Trainable parameters of ``module``, a shared one under its first name.

        Args:
            module: The model.
            by_module: One group for each module that owns parameters, instead of one in all.
            only: Keep these alone.

        Raises:
            ConfigurationError: None is left.
        """
        wanted = None if only is None else {id(parameter) for parameter in only}
        kept = [
            (name, parameter)
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and (wanted is None or id(parameter) in wanted)
        ]
        if not kept:
            raise ConfigurationError(
                f"{type(module).__name__} has no trainable parameter to measure: was everything frozen?"
            )
        names, parameters = zip(*kept, strict=True)
        if not by_module:
            return cls(names, parameters, (0,) * len(names))
        owners = [name.rpartition(".")[0] or "(root)" for name in names]
        unique = tuple(dict.fromkeys(owners))
        return cls(names, parameters, tuple(unique.index(owner) for owner in owners), unique)

    def gather(self, norms: Sequence[Tensor | None]) -> Tensor:
        """Adds squared norms up by group.

        Args:
            norms: ``|.|^2`` of each parameter's gradient, shape (); None where there was no gradient.

        Returns:
            Shape (G,), float32 or wider, on the norms' device.
        """
        present = [(norm, group) for norm, group in zip(norms, self.groups, strict=True) if norm is not None]
        if not present:
            return torch.zeros(len(self.group_names), device=self.parameters[0].device)
        values = torch.stack([norm.to(present[0][0].device) for norm, _ in present])
        if len(self.group_names) == 1:
            return values.sum(0, keepdim=True)
        index = torch.tensor([group for _, group in present], device=values.device)
        return torch.zeros(len(self.group_names), dtype=values.dtype, device=values.device).index_add(0, index, values)

    def gradient_squares(self, metric: Metric | None = None) -> Tensor:
        """``|g|^2`` by group, shape (G,), read from the parameters' ``.grad``."""
        return self.gather(
            [
                None if parameter.grad is None else squared_norm(weighted(parameter.grad, parameter, metric))
                for parameter in self.parameters
            ]
        )


def squared_norm(tensor: Tensor) -> Tensor:
    """Sum of squares, shape (), accumulated in float32 at least; reads the tensor once."""
    flat = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()).reshape(-1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        norm: Tensor = torch.linalg.vector_norm(flat, dtype=torch.float32)
        return norm.square()
    return torch.dot(flat, flat)


def weighted(gradient: Tensor, parameter: nn.Parameter, metric: Metric | None) -> Tensor:
    """The gradient in the metric: ``p * gradient``, or itself. Sparse gradients come back dense."""
    dense = gradient.to_dense() if gradient.is_sparse else gradient
    scale = None if metric is None else metric.get(parameter)
    return dense if scale is None else dense * scale


def adam_metric(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, Tensor]:
    """``1 / (sqrt(v_hat) + eps)`` from an Adam-like optimizer's second moment.

    The raw noise scale asks how large a batch plain gradient descent can use. An optimizer that divides by
    ``sqrt(v_hat) + eps`` descends in another metric, and its noise scale is that of the divided gradient.
    Reads ``exp_avg_sq`` (``max_exp_avg_sq`` under AMSGrad) and ``step``, or RMSprop's ``square_avg``;
    parameters without them (before the first update, or under another optimizer) keep the raw metric.
    """
    metric: dict[nn.Parameter, Tensor] = {}
    for group in optimizer.param_groups:
        beta2 = group["betas"][1] if "betas" in group else None
        for parameter in group["params"]:
            scale = _inverse_root(optimizer.state.get(parameter, {}), beta2, group.get("eps", 1e-8))
            if scale is not None:
                metric[parameter] = scale
    return metric


def _inverse_root(state: Mapping[str, Any], beta2: float | None, eps: float) -> Tensor | None:
    second: Tensor | None = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if second is not None and beta2 is not None and "step" in state:
        step = torch.as_tensor(state["step"], dtype=torch.float32, device=second.device)
        return (second / (1 - torch.pow(torch.tensor(beta2, device=second.device), step))).sqrt().add(eps).reciprocal()
    average: Tensor | None = state.get("square_avg")
    return None if average is None else average.sqrt().add(eps).reciprocal()

"""AdaGrad-Norm: one accumulator for the whole network.

=======  ==============================================  ==============
symbol   meaning                                         unit
=======  ==============================================  ==============
``g_t``  gradient of all parameters, all groups          gradient
``b_t``  root of the accumulator                         gradient
``eta``  ``lr``                                          parameter
=======  ==============================================  ==============

    b_t^2 = b_{t-1}^2 + |g_t|^2,      x_{t+1} = x_t - eta / b_t g_t

Ward, Wu and Bottou 2019 (arXiv 1806.01811), algorithm 1, and the optimizer of AdAdaGrad-Norm (arXiv 2402.11215).
Differs from both by ``eps`` in the denominator, which only matters where every gradient so far was zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autotune.errors import ConfigurationError


class AdaGradNorm(Optimizer):
    """The scalar AdaGrad.

    The accumulator is one number for all groups; a group has its own ``lr`` and ``weight_decay``
    (decoupled, so that it is no part of the gradient that is accumulated). It lies in the state of the
    first parameter, where checkpoints and ``add_param_group`` keep it.

    Args:
        params: Parameters or groups.
        lr: ``eta``, 0 or more.
        initial_accumulator: ``b_0``, in units of the gradient, 0 or more.
        eps: Added to ``b_t``.
        weight_decay: Decoupled: multiplies parameters by ``1 - lr * weight_decay``.

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-1,
        initial_accumulator: float = 0.0,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("initial_accumulator", initial_accumulator), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ConfigurationError(f"AdaGradNorm: {name} must be 0 or more; got {value!r}")
        if not eps > 0:
            raise ConfigurationError(f"AdaGradNorm: eps must be positive; got {eps!r}")
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        first = self.param_groups[0]["params"][0]
        accumulator = torch.full((), initial_accumulator**2, dtype=torch.float64 if first.is_cpu else torch.float32)
        self.state[first]["square"] = accumulator.to(first.device)

    @property
    def accumulator(self) -> Tensor:
        """``b_t^2``, shape ()."""
        square: Tensor = self.state[self.param_groups[0]["params"][0]]["square"]
        return square

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; the accumulator keeps its own precision, which torch would cut to the parameter's."""
        super().load_state_dict(state_dict)
        first = self.param_groups[0]["params"][0]
        self.state[first]["square"] = state_dict["state"][0]["square"].detach().clone().to(first.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; ``closure`` is evaluated with gradients, as in every torch optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        square = self.accumulator
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return loss
        norms = torch._foreach_norm([grad.to_dense() if grad.is_sparse else grad for grad in gradients])
        square += torch.stack([norm.to(square) for norm in norms]).square().sum()
        root = square.sqrt()
        for group in self.param_groups:
            self._apply(group, root)
        return loss

    def _apply(self, group: dict[str, Any], root: Tensor) -> None:
        mine = [p for p in group["params"] if p.grad is not None]
        if not mine:
            return
        if group["weight_decay"] != 0:
            torch._foreach_mul_(mine, 1 - group["lr"] * group["weight_decay"])
        gradients = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in mine]
        step_size = -group["lr"] / (root + group["eps"])
        # Moved by tensor arithmetic alone: reading the accumulator as a number would wait for the device.
        moves = torch._foreach_mul(gradients, step_size.to(gradients[0].dtype))
        torch._foreach_add_(mine, moves)

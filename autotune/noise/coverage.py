"""Which parameters one backward pass tells apart by example, and why the others are left out.

A parameter is covered where every use of it is one by a supported layer whose first axis is the batch, the gradients of
all these uses have come, and nothing else of the loss's graph uses it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autotune.noise import layers
from autotune.noise.attention import Inputs
from autotune.noise.graph import Reached, reached
from autotune.noise.parameters import ParameterSet

#: Instantiated gradients of a shared parameter larger than this (numbers) are left out instead.
INSTANCE_LIMIT = 1 << 26
_NEVER = -(10**6)  # uses of a parameter that is left out in this pass, whatever is counted yet


@dataclass(frozen=True)
class Coverage:
    """What an estimate covers.

    Attributes:
        share: Part of the trainable parameters (by count of numbers) that is covered.
        excluded: Name -> why it is not.
    """

    share: float
    excluded: dict[str, str]


@dataclass
class Call:
    """One use of a layer in the forward pass that has not been back-propagated yet."""

    name: str
    layer: nn.Module
    inputs: Tensor | Inputs
    gradient: Tensor | None = None
    learned: bool = False


class UseCounts:
    """Counts, in each pass, what layers did with the measured parameters and what the loss's graph says they did.

    Args:
        wanted: What is measured.
    """

    def __init__(self, wanted: ParameterSet) -> None:
        self._wanted = wanted
        self._ids = {id(parameter) for parameter in wanted.parameters}
        self._called: Counter[int] = Counter()
        self._fired: Counter[int] = Counter()
        self._reached: Reached | None = None
        self._excluded: dict[str, str] = {}
        self._batch = 0

    def begin_update(self) -> None:
        """Forgets why anything was left out."""
        self._excluded = {}

    def begin_pass(self, calls: Iterable[Call], batch: int, loss: Tensor | None) -> None:
        """A backward pass comes.

        Args:
            calls: Those of the forward pass.
            batch: Examples in it.
            loss: Its graph is searched for uses of parameters that no layer accounts for.
        """
        self._batch, self._called, self._fired = batch, Counter(), Counter()
        for call in calls:
            self._called.update(id(parameter) for parameter in layers.own_parameters(call.layer).values())
        self._reached = None if loss is None else reached(loss)

    def of(self, layer: nn.Module) -> dict[str, nn.Parameter]:
        """The layer's parameters that are measured, by name."""
        return {key: p for key, p in layers.own_parameters(layer).items() if id(p) in self._ids}

    def most_uses(self, layer: nn.Module) -> int:
        """How often the most used of the layer's parameters was used by layers."""
        return max((self._called[id(p)] for p in layers.own_parameters(layer).values()), default=0)

    def fired(self, call: Call) -> None:
        """The gradient of the call's output has come."""
        self._fired.update(id(parameter) for parameter in self.of(call.layer).values())

    def leave_out(self, call: Call, reason: str) -> None:
        """The layer's parameters are not covered in this pass."""
        for key, parameter in self.of(call.layer).items():
            self._excluded[f"{call.name}.{key}"] = reason
            self._called[id(parameter)] = _NEVER

    def why_not(self, call: Call, e: Tensor, *, instantiated: bool) -> str | None:
        """Why a call says nothing of single examples; None where it does.

        Args:
            call: The call.
            e: The gradient of its output, examples first.
            instantiated: Whether the gradients themselves would be formed.
        """
        a: Any = call.inputs
        if call.learned:
            return "its input is a parameter and holds no examples"
        if e.is_complex():
            return "it computes with complex numbers"
        if not layers.has_examples(call.layer, e):
            return "its input has no axis for examples"
        if a.ndim == 0 or a.shape[0] != self._batch or e.shape[0] != self._batch:
            return f"its input's first axis is {a.shape[0] if a.ndim else 0} long, the batch {self._batch}"
        positions = isinstance(call.layer, nn.Embedding) and a.ndim == 1
        if positions and torch.equal(a, torch.arange(len(a), dtype=a.dtype, device=a.device)):
            return "its input counts positions, not examples"
        numbers = self._batch * max((p.numel() for p in self.of(call.layer).values()), default=0)
        if instantiated and numbers > INSTANCE_LIMIT:
            return f"its {self._batch} gradients would need {numbers} numbers at once, above {INSTANCE_LIMIT}"
        return None

    def covered(self, read: Collection[int]) -> set[int]:
        """Of the parameters that were ``read`` by example those that nothing else used; all by id."""
        return {id(parameter) for parameter in self._wanted.parameters if self._is_covered(parameter, read)}

    def coverage(self, covered: Collection[int]) -> Coverage:
        """What this pass covers, after it.

        Args:
            covered: As :meth:`covered` says.
        """
        excluded = dict(self._excluded)
        count = total = 0
        for name, parameter in zip(self._wanted.names, self._wanted.parameters, strict=True):
            is_covered = id(parameter) in covered
            # What the loss does not reach has no gradient, and no noise.
            total += parameter.numel() if is_covered or parameter.grad is not None else 0
            if is_covered:
                count += parameter.numel()
                excluded.pop(name, None)
            elif self._coupled:
                excluded[name] = "batch normalisation makes an example's gradient depend on its neighbours"
            elif self._is_used_by_hand(parameter):
                excluded[name] = "it is also used without its layer"
            elif parameter._backward_hooks:
                excluded[name] = "a hook on it may change its gradient"
            elif name not in excluded and parameter.grad is not None:
                excluded[name] = "no use of it by a supported layer was seen in this pass"
        return Coverage(count / total if total else 0.0, excluded)

    @property
    def _coupled(self) -> bool:
        return self._reached is not None and self._reached.coupled

    def _is_covered(self, parameter: nn.Parameter, read: Collection[int]) -> bool:
        own = self._called[id(parameter)] > 0 and not parameter._backward_hooks
        return id(parameter) in read and own and not self._is_used_by_hand(parameter) and not self._coupled

    def _is_used_by_hand(self, parameter: nn.Parameter) -> bool:
        """Whether the graph uses it more or less often than gradients of its layers' outputs have come."""
        fired = self._fired[id(parameter)]
        # Of a reentrant checkpoint the graph knows nothing.
        uses = 0 if self._reached is None else self._reached.uses[id(parameter)]
        return uses > 0 and 0 < fired != uses

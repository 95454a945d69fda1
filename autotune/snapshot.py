"""Capture and roll back everything a trial touches, in memory.

Tensors go into preallocated buffers by one ``_foreach_copy_`` a group, so that a rollback costs a memory
copy; the tensors themselves are never replaced, which is what keeps compiled modules, optimizers and sharded
parameters whole. The copies are of *local* tensors: no state dict is built and nothing is gathered.

What is kept: parameters and buffers (persistent or not, rebound ones too), ``requires_grad``, gradients, the
optimizer's state and its groups' settings, random generators (torch, CUDA, numpy, random), attributes of
every module (see :mod:`autotune.pystate`; torchmetrics objects keep their state there), and whatever is handed
over as ``extras``. A module that keeps other state (an object of its own class, say) defines two methods:

``on_trial_snapshot(self) -> Any``
    returns a copy of that state;
``on_trial_restore(self, saved) -> None``
    puts such a copy back. It may be called several times with the same ``saved``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autotune.pystate import Attributes, Restore, plain_items, save
from autotune.randomness import RandomState
from autotune.sharding import laid_out, reshard
from autotune.tensor_copies import TensorCopies

#: Attributes every ``nn.Module`` has, apart from its mode: hook tables and the tensor tables kept below.
MODULE_INTERNALS = frozenset(vars(nn.Module())) - {"training"}
_OPTIMIZER_INTERNALS = frozenset({"state", "param_groups", "defaults"})


class Part(Protocol):
    """Something that can be remembered and put back."""

    def capture(self) -> None:
        """Remembers the present."""

    def restore(self) -> None:
        """Puts back what the last :meth:`capture` remembered; may be called again and again."""


class Weights:
    """Parameters, buffers and ``requires_grad`` of a module; :attr:`Weights.copies` are name-ordered."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tables: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._needs_grad: list[tuple[Tensor, bool]] = []
        self.copies = TensorCopies()

    def capture(self) -> None:
        """Remembers the tensors and which object each name is bound to."""
        reshard(self._module)
        tables: list[Any] = [t for module in self._module.modules() for t in (module._parameters, module._buffers)]
        self._tables = [(table, dict(table)) for table in tables]
        distinct = {id(t): t for _, names in self._tables for t in names.values() if t is not None}
        self._needs_grad = [(t, t.requires_grad) for t in distinct.values() if t.is_leaf]
        self.copies.save(distinct.values())

    def restore(self) -> None:
        """Binds every name to its tensor again and writes the tensor's content back."""
        reshard(self._module)
        for table, names in self._tables:
            table.clear()
            table.update(names)
        self.copies.load()
        for tensor, needs_grad in self._needs_grad:
            if tensor.requires_grad != needs_grad:
                tensor.requires_grad_(needs_grad)

    def state_dict(self) -> list[Tensor]:
        """The remembered tensors, on the CPU, in the order of the module's names."""
        return self.copies.wholes()

    def load_state_dict(self, saved: list[Tensor]) -> None:
        """Remembers ``saved`` instead of the present; the module must have the same names."""
        self.capture()
        self.copies.take(saved)


class Gradients:
    """The ``.grad`` of every parameter: present, absent, and its content."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._grads: list[tuple[nn.Parameter, Tensor | None]] = []
        self._copies = TensorCopies()

    def capture(self) -> None:
        """Remembers the gradients."""
        self._grads = [(parameter, parameter.grad) for parameter in self._module.parameters()]
        self._copies.save(grad for _, grad in self._grads if grad is not None)

    def restore(self) -> None:
        """Puts the gradients back."""
        self._copies.load()
        for parameter, grad in self._grads:
            parameter.grad = grad


class OptimizerState:
    """An optimizer's per-parameter state and its groups' settings (a group's parameters are not touched).

    Args:
        optimizer: Whose.
        hooks: Whether its hooks are put back too. What a trial registers has to go; what others have registered in a
            run since then has to stay.
    """

    def __init__(self, optimizer: Optimizer, *, hooks: bool = True) -> None:
        self._optimizer = optimizer
        self._state: list[tuple[Any, dict[str, Any], dict[str, Restore]]] = []
        self._groups: list[dict[str, Restore]] = []
        self._settings: list[dict[str, Any]] = []
        kept = frozenset() if hooks else {name for name in vars(optimizer) if name.endswith("_hooks")}
        # LBFGS has a list of the parameters: what is in them is no setting of the optimizer's.
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = vars(optimizer).items()
        lists = {name for name, value in found if isinstance(value, list) and own & set(map(id, value))}
        self._attributes = Attributes([optimizer], skip=_OPTIMIZER_INTERNALS | kept | lists)
        self.copies = TensorCopies()

    def capture(self) -> None:
        """Remembers state and settings."""
        tensors: list[Tensor] = []
        self._state = []
        for parameter, values in self._optimizer.state.items():
            tensors += [value for value in values.values() if isinstance(value, Tensor)]
            others = {key: save(value) for key, value in values.items() if not isinstance(value, Tensor)}
            self._state.append((parameter, dict(values), others))
        self.copies.save(tensors)
        self._groups = [
            {key: save(value) for key, value in group.items() if key != "params"}
            for group in self._optimizer.param_groups
        ]
        self._settings = [plain_items(group) for group in self._optimizer.param_groups]
        self._attributes.capture()

    def restore(self) -> None:
        """Puts state and settings back; state that did not exist then is forgotten."""
        self.copies.load()
        self._optimizer.state.clear()
        for parameter, values, others in self._state:
            put_back = {key: restore() for key, restore in others.items()}
            self._optimizer.state[parameter] = {**values, **put_back}
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=False):
            for key in [key for key in group if key != "params" and key not in settings]:
                del group[key]
            group.update({key: restore() for key, restore in settings.items()})
        self._attributes.restore()

    def state_dict(self) -> dict[str, Any]:
        """The remembered per-parameter state: the parameter's place in the groups, tensors and primitives."""
        place = {id(p): n for n, p in enumerate(p for group in self._optimizer.param_groups for p in group["params"])}
        wholes = iter(self.copies.wholes())
        entries = []
        for parameter, values, others in self._state:
            tensors = {key: next(wholes) for key in values if key not in others}
            rest = {key: _remembered(values[key], restore) for key, restore in others.items()}
            entries.append([place[id(parameter)], tensors, rest])
        return {"entries": entries, "groups": [dict(settings) for settings in self._settings]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Remembers ``saved`` instead of the present; settings that are no primitives are those of the present."""
        self.capture()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._state = []
        tensors: list[Tensor] = []
        for place, values, others in saved["entries"]:
            parameter = parameters[place]
            others = {key: _beside(parameter, value) for key, value in others.items()}
            device = {key: _state_device(key, value, parameter) for key, value in values.items()}
            own = {key: value.to(device[key], copy=True) for key, value in values.items()}
            # What has the parameter's shape (a moment) lies where the parameter lies.
            shaped = {key: value for key, value in own.items() if value.shape == parameter.shape}
            own.update({key: laid_out(value, parameter) for key, value in shaped.items()})
            tensors += own.values()
            self._state.append((parameter, {**own, **others}, {key: save(value) for key, value in others.items()}))
        self.copies.save(tensors)
        self._settings = saved["groups"]
        for group, settings in zip(self._groups, self._settings, strict=False):
            group.update({key: save(value) for key, value in settings.items()})


def _remembered(value: Any, restore: Restore) -> Any:
    """A copy of what ``restore`` would put back into ``value``, which stays as it is."""
    present = save(value)
    try:
        return copy.deepcopy(restore())
    finally:
        present()


def _beside(parameter: Tensor, value: Any) -> Any:
    """Copies where the parameter lies: what a state holds in lists comes off a checkpoint on the CPU."""
    if isinstance(value, Tensor):
        return value.to(parameter.device, copy=True)
    if type(value) in (list, tuple):
        return type(value)([_beside(parameter, item) for item in value])
    return {key: _beside(parameter, item) for key, item in value.items()} if isinstance(value, dict) else value


def _state_device(key: str, value: Tensor, parameter: Tensor) -> torch.device:
    # As in torch.optim: step counters stay where the optimizer keeps them unless they live with the parameter.
    return torch.device("cpu") if key == "step" and value.ndim == 0 and not parameter.is_cuda else parameter.device


class ModuleHooks:
    """What modules hand over themselves, by ``on_trial_snapshot`` and ``on_trial_restore``."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._saved: list[tuple[Callable[[Any], None], Any]] = []

    def capture(self) -> None:
        """Asks every module that defines the pair of hooks."""
        modules: list[Any] = list(self._module.modules())
        self._saved = [
            (module.on_trial_restore, module.on_trial_snapshot())
            for module in modules
            if hasattr(module, "on_trial_snapshot") and hasattr(module, "on_trial_restore")
        ]

    def restore(self) -> None:
        """Hands every module its own back."""
        for put_back, saved in self._saved:
            put_back(saved)


class Snapshot:
    """An explicit list of parts that are remembered and put back together.

    Args:
        parts: In the order of capture; restored in the same order.

    Example: "snapshot, train, roll back, train" equals "train", bit for bit.

    >>> net = nn.Linear(1, 1)
    >>> snapshot = Snapshot.of_training(net, torch.optim.SGD(net.parameters(), lr=1.0))
    >>> before = net.weight.item()
    >>> with snapshot.rolled_back():
    ...     _ = net.weight.data.add_(1.0)
    >>> net.weight.item() == before
    True
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    @classmethod
    def of_training(cls, module: nn.Module, optimizer: Optimizer, extras: Sequence[Part] = ()) -> Snapshot:
        """Everything an optimizer step of ``module`` may touch; ``extras`` come before the generators."""
        return cls(
            [
                Weights(module),
                Gradients(module),
                OptimizerState(optimizer),
                Attributes(module.modules(), skip=MODULE_INTERNALS),
                ModuleHooks(module),
                *extras,
                RandomState(),
            ]
        )

    def capture(self) -> None:
        """Remembers the present."""
        for part in self._parts:
            part.capture()

    def restore(self) -> None:
        """Goes back to the last :meth:`capture`; may be called again and again."""
        for part in self._parts:
            part.restore()

    @contextmanager
    def rolled_back(self) -> Iterator[Snapshot]:
        """Captures on entry and restores on exit, however the block is left."""
        self.capture()
        try:
            yield self
        finally:
            self.restore()

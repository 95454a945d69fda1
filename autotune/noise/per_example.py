"""Noise from one batch in one chunk: every example's squared gradient norm, by hooks on one backward pass.

======  ================================================================  ==================
symbol  meaning                                                           unit
======  ================================================================  ==================
``h_i`` example i's part of the back-propagated loss's gradient           gradient
``c``   ``scale``: ``g_i = c h_i``; ``N`` times whatever the loop         1
        divided by for a mean-reduced loss, without ``N`` for a sum
``N``   examples in the batch                                             examples
======  ================================================================  ==================

A forward hook keeps a layer's input, a hook on its output takes the gradient when it comes; see
:mod:`autotune.noise.layers` for what is computed of the two. The first axis of every input must be the
examples.

What cannot be told apart by example is left out by name, of ``|g|^2`` too, so that the estimate is a whole
one of fewer parameters: layers of other kinds, parameters used without a layer, attention with dropout (see
:mod:`autotune.noise.attention`), inputs whose first axis is not the batch, a parameter that is used once by a
layer and once by hand (seen in the graph of the loss). Batch normalisation in training mode is refused: with it
an example's gradient depends on its neighbours, and the quantity does not exist.

Not seen, and so wrong: a hook of the user's on a layer's output *tensor* that changes its gradient, a parameter that is
used by hand inside a reentrant checkpoint by a layer that is used outside too, and sequences first where they are as
long as the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from autotune.errors import UnsupportedSetupError
from autotune.noise import attention, layers
from autotune.noise.coverage import Call, Coverage, UseCounts
from autotune.noise.microbatch import Extras, coordinate_ratio, upper_quantile
from autotune.noise.parameters import Metric, ParameterSet, weighted
from autotune.noise.ranks import Ranks
from autotune.noise.statistics import ChunkSums, GradientRecord, kish_effective


class PerExampleMeter:
    """Per-example squared norms of one backward pass.

    Use: ``begin``; for each micro-batch ``attach`` before the forward pass, ``arm`` between it and the backward pass,
    ``end_chunk`` after it; ``close`` once ``.grad`` is final. Forward passes that are not armed leave nothing. The
    extras need the whole window in one micro-batch.

    Args:
        model: The module.
        parameters: What is measured; what is unsupported is left out.
        extras: Further statistics; they instantiate the gradients.

    Raises:
        UnsupportedSetupError: Nothing in the model is supported.
    """

    def __init__(self, model: nn.Module, parameters: ParameterSet, extras: Extras | None = None) -> None:
        self.model = model
        self.wanted = parameters
        self.extras = extras or Extras()
        self.metric: Metric | None = None
        self._handles: list[Any] = []
        self._pending: dict[int, Call] = {}
        self._armed = False
        self._uses = UseCounts(parameters)
        self._batch = 0
        self._scale: float | Tensor = 1.0
        self._covered: set[int] | None = None
        self._sums: ChunkSums | None = None
        self._coverage = Coverage(1.0, {})
        self._norms: dict[int, Tensor] = {}
        self._grads: dict[int, Tensor] = {}
        if not any(layers.is_supported(module) for module in model.modules()):
            raise UnsupportedSetupError(
                f"no layer of {type(model).__name__} gives per-example gradients (supported: Linear, Conv1d-3d, "
                "Embedding, LayerNorm, RMSNorm, GroupNorm): accumulate gradients over two or more micro-batches "
                "and take source='microbatch'"
            )

    def begin(self) -> None:
        """Forgets what was collected; a new update follows."""
        self.detach()
        self._sums, self._covered = None, None
        self._uses.begin_update()

    def refuse_coupled(self) -> None:
        """Says no to batch normalisation in training mode.

        Raises:
            UnsupportedSetupError: With the layer's name and what to do.
        """
        name = self.coupled()
        if name is not None:
            raise UnsupportedSetupError(
                f"per-example gradients do not exist under batch normalisation ({name!r}): it makes "
                "an example's loss depend on its neighbours. Take source='microbatch' with "
                "Trainer(accumulate_grad_batches=2) or more, source='ranks', or GroupNorm"
            )

    def coupled(self) -> str | None:
        """The first layer that makes an example's loss depend on its neighbours; None where there is none."""
        return next((name for name, module in self.model.named_modules() if layers.is_coupled(module)), None)

    def attach(self) -> None:
        """Puts the forward hooks on.

        Raises:
            UnsupportedSetupError: See :meth:`refuse_coupled`.
        """
        self.detach()
        self.refuse_coupled()
        for name, module in self.model.named_modules():
            if layers.is_supported(module) and self._uses.of(module):
                # Before other hooks, which may change the output.
                hook = module.register_forward_hook(self._forward_hook(name), with_kwargs=True, prepend=True)
                self._handles.append(hook)

    def detach(self) -> None:
        """Takes every hook off and forgets what was kept."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._pending.clear()
        self._armed = False

    def _forward_hook(self, name: str) -> Any:
        def forward_hook(layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            attends = isinstance(layer, nn.MultiheadAttention)
            output, weights = output if attends else (output, None)
            # Under functional_call the layer holds other tensors, which are nothing of ours.
            if not output.requires_grad or not self._uses.of(layer):
                return
            given = inputs[0] if inputs else kwargs["query"] if attends else next(iter(kwargs.values()))
            call = Call(name, layer, attention.read(layer, inputs, kwargs) if attends else given.detach())
            call.learned = isinstance(given, nn.Parameter)
            self._pending[id(call)] = call
            output.register_hook(lambda gradient: self._backward(call, gradient))
            if weights is not None and weights.requires_grad:
                used = "the loss uses its attention weights"
                weights.register_hook(lambda gradient: self._uses.leave_out(call, used))

        return forward_hook

    def _backward(self, call: Call, gradient: Tensor) -> None:
        # A pass that nobody armed (a trial, a user's own backward) takes its calls away with it.
        self._pending.pop(id(call), None)
        if not self._armed:
            return
        call.gradient = gradient.detach()
        self._uses.fired(call)
        simple = self.metric is None and not (self.extras.inner or self.extras.coordinate)
        try:
            if simple and self._uses.most_uses(call.layer) == 1:
                self._take(call, layers.squares, self._norms)
            else:
                self._take(call, layers.instances, self._grads)
        except torch.OutOfMemoryError:
            raise  # the loop's business
        except Exception as error:  # a layer's unusual input must not break off the user's backward pass
            self._uses.leave_out(call, f"{type(error).__name__}: {error}")

    def _take(self, call: Call, reader: layers.Reader, store: dict[int, Tensor]) -> None:
        layer, a = call.layer, call.inputs
        assert call.gradient is not None
        e = layers.first_axis_examples(layer, call.gradient)
        own = self._uses.of(layer)
        reason = self._uses.why_not(call, e, instantiated=reader is layers.instances)
        if reason is not None:
            self._uses.leave_out(call, reason)
            return
        for key, value in reader(layer, a, e).items():
            if key in own:
                before = store.get(id(own[key]))
                if before is not None and reader is layers.squares:
                    self._uses.leave_out(call, "a checkpoint used it once more in the backward pass")
                    return
                store[id(own[key])] = value if before is None else before + value

    def arm(self, batch: int, loss: Tensor | None = None, metric: Metric | None = None) -> None:
        """The backward pass that comes is the one to measure.

        Args:
            batch: ``N``.
            loss: Its graph is searched for uses of parameters that no layer accounts for.
            metric: Preconditioner, as in :mod:`autotune.noise.parameters`.
        """
        self._batch, self.metric, self._armed = batch, metric, True
        self._norms, self._grads = {}, {}
        self._uses.begin_pass(self._pending.values(), batch, loss)

    def end_chunk(self, scale: float | Tensor) -> None:
        """The backward pass is over; ``g_i = scale * h_i``."""
        self._scale = scale
        self.detach()
        covered = self._uses.covered(self._norms.keys() ^ self._grads.keys())
        # A parameter must be covered in every micro-batch, or it belongs to none.
        if self._covered is not None and covered != self._covered:
            self._sums = None if self._sums is None else self._sums + self._sums.spoiled()
        self._covered = covered
        device = self.wanted.parameters[0].device
        per_example = torch.zeros(self._batch, len(self.wanted.group_names), device=device)
        for parameter, group in self._kept():
            norms = self._norms.get(id(parameter))
            if norms is None:
                norms = weighted(self._grads[id(parameter)], parameter, self.metric).flatten(1).square().sum(1)
            per_example[:, group] += norms
        sums = ChunkSums.of([1] * self._batch, per_example * scale**2)
        self._sums = sums if self._sums is None else self._sums + sums
        self._coverage = self._uses.coverage(covered)
        if not (self.extras.inner or self.extras.coordinate):
            self._norms, self._grads = {}, {}

    def _kept(self) -> list[tuple[nn.Parameter, int]]:
        pairs = zip(self.wanted.parameters, self.wanted.groups, strict=True)
        return [(parameter, group) for parameter, group in pairs if id(parameter) in (self._covered or ())]

    def coverage(self) -> Coverage:
        """What the last record covers; everything, before there is one."""
        return self._coverage

    def close(
        self,
        ranks: Ranks | None = None,
        scale: float | Tensor = 1.0,
        *,
        weights: Sequence[float] | None = None,
        sizes: Sequence[int] = (),
    ) -> GradientRecord:
        """The record over what is covered, from ``.grad`` with ``g = scale * .grad``.

        Args:
            ranks: How to join with the other processes.
            weights: ``w_m`` of this process's micro-batches as the loop weighted them; None for ``b_m / B``.
            sizes: Their ``b_m``.
            scale: As it says; ``.grad`` is accumulated, averaged over ranks, unscaled, not yet clipped.
        """
        kept = self._kept()
        sums = self._sums
        if sums is None or not kept:
            raise RuntimeError("PerExampleMeter.close() comes after end_chunk(), and something must be covered")
        single = int(self.extras.inner or self.extras.coordinate)
        if single:
            inner, coordinate = self._extras(kept, scale)
            sums = replace(sums, inner_sq=inner.square().sum())
        if ranks is not None:
            sums = ranks.join(sums)
        covered = replace(
            self.wanted,
            names=("",) * len(kept),
            parameters=tuple(parameter for parameter, _ in kept),
            groups=tuple(group for _, group in kept),
        )
        mean_sq = covered.gradient_squares(self.metric) * scale**2
        self._norms, self._grads = {}, {}
        world = 1 if ranks is None else ranks.size
        effective = None if weights is None else kish_effective(weights, sizes) * world
        return sums.close(mean_sq, effective, coordinate if single else None)

    def _extras(self, kept: list[tuple[nn.Parameter, int]], scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """``g_i . g`` of each example, and the quantile of ``V_j / g_j^2``."""
        inner = torch.zeros(self._batch, device=kept[0][0].device)
        count = torch.tensor(float(self._batch), device=inner.device)
        ratios = []
        for parameter, _ in kept:
            if parameter.grad is None:
                continue
            grads = weighted(self._grads[id(parameter)], parameter, self.metric).flatten(1) * self._scale
            final = weighted(parameter.grad, parameter, self.metric).reshape(-1) * scale
            inner += grads @ final
            ratios.append(coordinate_ratio(grads.square().sum(0), final.square(), count, count))
        return inner, upper_quantile(torch.cat(ratios), self.extras.quantile)

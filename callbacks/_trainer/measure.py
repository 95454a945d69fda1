"""Gradient noise of a running ``Trainer``: picks a source, hooks the loop, hands over one record an update.

======  =====================================================================  ========
symbol  meaning                                                                unit
======  =====================================================================  ========
``f``   what the loop multiplies a micro-batch's loss by (1/k, or its weight)  1
``u``   ``f`` for a mean-reduced loss, ``f b_m`` for a summed one              1
``s``   mixed precision's loss scale                                           1
======  =====================================================================  ========

``.grad`` before the update is ``sum_m u_m g_m``, whatever the loop's weights are, and a micro-batch's own
gradient arrives as ``u s g_m``; so the records come out in the units of the plain mean gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

from autotune.callbacks._trainer.accumulation import current_piece
from autotune.callbacks._trainer.batches import examples_in
from autotune.callbacks._trainer.facts import warn, window_end, window_start
from autotune.callbacks._trainer.sources import SOURCES, Source, chosen, refuse_missing, refuse_shards
from autotune.errors import ConfigurationError
from autotune.noise import layers
from autotune.noise.consecutive import ConsecutiveMeter
from autotune.noise.microbatch import ChunkMeter, Extras
from autotune.noise.parameters import Metric, ParameterSet, adam_metric
from autotune.noise.per_example import PerExampleMeter
from autotune.noise.ranks import Ranks
from autotune.noise.statistics import GradientRecord


class LoopMeter:
    """Measures chosen updates; the callback that owns it forwards its hooks.

    Args:
        source: Where chunks come from; ``"auto"`` decides at the start and again when accumulation changes.
        loss_reduction: Whether ``training_step`` returns the mean of its examples' losses or their sum.
        preconditioned: Measure in the optimizer's own (Adam's) metric.
        by_module: Tell modules apart.
        extras: Further statistics.

    Raises:
        ConfigurationError: An argument is unknown.
    """

    def __init__(
        self,
        source: Source = "auto",
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        preconditioned: bool = False,
        by_module: bool = False,
        extras: Extras | None = None,
    ) -> None:
        if source not in SOURCES:
            raise ConfigurationError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
        if loss_reduction not in ("mean", "sum"):
            raise ConfigurationError(f"loss_reduction must be 'mean' or 'sum'; got {loss_reduction!r}")
        self.source = source
        self.extras = extras or Extras()
        self.loss_reduction = loss_reduction
        self._summed = loss_reduction == "sum"
        self.preconditioned = preconditioned
        self._by_module = by_module
        self._chunks: ChunkMeter | None = None
        self._examples: PerExampleMeter | None = None
        self._pairs: ConsecutiveMeter | None = None
        self._kept_at = 0
        self._told: set[str] = set()
        self._left: list[tuple[int, int]] = []
        self._open: str | None = None
        self._weights: list[float] = []
        self._sizes: list[int] = []
        self.parameters: ParameterSet | None = None

    def start(self, trainer: Any, module: nn.Module) -> None:
        """Builds the parameter list once the optimizers exist, and refuses what cannot be measured.

        Raises:
            UnsupportedSetupError: The source that was asked for does not exist here.
        """
        mine = _optimized(trainer)
        refuse_shards(mine)
        self._watch(module, ParameterSet.of(module, by_module=self._by_module, only=mine))
        refuse_missing(self.source, trainer, self._examples, self.extras)

    def _watch(self, module: nn.Module, parameters: ParameterSet) -> None:
        self.parameters = parameters
        self._chunks = ChunkMeter(self.parameters, self.extras)
        self._pairs = ConsecutiveMeter(self.parameters)
        self._examples = None
        # Where no layer is supported the meter says so, to those who have asked for it.
        if self.source == "per_example" or any(layers.is_supported(child) for child in module.modules()):
            self._examples = PerExampleMeter(module, self.parameters, self.extras)

    def _follow(self, trainer: Any) -> None:
        """Takes in parameters that have thawed since, or come to the optimizer, and leaves out what was frozen."""
        assert self.parameters is not None
        module, mine = trainer.lightning_module, _optimized(trainer)
        if not any(parameter.requires_grad for parameter in mine):
            return
        now = ParameterSet.of(module, by_module=self._by_module, only=mine)
        if [*map(id, now.parameters)] != [*map(id, self.parameters.parameters)]:
            self._tell("followed", "other parameters train now than before: gradient noise is measured in those")
            self._watch(module, now)

    def pick(self, trainer: Any) -> str:
        """The source that serves now."""
        return chosen(self.source, trainer, self._examples)

    def batch_start(self, trainer: Any, batch_idx: int, due: Callable[[], bool]) -> None:
        """A batch begins; at the first of a window ``due`` decides whether it is measured."""
        if window_start(trainer, batch_idx):
            self._cancel()
            if due() or (self._pairs is not None and self._pairs.armed):
                self._begin(trainer)
        if self._open == "per_example" and self._examples is not None:
            self._examples.attach()

    def _begin(self, trainer: Any) -> None:
        self._follow(trainer)
        self._open = self.pick(trainer)
        self._weights, self._sizes, self._left = [], [], []
        if self._open == "microbatch":
            assert self._chunks is not None
            self._chunks.begin(self._metric(trainer))
        elif self._open == "per_example":
            assert self._examples is not None
            coupled = self._examples.coupled()
            if coupled is not None:
                self._open = None
                self._tell("coupled", f"no gradient noise is measured while {coupled!r} normalises by batch")
                return
            self._examples.begin()
        elif self._open == "consecutive":
            self._tell(
                "consecutive",
                "gradient noise is taken from consecutive updates, because an update here is one chunk whose "
                "examples cannot be told apart (batch normalisation, or layers without per-example gradients); at "
                "large learning rates it reads too high. Trainer(accumulate_grad_batches=2) gives a better source",
            )
            if self.extras.inner or self.extras.coordinate:
                self._tell(
                    "nothing to read",
                    "the inner-product, augmented and coordinate rules read single examples or several micro-batches, "
                    "and here are neither: the batch will not grow. Set Trainer(accumulate_grad_batches=2) or more, or "
                    "take rule='noise_scale' or rule='norm'",
                )

    def _metric(self, trainer: Any) -> Metric | None:
        return adam_metric(trainer.optimizers[0]) if self.preconditioned else None

    def before_backward(self, trainer: Any, loss: Tensor, batch: Any) -> None:
        """Between a micro-batch's forward and backward pass."""
        if self._open is None:
            return
        size, factor = current_piece(trainer, examples_in(batch))
        self._sizes.append(size)
        self._weights.append(factor * size if self._summed else factor)
        if self._open == "microbatch" and self._chunks is not None:
            self._chunks.listen()
        elif self._open == "per_example" and self._examples is not None:
            self._examples.arm(size, loss, self._metric(trainer))

    def after_backward(self, trainer: Any) -> None:
        """A micro-batch's backward pass is over."""
        if self._open is None or not self._weights:
            return
        scale = 1.0 / (self._weights[-1] * _loss_scale(trainer))
        if self._open == "microbatch" and self._chunks is not None:
            self._chunks.end_chunk(self._sizes[-1], scale)
        elif self._open == "per_example" and self._examples is not None:
            self._examples.end_chunk(self._sizes[-1] * scale)
            self._tell_coverage()
        self._left = self._versions()

    def _versions(self) -> list[tuple[int, int]]:
        """Tells whether gradients have been written since."""
        assert self.parameters is not None
        found = [parameter.grad for parameter in self.parameters.parameters]
        return [(id(gradient), 0 if gradient is None else gradient._version) for gradient in found]

    def before_step(self, trainer: Any) -> GradientRecord | None:
        """The window's gradient is final and not yet clipped: its record, if this window is measured."""
        source, self._open = self._open, None
        if source is None or not self._weights:
            return None
        # Mixed precision unscales them itself.
        if source != "consecutive" and self._left != self._versions() and _scaler(trainer) is None:
            self._tell(
                "edited",
                "gradients are written between the backward pass and the update (by a module's on_after_backward, or "
                "a callback), so that they are not the sum of their parts: no gradient noise is taken of such updates",
            )
            return None
        scale = 1.0 / sum(self._weights)
        ranks = Ranks.here() if trainer.world_size > 1 else None
        if source == "microbatch":
            assert self._chunks is not None
            if len(self._sizes) * trainer.world_size < 2:
                return None
            return self._chunks.close(ranks, self._weights, scale)
        if source == "per_example":
            assert self._examples is not None
            if self._examples.coverage().share == 0:
                return None
            weights = self._weights if len(self._weights) > 1 else None
            return self._examples.close(ranks, scale, weights=weights, sizes=self._sizes)
        return self._compare(trainer, scale)

    def _compare(self, trainer: Any, scale: float) -> GradientRecord | None:
        assert self._pairs is not None
        size = sum(self._sizes) * trainer.world_size
        if self._pairs.armed:
            return self._pairs.close(size, scale)
        self._pairs.keep(size, self._metric(trainer), scale)
        self._kept_at = int(trainer.global_step)
        return None

    def state_dict(self) -> dict[str, Any] | None:
        """Between the two updates of a measurement the first one's gradient; else None. Not with a metric."""
        if self._pairs is None or not self._pairs.armed or self.preconditioned:
            return None
        return {"update": self._kept_at, **self._pairs.state_dict()}

    def load_state_dict(self, trainer: Any, saved: dict[str, Any] | None) -> None:
        """The inverse of :meth:`state_dict`; the gradient of an update that is made again is left out."""
        if saved is not None and self._pairs is not None and trainer.global_step == saved["update"] + 1:
            self._pairs.load_state_dict(saved)

    def batch_end(self, trainer: Any) -> None:
        """A batch is over; nothing stays hooked between windows."""
        if self._examples is not None:
            self._examples.detach()
        if window_end(trainer):
            self._cancel()

    def _cancel(self) -> None:
        self._open = None
        if self._chunks is not None:
            self._chunks.stop()
        if self._examples is not None:
            self._examples.detach()

    def stop(self) -> None:
        """Takes everything off the model."""
        self._cancel()

    def forget(self) -> None:
        """Lets go of the gradient between two updates."""
        if self._pairs is not None:
            self._pairs.drop()

    def spoil(self) -> None:
        """Leaves the present window out: something was repeated in it."""
        self._cancel()

    def _tell_coverage(self) -> None:
        assert self._examples is not None
        coverage = self._examples.coverage()
        if coverage.excluded:
            names = ", ".join(f"{name} ({reason})" for name, reason in list(coverage.excluded.items())[:5])
            more = len(coverage.excluded) - 5
            self._tell(
                "coverage",
                f"per-example gradient noise covers {coverage.share:.0%} of the parameters and leaves out "
                f"{names}{f' and {more} more' if more > 0 else ''}",
            )

    @property
    def share(self) -> float:
        """Part of the parameters that the last per-example record covers; 1 for the other sources."""
        return 1.0 if self._examples is None else self._examples.coverage().share

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warn(message)


def _loss_scale(trainer: Any) -> float | Tensor:
    """Mixed precision's loss scale as it lies on the device: reading it as a number would wait for the device."""
    scale = getattr(_scaler(trainer), "_scale", None)
    return 1.0 if scale is None else scale.detach().clone()


def _optimized(trainer: Any) -> list[nn.Parameter]:
    return [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)

"""Watches the gradient noise scale of a run and changes nothing."""

from __future__ import annotations

import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autotune.arguments import is_count
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer.measure import LoopMeter
from autotune.callbacks._trainer.sources import Source
from autotune.errors import ConfigurationError
from autotune.noise.smoothing import NoiseEstimate, NoiseSmoother, NoiseState
from autotune.noise.statistics import GradientRecord


class GradientNoiseMonitor(Callback):
    """Logs how large a batch the gradients' noise would justify, and changes nothing, to the bit.

    Logged, where there is a logger: ``autotune/noise_scale`` (examples) with ``autotune/noise_scale_low`` and
    ``_high``, the ends of its interval, and ``autotune/norm_test``, the eta at the edge of the norm test
    ``V/B <= eta^2 |g|^2`` of the last measured update: every larger eta passes, every smaller one fails.

    The noise scale is a proxy of the critical batch size, not that size itself.

    Taken to be so, and not seen where it is not: the first axis of a batch's tensors is its examples, and the loss is a
    mean (or a sum) of one term an example. A loss that compares the examples of a batch with one another (contrastive
    ones) has no noise of single examples.

    Args:
        every_n_steps: Measure one update in so many.
        source: ``"auto"``: micro-batches and ranks where an update has several, else per-example gradients,
            else (batch normalisation, or mostly layers without per-example gradients) two consecutive
            updates.
        loss_reduction: What ``training_step`` returns: its examples' mean loss, or their sum.
        preconditioned: Measure in the metric of an Adam-like optimizer.
        by_module: Log ``autotune/noise_scale/<module>`` too.
        decay: Smoothing, a measurement.
        level: Coverage of the interval.

    Raises:
        ConfigurationError: An argument is out of range.
        UnsupportedSetupError: At the start of a fit, where the source does not exist there.
    """

    def __init__(
        self,
        every_n_steps: int = 20,
        source: Source = "auto",
        loss_reduction: Literal["mean", "sum"] = "mean",
        preconditioned: bool = False,
        by_module: bool = False,
        decay: float = 0.9,
        level: float = 0.8,
    ) -> None:
        if not is_count(every_n_steps):
            raise ConfigurationError(f"every_n_steps counts updates, 1 or more; got {every_n_steps!r}")
        for name, value in (("preconditioned", preconditioned), ("by_module", by_module)):
            if not isinstance(value, bool):
                raise ConfigurationError(f"{name} must be True or False; got {value!r}")
        self.every_n_steps = every_n_steps
        self._meter = LoopMeter(
            source, loss_reduction=loss_reduction, preconditioned=preconditioned, by_module=by_module
        )
        self._smoother = NoiseSmoother(decay, level)
        self._fits = True
        self._reset()

    def _reset(self) -> None:
        self._state = self._smoother.init()
        self._modules: dict[str, NoiseState] = {}
        self._pending: Tensor | None = None
        self._norm_test = math.nan
        self._batch: Any = None
        self._saved_meter: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Two monitors of different kinds may watch one run."""
        meter = self._meter
        return self._generate_state_key(source=meter.source, preconditioned=meter.preconditioned)

    @property
    def estimate(self) -> NoiseEstimate:
        """Everything known now."""
        self._read()
        return self._smoother.estimate(self._state)

    @property
    def noise_scale(self) -> float:
        """The noise scale in examples; NaN before the first measurement, infinite where no signal is seen."""
        return self.estimate.noise_scale

    @property
    def interval(self) -> tuple[float, float]:
        """Its interval, in examples."""
        estimate = self.estimate
        return estimate.low, estimate.high

    @property
    def norm_test(self) -> float:
        """The eta at the edge of the norm test of the last measured update."""
        self._read()
        return self._norm_test

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A fit begins anew, or with a checkpoint's sums, which come after this."""
        self._fits = stage == "fit"
        if self._fits:
            self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the parameters, and refuses a source that does not exist here."""
        self._meter.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A checkpoint between two updates that are compared goes on with the second."""
        saved, self._saved_meter = self._saved_meter, None
        self._meter.load_state_dict(trainer, saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this window is measured."""
        self._batch = batch
        self._meter.batch_start(trainer, batch_idx, lambda: trainer.global_step % self.every_n_steps == 0)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Listens."""
        self._meter.before_backward(trainer, loss, self._batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a chunk in."""
        self._meter.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Closes the window; its numbers stay on the device."""
        record = self._meter.before_step(trainer)
        if record is not None:
            self._read()
            self._pending = record.pack()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs a new measurement; the device is read a batch later, when it has caught up."""
        pending = self._pending
        self._batch = None
        self._meter.batch_end(trainer)
        if pending is None or (pending.is_cuda and trainer.global_step % self.every_n_steps == 1 % self.every_n_steps):
            return
        self._read()
        self._log(trainer)

    def _read(self) -> None:
        if self._pending is None:
            return
        record = GradientRecord.unpack(self._pending.double().cpu())
        self._pending = None
        variance, signal = record.variance(), record.signal()
        names = self._meter.parameters.group_names if self._meter.parameters is not None else ()
        if len(names) > 1 and len(names) == len(variance):  # else more of them have begun to train since
            for name, v, s in zip(names, variance.tolist(), signal.tolist(), strict=True):
                state = self._modules.get(name, self._smoother.init())
                self._modules[name] = self._smoother.step_values(state, v, s)
        total = float(variance.sum())
        self._state = self._smoother.step_values(self._state, total, float(signal.sum()))
        mean_sq = float(record.mean_sq.sum())
        ratio = total / float(record.sums.examples) / mean_sq if mean_sq > 0 else math.nan
        self._norm_test = math.sqrt(ratio) if ratio >= 0 else math.nan

    def _log(self, trainer: Trainer) -> None:
        estimate = self._smoother.estimate(self._state)
        values = {
            "noise_scale": estimate.noise_scale,
            "noise_scale_low": estimate.low,
            "noise_scale_high": estimate.high,
            "norm_test": self._norm_test,
        }
        for name, state in self._modules.items():
            values[f"noise_scale/{name}"] = self._smoother.estimate(state).noise_scale
        RunLog.of(trainer).scalars(values)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves no hook behind. The state stays: who saves a checkpoint on an exception comes after us."""
        self._meter.stop()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves no hook behind."""
        self._read()
        self._meter.stop()
        self._meter.forget()

    def state_dict(self) -> dict[str, Any]:
        """The smoothed sums and, between two updates that are compared, the first one's gradient."""
        self._read()
        return {
            "noise": self._state.state_dict(),
            "modules": {name: state.state_dict() for name, state in self._modules.items()},
            "norm_test": self._norm_test,
            "meter": self._meter.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; a checkpoint that is only evaluated says nothing to us."""
        if not self._fits:
            return
        self._state = NoiseState.from_state_dict(state_dict["noise"])
        self._modules = {name: NoiseState.from_state_dict(state) for name, state in state_dict["modules"].items()}
        self._norm_test = state_dict["norm_test"]
        self._saved_meter = state_dict["meter"]

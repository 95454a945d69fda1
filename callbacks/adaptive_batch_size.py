"""Grows the batch while a run trains, as far as the gradients' noise justifies."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autotune.arguments import is_count
from autotune.batch.rules import Rule, Tolerances
from autotune.batch.scaling import SCALINGS, Scaling, refuse_betas
from autotune.batch.settings import BatchSettings
from autotune.callbacks._batch_run import BatchRun, Tools
from autotune.callbacks._growth import auto_lrs
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._saved import check_origin, stamp
from autotune.callbacks._trainer.accumulation import Windows
from autotune.callbacks._trainer.facts import callbacks_named
from autotune.callbacks._trainer.guards import refuse_optimizers, refuse_unsupported
from autotune.callbacks._trainer.measure import LoopMeter
from autotune.callbacks._trainer.resize import ResizableLoader
from autotune.callbacks._trainer.resume import DataPosition
from autotune.callbacks._trainer.schedules import ExampleSchedules
from autotune.decision import Decision
from autotune.errors import ConfigurationError
from autotune.noise.microbatch import Extras

_STATE_VERSION = 2


class AdaptiveBatchSize(Callback):
    """Measures gradient noise and grows the global batch with it: the micro-batch first, then accumulation.

    Under a schedule (the user's or ``AutoLRS``'s) the batch grows in the place of the rate's decay, and the rate falls
    the less for it; without one it grows towards the noise scale. Every example is still seen once an epoch;
    ``max_steps``, ``max_epochs``, validation cadence and schedulers keep their meaning. A growth after which the loss
    explodes is undone and not tried again; while the rate decays the next one keeps it below its peak, and the one
    after that (``lr_scaling="auto"``) leaves it as scheduled. A batch that does not fit into memory is run in pieces.
    It never shrinks else.

    Args:
        max_batch_size: Largest global batch, in examples; None for what leaves 32 updates an epoch.
        rule: ``"noise_scale"``, ours; or one of the published tests.
        lr_scaling: ``"auto"``: for SGD AdaScale's gain (linear in the place of a decay), for Adam and its kin the
            square root, and more where there is little noise (``"adam"``), none for AdaGrad. ``"sqrt_betas"`` and
            ``"adam_betas"`` also raise Adam's betas to the power of the growth k, so that its averages reach back over
            as many examples as before, and divide eps by sqrt(k); they stay so after the fit.
        every_n_steps: Measure one update in so many.
        noise_multiple: Our rule, without a schedule, aims at so many noise scales; in a decay they
            say how far the rate may rise above its peak.
        eta: Tolerance of the published tests: of the norm and coordinate tests as a number; with theta and nu of the
            inner-product and augmented tests as ``Tolerances(eta, theta, nu)``.
        rest_updates: Least updates between two changes under our rule.
        decay_growth: Our rule, while the rate decays: the batch at the most, in units of the one at the peak, reached
            in whole multiples of the loader's. More saves more updates, and leaves less of the decay to the rate.
        loss_reduction: What ``training_step`` returns: its examples' mean loss, or their sum.

    Raises:
        ConfigurationError: An argument is out of range.
        UnsupportedSetupError: At the start of a fit, for what cannot be resized, or has not the betas that are to be
            scaled; with what to write instead.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        rule: Rule = "noise_scale",
        lr_scaling: Scaling = "auto",
        every_n_steps: int = 10,
        noise_multiple: float = 0.25,
        eta: float | Tolerances = 0.5,
        rest_updates: int = 20,
        decay_growth: float = 3.0,
        loss_reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        if max_batch_size is not None and not is_count(max_batch_size):
            raise ConfigurationError(f"max_batch_size counts examples, 1 or more; got {max_batch_size!r}")
        if lr_scaling not in SCALINGS:
            raise ConfigurationError(f"lr_scaling must be one of {', '.join(SCALINGS)}; got {lr_scaling!r}")
        if not is_count(every_n_steps):
            raise ConfigurationError(f"every_n_steps counts updates, 1 or more; got {every_n_steps!r}")
        tolerances = eta if isinstance(eta, Tolerances) else Tolerances(eta)
        self._settings = BatchSettings(
            max_batch_size, rule, lr_scaling, every_n_steps, noise_multiple, tolerances, rest_updates, decay_growth
        )
        self._settings.controller()
        extras = Extras(inner=rule in ("inner_product", "augmented"), coordinate=rule == "coordinate")
        self._meter = LoopMeter(loss_reduction=loss_reduction, extras=extras)
        self.decisions: list[Decision] = []
        self._saved: dict[str, Any] | None = None
        self._fits = True
        self._reset()

    def _reset(self) -> None:
        self._run: BatchRun | None = None
        self._batch: Any = None
        self._loader = ResizableLoader()
        self._windows = Windows(self._sizes, self._short)
        self._schedules = ExampleSchedules(self._loader)
        self._position = DataPosition()
        self._trainer: weakref.ref[Trainer] | None = None

    def _sizes(self, batch_idx: int) -> list[int]:
        trainer = self._trainer() if self._trainer is not None else None
        return [] if trainer is None else self._loader.window_sizes(batch_idx, trainer.accumulate_grad_batches)

    def _short(self, examples: int, pieces: int) -> None:
        if self._run is not None:
            self._run.short_of_memory(examples, pieces)

    @property
    def batch_size(self) -> int:
        """Global examples an update now; 0 before a fit."""
        return 0 if self._run is None else self._run.batch_size

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be served; from here on the training loader is ours to resize.

        The user's ``configure_optimizers`` comes next, and may ask for the loader's length.
        """
        self._fits, self._saved = stage == "fit", None
        if self._fits:
            refuse_unsupported(trainer, self)
            self._reset()
            self._trainer = weakref.ref(trainer)
            self._loader.attach(trainer)
            if self._owns_position(trainer):
                self._position.attach(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The state to resume is known, the optimizers exist."""
        refuse_optimizers(trainer, self)
        refuse_betas(self._settings.lr_scaling, trainer.optimizers[0])
        saved = self._saved
        # All controllers hand their history over before the first of them opens the file.
        self.decisions = [] if saved is None else RunLog.of(trainer).restore(saved["decisions"])
        self._loader.resume(trainer, None if saved is None else saved["loader"])
        self._windows.attach(trainer)
        self._meter.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders are set up: plans, or goes on where a resumed run stopped."""
        self._loader.start(trainer)
        self._schedules.attach(trainer)
        saved, self._saved = self._saved, None
        tools = Tools(self._loader, self._windows, self._meter)
        self._run = BatchRun(self._settings, trainer, pl_module, tools, saved, self.decisions)
        if saved is not None and saved["position"] is not None and self._owns_position(trainer):
            self._position.restore(trainer, saved["position"])
        self._loader.after_restore(trainer)
        self._meter.load_state_dict(trainer, None if saved is None else saved["meter"])
        RunLog.of(trainer).open()
        if saved is None:
            self._run.begin(trainer)

    def _owns_position(self, trainer: Trainer) -> bool:
        # One callback restores the data's position; AutoLRS does, where it is present.
        return auto_lrs(trainer) is None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lengths follow the size."""
        RunLog.of(trainer).open()
        self._loader.epoch_start(trainer)
        if self._owns_position(trainer):
            self._position.epoch_start(trainer)
        if self._run is not None:
            self._run.epoch_start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this window is measured."""
        self._batch = batch
        every = self._settings.every_n_steps
        self._meter.batch_start(trainer, batch_idx, lambda: trainer.global_step % every == 0)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Listens."""
        self._meter.before_backward(trainer, loss, self._batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a chunk in."""
        self._meter.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Closes the window."""
        record = self._meter.before_step(trainer)
        if record is not None and self._run is not None:
            self._run.measured(record)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: whatever is to be decided, and the loader's lengths."""
        self._batch = None
        self._meter.batch_end(trainer)
        if self._run is not None:
            self._run.batch_end(trainer, pl_module, outputs, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch is through."""
        self._loader.epoch_end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The log says where the run ended; ``AutoLRS`` and ``ReplaySchedule`` do that where they are."""
        if self._run is not None and not callbacks_named(trainer, "AutoLRS", "ReplaySchedule"):
            self._run.finish(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._meter.stop()
        self._windows.detach(trainer)
        self._schedules.detach(trainer)
        self._loader.detach(trainer)
        if self._owns_position(trainer):
            self._position.detach(trainer)
        if self._run is not None:
            self._run.leave()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end. The state stays: who saves a checkpoint on an exception comes after us."""
        self._leave(trainer)
        RunLog.end(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing of ours on the trainer."""
        if stage == "fit":
            self._leave(trainer)
            self._meter.forget()
            RunLog.end(trainer)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that evolves, as primitives and tensors; empty before training has begun."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or self._run is None:
            return {}
        return {
            **stamp(_STATE_VERSION, self._stamped()),
            **self._run.state_dict(),
            "meter": self._meter.state_dict(),
            "accumulate": self._loader.accumulate(trainer),
            "loader": self._loader.state_dict(trainer),
            "position": self._position.state_dict(trainer) if self._owns_position(trainer) else None,
            "decisions": self._run.log.saved(self.decisions),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the fit starts: loaders and optimizer are not there yet. Where none starts it is not read.

        Raises:
            StateError: The state is another version's, or of other settings.
        """
        if not (state_dict and self._fits):
            return
        check_origin("AdaptiveBatchSize", _STATE_VERSION, self._stamped(), state_dict)
        self._saved = state_dict

    def _stamped(self) -> dict[str, Any]:
        return {**asdict(self._settings), "loss_reduction": self._meter.loss_reduction}

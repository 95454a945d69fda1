"""Grows the batch while a run trains, as far as the gradients' noise justifies."""

from __future__ import annotations

import weakref
from dataclasses import astuple
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from autotune.batch.controller import BatchController, BatchState, Target
from autotune.batch.plan import Split, plan
from autotune.batch.rules import Rule, Tolerances
from autotune.batch.scaling import SCALINGS, Scaling, gain, rule_for, scale_group_betas
from autotune.callbacks._growth import Rates, Watch, auto_lrs
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer.accumulation import Windows
from autotune.callbacks._trainer.facts import inform, window_end
from autotune.callbacks._trainer.guards import refuse_optimizers, refuse_unsupported
from autotune.callbacks._trainer.measure import LoopMeter
from autotune.callbacks._trainer.memory import forget_peak, micro_limit
from autotune.callbacks._trainer.resize import ResizableLoader, align, move
from autotune.callbacks._trainer.resume import DataPosition
from autotune.decision import Decision
from autotune.errors import ConfigurationError
from autotune.noise.microbatch import Extras
from autotune.noise.ranks import Ranks
from autotune.noise.smoothing import NoiseSmoother, NoiseState
from autotune.noise.statistics import GradientRecord

#: An epoch keeps at least so many updates where no largest batch is given.
UPDATES_AN_EPOCH = 32


class AdaptiveBatchSize(Callback):
    """Measures gradient noise and grows the global batch with it: the micro-batch first, then accumulation.

    Every example is still seen once an epoch; ``max_steps``, ``max_epochs``, validation cadence and epoch schedulers
    keep their meaning. The learning rate follows by the optimizer's family. A growth after which the loss explodes
    is undone and not tried again; a batch that does not fit into memory is run in pieces. It never shrinks else.

    Args:
        max_batch_size: Largest global batch, in examples; None for what leaves 32 updates an epoch.
        rule: ``"noise_scale"``, ours; or one of the published tests.
        lr_scaling: ``"auto"``: AdaScale's gain for SGD, the square root for Adam and its kin, none for AdaGrad.
        every_n_steps: Measure one update in so many.
        noise_multiple: Our rule aims at so many noise scales.
        eta: Of the norm and coordinate tests; ``theta`` and ``nu`` are the augmented test's.
        theta: See ``eta``.
        nu: See ``eta``.
        rest_updates: Least updates between two changes under our rule.
        loss_reduction: What ``training_step`` returns: its examples' mean loss, or their sum.
        scale_betas: With growth k, also raise Adam's betas to the power k and divide eps by sqrt(k).

    Raises:
        ConfigurationError: An argument is out of range.
        UnsupportedSetupError: At the start of a fit, for what cannot be resized, with what to write instead.
    """

    def __init__(
        self,
        max_batch_size: int | None = None,
        rule: Rule = "noise_scale",
        lr_scaling: Scaling = "auto",
        every_n_steps: int = 10,
        noise_multiple: float = 1.0,
        eta: float = 0.5,
        theta: float = 0.5,
        nu: float = 1.0,
        rest_updates: int = 50,
        loss_reduction: Literal["mean", "sum"] = "mean",
        scale_betas: bool = False,
    ) -> None:
        if max_batch_size is not None and max_batch_size < 1:
            raise ConfigurationError(f"max_batch_size counts examples, 1 or more; got {max_batch_size!r}")
        if lr_scaling not in SCALINGS:
            raise ConfigurationError(f"lr_scaling must be one of {', '.join(SCALINGS)}; got {lr_scaling!r}")
        if every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps counts updates, 1 or more; got {every_n_steps!r}")
        self.max_batch_size = max_batch_size
        self.lr_scaling = lr_scaling
        self.every_n_steps = every_n_steps
        self.scale_betas = scale_betas
        self._controller = BatchController(rule, Tolerances(eta, theta, nu), noise_multiple, rest_updates)
        extras = Extras(inner=rule in ("inner_product", "augmented"), coordinate=rule == "coordinate")
        self._meter = LoopMeter(loss_reduction=loss_reduction, extras=extras)
        self._smoother = NoiseSmoother()
        self._saved: dict[str, Any] | None = None
        self.decisions: list[Decision] = []
        self._reset()

    def _reset(self) -> None:
        self._noise: NoiseState = self._smoother.init()
        self._state: BatchState | None = None
        self._split = Split(1, 1)
        self._next: Split | None = None
        self._record: Tensor | None = None
        self._batch: Any = None
        self._micro_limit: int | None = None
        self._rates = Rates()
        self._watch = Watch()
        self._loader = ResizableLoader()
        self._windows = Windows(self._sizes, self._short)
        self._position = DataPosition()
        self._rule: Scaling = "none"
        self._effective = 0
        self._gain = 1.0
        self._before = self._split
        self._memory: tuple[int, int] | None = None
        self._announce = False
        self._resumed: dict[str, Any] | None = None
        self._trainer: weakref.ref[Trainer] | None = None

    def _sizes(self, batch_idx: int) -> list[int]:
        trainer = self._trainer() if self._trainer is not None else None
        return [] if trainer is None else self._loader.window_sizes(batch_idx, trainer.accumulate_grad_batches)

    @property
    def batch_size(self) -> int:
        """Global examples an update now; 0 before a fit."""
        return 0 if self._state is None else self._state.batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be served."""
        if stage == "fit":
            refuse_unsupported(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The state to resume is known, the loaders are not set up yet."""
        refuse_optimizers(trainer, self)
        saved, self._saved = self._saved, None
        self._reset()
        self.decisions = [] if saved is None else [Decision.from_dict(record) for record in saved["decisions"]]
        # All controllers hand their history over before the first of them opens the file.
        RunLog.of(trainer).restore(self.decisions)
        self._resumed = saved
        self._trainer = weakref.ref(trainer)
        self._loader.attach(trainer, None if saved is None else saved["loader"])
        if self._owns_position(trainer):
            self._position.attach(trainer)
        self._windows.attach(trainer)
        self._meter.start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders are set up: plans, or goes on where a resumed run stopped."""
        self._loader.start(trainer)
        sampler, ranks = self._loader.sampler, trainer.world_size
        self._rule = rule_for(trainer.optimizers[0]) if self.lr_scaling == "auto" else self.lr_scaling
        self._rates.attach(trainer, sampler.batch_size * trainer.accumulate_grad_batches * ranks)
        self._split = Split(sampler.batch_size, trainer.accumulate_grad_batches, ranks)
        ceiling = self.max_batch_size
        if ceiling is None:
            ceiling = sampler.examples * ranks // UPDATES_AN_EPOCH
        self._state = self._controller.init(self._split.examples, ceiling)
        if self._resumed is not None:
            self._go_on(trainer, self._resumed)
        log = RunLog.of(trainer)
        log.restore(self.decisions)
        log.open()
        if self._resumed is None:
            self._decide(trainer, "setup", "set_batch", self._plan_in_words(trainer), self._opening())
        self._resumed = None

    def _plan_in_words(self, trainer: Trainer) -> str:
        assert self._state is not None
        return (
            f"start at {self._split.examples} examples an update, grow by the {self._controller.rule} rule to "
            f"{self._state.ceiling} at most; noise from {self._meter.pick(trainer)}, learning rate by {self._rule}"
        )

    def _opening(self) -> dict[str, Any]:
        """What the first record says beside the plan in words; a replay needs all of it."""
        assert self._state is not None
        return {
            "controller": type(self).__name__,
            "max_batch": self._state.ceiling,
            "batch": self._split.examples,
            "micro": self._split.micro,
            "accumulate": self._split.accumulate,
            "rule": self._controller.rule,
            "lr_scaling": self._rule,
            "scale_betas": self.scale_betas,
            "epoch_examples": self._loader.sampler.examples * self._split.ranks,
        }

    def _go_on(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        self._noise = NoiseState.from_state_dict(saved["noise"])
        self._state = BatchState.from_state_dict(saved["batch"])
        self._split = Split(*saved["split"])
        self._next = None if saved["next"] is None else Split(*saved["next"])
        self._effective, self._gain = saved["effective"], saved["gain"]
        self._rates.load_state_dict(saved["rates"])
        self._windows.piece_limit = saved["piece_limit"]
        trainer.accumulate_grad_batches = self._split.accumulate
        if saved["position"] is not None and self._owns_position(trainer):
            self._position.restore(trainer, saved["position"])
            self._loader.after_restore(trainer)

    def _owns_position(self, trainer: Trainer) -> bool:
        # One callback restores the data's position; AutoLRS does, where it is present.
        return auto_lrs(trainer) is None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lengths follow the size; an epoch's first batch opens a window of any length."""
        RunLog.of(trainer).open()
        if self._announce and self._state is not None:
            self._announce = False
            self._decide(trainer, "setup", "set_batch", self._plan_in_words(trainer), self._opening())
        self._loader.epoch_start(trainer)
        if self._owns_position(trainer):
            self._position.epoch_start(trainer)
        self._align(trainer, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decides whether this window is measured."""
        self._batch = batch
        self._meter.batch_start(trainer, batch_idx, lambda: trainer.global_step % self.every_n_steps == 0)

    def _take_effect(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._next is not None
        assert self._state is not None
        optimizer = trainer.optimizers[0]
        self._before = self._split
        growth = self._next.examples / self._split.examples
        self._watch.begin(module, optimizer)
        self._split, self._next = self._next, None
        self._state = self._controller.grown(self._state, self._split.examples, trainer.global_step)
        self._rates.scale(self._gain)
        self._rates.grown(self._split.examples)
        if self.scale_betas:
            scale_group_betas(optimizer, growth)
        forget_peak(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Listens."""
        self._meter.before_backward(trainer, loss, self._batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes a chunk in."""
        self._meter.after_backward(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Closes the window."""
        record = self._meter.before_step(trainer)
        if record is not None:
            self._record = record.total().pack()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: judge the last growth, look at a new measurement, move the loader."""
        self._batch = None
        self._watch.note(outputs, trainer.accumulate_grad_batches)
        self._meter.batch_end(trainer)
        if window_end(trainer):
            self._align(trainer, batch_idx + 1)
            if self._watch.update_done(Ranks.here() if trainer.world_size > 1 else None):
                self._undo(trainer)
            self._look(trainer)
            # Before the next window's batch_start hooks: who sets the rate there already sees the scaled one.
            if self._next is not None and trainer.global_step >= self._effective:
                self._take_effect(trainer, pl_module)
        self._loader.batch_end(trainer)
        self._report_memory(trainer)

    def _look(self, trainer: Trainer) -> None:
        packed, self._record = self._record, None
        if packed is None:
            return
        assert self._state is not None
        record = GradientRecord.unpack(packed.double().cpu())
        self._noise = self._smoother.step(self._noise, record)
        estimate = self._smoother.estimate(self._noise)
        values = {
            "noise_scale": estimate.noise_scale,
            "noise_scale_low": estimate.low,
            "noise_scale_high": estimate.high,
        }
        RunLog.of(trainer).scalars({**values, "batch_size": self._state.batch})
        if self._next is not None or self._watch.active:
            return
        target = self._controller.step(self._state, record, estimate, trainer.global_step)
        if target is not None:
            self._grow(trainer, target, estimate.noise_scale)

    def _grow(self, trainer: Trainer, target: Target, noise_scale: float) -> None:
        assert self._state is not None
        limit = micro_limit(trainer, self._split.micro, self._windows.piece_limit)
        split = plan(target.batch, self._split, limit, self._state.ceiling)
        if split.examples <= self._split.examples:
            return
        self._gain = gain(self._rule, split.examples / self._split.examples, noise_scale, self._split.examples)
        self._next = split
        self._effective = self._send(trainer, split)
        numbers = {
            "batch": split.examples,
            "batch_before": self._split.examples,
            "micro": split.micro,
            "accumulate": split.accumulate,
            "lr_gain": self._gain,
            "lr_multiplier": self._rates.multiplier * self._gain,
            **target.numbers,
        }
        self._decide(trainer, "batch", "grow", target.reason, numbers, self._effective)

    def _send(self, trainer: Trainer, split: Split) -> int:
        """Moves loader and accumulation towards ``split``; returns the first update that is wholly made of it."""
        return move(trainer, self._loader, self._split, split)

    def _align(self, trainer: Trainer, ready: int) -> None:
        """Lengthens the window where its new boundaries are boundaries of the old one too."""
        align(trainer, ready, (self._next or self._split).accumulate)

    def _undo(self, trainer: Trainer) -> None:
        assert self._state is not None
        losses = self._watch.losses
        self._watch.undo()
        self._rates.scale(1.0 / self._gain)
        grown, self._split = self._split, self._before
        self._next = None
        if grown.micro != self._split.micro:
            self._loader.resize(trainer, self._split.micro)
        self._align(trainer, self._loader.ready(trainer))
        self._state = self._controller.undone(self._state, self._split.examples, trainer.global_step)
        reason = (
            f"the loss went from {losses['loss_before']:.4g} to {losses['loss_after']:.4g} after the batch had grown "
            f"to {grown.examples}: weights, optimizer and batch go back, and it stays at {self._split.examples}"
        )
        numbers = {
            "batch": self._split.examples,
            "batch_before": grown.examples,
            "micro": self._split.micro,
            "accumulate": self._split.accumulate,
            "lr_gain": 1.0 / self._gain,
            **losses,
        }
        self._decide(trainer, "batch", "undo_growth", reason, numbers)

    def _short(self, examples: int, pieces: int) -> None:
        self._meter.spoil()
        self._memory = (examples, pieces)

    def _report_memory(self, trainer: Trainer) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            examples, pieces = memory
            reason = (
                f"memory ran out on a micro-batch of {examples}: it was repeated in {pieces} pieces, and micro-batches "
                f"above {self._windows.piece_limit} are run in pieces from now on"
            )
            self._decide(
                trainer,
                "batch",
                "split",
                reason,
                {"micro": examples, "pieces": pieces, "piece_limit": self._windows.piece_limit},
            )

    def _decide(
        self, trainer: Trainer, kind: str, action: str, reason: str, numbers: dict[str, Any], effective: int = -1
    ) -> None:
        decision = Decision(kind, action, reason, trainer.global_step, effective, numbers)
        self.decisions.append(decision)
        RunLog.of(trainer).write(decision)
        inform(reason)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch is through."""
        self._loader.epoch_end(trainer)

    def _leave(self, trainer: Trainer) -> None:
        self._meter.stop()
        self._windows.detach(trainer)
        self._loader.detach(trainer)
        if self._owns_position(trainer):
            self._position.detach(trainer)
        self._rates.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves nothing of ours on the trainer."""
        self._leave(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves nothing of ours on the trainer."""
        if stage == "fit":
            self._leave(trainer)
            RunLog.end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that evolves, as primitives and tensors; empty before training has begun."""
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or self._state is None or self._resumed is not None:
            return {}
        return {
            "noise": self._noise.state_dict(),
            "batch": self._state.state_dict(),
            "split": list(astuple(self._split)),
            "next": None if self._next is None else list(astuple(self._next)),
            "effective": self._effective,
            "gain": self._gain,
            "rates": self._rates.state_dict(),
            "piece_limit": self._windows.piece_limit,
            "loader": self._loader.state_dict(trainer),
            "position": self._position.state_dict(trainer) if self._owns_position(trainer) else None,
            "decisions": [decision.to_dict() for decision in self.decisions],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the fit starts: loaders and optimizer are not there yet."""
        self._saved = state_dict or None

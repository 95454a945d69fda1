"""One fit under ``AdaptiveBatchSize``: measurements in, decisions out, and how they are carried out."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn

from autotune.batch.controller import BatchState, Decay, Target
from autotune.batch.plan import Split, plan
from autotune.batch.scaling import Scaling, gain, rule_for, scale_group_betas, scales_betas
from autotune.batch.settings import BatchSettings
from autotune.callbacks import _batch_words as words
from autotune.callbacks._growth import Rates, Watch
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer.accumulation import Windows
from autotune.callbacks._trainer.facts import inform, window_end
from autotune.callbacks._trainer.measure import LoopMeter
from autotune.callbacks._trainer.memory import forget_peak, micro_limit
from autotune.callbacks._trainer.resize import ResizableLoader, align, move
from autotune.decision import Decision
from autotune.noise.ranks import Ranks
from autotune.noise.smoothing import NoiseSmoother, NoiseState
from autotune.noise.statistics import GradientRecord

#: An epoch keeps at least so many updates where no largest batch is given.
UPDATES_AN_EPOCH = 32


@dataclass(frozen=True)
class Tools:
    """What acts on the trainer for a fit."""

    loader: ResizableLoader
    windows: Windows
    meter: LoopMeter


class BatchRun:
    """The part of a fit between ``on_train_start`` and its end.

    Args:
        settings: The user's.
        trainer: With its loaders set up.
        module: The user's.
        tools: Attached to it.
        saved: :meth:`state_dict` of a run that goes on here.
        decisions: The list to add to; a resumed run's earlier ones stand in it.
    """

    def __init__(
        self,
        settings: BatchSettings,
        trainer: Any,
        module: nn.Module,
        tools: Tools,
        saved: dict[str, Any] | None,
        decisions: list[Decision],
    ) -> None:
        self.settings, self.tools, self.decisions = settings, tools, decisions
        self.log = RunLog.of(trainer)
        self._controller = settings.controller()
        self._smoother = NoiseSmoother()
        self._noise: NoiseState = self._smoother.init()
        sampler, ranks = tools.loader.sampler, trainer.world_size
        self._split = self._before = Split(tools.loader.first_size, trainer.accumulate_grad_batches, ranks)
        self._next: Split | None = None
        self._record: Tensor | None = None
        self._effective, self._gain = 0, 1.0
        self._memory: tuple[int, int] | None = None
        self._watch = Watch()
        self._rates = Rates()
        self._rates.attach(trainer, self._split.examples)
        ceiling = settings.max_batch_size
        if ceiling is None:
            ceiling = sampler.examples * ranks // UPDATES_AN_EPOCH
        # No update is made of more than an epoch, and where the last batch is dropped none would be made at all.
        first = tools.loader.first_size
        ceiling = min(ceiling, sampler.examples // first * first * ranks)
        self._state: BatchState = self._controller.init(self._split.examples, ceiling)
        if saved is not None:
            self._go_on(trainer, module, saved)

    def _scaling(self, trainer: Any) -> Scaling:
        """Asked for at a growth: ``AutoLRS`` may start its run, and with it a schedule, after us."""
        if self.settings.lr_scaling != "auto":
            return self.settings.lr_scaling
        if self._controller.leaves_rate(self._state):
            return "none"
        in_decay = self.settings.rule == "noise_scale" and self._decay(trainer) is not None
        return rule_for(trainer.optimizers[0], in_decay)

    def _decay(self, trainer: Any) -> Decay | None:
        """Where the rate stands in its schedule; None where it has none."""
        level = self._rates.level(trainer)
        return None if level is None else Decay(self._rates.base, level)

    @property
    def batch_size(self) -> int:
        """Global examples an update."""
        return self._state.batch

    def begin(self, trainer: Any) -> None:
        """Says what is going to happen."""
        source, scaling = self.tools.meter.pick(trainer), self._scaling(trainer)
        reason = (
            f"start at {self._split.examples} examples an update, grow by the {self._controller.rule} rule to "
            f"{self._state.ceiling} at most; noise from {source}, learning rate by {scaling}"
        )
        self._decide(trainer, "setup", "set_batch", reason, self._opening(scaling))

    def _opening(self, scaling: Scaling) -> dict[str, Any]:
        """What the first record says beside the plan in words; a replay needs all of it."""
        return {
            "controller": "AdaptiveBatchSize",
            "max_batch": self._state.ceiling,
            "batch": self._split.examples,
            "micro": self._split.micro,
            "accumulate": self._split.accumulate,
            "rule": self._controller.rule,
            "lr_scaling": scaling,
            "scale_betas": scales_betas(scaling),
            "epoch_examples": self.tools.loader.sampler.examples * self._split.ranks,
            "drop_last": self.tools.loader.sampler.drop_last,
        }

    # ------------------------------------------------------------------ the loop's moments

    def epoch_start(self, trainer: Any) -> None:
        """An epoch's first batch opens a window of any length."""
        self._align(trainer, 0)

    def measured(self, record: GradientRecord) -> None:
        """An update was measured; its numbers stay on the device until it is over."""
        self._record = record.total().pack()

    def short_of_memory(self, examples: int, pieces: int) -> None:
        """A micro-batch had to be taken apart."""
        self.tools.meter.spoil()
        self._memory = (examples, pieces)

    def batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch_idx: int) -> None:
        """After an update: judge the last growth, look at a new measurement, make a change that is due."""
        self._watch.note(outputs, trainer.accumulate_grad_batches)
        if window_end(trainer):
            self._align(trainer, batch_idx + 1)
            if self._watch.update_done(Ranks.here() if trainer.world_size > 1 else None):
                self._undo(trainer)
            self._look(trainer)
            # Before the next window's batch_start hooks: who sets the rate there already sees the scaled one.
            if self._next is not None and trainer.global_step >= self._effective:
                self._take_effect(trainer, module)
        self.tools.loader.batch_end(trainer)
        self._report_memory(trainer)

    def finish(self, trainer: Any) -> None:
        """The run has ended, and no other controller says so."""
        grown = sum(decision.action == "grow" for decision in self.decisions)
        self._decide(trainer, "finish", "end", *words.finished(trainer.global_step, self._split, grown))

    def leave(self) -> None:
        """Takes the hooks off the optimizer."""
        self._rates.detach()

    # ------------------------------------------------------------------ decisions

    def _look(self, trainer: Any) -> None:
        packed, self._record = self._record, None
        if packed is None:
            return
        record = GradientRecord.unpack(packed.double().cpu())
        self._noise = self._smoother.step(self._noise, record)
        estimate = self._smoother.estimate(self._noise)
        values = {
            "noise_scale": estimate.noise_scale,
            "noise_scale_low": estimate.low,
            "noise_scale_high": estimate.high,
        }
        self.log.scalars({**values, "batch_size": self._state.batch})
        if self._next is not None or self._watch.active:
            return
        target = self._controller.step(self._state, record, estimate, trainer.global_step, self._decay(trainer))
        if target is not None:
            self._grow(trainer, target, estimate.noise_scale)

    def _grow(self, trainer: Any, target: Target, noise_scale: float) -> None:
        limit = micro_limit(trainer, self._split.micro, self.tools.windows.piece_limit)
        split = plan(target.batch, self._split, limit, target.most, self.tools.loader.first_size)
        if split.examples <= self._split.examples:
            return
        self._gain = gain(
            self._scaling(trainer), split.examples / self._split.examples, noise_scale, self._split.examples
        )
        self._next = split
        self._effective = self._send(trainer, split)
        multiplier = self._rates.multiplier * self._gain
        numbers = {**words.changed(split, self._split, self._gain), "lr_multiplier": multiplier, **target.numbers}
        self._decide(trainer, "batch", "grow", target.reason(split.examples), numbers, self._effective)

    def _send(self, trainer: Any, split: Split) -> int:
        """Moves loader and accumulation towards ``split``; returns the first update that is wholly made of it."""
        return move(trainer, self.tools.loader, self._split, split)

    def _align(self, trainer: Any, ready: int) -> None:
        """Lengthens the window where its new boundaries are boundaries of the old one too."""
        align(trainer, ready, (self._next or self._split).accumulate)

    def _take_effect(self, trainer: Any, module: nn.Module) -> None:
        assert self._next is not None
        optimizer = trainer.optimizers[0]
        self._before = self._split
        growth = self._next.examples / self._split.examples
        self._watch.begin(module, optimizer)
        self._split, self._next = self._next, None
        self._state = self._controller.grown(self._state, self._split.examples, trainer.global_step)
        self._rates.scale(self._gain)
        self._rates.grown(self._split.examples)
        if scales_betas(self.settings.lr_scaling):
            scale_group_betas(optimizer, growth)
        forget_peak(trainer)

    def _undo(self, trainer: Any) -> None:
        losses = self._watch.losses
        self._watch.undo()
        self._rates.scale(1.0 / self._gain)
        grown, self._split = self._split, self._before
        self._next = None
        whole = move(trainer, self.tools.loader, grown, self._split)
        decay = self._decay(trainer)
        self._state = self._controller.undone(
            self._state,
            self._split.examples,
            trainer.global_step,
            decay,
            may_leave_rate=self.settings.lr_scaling == "auto",
        )
        undone = words.undone(self._split, grown, 1.0 / self._gain, whole, losses)
        self._decide(trainer, "batch", "undo_growth", *undone)

    def _report_memory(self, trainer: Any) -> None:
        memory, self._memory = self._memory, None
        if memory is not None:
            self._decide(trainer, "batch", "split", *words.taken_apart(*memory, self.tools.windows.piece_limit))

    def _decide(
        self, trainer: Any, kind: str, action: str, reason: str, numbers: dict[str, Any], effective: int = -1
    ) -> None:
        decision = Decision(kind, action, reason, trainer.global_step, effective, numbers)
        self.decisions.append(decision)
        self.log.write(decision)
        inform(reason)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that evolves, as primitives and tensors."""
        return {
            "noise": self._noise.state_dict(),
            "batch": self._state.state_dict(),
            "split": list(astuple(self._split)),
            "next": None if self._next is None else list(astuple(self._next)),
            "effective": self._effective,
            "gain": self._gain,
            "rates": self._rates.state_dict(),
            "piece_limit": self.tools.windows.piece_limit,
            "before": list(astuple(self._before)),
            "watch": self._watch.state_dict(),
        }

    def _go_on(self, trainer: Any, module: nn.Module, saved: dict[str, Any]) -> None:
        self._noise = NoiseState.from_state_dict(saved["noise"])
        self._state = BatchState.from_state_dict(saved["batch"])
        self._split = Split(*saved["split"])
        self._next = None if saved["next"] is None else Split(*saved["next"])
        self._effective, self._gain = saved["effective"], saved["gain"]
        self._rates.load_state_dict(saved["rates"])
        self.tools.windows.piece_limit = saved["piece_limit"]
        self._before = Split(*saved["before"])
        self._watch.load_state_dict(saved["watch"], module, trainer.optimizers[0])
        # Between a decision and its effect the window may have its new length already.
        trainer.accumulate_grad_batches = saved["accumulate"]

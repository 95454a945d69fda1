"""``AutoLRS``: the learning rate, chosen while the run trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from autotune.callbacks._lr_run import LRRun
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._saved import check_origin, stamp
from autotune.callbacks._trainer import horizon as horizons
from autotune.callbacks._trainer.bar import show_on_bar
from autotune.callbacks._trainer.data import refuse_one_shot
from autotune.callbacks._trainer.facts import (
    early_stopping_waits,
    inform,
    logs_now,
    training_loss,
    versions,
    window_end,
    window_start,
)
from autotune.callbacks._trainer.guards import refuse_lazy, refuse_optimizers, refuse_unsupported
from autotune.callbacks._trainer.resume import DataPosition
from autotune.decision import Decision
from autotune.stage.settings import LRSettings, Mode, Objective, Proposals, SearchWhen

_STATE_VERSION = 8


class AutoLRS(Callback):
    """Finds the learning rate in the run that uses it, and decays it to zero at the run's end.

    Before the first update it tries rates on the trainer's own model, by short trials whose rate decays to zero, all
    from the same weights on the same batches; a Gaussian process over log rate and trial length proposes the next
    and says which rate does best, and the answer lies half-way between that and what is usual for the optimizer
    (:mod:`autotune.search.bracket`). Then the run trains with a short warm-up, at half a decade below that rate.
    For half of its known length the rate rises while the training loss gets better and falls while it gets worse
    (:mod:`autotune.stage.climb`); from there it decays linearly to zero. On a doubling clock the forecast is judged, a
    stage that lost ground is undone, and the rate is searched again when there is a reason. Where the trainer validates
    often, its own validations say which weights were best, else looks at nine tenths or more of what it would validate,
    as many as the search leaves over (:mod:`autotune.stage.validations`). Trials leave no trace, and all they cost is
    inside ``search_budget``.

    With a learning-rate scheduler of the user's, what is tuned is a multiplier on it: what is searched is the rate at
    its top, which a copy of it that is stepped ahead shows. Under a schedule-free optimizer the rate is held, in trials
    too, and its average is what trials are judged by. In both cases, and while the run's end is not known, the rate
    begins where the search says and does not climb.

    Args:
        min_lr: Lowest rate to consider for the optimizer's first group; None for 1e-6.
        max_lr: Highest; None for 10. Ratios between groups are kept.
        search_budget: Cap on what searching may cost, as a share of the planned updates, in (0, 1); evaluations
            count a third of a step for a batch of training size. It comes on top of ``max_steps`` or ``max_epochs``:
            for a fixed total ``T`` set ``max_steps=int(T / (1 + search_budget))``.
        objective: ``"annealed"``; or ``"forecast"`` for AutoLRS as published (Jin et al., ICLR 2021), as a baseline.
        search: ``"on_evidence"``, or ``"every_stage"`` for a search at every stage's end.
        monitor: A name that ``validation_step`` logs; None finds the validation loss.
        mode: Whether the monitored value is to be made small (``"min"``) or large (``"max"``).
        seed: Chooses trial and probe batches; the run's own randomness is never touched.
        proposals: ``"bayesian"``; or ``"grid"`` for about as many trials of the first search on a fixed log grid, for
            comparison.
        stop_early: Whether hopeless trials are stopped before their end.
        climb: Whether a held rate begins below what the search says, and rises while the training loss improves.
        forecasts: Whether the loss at a stage's end is predicted: one above its interval asks for a search, and a
            training loss above its own ends the stage.

    Raises:
        ConfigurationError: At construction, for an argument that cannot be served; when a fit starts, for rates of 0
            that leave nothing to keep ratios to or to multiply.
        UnsupportedSetupError: When a fit starts, for a setup that cannot be served.
        MonitorError: For a ``monitor`` that validation does not log before the first update, or no longer logs.
    """

    def __init__(
        self,
        *,
        min_lr: float | None = None,
        max_lr: float | None = None,
        search_budget: float = 0.1,
        objective: Objective = "annealed",
        search: SearchWhen = "on_evidence",
        monitor: str | None = None,
        mode: Mode = "min",
        seed: int = 0,
        proposals: Proposals = "bayesian",
        stop_early: bool = True,
        climb: bool = True,
        forecasts: bool = True,
    ) -> None:
        super().__init__()
        self.settings = LRSettings(
            min_lr=min_lr,
            max_lr=max_lr,
            search_budget=search_budget,
            objective=objective,
            search=search,
            monitor=monitor,
            mode=mode,
            seed=seed,
            proposals=proposals,
            stop_early=stop_early,
            climb=climb,
            forecasts=forecasts,
        )
        self._run: LRRun | None = None
        self._ended: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        self._fits = True
        self._position = DataPosition()
        self._decisions: list[Decision] = []
        self._lr: float | None = None
        self._trial_steps = 0

    # ------------------------------------------------------------------ what a user reads

    @property
    def lr(self) -> float | None:
        """The first group's rate in the last update; None before the first."""
        return self._lr

    @property
    def trial_steps(self) -> int:
        """Optimizer steps spent in trials so far."""
        return self._trial_steps if self._run is None else self._run.costs.trial_steps

    @property
    def decisions(self) -> list[Decision]:
        """Every decision so far, those of a resumed run's first part included."""
        return list(self._decisions if self._run is None else self._run.decisions)

    @property
    def level(self) -> float | None:
        """The share of its peak at which the rate stands by its schedule; None where none decays."""
        run = self._run
        if run is None or not (run.driver.scheduled or run.plan.shape.decay):
            return None
        return float(run.driver.level(run.plan.shape(run.plan.progress)))

    def request_search(self, reason: str) -> None:
        """Asks for a search before the next update, the budget permitting (a grown batch does)."""
        if self._run is not None:
            self._run.request_search(reason)

    def rescale(self, factor: float) -> None:
        """Multiplies the rate from the next update on (a grown batch does)."""
        if self._run is not None:
            self._run.rescale(factor)

    # ------------------------------------------------------------------ the fit

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be served, and starts to watch the data's position."""
        self._fits, self._saved = stage == "fit", None
        if self._fits:
            refuse_unsupported(trainer, self)
            self._run, self._ended, self._position = None, {}, DataPosition()
            self._position.attach(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Looks at the optimizer. The state to resume is known."""
        refuse_optimizers(trainer, self)
        # All controllers hand their history over before the first of them opens the file.
        self._decisions = []
        self._take_history(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Plans the run, or takes up a resumed one."""
        refuse_one_shot(trainer.fit_loop._combined_loader)
        refuse_lazy(trainer, self)
        self._take_history(trainer)  # under FSDP2 callbacks are restored later than elsewhere
        saved, self._saved = self._saved, None
        if saved is not None:
            self._position.restore(trainer, saved["position"])
        else:
            self._lr, self._trial_steps = None, 0
        path = RunLog.of(trainer).open()
        self._run = LRRun(self.settings, trainer, pl_module, None if saved is None else saved["run"], self._decisions)
        if saved is None:
            self._run.record("setup", "begin", self._run.plan.describe(), numbers=self._opening(trainer))
        else:
            self._lr = saved["lr"]
        if path is not None:
            inform(f"decisions go to {path}")

    def _take_history(self, trainer: Any) -> None:
        if self._saved is not None and not self._decisions:
            self._decisions = RunLog.of(trainer).restore(self._saved["decisions"])

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Remembers where the epoch's order comes from."""
        self._position.epoch_start(trainer)
        if self._run is not None:
            self._run.epoch_started()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Before an update: whatever is due, then the rate."""
        if self._run is not None and window_start(trainer, batch_idx):
            self._run.before_update()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an update: its loss and rate."""
        if self._run is None or not window_end(trainer):
            return
        self._run.after_update(training_loss(outputs))
        self._lr = self._run.driver.last
        if logs_now(trainer):
            RunLog.of(trainer).scalars(self._run.scalars())
            show_on_bar(trainer, {"lr": self._lr})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Remembers the monitored value of the validation before."""
        if self._run is not None:
            self._run.validations.began(trainer.callback_metrics)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Reads the monitored value. Half out of early stopping's patience the stage ends, lest a plateau go on."""
        if self._run is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._run.validations.ended(trainer.callback_metrics)
        if early_stopping_waits(trainer):
            self._run.plateau()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Judges the last stage and sums up."""
        if self._run is not None:
            self._run.finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lets go of optimizer, loader and log."""
        if stage == "fit":
            if self._run is not None:
                # Of a fit that has ended nothing large is kept; whoever saves a checkpoint later has the rest of it.
                self._ended = self._state_of(self._run, best=False)
                self._decisions, self._trial_steps = self._run.decisions, self._run.costs.trial_steps
            self._release(trainer)
            self._run = None

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Hooks come off. The state stays: who saves a checkpoint on an exception comes after us."""
        self._release(trainer)

    def _release(self, trainer: Any) -> None:
        self._position.detach(trainer)
        if self._run is not None:
            self._run.driver.remove()
        RunLog.end(trainer)

    def _opening(self, trainer: Any) -> dict[str, Any]:
        assert self._run is not None
        run, plan = self._run, self._run.plan
        return {
            "controller": "AutoLRS",
            **self.settings.to_dict(),
            "horizon": plan.numbers(),
            "optimizer": type(trainer.optimizers[0]).__name__,
            "lr_ratios": list(run.driver.ratios),
            "scheduler": run.driver.scheduled,
            "shape": plan.shape_numbers(),
            **horizons.epoch_numbers(trainer),
            "versions": versions(),
        }

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as primitives and tensors; after a fit without the best weights."""
        return self._ended if self._run is None else self._state_of(self._run)

    def _state_of(self, run: LRRun, *, best: bool = True) -> dict[str, Any]:
        return {
            **stamp(_STATE_VERSION, self.settings.to_dict()),
            "decisions": run.log.saved(run.saved.decisions),
            "run": run.saved.state_dict(best=best),
            "lr": self._lr,
            "position": self._position.state_dict(run.trainer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a saved state when training starts; a checkpoint that is only evaluated says nothing to us.

        Raises:
            StateError: The state is another version's, or of other settings.
        """
        if not (state_dict and self._fits):
            return
        check_origin("AutoLRS", _STATE_VERSION, self.settings.to_dict(), state_dict)
        self._saved = state_dict

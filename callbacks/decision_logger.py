"""Puts every decision on every dashboard the trainer has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from autotune.callbacks._dashboards import Dashboard, dashboard_for
from autotune.callbacks._run_log import RunLog
from autotune.callbacks._trainer.bar import BarItems
from autotune.callbacks._trainer.facts import warn
from autotune.decision import Decision, read_decisions
from autotune.errors import LogFormatError
from autotune.report.values import spell


class DecisionLogger(Callback):
    """Logs the decisions of the trainer's controllers to each of its loggers, in the logger's own idiom.

    TensorBoard gets scalars, an "Autotune" group on the custom-scalars page, a figure for each search, texts and
    hparams; W&B scalars, images, a table and the configuration; MLflow metrics, parameters, artifacts and tags;
    CSV and any other logger the scalars and hyperparameters. Scalars are called ``autotune/<kind>/<number>`` and
    stand at the decision's ``step``. A progress bar shows the learning rate and the batch. Rank zero only.

    A logger that fails is told of once and left alone from then on: training goes on.

    Example::

        trainer = L.Trainer(callbacks=[AutoLRS(), DecisionLogger()])
    """

    def __init__(self) -> None:
        self._run_log: RunLog | None = None
        self._dashboards: list[Dashboard] = []
        self._decisions: list[Decision] = []
        self._path: Path | None = None
        self._bar: BarItems | None = None

    @property
    def path(self) -> Path | None:
        """Where ``decisions.jsonl`` lies; None before the fit starts and on ranks that do not write it."""
        return self._path if self._run_log is None else self._run_log.path or self._path

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Subscribes before any controller has decided anything."""
        if stage != "fit":
            return
        self._decisions, self._path = [], None
        self._run_log = RunLog.of(trainer)
        quiet = getattr(trainer, "fast_dev_run", False)
        self._dashboards = [] if quiet else [dashboard_for(logger) for logger in trainer.loggers]
        self._run_log.subscribe(self._on_decision, self._on_earlier)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Puts learning rate and batch on the progress bar, where there is one."""
        self._bar = BarItems(trainer, lambda: _in_use(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A run that died has its tables too."""
        self._finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Writes what wants to be written once, before the loggers are closed."""
        if stage == "fit":
            self._finish()

    def _on_decision(self, decision: Decision) -> None:
        self._decisions.append(decision)
        self._each("decision", decision)

    def _on_earlier(self, decisions: Sequence[Decision]) -> None:
        """A resumed run's dashboards may be new ones: they get the configuration; the file has the rest."""
        for decision in decisions:
            if decision.kind == "setup":
                self._each("setup", decision)

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.remove()
            self._bar = None
        if self._run_log is None:
            return
        self._path, self._run_log = self._run_log.path, None
        decisions = self._decisions
        if self._path is not None:
            try:
                decisions = read_decisions(self._path)  # a resumed run's earlier decisions are in the file only
            except LogFormatError as error:
                warn(f"the dashboards get the decisions of this fit only ({error})")
        if decisions:
            self._each("finish", decisions, self._path)

    def _each(self, method: str, *arguments: Any) -> None:
        for dashboard in list(self._dashboards):
            try:
                getattr(dashboard, method)(*arguments)
            except Exception as error:  # a dashboard is never worth a training run
                self._dashboards.remove(dashboard)
                name = type(dashboard._logger).__name__
                warn(f"{name} takes no further decisions ({type(error).__name__}: {error}); decisions.jsonl has them")


def _in_use(trainer: Any) -> dict[str, str]:
    """Learning rate and batch that the trainer's controllers have in use now, for a bar."""
    found = {}
    for shown, name in {"lr": "lr", "batch": "batch_size"}.items():
        for callback in trainer.callbacks:
            value = getattr(callback, name, None)
            if isinstance(value, (int, float)) and hasattr(callback, "decisions"):
                found[shown] = spell(value)
    return found

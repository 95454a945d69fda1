"""One adapter for each kind of logger: what a decision looks like in TensorBoard, W&B, MLflow and elsewhere.

A logger is known by the name of its class, so that none of the libraries is imported for a logger that is not
there, and both of Lightning's name spaces are served. Every method may raise; the caller keeps it from training.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.decision import Decision, encode
from autotune.report.pictures import pixels, search_picture
from autotune.report.values import number, settings, spell

COLUMNS = ["step", "effective_step", "kind", "action", "reason", "cost_steps"]


def scalars_of(decision: Decision) -> dict[str, float]:
    """What a decision says in numbers, as ``autotune/<kind>/<number>``; flags are 0 or 1.

    >>> scalars_of(Decision("stage", "end", "", 5, numbers={"loss": 0.5, "inside": True, "evidence": []}))
    {'autotune/stage/loss': 0.5, 'autotune/stage/inside': 1.0}
    """
    found = {}
    for key, value in decision.numbers.items():
        plain = float(value) if isinstance(value, bool) else number(decision, key)
        if plain is not None:
            found[f"autotune/{decision.kind}/{key}"] = plain
    if decision.cost_steps:
        found[f"autotune/{decision.kind}/cost_steps"] = float(decision.cost_steps)
    return found


class Dashboard:
    """A logger that takes scalars and hyperparameters: CSV, and every logger we know nothing of."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._setups: list[Decision] = []

    def decision(self, decision: Decision) -> None:
        """Shows one decision."""
        if decision.kind == "setup":
            self.setup(decision)
        elif values := scalars_of(decision):
            self._logger.log_metrics(values, step=decision.step)

    def setup(self, decision: Decision) -> None:
        """Takes one setup record in, a resumed run's earlier ones too."""
        self._setups.append(decision)
        self.configuration(settings(self._setups))

    def configuration(self, found: Mapping[str, Any]) -> None:
        """Shows what the run was configured with: once for each controller, and all of it each time."""
        self._logger.log_hyperparams({f"autotune/{key}": value for key, value in _flat(found).items()})

    def finish(self, decisions: Sequence[Decision], log: Path | None) -> None:
        """The run is over; ``decisions`` are all of it, ``log`` is its file."""
        self._logger.save()


class TensorBoard(Dashboard):
    """Scalars, a custom-scalars layout, a figure for each search, the decisions as text, hparams."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._laid_out = False

    def decision(self, decision: Decision) -> None:
        """Scalars and one line of text; a search's figure."""
        if not self._laid_out:
            self._laid_out = True
            self._logger.experiment.add_custom_scalars(LAYOUT)
        super().decision(decision)
        board = self._logger.experiment
        board.add_text(f"autotune/{decision.kind}", _markdown(decision), decision.step)
        if decision.kind == "search" and (picture := search_picture(decision)) is not None:
            board.add_image("autotune/search", pixels(picture), decision.step, dataformats="HWC")

    def configuration(self, found: Mapping[str, Any]) -> None:
        """Waits for the end: the hparams page wants parameters and results together."""

    def finish(self, decisions: Sequence[Decision], log: Path | None) -> None:
        """The whole table as text (the plugin shows a sample of many texts, but one text whole), and hparams."""
        head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        body = "\n".join(f"| {' | '.join(_cell(cell) for cell in _row(decision))} |" for decision in decisions)
        last = decisions[-1].step if decisions else 0
        self._logger.experiment.add_text("autotune/decisions", head + body, last)
        if found := settings(decisions):
            flat = {f"autotune/{key}": value for key, value in _flat(found).items()}
            self._logger.log_hyperparams(flat, metrics=_results(decisions))
        self._logger.save()


class Wandb(Dashboard):
    """Scalars on ``trainer/global_step``, an image for each search, the decisions as a table, the configuration."""

    def decision(self, decision: Decision) -> None:
        """Scalars; a search's image."""
        super().decision(decision)
        if decision.kind == "search" and (picture := search_picture(decision)) is not None:
            self._logger.log_image("autotune/search", [pixels(picture)], step=decision.step, caption=[decision.reason])

    def configuration(self, found: Mapping[str, Any]) -> None:
        """One nested entry in the run's config."""
        self._logger.experiment.config.update({"autotune": _plain(found)}, allow_val_change=True)

    def finish(self, decisions: Sequence[Decision], log: Path | None) -> None:
        """The table, once: W&B uploads a table anew each time it grows."""
        last = decisions[-1].step if decisions else 0
        table = [_row(decision) for decision in decisions]
        self._logger.log_table("autotune/decisions", columns=COLUMNS, data=table, step=last)
        self._logger.experiment.summary.update(_results(decisions))


class MLflow(Dashboard):
    """Metrics, parameters, the log and each search's picture as artifacts, results as tags."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self._told: set[str] = set()

    def configuration(self, found: Mapping[str, Any]) -> None:
        """Parameters, each told once: MLflow refuses another value."""
        new = {f"autotune/{key}": value for key, value in _flat(found).items() if key not in self._told}
        self._told |= {key.removeprefix("autotune/") for key in new}
        if new:
            self._logger.log_hyperparams(new)

    def decision(self, decision: Decision) -> None:
        """Metrics; a search's picture."""
        super().decision(decision)
        if decision.kind == "search" and (picture := search_picture(decision)) is not None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / f"search_{decision.step:08d}.png"
                picture.savefig(file)
                self._logger.experiment.log_artifact(self._logger.run_id, str(file), "autotune")

    def finish(self, decisions: Sequence[Decision], log: Path | None) -> None:
        """The log itself and the results as tags, by which runs are found."""
        client, run = self._logger.experiment, self._logger.run_id
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "decisions.jsonl"
            file.write_text("".join(encode(decision) + "\n" for decision in decisions), encoding="utf-8")
            client.log_artifact(run, str(file), "autotune")
        for key, value in _results(decisions).items():
            client.set_tag(run, key.replace("/", "."), value)


_KNOWN: dict[str, type[Dashboard]] = {"TensorBoardLogger": TensorBoard, "WandbLogger": Wandb, "MLFlowLogger": MLflow}

#: TensorBoard's "Custom Scalars" page: the group "Autotune".
LAYOUT = {
    "Autotune": {
        "learning rate": ["Multiline", [r"autotune/lr$", r"autotune/(search|rollback|plateau|setback|climb)/lr$"]],
        "forecast": [
            "Margin",
            ["autotune/forecast/prediction", "autotune/forecast/low", "autotune/forecast/high"],
        ],
        "loss at stage ends": ["Multiline", [r"autotune/stage/(loss|prediction)$"]],
        "batch and noise scale": ["Multiline", [r"autotune/(batch_size|noise_scale|batch/batch)$"]],
        "cost of searches (steps)": ["Multiline", [r"autotune/search/cost_steps$", r"autotune/trial_steps$"]],
    }
}


def dashboard_for(logger: Any) -> Dashboard:
    """The adapter for a logger, by the names of its class and the classes it comes from."""
    for cls in type(logger).__mro__:
        if cls.__name__ in _KNOWN:
            return _KNOWN[cls.__name__](logger)
    return Dashboard(logger)


def _results(decisions: Sequence[Decision]) -> dict[str, float]:
    finish = next((decision for decision in reversed(decisions) if decision.kind == "finish"), None)
    found = {} if finish is None else scalars_of(finish)
    return {**found, "autotune/decisions": float(len(decisions))}


def _row(decision: Decision) -> list[Any]:
    record = decision.to_dict()
    return [record[column] for column in COLUMNS]


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _markdown(decision: Decision) -> str:
    cost = f" ({spell(decision.cost_steps)} steps)" if decision.cost_steps else ""
    return f"**{decision.action}** {_cell(decision.reason)}{cost}"


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in numbers.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{prefix}{key}/"))
        else:
            found[prefix + key] = _primitive(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return None if value is None else _primitive(value)


def _primitive(value: Any) -> bool | int | float | str:
    """``value`` in an exact built-in type: a YAML dump of a subclass (torch's version is one) cannot be loaded."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return spell(value, 6)

"""Each logger is the real library writing real files; what it wrote is read back with the library's own reader."""

import csv
import json
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger

from autotune.callbacks import DecisionLogger
from autotune.callbacks._dashboards import COLUMNS, scalars_of
from autotune.callbacks._run_log import RunLog
from autotune.decision import read_decisions
from tests.callbacks.harness import Save


class Controller(L.Callback):
    """Writes recorded decisions as a controller writes them."""

    def __init__(self, decisions):
        self.recorded, self.decisions, self.lr, self.batch_size = decisions, [], 3e-5, 512

    def on_train_start(self, trainer, pl_module):
        log = RunLog.of(trainer)
        log.open()
        for decision in self.recorded:
            log.write(decision)
            self.decisions.append(decision)

    def teardown(self, trainer, pl_module, stage):
        RunLog.end(trainer)


def fit(folder, logger, recorded, callbacks=(), model=None, **kwargs):
    decision_logger = DecisionLogger()
    trainer = L.Trainer(
        max_steps=4,
        limit_val_batches=0,
        default_root_dir=folder,
        logger=logger,
        callbacks=[decision_logger, Controller(recorded), *callbacks],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"enable_progress_bar": bool(callbacks), **kwargs},
    )
    trainer.fit(model or BoringModel(), torch.utils.data.DataLoader(torch.randn(64, 32), batch_size=4))
    return decision_logger


def expected(decisions, without=()):
    """(name, step, value) of every scalar that these decisions are to leave."""
    return [
        (name, d.step, value)
        for d in decisions
        if d.kind not in {"setup", *without}
        for name, value in scalars_of(d).items()
    ]


def same(found, wanted, rel=0.0):
    """Whether both hold the same names, steps and values; ``rel`` is for readers that keep 32 bits."""
    found, wanted = sorted(found), sorted(wanted)
    assert [item[:2] for item in found] == [item[:2] for item in wanted]
    assert len(wanted) > 30
    assert [item[2] for item in found] == pytest.approx([item[2] for item in wanted], rel=rel, abs=0)


def test_csv_holds_every_scalar(tmp_path, tiny):
    decision_logger = fit(tmp_path, CSVLogger(tmp_path), tiny.decisions)
    folder = decision_logger.path.parent
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(name, int(row["step"]), row[name]) for row in rows for name in row if name.startswith("autotune/")]
    assert read_decisions(folder) == tiny.decisions
    same([(name, step, float(text)) for name, step, text in found if text], expected(tiny.decisions))
    hparams = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert hparams["autotune/search_budget"] == 0.6
    assert hparams["autotune/versions/torch"] == torch.__version__


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_runs_new_folder_has_the_configuration(tmp_path):
    from real_run import train

    from autotune.callbacks import AutoLRS

    save = Save(tmp_path / "mid.ckpt", 30)
    whole, _ = train(tmp_path, [AutoLRS(search_budget=0.5), DecisionLogger(), save], max_steps=60)
    rest, _ = train(tmp_path, [AutoLRS(search_budget=0.5), DecisionLogger()], max_steps=90, ckpt_path=save.path)
    assert whole.log_dir != rest.log_dir
    first, second = (yaml.safe_load(Path(one.log_dir, "hparams.yaml").read_text()) for one in (whole, rest))
    assert first["autotune/search_budget"] == 0.5
    assert second == {**first, "autotune/horizon/total": 90.0, "autotune/horizon/updates": 90.0}


def test_tensorboard_holds_scalars_layout_pictures_texts_and_hparams(tmp_path, tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    decision_logger = fit(tmp_path, TensorBoardLogger(tmp_path), tiny.decisions)
    reader = EventAccumulator(str(decision_logger.path.parent), size_guidance=dict.fromkeys(("scalars", "images"), 0))
    reader.Reload()
    scalars = [
        (tag, event.step, event.value)
        for tag in reader.Tags()["scalars"]
        if tag.startswith("autotune/") and not tag.startswith("autotune/finish") and tag != "autotune/decisions"
        for event in reader.Scalars(tag)
    ]
    same(scalars, expected(tiny.decisions, without=["finish"]), rel=1e-6)

    searches = [d.step for d in tiny.decisions if d.kind == "search"]
    assert [image.step for image in reader.Images("autotune/search")] == searches
    assert all(image.width > 500 for image in reader.Images("autotune/search"))

    layout = Layout.FromString(reader.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["Autotune"]
    assert any(chart.HasField("margin") for chart in layout.category[0].chart)

    table = reader.Tensors("autotune/decisions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [line.split(" | ")[4] for line in table.splitlines()[2:]] == [d.reason for d in tiny.decisions]

    plugin = reader.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(plugin).session_start_info.hparams
    assert hparams["autotune/search_budget"].number_value == 0.6


def wandb_records(file):
    """The records of a W&B offline file: LevelDB's log format (blocks of 32 KiB; crc, length, type) after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, partial = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, sort = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        partial += data[at + 7 : at + 7 + size]
        at += 7 + size
        if sort in (1, 4):  # whole, or the last part of several
            yield wandb_internal_pb2.Record.FromString(partial)
            partial = b""


@pytest.mark.slow
def test_wandb_holds_scalars_table_pictures_and_configuration(tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    import wandb

    logger = WandbLogger(save_dir=tmp_path, offline=True)
    fit(tmp_path, logger, tiny.decisions)
    folder = Path(logger.experiment.dir)
    wandb.finish()
    # The service process writes the file; its last record is the run's exit.
    file, records, end = next(folder.parent.glob("*.wandb")), [], time.monotonic() + 30
    while not any(record.HasField("exit") for record in records) and time.monotonic() < end:
        time.sleep(0.1)
        records = list(wandb_records(file))
    rows, config = [], {}
    for record in records:
        if record.HasField("history"):
            rows.append({tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        for update in record.config.update:
            config["/".join(update.nested_key) or update.key] = json.loads(update.value_json)
    step = ("trainer/global_step",)
    found = [(key[0], row[step], value) for row in rows for key, value in row.items() if len(key) == 1]
    same([item for item in found if item[0].startswith("autotune/")], expected(tiny.decisions))
    pictures = [row[step] for row in rows if ("autotune/search", "count") in row]
    assert pictures == [d.step for d in tiny.decisions if d.kind == "search"]
    path = next(row["autotune/decisions", "path"] for row in rows if ("autotune/decisions", "path") in row)
    content = json.loads((folder / path).read_text())
    assert content["columns"] == COLUMNS
    assert content["data"] == [[d.to_dict()[column] for column in COLUMNS] for d in tiny.decisions]
    assert config["autotune"]["search_budget"] == 0.6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_mlflow_holds_metrics_parameters_artifacts_and_tags(tmp_path, tiny):
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", artifact_location=str(tmp_path / "artifacts"))
    fit(tmp_path, logger, tiny.decisions)
    client, run = logger.experiment, logger.run_id
    names = {name for name, _, _ in expected(tiny.decisions)}
    found = [(name, m.step, m.value) for name in names for m in client.get_metric_history(run, name)]
    same(found, expected(tiny.decisions))
    data = client.get_run(run).data
    assert data.params["autotune/search_budget"] == "0.6"
    assert float(data.tags["autotune.finish.real_steps"]) == 140
    artifacts = {item.path for item in client.list_artifacts(run, "autotune")}
    pictures = {f"autotune/search_{d.step:08d}.png" for d in tiny.decisions if d.kind == "search"}
    assert artifacts == pictures | {"autotune/decisions.jsonl"}
    copy = client.download_artifacts(run, "autotune/decisions.jsonl", str(tmp_path))
    assert read_decisions(copy) == tiny.decisions


class Recorder(Logger):
    """A logger nobody has heard of."""

    name, version = "recorder", 0

    def __init__(self, fail=False):
        super().__init__()
        self.rows, self.hparams, self.fail = [], {}, fail

    def log_metrics(self, metrics, step=None):
        if self.fail and any(name.startswith("autotune/") for name in metrics):
            raise OSError("disk full")
        self.rows.append((metrics, step))

    def log_hyperparams(self, params, *args, **kwargs):
        self.hparams.update(params)


def test_an_unknown_logger_gets_the_scalars(tmp_path, tiny):
    recorder = Recorder()
    fit(tmp_path, recorder, tiny.decisions)
    found = [(n, step, v) for row, step in recorder.rows for n, v in row.items() if n.startswith("autotune/")]
    same(found, expected(tiny.decisions))
    assert recorder.hparams["autotune/controller"] == "TinyRun"


def test_a_failing_logger_is_left_alone_and_the_others_are_served(tmp_path, tiny):
    broken, whole = Recorder(fail=True), Recorder()
    with pytest.warns(UserWarning, match="Recorder takes no further decisions .OSError: disk full"):
        fit(tmp_path, [broken, whole], tiny.decisions)
    assert len(whole.rows) >= len(tiny.decisions) - 1


def test_a_run_that_dies_has_its_table(tmp_path, tiny):
    class Dies(BoringModel):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, TensorBoardLogger(tmp_path), tiny.decisions, model=Dies())
    reader = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    reader.Reload()
    assert "autotune/decisions/text_summary" in reader.Tags()["tensors"]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_the_bar_shows_what_is_in_use_and_nothing_is_printed_over_it(tmp_path, tiny, capfd, bar):
    fit(tmp_path, False, [], callbacks=[bar(refresh_rate=1)])
    without = capfd.readouterr()
    fit(tmp_path, False, tiny.decisions, callbacks=[bar(refresh_rate=1)])
    shown = capfd.readouterr()
    text = shown.out + shown.err
    assert "3e-05" in text
    assert "512" in text
    # Only the bar's own lines: as many as in a run whose controller decides nothing.
    assert text.count("\n") == (without.out + without.err).count("\n")


def test_the_bar_gets_its_own_method_back(tmp_path, tiny):
    bar = TQDMProgressBar()
    fit(tmp_path, False, tiny.decisions, callbacks=[bar])
    assert "get_metrics" not in vars(bar)


def test_without_a_logger_the_log_lies_in_the_root(tmp_path, tiny):
    assert fit(tmp_path, False, tiny.decisions).path == tmp_path / "decisions.jsonl"


def test_the_rich_bar_can_be_drawn_during_a_trial(tmp_path, monkeypatch):
    """Its columns are drawn by a thread that asks the trainer for the bar, also while callbacks are exchanged."""
    from real_run import Net, train

    from autotune.callbacks import AutoLRS

    bar, drawn_in_trials = RichProgressBar(), []

    def training_step(self, batch, batch_idx, own=Net.training_step):
        bar.progress.make_tasks_table(bar.progress.tasks)
        drawn_in_trials.append(bar not in self.trainer.callbacks)
        return own(self, batch, batch_idx)

    monkeypatch.setattr(Net, "training_step", training_step)
    trainer, _ = train(tmp_path, [AutoLRS(search_budget=0.5), DecisionLogger(), bar], enable_progress_bar=True)
    assert trainer.global_step == 120
    assert sum(drawn_in_trials) > 5

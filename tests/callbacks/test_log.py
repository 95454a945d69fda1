"""Every decision is on record: in the file, in the loggers at the right step, and in ``callback_metrics``."""

import csv
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from autotune.callbacks import AdaptiveBatchSize
from autotune.decision import Decision, DecisionLog, read_decisions
from tests.callbacks.harness import Break, Tiny, Witness, controller, loader, trainer, val_loader

pytestmark = pytest.mark.usefixtures("several_searches")

SCALARS = {"autotune/lr", "autotune/peak_lr", "autotune/stage", "autotune/trial_steps", "autotune/search_cost_steps"}


def fit(folder, *callbacks, module=None, **settings):
    L.seed_everything(3, verbose=False)
    callback, witness = controller(min_lr=1e-4, max_lr=3e-2), Witness()
    runner = trainer(folder, callback, *callbacks, witness, **{"max_steps": 60, **settings})
    runner.fit(module or Tiny(), loader(batch=8), val_loader())
    return callback, runner, witness


def test_file_holds_what_was_decided(tmp_path):
    callback, _, _ = fit(tmp_path)
    assert read_decisions(tmp_path) == callback.decisions
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    wanted = {"schema", "step", "effective_step", "kind", "action", "reason", "numbers", "cost_steps"}
    assert all(set(line) == wanted for line in lines)
    assert [line["kind"] for line in lines][:3] == ["setup", "search", "stage"]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert lines[0]["numbers"]["search_budget"] == 0.5
    assert "torch" in lines[0]["numbers"]["versions"]


def test_a_search_is_recorded_with_its_candidates(tmp_path):
    callback, _, witness = fit(tmp_path)
    first = next(one for one in callback.decisions if one.kind == "search")
    assert first.effective_step == 0
    for candidate in first.numbers["candidates"]:
        assert 1e-4 * 0.999 <= candidate["lr"] <= 3e-2 * 1.001
        assert candidate["steps"] <= candidate["horizon_steps"]
        assert candidate["curve"][-1][0] == candidate["steps"] - 1
    # The rate of the first updates is the decided one under warm-up.
    assert max(lrs[0] for lrs in witness.lrs[:5]) == pytest.approx(first.numbers["lr"], rel=0.1)


def test_csv_scalars_stand_at_the_step_of_lightnings_own_row(tmp_path):
    callback, _, witness = fit(tmp_path, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=5)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    ours = {int(row["step"]): row for row in rows if row["autotune/lr"]}
    theirs = {int(row["step"]) for row in rows if row["train_loss_step"]}
    assert set(ours) == theirs == set(range(4, 60, 5))
    for step, row in ours.items():
        assert float(row["autotune/lr"]) == pytest.approx(witness.lrs[step][0])
    assert float(ours[59]["autotune/trial_steps"]) == callback.trial_steps
    assert set(rows[0]) >= SCALARS


def test_tensorboard_scalars(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    _, _, witness = fit(tmp_path, logger=logger, log_every_n_steps=10)
    events = accumulator.EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= SCALARS
    seen = {event.step: event.value for event in events.Scalars("autotune/lr")}
    assert sorted(seen) == [event.step for event in events.Scalars("train_loss_step")] == list(range(9, 60, 10))
    assert all(value == pytest.approx(witness.lrs[step][0]) for step, value in seen.items())
    assert (tmp_path / "run" / "decisions.jsonl").exists()


def test_several_loggers_and_callback_metrics(tmp_path):
    class Reader(Callback):
        def __init__(self):
            self.seen = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                self.seen.append({name for name in trainer.callback_metrics if name.startswith("autotune/")})

    reader = Reader()
    loggers = [CSVLogger(tmp_path / "a", name="", version=""), CSVLogger(tmp_path / "b", name="", version="")]
    _, runner, _ = fit(tmp_path, reader, logger=loggers)
    assert all((tmp_path / name / "metrics.csv").read_text().count("autotune/lr") for name in "ab")
    assert (tmp_path / "a" / "decisions.jsonl").exists()
    assert set(runner.callback_metrics) >= SCALARS
    assert isinstance(runner.callback_metrics["autotune/lr"], torch.Tensor)
    assert reader.seen
    assert all(names >= SCALARS for names in reader.seen)


def test_without_a_logger_the_default_root_holds_the_log(tmp_path):
    _, runner, _ = fit(tmp_path, logger=False)
    assert runner.log_dir in (None, str(tmp_path))
    assert (tmp_path / "decisions.jsonl").exists()


def test_a_second_run_keeps_the_first_runs_log(tmp_path):
    first, _, _ = fit(tmp_path)
    second, _, _ = fit(tmp_path, max_steps=70)
    third, _, _ = fit(tmp_path, max_steps=80)
    assert read_decisions(tmp_path / "decisions.1.jsonl") == first.decisions
    assert read_decisions(tmp_path / "decisions.2.jsonl") == second.decisions
    assert read_decisions(tmp_path) == third.decisions
    assert len(list(tmp_path.glob("decisions*"))) == 3


@pytest.mark.parametrize("how", ["directory is a file", "file is a directory"])
def test_a_log_that_cannot_be_written(tmp_path, how):
    root = tmp_path / "root"
    if how == "directory is a file":
        root.write_text("in the way")
    else:
        (root / "decisions.jsonl" / "full").mkdir(parents=True)
    with pytest.warns(UserWarning, match="decision log cannot be written.*training goes on") as caught:
        callback, runner, _ = fit(root)
    assert sum("decision log" in str(one.message) for one in caught) == 1
    assert runner.global_step == 60
    assert callback.decisions[-1].kind == "finish"


@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
@pytest.mark.parametrize("make", [controller, AdaptiveBatchSize])
def test_a_fit_after_one_that_broke_off_begins_a_log_of_its_own(tmp_path, make):
    breaking = Break(20, tmp_path / "broken.ckpt")
    runner = trainer(tmp_path, make(), breaking, max_steps=40)
    with pytest.raises(ZeroDivisionError):
        runner.fit(Tiny(), loader(batch=8), val_loader())
    breaking.update = -1
    runner.fit(Tiny(), loader(batch=8), val_loader())
    found = read_decisions(tmp_path)
    assert found == runner.callbacks[0].decisions
    assert [one.kind for one in found].count("setup") == 1


def test_the_disk_fills_up_in_the_middle(tmp_path):
    class Fill(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                (tmp_path / "decisions.jsonl").unlink()
                (tmp_path / "decisions.jsonl").mkdir()

    with pytest.warns(UserWarning, match="decision log cannot be written") as caught:
        callback, runner, _ = fit(tmp_path, Fill())
    assert sum("decision log" in str(one.message) for one in caught) == 1
    assert runner.global_step == 60
    assert len(callback.decisions) > 4


class TestDecisionLog:
    ONE, TWO = Decision("stage", "begin", "one", 0), Decision("stage", "end", "two", 5)

    def test_an_earlier_file_is_kept_under_another_name(self, tmp_path):
        DecisionLog(tmp_path / "log.jsonl").write(self.ONE)
        DecisionLog(tmp_path / "log.jsonl").write(self.TWO)
        assert read_decisions(tmp_path / "log.1.jsonl") == [self.ONE]
        assert read_decisions(tmp_path / "log.jsonl") == [self.TWO]

    def test_an_earlier_file_that_the_history_contains_is_replaced(self, tmp_path):
        DecisionLog(tmp_path / "log.jsonl").write(self.ONE)
        log = DecisionLog(tmp_path / "log.jsonl", [self.ONE])
        log.write(self.TWO)
        assert read_decisions(tmp_path / "log.jsonl") == [self.ONE, self.TWO]
        assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]

    def test_a_foreign_or_torn_file_is_kept_too(self, tmp_path):
        (tmp_path / "log.jsonl").write_bytes(b"\xff not ours")
        DecisionLog(tmp_path / "log.jsonl").write(self.ONE)
        assert (tmp_path / "log.1.jsonl").read_bytes() == b"\xff not ours"

    def test_an_empty_file_is_replaced(self, tmp_path):
        DecisionLog(tmp_path / "log.jsonl")
        DecisionLog(tmp_path / "log.jsonl").write(self.ONE)
        assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]

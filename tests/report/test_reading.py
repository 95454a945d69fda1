"""A broken log gives what is whole, and a plain word on the rest."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from real_run import train

from autotune import Decision
from autotune.callbacks import AutoLRS, DecisionLogger
from autotune.decision import encode
from autotune.errors import LogFormatError
from autotune.report.metrics import Series
from autotune.report.reading import distinct, read_run
from autotune.report.summary import rows, summarise
from autotune.report.tracks import batch_size, examples_axis, forecasts, learning_rate, losses
from tests.callbacks.harness import Save


def log(folder, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decisions.jsonl").write_text("".join(lines))
    return folder


def line(**changes):
    return json.dumps({**Decision("search", "set_lr", "why", 3, numbers={"lr": 0.1}).to_dict(), **changes}) + "\n"


def test_a_whole_run_has_no_problem_and_all_curves(tiny):
    run = read_run(tiny.folder)
    assert run.problems == ()
    assert list(run.decisions) == tiny.decisions
    assert losses(run)["train"][0] == "train_loss"
    assert losses(run)["validation"][0] == "val_loss"
    assert len(learning_rate(run).steps) == 140
    assert run.last_step == 140


def test_the_monitored_metric_is_the_validation_curve_alone_whatever_its_name(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,lossy,loss\n0,2.0,4.0\n1,1.0,3.0\n")
    run = read_run(log(tmp_path, line(kind="setup", action="begin", step=0, numbers={"monitor": "lossy"})))
    assert {role: name for role, (name, _) in losses(run).items()} == {"validation": "lossy", "train": "loss"}
    alone = replace(run, metrics={"lossy": run.metrics["lossy"]})
    assert list(losses(alone)) == ["validation"]


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(LogFormatError, match="nowhere does not exist: name a run's directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(LogFormatError, match=r"holds no decisions\.jsonl: was a controller among"):
        read_run(tmp_path)


def test_metrics_without_a_log_make_a_report_that_says_so(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss\n0,2.0\n1,\n2,1.0\n")
    run = read_run(tmp_path)
    assert "holds no decisions.jsonl" in run.problems[0]
    assert run.metrics["train_loss"].values.tolist() == [2.0, 1.0]


def test_an_empty_log(tmp_path):
    with pytest.raises(LogFormatError, match="is empty: the run died before its first decision"):
        read_run(log(tmp_path, ""))


def test_a_truncated_last_line_is_left_out_and_told(tmp_path):
    run = read_run(log(tmp_path, line(), line()[:40]))
    assert len(run.decisions) == 1
    assert run.problems == ("Line 2, the last, was cut short while it was written; it is left out.",)


def test_foreign_lines_are_left_out_and_counted(tmp_path):
    foreign = ["{}\n", "[1]\n", '{"schema":"a"}\n', '{"event":"x"}\n', "not json\n"]
    run = read_run(log(tmp_path, line(), *foreign, line(step=5, effective_step=5)))
    assert [d.step for d in run.decisions] == [3, 5]
    assert [problem.split(":")[0] for problem in run.problems] == [
        "Line 2",
        "Line 3",
        "Line 4",
        "Line 6",
        "1 more lines of the same sort (not a decision).",
    ]


def test_a_newer_schema_is_read_as_far_as_it_goes(tmp_path):
    run = read_run(log(tmp_path, line(schema=9, more=1), line(schema=9, reason=7)))
    assert [d.reason for d in run.decisions] == ["why"]
    assert "written with schema 9, this version knows 1" in run.problems[0]
    assert "Line 2: a decision's 'reason'" in run.problems[1]


def test_a_foreign_file_altogether(tmp_path):
    (tmp_path / "decisions.jsonl").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(LogFormatError, match="not JSON"):
        read_run(tmp_path)


def test_a_directory_of_runs_means_the_newest(tmp_path):
    import os

    for age, name in enumerate(["version_1", "version_0"]):
        log(tmp_path / name, line(reason=name))
        os.utime(tmp_path / name / "decisions.jsonl", (1000 - age, 1000 - age))
    run = read_run(tmp_path)
    assert run.decisions[0].reason == "version_1"
    assert "holds 2 logs below it; this is the newest" in run.problems[0]


def test_every_key_may_be_missing_and_every_value_of_a_wrong_type(tiny, tmp_path):
    """Whatever is taken out of a real log or bent in it: a summary and every figure still come out."""
    from autotune.report.page import content

    random.seed(3)

    def bent(value, depth=0):
        roll = random.random()
        if depth and roll < 0.1:
            return random.choice([None, "x", -1, float("nan"), [], {}, [None], {"a": []}, True])
        if isinstance(value, dict):
            return {k: bent(v, depth + 1) for k, v in value.items() if random.random() > 0.05}
        if isinstance(value, list):
            return [bent(v, depth + 1) for v in value if random.random() > 0.05]
        return value

    for trial in range(60):
        broken = [
            Decision(d.kind, d.action, d.reason, d.step, numbers=bent(dict(d.to_dict()["numbers"])))
            for d in tiny.decisions
        ]
        run = read_run(log(tmp_path / str(trial), *(encode(d) + "\n" for d in broken)))
        body, figures = content([run])
        assert "What it came to" in body
        json.dumps(figures, allow_nan=False)


def test_forecasts_meet_what_came_true(tiny):
    found = forecasts(read_run(tiny.folder))
    ends = [d for d in tiny.decisions if d.kind == "stage" and d.action == "end"]
    assert [f.outcome for f in found] == [d.numbers["loss"] for d in ends]
    assert [f.inside for f in found] == [d.numbers["inside"] for d in ends]


def test_forecasts_of_a_score_have_its_sign(tmp_path):
    told = {"prediction": -0.8, "low": -0.9, "high": -0.7, "target_step": 20, "stage": 1, "sign": -1.0}
    end = line(kind="stage", action="end", step=20, numbers={"index": 1, "loss": -0.85})
    found = forecasts(read_run(log(tmp_path, line(kind="forecast", action="predict", step=10, numbers=told), end)))
    assert [(f.prediction, f.low, f.high, f.outcome, f.inside) for f in found] == [(0.8, 0.7, 0.9, 0.85, True)]


def test_batch_and_examples(tiny):
    run = read_run(tiny.folder)
    size = batch_size(run)
    assert dict(zip(size.steps, size.values, strict=True)) == {0: 16, 20: 32, 60: 64, 140: 128}
    axis = dict(examples_axis(run))
    assert (axis[20], axis[60], axis[140]) == (20 * 16, 20 * 16 + 40 * 32, 20 * 16 + 40 * 32 + 80 * 64)


def test_the_summary_adds_up(tiny):
    summary = summarise(read_run(tiny.folder))
    candidates = [c for d in tiny.decisions if d.kind == "search" for c in d.numbers["candidates"]]
    assert summary.trial_steps == tiny.trial_steps == sum(c["steps"] for c in candidates)
    assert summary.saved_steps == 8 * len(candidates) - tiny.trial_steps > 0
    assert summary.share == tiny.trial_steps / (tiny.trial_steps + 140)
    assert summary.real_steps == 140
    assert summary.batch_changes == 3
    assert len(rows(summary)) == 10


def test_the_last_peak_counts_growths_of_the_batch(tmp_path):
    numbers = {"batch": 64, "lr_gain": 1.5}
    grown = line(kind="batch", action="grow", step=6, effective_step=8, numbers=numbers)
    lines = [line(numbers={"lr": 0.2}), grown, line(kind="finish", action="end", step=10, numbers={"lr": 0.01})]
    run = read_run(log(tmp_path, *lines))
    assert summarise(run).final_lr == pytest.approx(0.3)
    rate = learning_rate(run)
    assert np.interp([4.0, 7.9, 8.1, 9.9], rate.steps, rate.values) == pytest.approx([0.2, 0.2, 0.3, 0.3], rel=1e-3)
    assert rate.values[-1] == 0.01


def test_a_run_that_was_made_longer_is_as_long_as_it_is_now(tmp_path):
    def end(step):
        return line(kind="finish", action="end", step=step, numbers={"real_steps": step, "seconds": step})

    ends = [end(10), end(30)]
    going_on = line(kind="stage", step=20)
    assert summarise(read_run(log(tmp_path / "a", ends[0]))).real_steps == 10
    assert summarise(read_run(log(tmp_path / "b", ends[0], going_on))).real_steps == 20
    whole = summarise(read_run(log(tmp_path / "c", ends[0], going_on, ends[1])))
    assert (whole.real_steps, whole.seconds) == (30, 30)


def test_the_rate_of_a_run_that_was_made_longer_goes_on_after_its_first_end(tmp_path):
    first = [line(numbers={"lr": 0.2}), line(kind="finish", action="end", step=10, numbers={"lr": 0.01})]
    longer = line(kind="climb", action="raise", step=15, effective_step=15, numbers={"lr": 0.3})
    rate = learning_rate(read_run(log(tmp_path, *first, longer)))
    assert list(rate.steps) == sorted(rate.steps)
    assert rate.values[-1] == 0.3


def test_what_is_monitored_is_known_whichever_controller_spoke_first(tiny):
    run = read_run(tiny.folder)
    batch = Decision("setup", "set_batch", "", 0, numbers={"controller": "AdaptiveBatchSize", "batch": 8})
    setup = next(d for d in run.decisions if d.kind == "setup")
    name = "val_accuracy"
    monitored = replace(setup, numbers={**setup.numbers, "monitor": name})
    curves = {**run.metrics, name: next(iter(run.metrics.values()))}
    for order in ([monitored, batch], [batch, monitored]):
        assert losses(replace(run, decisions=tuple(order), metrics=curves))["validation"][0] == name


def test_thinning_keeps_every_extreme():
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.normal(size=100_000))
    values[[17, 50_001, 99_990]] = [1e4, -1e4, np.nan]
    whole = Series(np.arange(100_000.0), values)
    small = whole.thinned(3000)
    assert len(small.steps) <= 3000
    assert np.nanmax(small.values) == 1e4
    assert np.nanmin(small.values) == -1e4
    assert np.isnan(small.values).sum() == 1
    assert (small.steps[0], small.steps[-1]) == (0, 99_999)
    assert set(small.steps) <= set(whole.steps)
    # In every stretch of the run the lowest and highest are those of the whole curve.
    for part in np.array_split(np.arange(100_000), 999):
        inside = (small.steps >= part[0]) & (small.steps <= part[-1])
        assert np.nanmax(small.values[inside]) == np.nanmax(values[part])
        assert np.nanmin(small.values[inside]) == np.nanmin(values[part])


def test_names_of_compared_runs_tell_them_apart(tiny, tmp_path):
    runs = [read_run(log(tmp_path / name / "lightning_logs" / "version_0", line())) for name in ("sgd", "adam", "lion")]
    assert [run.name for run in distinct(runs)] == ["sgd", "adam", "lion"]


def test_metrics_of_tensorboard(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for step in range(2000):
            writer.add_scalar("val_loss", 1 / (1 + step), step)
    run = read_run(log(tmp_path, line()))
    assert len(run.metrics["val_loss"].steps) == 2000
    assert run.metrics["val_loss"].values[-1] == pytest.approx(1 / 2000)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")
def test_curves_of_tensorboard_are_those_of_the_logs_own_run(tmp_path):
    """Two fits and a resumed one write into one folder: each part begins where it does, and the first is another's."""

    def fit(**kwargs):
        logger = TensorBoardLogger(tmp_path, name="", version="one", default_hp_metric=True)
        logger.log_hyperparams({"size": 3})  # at step 0, as every part of a run does
        callbacks = [AutoLRS(search_budget=0.5), DecisionLogger(), Save(tmp_path / f"{len(runs)}.ckpt", 57)]
        runs.append(train(tmp_path, callbacks, logger=logger, **kwargs)[0])
        return read_run(tmp_path / "one")

    runs = []
    alone = fit(max_steps=150)
    assert alone.problems == ()
    assert alone.metrics["autotune/lr"].steps.tolist() == list(range(150))
    own = fit(max_steps=100)
    assert own.metrics["autotune/lr"].steps.tolist() == list(range(100))
    assert own.metrics["epoch"].steps[-1] == 99
    assert len(own.problems) == 1
    assert re.fullmatch(r"\S+ begins another run: \d+ values of files before it are left out\.", own.problems[0])
    resumed = fit(max_steps=80, ckpt_path=tmp_path / "1.ckpt")
    assert resumed.metrics["train_loss"].steps.tolist() == list(range(80))
    first = own.metrics["train_loss"].values[:57].tolist()
    assert resumed.metrics["train_loss"].values[:57].tolist() == first
    assert "goes on from step 57" in resumed.problems[-1]
    kept = read_run(tmp_path / "one" / "decisions.1.jsonl")
    assert (len(kept.metrics), kept.last_step) == (0, 150)
    assert "kept when another run began in its folder" in kept.problems[0]


def test_a_run_that_logs_to_tensorboard_seldom_begins_before_its_second_row_is_due(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for steps in (range(200), range(49, 150, 50)):
        with SummaryWriter(tmp_path) as writer:
            for step in steps:
                writer.add_scalar("train_loss", len(steps), step)
    assert read_run(log(tmp_path, line(step=0))).metrics["train_loss"].steps.tolist() == [49, 99, 149]


def test_metrics_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(b"\xff\xfe\x00step")
    run = read_run(log(tmp_path, line()))
    assert "metrics.csv cannot be read" in run.problems[0]

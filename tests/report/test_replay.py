"""What was found is found again: bit for bit in a run, exactly in a scheduler and in a file."""

import csv
import io
import json
from dataclasses import replace

import lightning as L
import pytest
import torch
from real_run import Bomb, train

from autotune import Decision, read_decisions
from autotune.callbacks import AutoLRS, ReplaySchedule
from autotune.errors import ConfigurationError, LogFormatError, StateError, UnsupportedSetupError
from autotune.replay import load_schedule, schedule_of
from tests.callbacks.harness import Break, Save


def column(trainer, name):
    with open(f"{trainer.log_dir}/metrics.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


def same(first, second):
    (trainer, model), (other_trainer, other) = first, second
    weights = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in weights) and all(
        column(trainer, name) == column(other_trainer, name) for name in ("train_loss", "val_loss", "autotune/lr")
    )


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"max_steps": -1, "max_epochs": 4},
        {"max_steps": -1, "max_epochs": 4, "accumulate_grad_batches": 3},
        {"scheduler": True},
        {"max_steps": -1, "callbacks": [L.pytorch.callbacks.EarlyStopping("val_loss", patience=2)], "max_epochs": 6},
    ],
    ids=["steps", "examples", "accumulation", "scheduler", "no known end"],
)
def test_a_replay_is_the_run_bit_for_bit(tmp_path, limits):
    limits = dict(limits)
    further = limits.pop("callbacks", [])
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5), *further], **limits)
    fresh = [L.pytorch.callbacks.EarlyStopping("val_loss", patience=2) for _ in further]
    second = train(tmp_path / "b", [ReplaySchedule(first[0].log_dir), *fresh], **limits)
    assert len(column(first[0], "train_loss")) > 20
    assert len(set(column(first[0], "autotune/lr"))) > 5 or further
    assert same(first, second)


def test_a_stream_without_a_length_is_replayed_by_its_updates(tmp_path):
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5)], max_steps=-1, max_epochs=3)
    second = train(tmp_path / "b", [ReplaySchedule(first[0].log_dir)], stream=True, max_steps=-1, max_epochs=3)
    assert column(second[0], "autotune/lr") == column(first[0], "autotune/lr")


def test_a_rollback_is_replayed_and_a_replay_too(tmp_path):
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5), Bomb()])
    rollbacks = [d for d in read_decisions(first[0].log_dir) if d.action == "roll_back"]
    assert rollbacks
    second = train(tmp_path / "b", [ReplaySchedule(first[0].log_dir), Bomb()])
    assert same(first, second)
    third = train(tmp_path / "c", [ReplaySchedule(second[0].log_dir), Bomb()])
    assert same(first, third)


def test_a_replay_makes_no_trial_and_says_so(tmp_path):
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5)])
    callback = ReplaySchedule(first[0].log_dir)
    second = train(tmp_path / "b", [callback])
    played, found = read_decisions(second[0].log_dir), read_decisions(first[0].log_dir)
    assert [(d.kind, d.step) for d in played] == [(d.kind, d.step) for d in found]
    assert sum(d.cost_steps for d in found) > 0
    assert sum(d.cost_steps for d in played if d.kind != "rollback") == 0
    assert played == callback.decisions
    assert callback.lr == float(column(second[0], "autotune/lr")[-1])


class Weights(L.Callback):
    """The weights before each update, as the callbacks before this one left them."""

    def __init__(self):
        self.before = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before[trainer.global_step] = [p.detach().clone() for p in pl_module.parameters()]


@pytest.mark.filterwarnings("ignore:.*this run will make 76")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_replay_can_still_roll_back(tmp_path):
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5), Bomb(80)])
    rollback = next(d for d in read_decisions(first[0].log_dir) if d.action == "roll_back")
    assert 0 < rollback.numbers["to_step"] < 76 < rollback.step < 120
    save = L.pytorch.callbacks.ModelCheckpoint(tmp_path / "saved", filename="at76", every_n_train_steps=76)
    whole, resumed = Weights(), Weights()
    callbacks = [ReplaySchedule(first[0].log_dir), whole, Bomb(80), save]
    train(tmp_path / "b", callbacks, max_steps=76, enable_checkpointing=True)
    callback = ReplaySchedule(first[0].log_dir)
    checkpoint = torch.load(tmp_path / "saved" / "at76.ckpt", weights_only=True)
    assert checkpoint["callbacks"]["ReplaySchedule"]["rates"]
    trainer, model = train(tmp_path / "c", [callback, resumed, Bomb(80)], ckpt_path=tmp_path / "saved" / "at76.ckpt")
    back = zip(resumed.before[rollback.step], whole.before[rollback.numbers["to_step"]], strict=True)
    assert all(torch.equal(now, then) for now, then in back)
    assert read_decisions(trainer.log_dir) == callback.decisions
    assert callback.decisions[0].step == 0
    weights = zip(model.state_dict().values(), first[1].state_dict().values(), strict=True)
    assert all(torch.equal(now, then) for now, then in weights)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_replay_that_was_broken_off_in_a_step_goes_on(tmp_path):
    """In the step at which the log goes back, too: what was played there is not played, or told, again."""
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5), Bomb()])
    log, found = first[0].log_dir, read_decisions(first[0].log_dir)
    back = next(d for d in found if d.action == "roll_back")
    for update in (back.step - 1, back.step):
        callbacks = [ReplaySchedule(log), Bomb(), Break(update, tmp_path / f"{update}.ckpt")]
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "b", callbacks)
        trainer, model = train(tmp_path / "c", [ReplaySchedule(log), Bomb()], ckpt_path=tmp_path / f"{update}.ckpt")
        weights = zip(model.state_dict().values(), first[1].state_dict().values(), strict=True)
        assert all(torch.equal(now, then) for now, then in weights)
        assert [(d.kind, d.step) for d in read_decisions(trainer.log_dir)] == [(d.kind, d.step) for d in found]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_replay_does_not_begin_in_the_middle_or_go_on_with_another_log(tmp_path):
    save = Save(tmp_path / "mid.ckpt", 57)
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.5), save])
    with pytest.raises(StateError, match="goes on after 57 updates from a checkpoint that holds no state of Replay"):
        train(tmp_path / "b", [ReplaySchedule(first[0].log_dir)], ckpt_path=tmp_path / "mid.ckpt")
    other = train(tmp_path / "other", [AutoLRS(search_budget=0.4)])
    train(tmp_path / "c", [ReplaySchedule(first[0].log_dir), Save(tmp_path / "replay.ckpt", 57)])
    with pytest.raises(StateError, match=r"log='\d+ decisions, SHA-256 .*the checkpoint has"):
        train(tmp_path / "d", [ReplaySchedule(other[0].log_dir)], ckpt_path=tmp_path / "replay.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_that_began_from_a_plain_checkpoint_is_replayed_from_it(tmp_path):
    train(tmp_path / "a", [Save(tmp_path / "plain.ckpt", 30)])
    first = train(tmp_path / "b", [AutoLRS(search_budget=0.5)], ckpt_path=tmp_path / "plain.ckpt")
    second = train(tmp_path / "c", [ReplaySchedule(first[0].log_dir)], ckpt_path=tmp_path / "plain.ckpt")
    assert same(first, second)


@pytest.mark.parametrize(
    ("limits", "plan", "batch"),
    [
        ({}, ("steps", 120.0), 32),
        ({"max_epochs": 2}, ("examples", 2 * 608.0), 32),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, ("examples", 4 * 608.0), 96),
        ({"max_epochs": 4, "accumulate_grad_batches": 4}, ("examples", 4 * 608.0), 128),
        ({"max_epochs": 4, "accumulate_grad_batches": 4, "limit_train_batches": 9}, ("examples", 4 * 288.0), 128),
    ],
    ids=["steps", "epochs", "3 an update", "4 an update", "limited"],
)
def test_lambda_lr_and_files_hold_what_the_run_did(tmp_path, limits, plan, batch):
    """An epoch of 19 batches, or 9, ends in a short window: it counts as short as it is."""
    limits = {"max_steps": -1, **limits} if limits else {}
    trainer, _ = train(tmp_path, [AutoLRS(search_budget=0.5)], **limits)
    updates = trainer.global_step
    logged = [float(text) for text in column(trainer, "autotune/lr")]
    schedule = load_schedule(trainer.log_dir)
    assert [schedule.rate(step) for step in range(updates)] == logged

    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], lr=5.0)
    scheduler = schedule.lambda_lr(optimizer)
    seen = []
    for _ in range(updates):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert [first for first, _ in seen] == logged
    assert [second for _, second in seen] == pytest.approx([3 * rate for rate in logged], rel=1e-12)

    text = io.StringIO()
    schedule.write_csv(text)
    rows = list(csv.DictReader(io.StringIO(text.getvalue())))
    assert [(int(row["step"]), float(row["lr"])) for row in rows] == list(enumerate(logged))
    assert {int(row["batch_size"]) for row in rows} == {batch}
    text = io.StringIO()
    schedule.write_json(text)
    whole = json.loads(text.getvalue())
    assert [row["lr"] for row in whole["updates"]] == logged
    assert [(found["step"], found["unit"], found["total"]) for found in whole["plans"]] == [(0, *plan)]


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    trainer, _ = train(tmp_path / "a", [AutoLRS(search_budget=0.5)])
    with pytest.raises(UnsupportedSetupError, match=r"had none .* this module has one"):
        train(tmp_path / "b", [ReplaySchedule(trainer.log_dir)], scheduler=True)
    with pytest.raises(UnsupportedSetupError, match="ReplaySchedule and AutoLRS both"):
        train(tmp_path / "b", [ReplaySchedule(trainer.log_dir), AutoLRS(search_budget=0.5)])
    with pytest.warns(UserWarning, match="over 120 updates and this run will make 150"):
        train(tmp_path / "b", [ReplaySchedule(trainer.log_dir)], max_steps=150)
    with pytest.raises(LogFormatError, match="cannot read"):
        ReplaySchedule(tmp_path / "nowhere")


def setup(**numbers):
    shape = {"shape": {"form": "hold", "warmup": 0.0}, "horizon": {"unit": "steps", "total": 8, "updates": 8}}
    return Decision("setup", "begin", "", 0, numbers={**shape, **numbers})


def test_a_growth_counts_from_its_effect_not_from_its_decision():
    """Between the two, a stage begins at the rate before; an undone growth gives the rate back."""
    found = {"lr": 0.5}
    decisions = [
        setup(batch_size=32),
        Decision("search", "set_lr", "", 0, numbers=found),
        Decision("batch", "grow", "", 2, effective_step=4, numbers={"batch": 64, "lr_gain": 1.4}),
        Decision("stage", "begin", "", 3, numbers=found),
        Decision("batch", "undo_growth", "", 6, numbers={"batch": 32, "lr_gain": 1 / 1.4}),
        Decision("finish", "end", "", 8),
    ]
    rows = schedule_of(decisions).rows()
    assert [row["lr"] for row in rows] == pytest.approx([0.5] * 4 + [0.7] * 2 + [0.5] * 2)
    assert [row["batch_size"] for row in rows] == [32] * 4 + [64] * 2 + [32] * 2


def test_a_run_whose_end_moved_has_two_plans():
    decisions = [
        setup(),
        Decision("search", "set_lr", "", 0, numbers={"lr": 1.0}),
        Decision("setup", "replan", "", 4, numbers={"unit": "steps", "total": 16, "shape": {"form": "linear"}}),
        Decision("finish", "end", "", 16),
    ]
    schedule = schedule_of(decisions)
    assert [schedule.rate(step) for step in range(16)] == [1.0] * 4 + [1 - step / 16 for step in range(4, 16)]


def test_a_batch_that_grew_keeps_its_factor_and_its_size():
    decisions = [
        setup(batch_size=32),
        Decision("search", "set_lr", "", 0, numbers={"lr": 0.5}),
        Decision("batch", "grow", "", 3, effective_step=5, numbers={"batch_size": 64, "lr_factor": 2.0}),
        Decision("finish", "end", "", 8),
    ]
    rows = schedule_of(decisions).rows()
    assert [row["lr"] for row in rows] == [0.5] * 5 + [1.0] * 3
    assert [row["batch_size"] for row in rows] == [32] * 5 + [64] * 3


def test_logs_without_a_schedule_are_named():
    search = Decision("search", "set_lr", "", 0, numbers={"lr": 0.5})
    with pytest.raises(LogFormatError, match="no setup record of AutoLRS"):
        schedule_of([search])
    with pytest.raises(LogFormatError, match="no decision that sets a learning rate"):
        schedule_of([setup()])
    scheduled = schedule_of([setup(scheduler=True), search])
    with pytest.raises(ConfigurationError, match="multiplied a learning-rate scheduler of your own"):
        scheduled.rate(0)
    assert scheduled.rows() == []
    assert schedule_of([setup(scheduler=True), search, replace(search, step=1)]).rows() == [{"step": 0, "peak_lr": 0.5}]

"""Looks: where the trainer does not validate, and what searching has left over pays for more probes of all there is."""

from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from autotune.callbacks import AutoLRS, ReplaySchedule
from tests.callbacks.test_guard import UPDATES, Regression, checks, overfit, returns
from tests.callbacks.test_validations import EPOCHS, Fit, timeless

#: Leaves over what a dozen looks cost.
BUDGET = 0.3


def controller(**settings):
    return AutoLRS(search_budget=BUDGET, **settings)


def looks(callback):
    return [d for d in callback.decisions if d.action == "look"]


def by_looks(callback):
    return [move for move in returns(callback) if move.reason.startswith("a look says")]


@pytest.mark.parametrize("seed", range(2))
def test_they_are_spread_over_the_run_and_paid_from_the_budget(tmp_path, seed):
    callback = controller()
    overfit(tmp_path, callback, seed)
    steps = [d.step for d in looks(callback)]
    assert len(steps) >= 10
    assert min(steps) >= UPDATES / 8
    assert max(steps) >= 0.9 * UPDATES
    assert all(after - before >= UPDATES // 40 for before, after in pairwise(steps))
    (price,) = {d.cost_steps for d in looks(callback)}
    assert price == pytest.approx(2.0 / 3.0)  # two batches
    probed = [d.step for d in callback.decisions if d.kind in ("stage", "forecast") and d.cost_steps > 0.0]
    assert len(set(probed)) == len(probed), "the same weights were probed twice"
    assert sum(d.cost_steps for d in callback.decisions if d.kind != "rollback") <= BUDGET * UPDATES


@pytest.mark.parametrize("seed", range(2))
def test_they_choose_the_weights_that_the_run_goes_back_to(tmp_path, seed):
    callback = controller()
    end, past = overfit(tmp_path, callback, seed)
    assert by_looks(callback), "the run overfits, and no look said so"
    first = looks(callback)[0].step
    looked = {d.step: d.numbers["loss"] for d in looks(callback)}
    for move in by_looks(callback):
        assert move.step >= 0.75 * UPDATES
        to = move.numbers["to_step"]
        seen = {step: loss for step, loss in checks(callback) if step < first or step in looked}
        assert seen[to] == min(loss for step, loss in seen.items() if step < move.step)
    last = by_looks(callback)[-1]
    if last.step == UPDATES and last.numbers["to_step"]:
        assert all(map(torch.equal, end, past.after[last.numbers["to_step"]]))


@pytest.mark.parametrize(("every", "made"), [(2, False), (20, True)])
def test_there_are_none_where_the_trainer_validates_often(tmp_path, every, made):
    callback = controller()
    overfit(tmp_path, callback, 1, Regression, max_steps=UPDATES, check_val_every_n_epoch=every)
    assert bool(looks(callback)) == made
    said = [move for move in returns(callback) if move.reason.startswith("validation says")]
    assert bool(said) != made


def test_nor_where_it_validates_just_often_enough(tmp_path):
    """The first validation and the first look would come before the same update."""
    callback = AutoLRS(search_budget=0.5)
    eighths = {"check_val_every_n_epoch": None, "val_check_interval": UPDATES // 8}
    overfit(tmp_path, callback, 1, Regression, max_steps=UPDATES, **eighths)
    assert not looks(callback)
    assert any(move.reason.startswith("validation says") for move in returns(callback))


@pytest.mark.parametrize("seed", [2, 3])
def test_where_validations_have_ceased_they_begin_with_weights_that_are_kept(tmp_path, seed):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=UPDATES // 2, filename="{step}")
    often = {"max_steps": UPDATES, "check_val_every_n_epoch": 2}
    overfit(tmp_path / "a", controller(), seed, Regression, saver, **often)
    callback = controller()
    kept = tmp_path / f"step={UPDATES // 2}.ckpt"
    overfit(tmp_path / "b", callback, 9, Regression, ckpt_path=kept, max_steps=UPDATES)
    for move in by_looks(callback):
        assert f"at step {move.numbers['to_step']}: back to" in move.reason


class Breaks(Regression):
    """The loss is not a number, once."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == self.at else loss


@pytest.mark.slow
@pytest.mark.parametrize("action", ["look", "end"])
def test_a_divergence_that_a_probe_finds_is_undone_once(tmp_path, action):
    """The losses since then are still on the device, and mostly no numbers."""
    callback = controller()
    overfit(tmp_path / "a", callback)
    probes = [d.step for d in callback.decisions if d.kind == "stage" and d.action in ("look", "end")]
    acts = {d.step: d.action for d in callback.decisions if d.kind == "stage" and d.action in ("look", "end")}
    before, step = next((a, b) for a, b in pairwise(probes) if acts[b] == action and acts[a] == "look" and b - a > 3)
    # At the look before it the losses were read; in fewer than ten updates they are not read again.
    Breaks.at = max(before, step - 5)
    broken = controller()
    overfit(tmp_path / "b", broken, 1, Breaks)
    back = [move.step for move in returns(broken) if Breaks.at < move.step <= Breaks.at + 12]
    assert len(back) == 1


@pytest.mark.slow
def test_a_run_that_is_made_longer_looks_no_closer_than_they_count(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=UPDATES // 2, filename="{step}")
    overfit(tmp_path / "a", controller(), 1, Regression, saver)
    callback = controller()
    kept = tmp_path / f"step={UPDATES // 2}.ckpt"
    overfit(tmp_path / "b", callback, 9, Regression, ckpt_path=kept, max_steps=2 * UPDATES)
    steps = [d.step for d in looks(callback) if d.step > UPDATES // 2]
    assert len(steps) >= 10
    assert all(after - before >= 2 * UPDATES // 40 for before, after in pairwise(steps))


def test_there_are_none_where_a_probe_shows_a_part(tmp_path):
    assert not looks(Fit(tmp_path, check_val_every_n_epoch=EPOCHS).callback)


@pytest.mark.parametrize("settings", [{"search": "every_stage"}, {"objective": "forecast"}])
def test_nor_where_searches_take_the_budget(tmp_path, settings):
    callback = controller(**settings)
    overfit(tmp_path, callback)
    assert not looks(callback)


def test_they_are_replayed(tmp_path):
    callback = controller()
    end, _ = overfit(tmp_path / "a", callback)
    assert by_looks(callback)
    again, _ = overfit(tmp_path / "b", ReplaySchedule(tmp_path / "a"))
    assert all(map(torch.equal, end, again))


@pytest.mark.slow
def test_a_resumed_run_looks_where_it_would_have(tmp_path):
    """Saved before the update after which the first look is, after that, and about one that sends the run back."""
    callback = controller()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    end, _ = overfit(tmp_path / "whole", callback, 1, Regression, saver)
    first, back = looks(callback)[0].step, by_looks(callback)[0]
    for step in (first - 1, first, back.step, back.step + 1):
        resumed = controller()
        again, past = overfit(
            tmp_path / str(step), resumed, 9, Regression, ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=UPDATES
        )
        assert min(past.after) == step + 1
        assert all(map(torch.equal, end, again)), step
        assert timeless(resumed) == timeless(callback), step

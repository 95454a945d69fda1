"""The held rate's climb on the real Trainer: what it does to the optimizer's rate, and where it keeps still."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import EarlyStopping

from autotune.callbacks import AutoLRS
from tests.callbacks.harness import Tiny, Witness, loader, searches, trainer, val_loader

UPDATES = 600


def run(folder, module=None, *more, steps=UPDATES, count=240, **settings):
    L.seed_everything(5, verbose=False)
    callback, witness = AutoLRS(**settings), Witness()
    trainer(folder, callback, witness, *more, max_steps=steps).fit(
        Tiny() if module is None else module, loader(count, batch=8), val_loader()
    )
    return callback, [lrs[0] for lrs in witness.lrs]


def climbs(callback):
    return [decision for decision in callback.decisions if decision.kind == "climb"]


def test_the_optimizer_follows_every_step_of_it(tmp_path):
    callback, rates = run(tmp_path)
    moves, peak = climbs(callback), searches(callback)[0].numbers["lr"]
    assert len(moves) >= 3
    assert {move.action for move in moves} <= {"raise", "lower"}
    warm, decays = round(0.02 * UPDATES), UPDATES // 2
    for move in moves:
        assert warm < move.step < decays
        assert rates[move.step - 1] == pytest.approx(peak)
        assert move.numbers["previous_lr"] == pytest.approx(peak)
        peak = move.numbers["lr"]
        assert (peak > move.numbers["previous_lr"]) == (move.action == "raise")
        assert rates[move.step] == pytest.approx(peak)
        assert move.cost_steps == 0.0
    assert rates[decays:] == sorted(rates[decays:], reverse=True)
    assert rates[decays + 1] == pytest.approx(peak, rel=0.01)


def test_without_it_the_run_begins_where_the_search_says(tmp_path):
    with_it, _ = run(tmp_path / "with", steps=150)
    without, rates = run(tmp_path / "without", steps=150, climb=False)
    assert not climbs(without)
    first = [searches(one)[0].numbers["lr"] for one in (with_it, without)]
    assert first[0] == pytest.approx(10**-0.5 * first[1])
    assert max(rates[:75]) == pytest.approx(first[1])


class Averaged(Tiny):
    def configure_optimizers(self):
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(self.parameters(), lr=1e-3)

    def on_train_start(self):
        self.optimizers().optimizer.train()


@pytest.mark.parametrize(
    ("module", "more"),
    [
        (lambda: Tiny(scheduler="lambda"), ()),
        (Tiny, (EarlyStopping("val_loss", patience=100),)),
        pytest.param(Averaged, (), id="schedule-free"),
    ],
)
def test_it_keeps_still_where_the_rate_is_not_ours_to_hold(tmp_path, module, more):
    if module is Averaged:
        pytest.importorskip("schedulefree")
    callback, _ = run(tmp_path, module(), *more, steps=200)
    assert not climbs(callback)
    assert "rise from there" not in searches(callback)[0].reason


def test_it_stays_within_the_users_bounds(tmp_path):
    callback, rates = run(tmp_path, min_lr=1e-4, max_lr=2e-4)
    assert max(rates) <= 2e-4 * (1 + 1e-9)
    assert climbs(callback)


class Breaks(Tiny):
    """Its training loss is not finite for a while."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if 100 <= self.trainer.global_step < 107 else loss


def test_what_was_rolled_back_does_not_rise_again(tmp_path):
    callback, _ = run(tmp_path, Breaks(), steps=800)
    back = next(decision.step for decision in callback.decisions if decision.kind == "rollback")
    assert back < 200, "a rollback in the decay says nothing here"
    before, after = ([one.action for one in climbs(callback) if (one.step < back) == early] for early in (True, False))
    assert "raise" in before
    assert "raise" not in after
    # The same run without the failure does rise later.
    whole, _ = run(tmp_path / "whole", steps=800)
    assert "raise" in [one.action for one in climbs(whole) if one.step >= back]

"""The held rate's climb on the real Trainer: what it does to the optimizer's rate, and where it keeps still."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from autotune.callbacks import AutoLRS, ReplaySchedule
from autotune.callbacks._losses import LossWatch
from autotune.callbacks._lr_climb import HeldRate
from autotune.stage.climb import Climb
from autotune.stage.machine import StageState
from autotune.stage.settings import LRSettings
from tests.callbacks.harness import Save, Tiny, Witness, loader, searches, trainer, val_loader

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


class Product(L.LightningModule):
    """Two small matrices whose product is to be learned: a saddle, from which short trials see no way down."""

    def __init__(self):
        super().__init__()
        self.left, self.right = (torch.nn.Parameter(1e-3 * torch.randn(6, 6)) for _ in range(2))

    def loss(self, batch):
        x, _ = batch
        return ((x @ self.left @ self.right - x @ torch.eye(6).flip(0)) ** 2).mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_on_a_saddle_it_rises_as_far_as_trials_were_harmless(tmp_path):
    callback, _ = run(tmp_path, Product())
    found, moves = searches(callback)[0].numbers, climbs(callback)
    stuck = [move for move in moves if "not clearly below where it began" in move.reason]
    assert len(stuck) >= 4
    assert {move.action for move in stuck} == {"raise"}
    window = UPDATES // 40
    assert any(after.step - before.step < 1.5 * window for before, after in pairwise(stuck)), "one window is enough"
    bound = 1.01 * found["initial_loss"]
    borne = max(one["lr"] for one in found["candidates"] if one["loss"] <= bound)
    # A trial's mean rate is half of its peak, the run's three quarters.
    reach, answer = 0.5 / 0.75 * borne, found["lr"] / Climb().start
    for move in stuck:
        assert move.numbers["previous_lr"] < max(reach, answer), "a step up begins below what did no harm"
    assert 1.5 * answer < max(move.numbers["lr"] for move in stuck)


def test_without_it_the_run_begins_where_the_search_says(tmp_path):
    with_it, _ = run(tmp_path / "with", steps=300)
    without, rates = run(tmp_path / "without", steps=300, climb=False)
    assert not climbs(without)
    first = [searches(one)[0].numbers["lr"] for one in (with_it, without)]
    assert first[0] == pytest.approx(10**-0.5 * first[1])
    assert max(rates[:150]) == pytest.approx(first[1])


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


class Fit:
    """What the climb sees of a fit: its plan, its rate and its losses, ten of them read at a time."""

    def __init__(self, lr=0.1, **settings):
        self.state = StageState(lr=lr)
        self.settings = LRSettings(**settings)
        self.watch = LossWatch()
        self.plan, self.driver = SimpleNamespace(climb=Climb(begin=0.03)), SimpleNamespace(scheduled=False)
        self.moves = []
        self.climb = HeldRate(self)
        self.step = 0

    def record(self, kind, action, reason, *, numbers):
        self.moves.append((action, numbers))

    def train(self, losses, updates=1000):
        for loss in losses:
            self.climb.move(self.step / updates)
            self.step += 1
            self.watch.add(self.step, torch.tensor(float(loss)))

    @property
    def actions(self):
        return [action for action, _ in self.moves]


def falling(count, begin=1.0):
    return [begin / (1.0 + 0.01 * step) for step in range(count)]


def test_losses_of_other_weights_say_nothing():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    fit.train([0.1] * 60)
    before, fit.state = fit.state.lr, replace(fit.state, lr=0.03)
    fit.climb.taken_back(before, fit.step / 1000)
    fit.train(falling(200, begin=5.0))
    assert fit.actions == [], "better than at its own beginning, and not allowed to rise"


def test_losses_of_the_warm_up_say_nothing():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    # From the warm-up to the first window it falls, and then no more.
    fit.train([10.0] * 20 + [1.0] * 300)
    assert fit.actions == []


def test_the_first_losses_tell_of_a_plateau():
    fit = Fit()
    fit.climb.searched(None, 10**-0.5, 0.0, 4.0)
    fit.train([1.0] * 400)
    assert set(fit.actions) == {"raise"}
    assert fit.moves[-1][1]["lr"] == pytest.approx(0.1 * 4.0 / 10**-0.5)


def test_first_losses_that_are_not_finite_are_not_replaced_by_later_ones():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0, 4.0)
    fit.train([float("nan")] * 10 + [1.0] * 400)
    assert fit.actions == []


def test_a_run_that_is_made_longer_is_not_on_a_plateau_for_that():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0, 10.0)
    fit.train([1.0] * 20 + falling(200, begin=0.5))
    fit.climb.clock_moved(fit.step / 3000)
    moves = len(fit.moves)
    fit.train([0.2] * 900, updates=3000)
    assert fit.step / 3000 > Climb().lasting
    assert fit.actions[moves:] == [], "level, but far below where it began"


def test_a_window_waits_for_its_losses():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    # A grown batch leaves five updates of a window's forty.
    fit.train(falling(60), updates=125)
    assert fit.actions
    assert "lower" not in fit.actions


def test_losses_that_are_not_finite_lower_it():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    fit.train([1.0] * 50 + [float("nan")] * 100)
    assert set(fit.actions) == {"lower"}


def test_bounds_of_the_user_hold_and_are_counted():
    fit = Fit(lr=1e-3, min_lr=1e-3)
    fit.climb.searched(None, 1.0, 0.0)
    fit.train([1.0] * 45 + [2.0 + 0.1 * step for step in range(150)])
    assert fit.state.lr == 1e-3
    fit.train(falling(240, begin=0.9))
    assert fit.moves
    assert fit.state.lr <= 10**0.5 * 1e-3 * (1 + 1e-9)


def test_a_rate_beyond_the_bounds_falls_by_one_step():
    fit = Fit(lr=0.0283, max_lr=0.01)
    fit.climb.searched(None, 1.0, 0.0)
    fit.train([1.0] * 45 + [2.0 + step for step in range(80)])
    assert fit.actions[0] == "lower"
    assert fit.moves[0][1]["lr"] == pytest.approx(0.7 * 0.0283)


def test_a_run_that_was_made_longer_begins_to_count_anew():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    fit.train(falling(1000))
    moves = len(fit.moves)
    # Three times as long: the decay's losses are lower than any at the peak.
    fit.climb.clock_moved(fit.step / 3000)
    fit.train(falling(400, begin=0.9), updates=3000)
    assert "lower" not in fit.actions[moves:]


def test_the_log_names_the_best_before():
    fit = Fit()
    fit.climb.searched(None, 1.0, 0.0)
    fit.train(falling(200))
    assert all(numbers["train_loss"] < numbers["best_train_loss"] for _, numbers in fit.moves)


def test_a_short_run_begins_where_it_can_come_back_from(tmp_path):
    starts = {}
    for steps in (130, 600):
        callback, _ = run(tmp_path / str(steps), steps=steps)
        wanted, _ = run(tmp_path / f"{steps} held", steps=steps, climb=False)
        starts[steps] = searches(callback)[0].numbers["lr"] / searches(wanted)[0].numbers["lr"]
    # Five windows of ten updates between warm-up and decay, and two windows for a move.
    assert starts[130] == pytest.approx(0.7**2)
    assert starts[600] == pytest.approx(10**-0.5)


def test_a_resumed_run_climbs_on_and_a_replayed_one_climbs_again(tmp_path):
    callback, rates = run(tmp_path / "whole", None, Save(tmp_path / "at 137.ckpt", 137))
    moves = [move.step for move in climbs(callback)]
    assert any(step < 137 for step in moves)
    assert any(step > 137 for step in moves)

    resumed, witness = AutoLRS(), Witness()
    runner = trainer(tmp_path / "resumed", resumed, witness, max_steps=UPDATES)
    runner.fit(Tiny(), loader(batch=8), val_loader(), ckpt_path=tmp_path / "at 137.ckpt", weights_only=False)
    assert [lrs[0] for lrs in witness.lrs] == rates[137:]
    plain = [one.to_dict() for one in climbs(callback)]
    assert [one.to_dict() for one in climbs(resumed)] == plain

    log = next((tmp_path / "whole").rglob("decisions.jsonl"))
    L.seed_everything(5, verbose=False)
    witness = Witness()
    trainer(tmp_path / "replayed", ReplaySchedule(log), witness, max_steps=UPDATES).fit(
        Tiny(), loader(batch=8), val_loader()
    )
    assert [lrs[0] for lrs in witness.lrs] == rates

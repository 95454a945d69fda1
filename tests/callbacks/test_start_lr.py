"""The optimizer's own learning rate does not matter: it is never consulted, only the ratios of its groups."""

import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR

from autotune.callbacks import AutoLRS
from autotune.callbacks._trainer.peaks import peak_rates
from autotune.errors import ConfigurationError
from tests.callbacks.harness import Tiny, Witness, controller, digest, loader, searches, trainer, val_loader


def run(folder, lr, make_callback, *traits, optimizer="adamw", **settings):
    L.seed_everything(5, verbose=False)
    callback, witness = make_callback(), Witness()
    runner = trainer(folder, callback, witness, **{"max_steps": 120, **settings})
    runner.fit(Tiny("dropout", *traits, optimizer=optimizer, lr=lr), loader(batch=8), val_loader())
    decisions = [
        {**one.to_dict(), "numbers": {k: v for k, v in one.numbers.items() if "seconds" not in k}}
        for one in callback.decisions
    ]
    return callback, witness, decisions


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("traits", [(), ("groups",)])
@pytest.mark.usefixtures("several_searches")
def test_same_decisions_and_same_weights(tmp_path, optimizer, traits):
    runs = [
        run(tmp_path / str(lr), lr, lambda: controller(min_lr=1e-4, max_lr=0.1), *traits, optimizer=optimizer)
        for lr in (1e-6, 1e-3, 10.0)
    ]
    callback, witness, decisions = runs[0]
    assert len(searches(callback)) >= 2
    for _, other, other_decisions in runs[1:]:
        assert other_decisions[1:] == decisions[1:]
        ratios = [one[0]["numbers"]["lr_ratios"] for one in (decisions, other_decisions)]
        assert ratios[0] == pytest.approx(ratios[1])
        assert [one["weights"] for one in other.states] == [one["weights"] for one in witness.states]
        assert [one["optimizer"] for one in other.states] == [one["optimizer"] for one in witness.states]


def test_where_no_search_can_be_made(tmp_path):
    runs = [run(tmp_path / str(lr), lr, AutoLRS, max_steps=4) for lr in (1e-6, 10.0)]
    assert runs[0][2] == runs[1][2]
    assert runs[0][1].lrs == runs[1][1].lrs


def test_a_scheduler_makes_the_peak_irrelevant_but_keeps_its_form(tmp_path):
    def scheduled(lr):
        L.seed_everything(5, verbose=False)
        callback, witness = AutoLRS(min_lr=1e-4, max_lr=0.1, search_budget=0.3), Witness()
        runner = trainer(tmp_path / str(lr), callback, witness, max_steps=120)
        runner.fit(Tiny(scheduler="lambda", lr=lr), loader(batch=8), val_loader())
        return callback, [lrs[0] for lrs in witness.lrs]

    (one, first), (two, second) = scheduled(1e-3), scheduled(1e-1)
    assert [d.action for d in one.decisions] == [d.action for d in two.decisions]
    assert first == pytest.approx(second, rel=1e-6)
    begin = first[: [d.step for d in one.decisions if d.kind == "search"][-1] + 1]
    assert begin == pytest.approx([begin[0] / (1.0 + 0.02 * step) for step in range(len(begin))], rel=1e-6)


def noam(step):
    """The absolute rates of "Attention is all you need", as they are usually written: for ``lr=1``."""
    return 64**-0.5 * min((step + 1) ** -0.5, (step + 1) * 40**-1.5)


class Scheduled(Tiny):
    """A user's own schedulers, of every update or of every epoch."""

    def __init__(self, lr, make, interval="step", **settings):
        super().__init__(lr=lr, **settings)
        self.make, self.interval = make, interval

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), "interval": self.interval}}


def scheduled_run(folder, lr, make, interval="step", *, updates=120, **settings):
    L.seed_everything(5, verbose=False)
    callback, witness = AutoLRS(search_budget=0.3), Witness()
    runner = trainer(folder, callback, witness, max_steps=updates, max_epochs=-1)
    runner.fit(Scheduled(lr, make, interval, **settings), loader(batch=8), val_loader())
    return callback, [lrs[0] for lrs in witness.lrs]


def test_a_schedule_of_absolute_rates_is_what_a_schedule_of_shares_is(tmp_path):
    """What is searched is the rate at the schedule's top, however it is written."""

    def factor(by):
        return lambda optimizer: LambdaLR(
            optimizer, lambda step: by * (step + 1) / 30 if step < 30 else by * 0.98**step
        )

    written = [(0.01, 1.0), (1.0, 0.01), (1e-3, 40.0)]
    runs = [scheduled_run(tmp_path / f"{lr}", lr, factor(by)) for lr, by in written]
    for callback, lrs in runs[1:]:
        assert lrs == pytest.approx(runs[0][1], rel=1e-5)
        assert [d.action for d in callback.decisions] == [d.action for d in runs[0][0].decisions]
    for (lr, by), (callback, lrs) in zip(written, runs, strict=True):
        found = searches(callback)[0].numbers
        assert max(lrs) == pytest.approx(found["lr"], rel=1e-5)
        assert found["multiplier"] == pytest.approx(found["lr"] / (lr * by), rel=1e-5)


@pytest.mark.parametrize(
    ("make", "top"),
    [
        (lambda optimizer: LambdaLR(optimizer, noam), max(map(noam, range(120)))),
        (lambda optimizer: LinearLR(optimizer, 0.1, 1.0, total_iters=30), 1.0),
        (lambda optimizer: LinearLR(optimizer, 0.001, 1.0, total_iters=1200), 0.001 + 0.999 * 119 / 1200),
        (lambda optimizer: CosineAnnealingLR(optimizer, 120), 1.0),
        (lambda optimizer: OneCycleLR(optimizer, max_lr=3.0, total_steps=130), 3.0),
        (
            lambda optimizer: SequentialLR(
                optimizer, [LinearLR(optimizer, 0.1), LambdaLR(optimizer, lambda step: 5.0)], milestones=[4]
            ),
            5.0,
        ),
    ],
)
def test_the_top_of_a_schedule_runs_at_what_was_found(tmp_path, make, top):
    callback, lrs = scheduled_run(tmp_path, 1.0, make)
    found = searches(callback)[-1].numbers
    assert len(searches(callback)) == 1
    assert found["multiplier"] == pytest.approx(found["lr"] / top, rel=0.011)
    assert max(lrs) == pytest.approx(found["lr"], rel=0.011)


def test_a_scheduler_of_epochs_is_looked_at_by_the_epoch(tmp_path):
    make = lambda optimizer: LambdaLR(optimizer, lambda epoch: 1.0 + epoch)  # noqa: E731
    callback, lrs = scheduled_run(tmp_path, 1.0, make, "epoch", updates=60)
    found = searches(callback)[0].numbers
    assert max(lrs) == pytest.approx(2.0 * min(lrs)), "the run has two epochs"
    assert max(lrs) == pytest.approx(found["lr"])
    assert found["multiplier"] == pytest.approx(found["lr"] / 2.0)


class Gauge(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that cannot be stepped apart from its run, or that draws random numbers."""

    def __init__(self, optimizer, draws):
        self.draws, self.lock = draws, None if draws else threading.Lock()
        super().__init__(optimizer)

    def get_lr(self):
        if self.draws:
            torch.rand(1)
        return [group["initial_lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize("draws", [True, False])
def test_looking_ahead_leaves_no_trace(tmp_path, draws):
    L.seed_everything(5, verbose=False)
    module, made = Scheduled(0.5, lambda optimizer: Gauge(optimizer, draws)), []
    runner = trainer(tmp_path, max_steps=4)

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            before = torch.get_rng_state(), digest(trainer.optimizers[0].state_dict())
            scheduler = trainer.lr_scheduler_configs[0].scheduler
            made.append((peak_rates(trainer), scheduler.last_epoch))
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1] == digest(trainer.optimizers[0].state_dict())

    runner.callbacks.append(Look())
    runner.fit(module, loader(batch=8), val_loader())
    assert made == [([0.5], 0)]


def test_a_schedule_of_zeros_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="at its highest"):
        scheduled_run(tmp_path, 0.0, lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))


class Saddle(Tiny):
    """A model whose validation loss short trials do not lower: by no rate, and less the further they go."""

    def on_fit_start(self):
        self.begun = [parameter.detach().clone() for parameter in self.parameters()]

    def validation_step(self, batch, batch_idx):
        moved = sum((now - then).abs().sum() for now, then in zip(self.parameters(), self.begun, strict=True))
        self.log("val_loss", 1.0 + 1e-6 * moved)


@pytest.mark.parametrize(("updates", "legs"), [(700, 2), (300, 1)])
def test_at_a_saddle_it_is_what_is_usual_for_the_optimizer(tmp_path, updates, legs):
    callback = AutoLRS()
    trainer(tmp_path, callback, max_steps=updates).fit(Saddle(), loader(batch=8), val_loader())
    first = searches(callback)[0]
    assert len(first.numbers["legs"]) == legs
    trials = first.numbers["candidates"]
    assert min(one["loss"] for one in trials) >= first.numbers["initial_loss"]
    longest = [one for one in trials if one["horizon_steps"] == trials[-1]["horizon_steps"]]
    # A run holds its peak and a trial does not: what is usual for the one is .68 of what is for the other.
    assert longest[0]["lr"] == pytest.approx(3e-3 / 0.68, rel=0.01)
    assert "usual" in longest[0]["reason"]
    assert first.numbers["lr"] == pytest.approx(10**-0.5 * 3e-3, rel=0.01)
    assert "usual" in first.reason


def test_published_trials_too_short_to_be_extrapolated_are_compared_where_they_end(tmp_path):
    """The first trials of a short run have a few steps; that their curve has no forecast is no explosion."""
    callback, _, _ = run(
        tmp_path, 1e-3, lambda: AutoLRS(objective="forecast", search_budget=0.9, search="every_stage"), max_steps=900
    )
    first = searches(callback)[0]
    small = [one for one in first.numbers["candidates"] if one["lr"] < 1e-2]
    assert small
    assert {one["status"] for one in small} <= {"finished", "stopped"}
    assert "no trial could be ranked" not in first.reason
    assert first.numbers["lr"] > 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_ends_by_the_clock_walks_from_what_is_usual(tmp_path, optimizer):
    """The clock is the trainer's, and cannot be read in the middle of a trial."""
    callback = AutoLRS()
    runner = trainer(tmp_path, callback, max_steps=-1, max_epochs=-1, max_time={"seconds": 4})
    runner.fit(Tiny(optimizer=optimizer), loader(batch=8), val_loader())
    first = searches(callback)[0]
    assert first.action == "set_lr"
    assert "usual" in first.reason
    finish = callback.decisions[-1]
    assert finish.kind == "finish"
    # The steps that timed an update are somebody's too.
    paid = [d.cost_steps for d in callback.decisions[:-1] if d.kind != "rollback"]
    assert finish.numbers["cost_steps"] == pytest.approx(sum(paid))

"""The optimizer's own learning rate does not matter: it is never consulted, only the ratios of its groups."""

import lightning as L
import pytest

from autotune.callbacks import AutoLRS
from tests.callbacks.harness import Tiny, Witness, controller, loader, searches, trainer, val_loader


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
    assert callback.decisions[-1].kind == "finish"

"""What searching costs, counted at the optimizer and at the module, never exceeds what the user allowed."""

import math

import lightning as L
import pytest
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from autotune.callbacks import AutoLRS
from tests.callbacks.harness import Tiny, Witness, examples, loader, trainer, val_loader


class Meter(Callback):
    """Cost so far, from outside: extra optimizer steps, and extra forward passes at a third of a step each.

    A training forward belongs to a step or, alone, to a probe; a validation forward outside Lightning's own
    validation is a probe, at a third of a step for a batch of training size.
    """

    def __init__(self, batch: int, accumulate: int = 1) -> None:
        self.update = batch * accumulate
        self.accumulate = accumulate
        self.witness = Witness()
        self.extra_examples = 0.0
        self.moments: list[tuple[int, float]] = []
        self._own = False

    def observe(self, module: L.LightningModule) -> None:
        self.witness.observe(module)
        original = module.validation_step

        def validation_step(batch, *args):
            self.extra_examples += 0 if self._own else len(batch[0])
            return original(batch, *args)

        module.validation_step = validation_step

    @property
    def trial_steps(self) -> int:
        return self.witness.steps - len(self.witness.lrs)

    @property
    def cost(self) -> float:
        bare = self.witness.forwards - len(self.witness.batches) - self.trial_steps * self.accumulate
        return self.trial_steps + (self.extra_examples + bare * self.update / self.accumulate) / self.update / 3.0

    def on_validation_start(self, *_):
        self._own = True

    def on_validation_end(self, *_):
        self._own = False

    def on_train_batch_end(self, trainer, *_):
        self.moments.append((trainer.global_step, self.cost))


def measured(folder, budget, batch=8, val=True, **settings):
    L.seed_everything(4, verbose=False)
    arguments = {name: settings.pop(name) for name in ("search", "objective") if name in settings}
    callback = AutoLRS(search_budget=budget, min_lr=1e-4, max_lr=1.0, **arguments)
    meter, module = Meter(batch, settings.get("accumulate_grad_batches", 1)), Tiny("dropout")
    meter.observe(module)
    runner = trainer(folder, callback, meter, meter.witness, **settings)
    data = DataLoader(examples(480), batch, shuffle=True)
    runner.fit(module, data, val_loader() if val else None)
    return callback, runner, meter


RUNS = {
    "steps": {"max_steps": 200},
    "epochs": {"max_epochs": 4},
    "accumulate": {"max_epochs": 8, "accumulate_grad_batches": 2},
    "short": {"max_steps": 40},
    "no validation": {"max_steps": 200, "val": False},
    "published": {"max_steps": 200, "objective": "forecast"},
    "early end": {"max_epochs": 4, "max_steps": 100},
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.3])
def test_cost_is_capped_at_every_moment(tmp_path, run, budget):
    callback, runner, meter = measured(tmp_path, budget, search="every_stage", **RUNS[run])
    planned = callback.decisions[0].numbers["horizon"]["updates"]
    real = runner.global_step
    assert planned == real
    assert meter.witness.steps <= (1.0 + budget) * real
    cap = budget * planned + 1e-6
    first = meter.moments[0][1]
    for done, cost in meter.moments:
        assert cost <= cap
        # Spent gradually: what comes after the first search is paid by updates that have been made.
        assert cost <= 2.0 * budget * done + first + 1e-6
    assert meter.cost <= cap
    # Our own counters agree with what was seen from outside.
    assert callback.trial_steps == meter.trial_steps
    finish = callback.decisions[-1].numbers
    assert finish["trial_steps"] == meter.trial_steps
    assert finish["real_steps"] == real
    assert finish["cost_steps"] >= meter.cost - 1e-6
    recorded = sum(one.cost_steps for one in callback.decisions if one.kind != "rollback")
    assert recorded == pytest.approx(finish["cost_steps"])


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_the_budget_is_used(tmp_path, budget):
    callback, runner, meter = measured(tmp_path, budget, max_steps=200)
    assert meter.trial_steps > 0.4 * budget * runner.global_step
    assert any(one.action == "set_lr" for one in callback.decisions)


@pytest.mark.parametrize(
    ("epochs", "said"), [(1000, "if you mean 1000, set max_epochs=1001"), (1001, "ends at 240240")]
)
def test_a_thousand_epochs_are_what_lightning_puts_in_for_none(tmp_path, epochs, said):
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    callback = AutoLRS(search_budget=0.001)
    runner = trainer(tmp_path, callback, Stop(), max_epochs=epochs)
    runner.fit(Tiny(), loader(), val_loader())
    assert said in callback.decisions[0].reason


def test_an_unknown_end_is_paid_by_what_has_been_done(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping

    L.seed_everything(4, verbose=False)
    callback, meter, module = AutoLRS(search_budget=0.1, search="every_stage"), Meter(8), Tiny("dropout")
    meter.observe(module)
    stopper = EarlyStopping("val_loss", patience=50)
    runner = trainer(tmp_path, callback, stopper, meter, meter.witness, max_epochs=5)
    runner.fit(module, loader(480, batch=8), val_loader())
    assert not math.isfinite(callback.decisions[0].numbers["horizon"]["total"])
    first = meter.moments[0][1]
    assert all(cost <= 0.2 * done + first + 1e-6 for done, cost in meter.moments)
    # Nor more than the share of all that it may make, which is when it does not end before.
    assert 0.0 < callback.decisions[-1].numbers["cost_steps"] <= 0.1 * 5 * 60


def test_readable_during_the_fit(tmp_path):
    class Reader(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_end(self, trainer, *_):
            self.seen.append((callback.lr, callback.trial_steps, len(callback.decisions)))

    callback, reader = AutoLRS(search_budget=0.3), Reader()
    assert callback.lr is None
    assert callback.trial_steps == 0
    assert callback.decisions == []
    witness = Witness()
    trainer(tmp_path, callback, reader, witness, max_steps=240).fit(Tiny(), loader(batch=8), val_loader())
    assert [lr for lr, _, _ in reader.seen] == [lrs[0] for lrs in witness.lrs]
    assert reader.seen[0][1] > 0
    assert callback.trial_steps == witness.steps - len(witness.lrs)
    assert reader.seen[-1][2] <= len(callback.decisions)

"""What the run is judged on: which examples a probe evaluates, how many it can pay, and what share they are."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from autotune.callbacks import AutoLRS
from tests.callbacks.harness import trainer

UPDATES, BATCH = 600, 8


class Endless(Sampler):
    """In order, and without a length."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return iter(range(self.count))


class Numbered(L.LightningModule):
    """Regression on examples that carry a number."""

    def __init__(self, logs=True):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.logs = logs

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[0][:, :1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        if self.logs:
            self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Probed(Callback):
    """What a checkpoint would hold of the best probe, and the numbers of the examples of each evaluated batch.

    These are kept here: whatever a module keeps, a probe puts back.
    """

    def __init__(self, controller, module):
        self.controller, self.best, self.batches = controller, None, []
        evaluate = module.validation_step

        def validation_step(batch, batch_idx):
            self.batches.append(tuple(batch[1].tolist()))
            evaluate(batch, batch_idx)

        module.validation_step = validation_step

    @property
    def shown(self):
        """All examples that were evaluated."""
        return {number for batch in self.batches for number in batch}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.best = self.controller.state_dict()["run"]["stage"]["best_probe"]


def numbered(count, seed=0):
    return TensorDataset(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), torch.arange(count))


def probed(folder, count, val_batch, controller=None, *, logs=True, loading=None, **options):
    """A fit without a validation of Lightning's own: all that is evaluated, a probe evaluates."""
    L.seed_everything(0, verbose=False)
    module, controller = Numbered(logs), AutoLRS() if controller is None else controller
    watch = Probed(controller, module)
    options = {"max_steps": UPDATES, "check_val_every_n_epoch": 10**6, "num_sanity_val_steps": 0, **options}
    train = DataLoader(numbered(256), BATCH, shuffle=True)
    val = DataLoader(numbered(count, 1), val_batch, **loading or {})
    trainer(folder, controller, watch, **options).fit(module, train, val)
    return controller, watch


@pytest.mark.parametrize(
    ("count", "val_batch", "options", "of"),
    [
        (64, 8, {}, 64),
        (20, 8, {}, 20),
        (640, 8, {"limit_val_batches": 2}, 16),
        (640, 32, {"limit_val_batches": 1}, 32),
        (640, 256, {"limit_val_batches": 2}, 512),
        (30, 256, {}, 30),
        (24, 8, {"limit_val_batches": 0}, None),
        (24, 8, {"loading": {"shuffle": True}}, 24),
        (640, 8, {"loading": {"shuffle": True}, "limit_val_batches": 2}, None),
        (24, 8, {"loading": {"sampler": Endless(24)}}, None),
    ],
)
@pytest.mark.parametrize("search", ["every_stage", "on_evidence"])
@pytest.mark.filterwarnings("ignore:.*shuffling enabled")
def test_a_probe_knows_what_share_it_is_of_all_there_is(tmp_path, count, val_batch, options, of, search):
    _, watch = probed(tmp_path, count, val_batch, AutoLRS(search=search, search_budget=0.3), **options)
    seen = watch.shown
    assert watch.best["share"] == (0.0 if of is None else pytest.approx(len(seen) / of))
    if of is not None:
        # In order, so that nothing beyond a limit may be looked at; a batch of training size is the finest there is.
        assert len(seen) <= of
        assert max(seen) < of
        assert len(seen) > 0.5 * of or search == "every_stage" or of > 300


def test_after_the_first_search_a_probe_is_larger_and_holds_the_batches_of_before(tmp_path):
    controller, watch = probed(tmp_path, 1000, 64, AutoLRS(search_budget=0.3))
    small, large = watch.batches[:2], watch.batches[-len(watch.best["batches"]) :]
    assert len(large) > 2 * len(small)
    assert large[:2] == small
    (first,) = [d for d in controller.decisions if d.kind == "stage" and d.numbers["index"] == 1 and d.cost_steps][:1]
    assert first.action == "begin"
    assert first.cost_steps == pytest.approx(len(large) / 3)
    spent = sum(d.cost_steps for d in controller.decisions if d.kind != "rollback")
    assert 0.5 * 0.3 * UPDATES < spent <= 0.3 * UPDATES
    assert spent == pytest.approx(controller.decisions[-1].numbers["cost_steps"])
    assert not [d for d in controller.decisions if "no room" in d.reason], "the last check is paid as well"


@pytest.mark.parametrize(
    ("settings", "logs"), [({"search": "every_stage"}, True), ({"objective": "forecast"}, True), ({}, False)]
)
def test_it_stays_small_where_what_is_left_is_for_searches_or_where_no_validation_loss_is_logged(
    tmp_path, settings, logs
):
    controller, _ = probed(tmp_path, 1000, 64, AutoLRS(**settings), logs=logs)
    begins = [d for d in controller.decisions if d.kind == "stage" and d.action == "begin"]
    assert begins
    assert not any(d.cost_steps for d in begins)


def test_a_validation_set_that_a_search_evaluates_wholly_is_not_evaluated_again(tmp_path):
    controller, watch = probed(tmp_path, 2 * BATCH, 64)
    assert watch.best["share"] == 1.0
    assert not any(d.cost_steps for d in controller.decisions if d.kind == "stage" and d.action == "begin")
    assert watch.shown == set(range(2 * BATCH))

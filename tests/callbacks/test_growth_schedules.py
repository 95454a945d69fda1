"""What a user planned in updates or epochs means the same after growth."""

import lightning as L
import pytest
import torch

from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize
from tests.batch.toys import QUIET, Weighing, loader, validation
from tests.callbacks.harness import Save

pytestmark = [pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")]


class Scheduled(Weighing):
    """One step scheduler of the user's, as long as the trainer says the run is."""

    def __init__(self, frequency=1, **kwargs):
        super().__init__(**kwargs)
        self.frequency, self.rates, self.planned = frequency, [], 0

    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        self.planned = self.trainer.estimated_stepping_batches // self.frequency
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.planned)
        return [optimizer], [{"scheduler": decay, "interval": "step", "frequency": self.frequency}]


def fit(path, model, *extra, ckpt=None, workers=0, batch=16, **kwargs):
    callback = AdaptiveBatchSize(max_batch_size=batch, rule="norm", every_n_steps=3, lr_scaling="none")
    options = {**QUIET, "max_epochs": 3, "default_root_dir": path, "num_sanity_val_steps": 0, **kwargs}
    trainer = L.Trainer(callbacks=[callback, *extra], **options)
    L.seed_everything(1, verbose=False)
    resume = {"ckpt_path": ckpt, "weights_only": True} if ckpt else {}
    trainer.fit(model, loader(num_workers=workers), validation(), **resume)
    return trainer, callback


def test_the_length_is_the_planned_one_before_and_after_a_resume(tmp_path):
    """The loader is set up while the optimizer is built; an integer cadence is longer than a grown epoch."""
    whole, resumed = Scheduled(), Scheduled()
    _, callback = fit(tmp_path, whole, Save(tmp_path / "mid.ckpt", 12), val_check_interval=20)
    assert callback.batch_size == 16
    fit(tmp_path, resumed, ckpt=tmp_path / "mid.ckpt", val_check_interval=20)
    assert whole.planned == resumed.planned == 75
    assert resumed.rates == whole.rates[12:]


class MemoryLimit(L.Callback):
    """Micro-batches end at five examples: growth has to accumulate."""

    def on_train_start(self, trainer, pl_module):
        trainer.callbacks[0]._windows.piece_limit = 5


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("frequency", [1, 5])
@pytest.mark.parametrize("extra", [[], [MemoryLimit()]], ids=["micro", "accumulated"])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_schedule_stands_where_it_was_planned_to(tmp_path, accumulate, frequency, extra, workers):
    options = {"accumulate_grad_batches": accumulate, "workers": workers}
    model, plain = Scheduled(frequency), Scheduled(frequency)
    trainer, callback = fit(tmp_path, model, *extra, batch=16 * accumulate, **options)
    reference, _ = fit(tmp_path, plain, batch=1, **options)
    assert len(model.rates) < len(plain.rates)
    assert callback.batch_size > 4 * accumulate
    planned = dict(zip(_examples_before(plain), plain.rates, strict=True))
    for examples, rate in zip(_examples_before(model), model.rates, strict=True):
        # Where no planned update began at that example, the one under way there counts.
        assert rate == planned[max(at for at in planned if at <= examples)]
    ends = [one.lr_scheduler_configs[0].scheduler.last_epoch for one in (trainer, reference)]
    assert ends[0] == ends[1]


def _examples_before(model):
    counts = [int((weights > 0).sum()) for weights in model.updates]
    return [sum(counts[:index]) for index in range(len(counts))]


def test_with_max_steps_an_update_is_a_step(tmp_path):
    model = Scheduled()
    trainer, callback = fit(tmp_path, model, max_steps=40, max_epochs=-1)
    assert callback.batch_size == 16
    assert trainer.global_step == model.planned == 40
    assert model.rates == pytest.approx([1 - step / 40 for step in range(40)])


def test_a_resumed_run_steps_on_from_where_it_was(tmp_path):
    whole, resumed = Scheduled(), Scheduled()
    fit(tmp_path, whole, Save(tmp_path / "mid.ckpt", 9))
    fit(tmp_path, resumed, ckpt=tmp_path / "mid.ckpt")
    assert resumed.rates == whole.rates[9:]
    assert whole.rates[-1] < 0.2


class Noisy(Scheduled):
    """Random labels: there is nothing but noise; ``pure``: hardly any."""

    def __init__(self, pure=False):
        super().__init__(examples=8)
        self.pure = pure

    def training_step(self, batch, batch_idx):
        x, y = batch
        return (self.layer(x) - (x.sum(1, keepdim=True) if self.pure else y)).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        made = super().configure_optimizers()
        made[0][0].param_groups[0]["lr"] = made[0][0].param_groups[0]["initial_lr"] = 0.01
        made[1][0]["scheduler"].base_lrs = [0.01]
        return made


def test_the_default_rule_takes_the_place_of_the_decay(tmp_path):
    """Fewer updates; no growth at the peak; the rate rises above it only where noise allows."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(1000, 8), torch.randn(1000, 1))
    updates = {}
    for pure in (False, True):
        callback = AdaptiveBatchSize(max_batch_size=128, every_n_steps=5, rest_updates=5)
        trainer = L.Trainer(callbacks=[callback], max_epochs=4, default_root_dir=tmp_path, **QUIET)
        L.seed_everything(1, verbose=False)
        model = Noisy(pure)
        rates = []
        model.on_before_zero_grad = lambda optimizer, rates=rates: rates.append(optimizer.param_groups[0]["lr"])
        trainer.fit(model, torch.utils.data.DataLoader(data, 8, shuffle=True))
        grown = [d for d in callback.decisions if d.action == "grow"]
        assert grown[0].numbers["batch"] == 16
        updates[pure] = trainer.global_step
        for decision in grown:
            assert decision.numbers["lr_gain"] == decision.numbers["batch"] / decision.numbers["batch_before"]
        # 16 is nearer than 8 from 12 on, where a pure signal's rate would be at two thirds of its peak.
        assert pure is False or max(rates) <= 0.01 * 16 / 12 * 1.1
    assert updates[True] <= 0.62 * 500
    assert updates[False] < updates[True]


class Unbearable(Noisy):
    """Its loss explodes in larger batches until so many growths were undone."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        undone = sum(d.action == "undo_growth" for d in self.trainer.callbacks[0].decisions)
        return loss * 1e6 if len(batch[0]) > 8 and undone < self.failures else loss


@pytest.mark.parametrize(
    ("failures", "scaling", "gains"),
    [(1, "auto", [2, 2, 1.5]), (2, "auto", [2, 2, 1, 1]), (3, "auto", [2, 2, 1]), (2, "linear", [2, 2])],
)
def test_growths_that_fail_leave_the_rate_alone_in_the_end(tmp_path, failures, scaling, gains):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(1000, 8), torch.randn(1000, 1))
    callback = AdaptiveBatchSize(max_batch_size=128, every_n_steps=5, rest_updates=5, lr_scaling=scaling)
    trainer = L.Trainer(callbacks=[callback], max_epochs=4, default_root_dir=tmp_path, **QUIET)
    L.seed_everything(1, verbose=False)
    model, rates = Unbearable(failures), []
    model.on_before_zero_grad = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    trainer.fit(model, torch.utils.data.DataLoader(data, 8, shuffle=True))
    changes = callback.decisions[1:]
    assert [d.action for d in changes[: 2 * failures]] == ["grow", "undo_growth"] * min(failures, len(gains))
    assert [d.numbers["lr_gain"] for d in changes if d.action == "grow"] == gains
    assert callback.batch_size == (24 if len(gains) > failures else 8)
    # Back at the scheduled rate where growths have failed for good, above it where one was borne.
    assert (rates[-1] > 0.01 / 500 * 2.5) == (failures == 1)

"""A grown batch outlives a resume, and one that does harm is undone, also after a resume."""

import lightning as L
import pytest
import torch
from torch import nn

from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize
from autotune.decision import read_decisions
from tests.batch.toys import (
    QUIET,
    Weighing,
    fit,
    loader,
    validation,
)
from tests.callbacks.harness import Break, Save

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive"),
]


class Fragile(Weighing):
    """Trains well until an update of more than four examples comes; then its loss explodes."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        big = len(batch[0]) > 4 and not self.trainer.callbacks[0].decisions[-1].action.startswith("undo")
        return loss + (1e6 * self.layer.weight.square().sum() + 1e3 if big else 0.0)


@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
def test_a_growth_after_which_the_loss_explodes_is_undone_and_remembered(tmp_path):
    callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", every_n_steps=3, lr_scaling="linear")
    _, model, _ = fit(tmp_path, callback, Fragile())
    assert [d.action for d in callback.decisions] == ["set_batch", "grow", "undo_growth", "end"]
    assert callback.batch_size == 4
    assert torch.isfinite(model.layer.weight).all()
    assert model.layer.weight.abs().max() < 0.1
    assert sum(len(batch) for batch in model.batches) == 300


@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize(("optimizer", "scaling"), [(torch.optim.SGD, "linear"), (torch.optim.Adam, "sqrt_betas")])
def test_a_growth_on_probation_is_undone_after_a_resume_as_well(tmp_path, optimizer, scaling):
    def run(model, **kwargs):
        callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", every_n_steps=3, lr_scaling=scaling)
        return fit(tmp_path, callback, model, **kwargs)

    whole, resumed = Fragile(optimizer=optimizer), Fragile(optimizer=optimizer)
    trainer, _, callback = run(whole, extra=[Save(tmp_path / "mid.ckpt", 3)])
    grow, undo, _ = callback.decisions[1:]
    assert grow.effective_step < 3 < undo.step
    trainer_again, _, again = run(resumed, ckpt_path=tmp_path / "mid.ckpt")
    assert again.decisions == callback.decisions
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    found = (one.optimizers[0].param_groups[0] for one in (trainer, trainer_again))
    groups = [{key: value for key, value in group.items() if key != "params"} for group in found]
    assert groups[0] == groups[1]
    assert groups[0].get("betas", (0.9, 0.999)) == (0.9, 0.999)


@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_that_broke_off_in_a_step_goes_on_with_the_rate_the_sizes_and_the_log(tmp_path):
    """In each step of an epoch in which the batch has grown, the last one too; by the same trainer."""

    def adaptive():
        return AdaptiveBatchSize(max_batch_size=16, rule="norm", every_n_steps=3, lr_scaling="linear")

    _, whole, callback = fit(tmp_path / "whole", adaptive())
    grow, end = callback.decisions[1], [sum(map(len, whole.batches[:at])) for at in range(20)].index(100)
    assert {len(batch) for batch in whole.batches[:end]} == {4, 16}
    for update in range(grow.step, end + 1):
        folder, again = tmp_path / str(update), adaptive()
        breaking = Break(update, folder / "broken.ckpt")
        options = {**QUIET, "max_epochs": 3, "default_root_dir": folder, "num_sanity_val_steps": 0}
        trainer = L.Trainer(callbacks=[again, breaking], **options)
        broken, resumed = Weighing(), Weighing()
        L.seed_everything(1, verbose=False)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(broken, loader(), validation())
        breaking.update = -1
        trainer.fit(resumed, loader(), validation(), ckpt_path=folder / "broken.ckpt", weights_only=True)
        assert resumed.batches == whole.batches[update:], update
        assert torch.equal(resumed.layer.weight, whole.layer.weight)
        assert read_decisions(folder) == again.decisions == callback.decisions


class Deep(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(100, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean() - self.net(batch[0]).mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [2, 4, 8, 9, 14, 21])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, at, workers):
    def run(model, ckpt=None, extra=()):
        callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", eta=1e-3, every_n_steps=3)
        options = {**QUIET, "max_epochs": 3, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
        trainer = L.Trainer(callbacks=[callback, *extra], **options)
        L.seed_everything(1, verbose=False)
        trainer.fit(model, loader(num_workers=workers), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return callback

    whole = Deep()
    reference = run(whole, extra=[Save(tmp_path / "mid.ckpt", at)])
    resumed = Deep()
    callback = run(resumed, tmp_path / "mid.ckpt")
    assert reference.batch_size == callback.batch_size == 16
    assert resumed.losses == whole.losses[at:]
    assert callback.decisions == reference.decisions
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


class Planned(Deep):
    """Its scheduler asks for the run's length, which sets the loader up before training does."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_resumed_run_whose_loader_is_set_up_twice_goes_on_bit_for_bit(tmp_path):
    def run(model, ckpt=None, extra=()):
        callback = AdaptiveBatchSize(max_batch_size=64, every_n_steps=2, rest_updates=5)
        options = {**QUIET, "max_epochs": 6, "default_root_dir": tmp_path, "num_sanity_val_steps": 0}
        trainer = L.Trainer(callbacks=[callback, *extra], reload_dataloaders_every_n_epochs=1, **options)
        L.seed_everything(1 if ckpt is None else 9, verbose=False)
        trainer.fit(model, loader(), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return callback

    L.seed_everything(2, verbose=False)
    whole = Planned()
    savers = [Save(tmp_path / f"{at}.ckpt", at) for at in range(26, 100)]
    reference = run(whole, extra=savers)
    grown = next(one.effective_step for one in reference.decisions if one.action == "grow")
    assert grown > 25
    assert grown % 25
    for at in (grown + 1, grown + 2):
        resumed = Planned()
        callback = run(resumed, tmp_path / f"{at}.ckpt")
        assert resumed.losses == whole.losses[at:]
        assert callback.decisions == reference.decisions

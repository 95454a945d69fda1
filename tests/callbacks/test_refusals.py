"""Setups and arguments that cannot be served are refused by name, with what to do instead."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)

from autotune.callbacks import AutoLRS
from autotune.errors import AutotuneError, ConfigurationError, MonitorError, UnsupportedSetupError
from tests.callbacks.harness import Tiny, loader, trainer, val_loader


class Manual(Tiny):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Manual):
    def configure_optimizers(self):
        return [torch.optim.SGD(self.body.parameters()), torch.optim.SGD(self.head.parameters())]


class NoOptimizer(Tiny):
    def configure_optimizers(self):
        return None


class OwnIterator(Tiny):
    def training_step(self, dataloader_iter):
        batch, index, _ = next(dataloader_iter)
        return super().training_step(batch, index)


def refused(folder, error, match, module=None, callbacks=(), callback=None, val=True, **settings):
    module = module or Tiny()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    runner = trainer(folder, callback or AutoLRS(), *callbacks, **{"max_steps": 120, **settings})
    with pytest.raises(error, match=match) as caught:
        runner.fit(module, loader(batch=8), val_loader() if val else None)
    assert isinstance(caught.value, AutotuneError)
    assert runner.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (lambda: LearningRateFinder(), "LearningRateFinder.*remove it"),
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging.*remove it"),
        (lambda: GradientAccumulationScheduler({0: 2}), "Trainer\\(accumulate_grad_batches=k\\)"),
    ],
)
def test_callbacks_that_fight_over_the_same_knob(tmp_path, callback, match):
    refused(tmp_path, UnsupportedSetupError, f"AutoLRS: .*{match}", callbacks=[callback()])


def test_a_second_controller(tmp_path):
    # Lightning itself objects to two callbacks of one state key, where it looks; ours says what to do.
    class Other(AutoLRS):
        @property
        def state_key(self):
            return "other"

    second = Other()
    second.__class__ = AutoLRS
    runner = trainer(tmp_path, AutoLRS(), max_steps=10)
    runner.callbacks.append(second)
    with pytest.raises(UnsupportedSetupError, match=r"two of this callback.*keep one"):
        runner.fit(Tiny(), loader(), val_loader())
    with pytest.raises((UnsupportedSetupError, RuntimeError), match=r"two of this callback|more than one"):
        trainer(tmp_path, AutoLRS(), AutoLRS(), max_steps=10).fit(Tiny(), loader(), val_loader())


def test_the_batch_size_finder(tmp_path):
    class Data(L.LightningDataModule):
        batch_size = 8

        def train_dataloader(self):
            return loader(batch=8)

    runner = trainer(tmp_path, BatchSizeFinder(), AutoLRS(), max_steps=10)
    with pytest.raises(UnsupportedSetupError, match=r"AutoLRS: .*BatchSizeFinder.*Tuner"):
        runner.fit(Tiny(), datamodule=Data())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "match"),
    [
        (Manual, "manual optimization.*automatic optimization"),
        (TwoOptimizers, "manual optimization|exactly one optimizer"),
        (OwnIterator, "dataloader_iter.*take a batch"),
    ],
)
def test_modules(tmp_path, module, match):
    refused(tmp_path, UnsupportedSetupError, match, module=module())


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer(tmp_path):
    refused(tmp_path, UnsupportedSetupError, "optimizer", module=NoOptimizer())


def test_first_group_at_rest(tmp_path):
    class Rested(Tiny):
        def configure_optimizers(self):
            groups = [{"params": self.body.parameters(), "lr": 0.0}, {"params": self.head.parameters(), "lr": 0.1}]
            return torch.optim.SGD(groups)

    refused(tmp_path, ConfigurationError, "first parameter group has learning rate 0.*requires_grad=False",
            module=Rested())  # fmt: skip


class TestMonitor:
    def test_lists_what_was_logged(self, tmp_path):
        class Two(Tiny):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.log("val_acc", 0.5)

        said = refused(
            tmp_path, MonitorError, "monitor='valid_loss'", module=Two(), callback=AutoLRS(monitor="valid_loss")
        )
        assert "val_acc, val_loss" in said
        assert "self.log('valid_loss', ...)" in said

    def test_without_validation(self, tmp_path):
        refused(tmp_path, MonitorError, "no validation loader", callback=AutoLRS(monitor="val_loss"), val=False)

    def test_nothing_logged(self, tmp_path):
        class Silent(Tiny):
            def validation_step(self, batch, batch_idx):
                pass

        refused(
            tmp_path, MonitorError, "validation logs nothing", module=Silent(), callback=AutoLRS(monitor="val_loss")
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"min_lr": 0.1, "max_lr": 0.01}, "min_lr must be below max_lr.*AutoLRS\\(min_lr=1e-5, max_lr=1.0\\)"),
        ({"min_lr": 0.1, "max_lr": 0.1}, "min_lr must be below max_lr"),
        ({"min_lr": 20.0}, "min_lr must be below max_lr.*10"),
        ({"max_lr": 1e-7}, "min_lr must be below max_lr.*1e-06"),
        ({"min_lr": 0.0}, "min_lr=0.0.*above 0"),
        ({"max_lr": -1.0}, "max_lr=-1.0.*above 0"),
        ({"max_lr": float("inf")}, "max_lr=inf.*above 0"),
        ({"min_lr": float("nan")}, "min_lr=nan.*above 0"),
        ({"min_lr": "small"}, "min_lr='small'"),
        ({"min_lr": True}, "min_lr=True"),
        ({"search_budget": 0.0}, "search_budget=0.0.*search_budget=0.1"),
        ({"search_budget": 1.0}, "search_budget=1.0.*between 0 and 1"),
        ({"search_budget": -0.1}, "strictly between 0 and 1"),
        ({"search_budget": float("nan")}, "strictly between 0 and 1"),
        ({"objective": "constant"}, "objective='constant'.*'annealed', 'forecast'"),
        ({"search": "never"}, "search='never'.*'on_evidence', 'every_stage'"),
        ({"mode": "lowest"}, "mode='lowest'.*'min', 'max'"),
        ({"proposals": "random"}, "proposals='random'.*'bayesian', 'grid'"),
        ({"monitor": ""}, "monitor=''.*monitor='val_loss'"),
        ({"monitor": 3}, "monitor=3"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"stop_early": 1}, "stop_early=1"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        AutoLRS(**arguments)


def test_only_keywords():
    with pytest.raises(TypeError):
        AutoLRS(1e-3)


def test_an_exhausted_stream(tmp_path):
    class OneShot(torch.utils.data.IterableDataset):
        def __init__(self):
            self.source = iter([(torch.zeros(6), torch.tensor(0))] * 400)

        def __iter__(self):
            return self

        def __next__(self):
            return next(self.source)

    runner = L.Trainer(default_root_dir=tmp_path, callbacks=[AutoLRS()], max_steps=100, logger=False,
                       enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")  # fmt: skip
    data = torch.utils.data.DataLoader(OneShot(), 4)
    with pytest.raises(UnsupportedSetupError, match="return a new iterator from __iter__"):
        runner.fit(Tiny(), data, val_loader())

"""Setups and arguments that cannot be served are refused by name, with what to do instead."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from autotune.callbacks import AutoLRS
from autotune.errors import AutotuneError, ConfigurationError, MonitorError, UnsupportedSetupError
from tests.callbacks.harness import Tiny, examples, loader, trainer, val_loader


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


class Lazy(Tiny):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.LazyLinear(6)

    def forward(self, x):
        return super().forward(self.first(x))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected")
def test_lazy_modules_need_a_batch_before(tmp_path):
    with pytest.raises(UnsupportedSetupError, match=r"first.weight, first.bias: lazy modules .* sanity check"):
        trainer(tmp_path, AutoLRS(), max_steps=60, num_sanity_val_steps=0).fit(Lazy(), loader(batch=8), val_loader())
    callback = AutoLRS(search_budget=0.5)
    runner = trainer(tmp_path, callback, max_steps=120, num_sanity_val_steps=2)
    runner.fit(Lazy(), loader(batch=8), val_loader())
    assert runner.global_step == 120
    assert callback.trial_steps


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (lambda: LearningRateFinder(), "LearningRateFinder.*remove it"),
        (lambda: ModelPruning("l1_unstructured", amount=0.1), "ModelPruning.*fit of its own"),
        (lambda: BackboneFinetuning(), "BackboneFinetuning.*all groups in configure_optimizers"),
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging.*remove it"),
        (lambda: GradientAccumulationScheduler({0: 2}), "Trainer\\(accumulate_grad_batches=k\\)"),
    ],
)
def test_callbacks_that_fight_over_the_same_knob(tmp_path, callback, match):
    refused(tmp_path, UnsupportedSetupError, f"AutoLRS: .*{match}", callbacks=[callback()])


class Thaws(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            pl_module.head.requires_grad_(True)
            trainer.optimizers[0].add_param_group({"params": pl_module.head.parameters(), "lr": 1e-3})


class Headless(Tiny):
    def configure_optimizers(self):
        self.head.requires_grad_(False)
        return torch.optim.SGD(self.body.parameters(), lr=1e-3)


def test_a_group_that_is_added_on_the_way(tmp_path):
    runner = trainer(tmp_path, AutoLRS(), Thaws(), max_steps=120)
    with pytest.raises(UnsupportedSetupError, match=r"2 parameter groups and had 1 .*configure_optimizers"):
        runner.fit(Headless(), loader(batch=8), val_loader())


class WritesRates(Tiny):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        for group in optimizer.param_groups:
            group["lr"] = 0.5
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def test_a_module_that_sets_the_rate_of_every_step(tmp_path):
    refused(tmp_path, UnsupportedSetupError, r"at a learning rate of 0.5 where .* optimizer_step.*scheduler",
            module=WritesRates())  # fmt: skip


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


def test_batch_size_finder(tmp_path):
    class WithData(Tiny):
        def train_dataloader(self):
            return DataLoader(examples(), self.batch_size)

    module = WithData()
    module.batch_size = 4
    with pytest.raises(UnsupportedSetupError, match=r"BatchSizeFinder.*Tuner"):
        trainer(tmp_path, AutoLRS(), BatchSizeFinder(), max_steps=10).fit(module)


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


@pytest.mark.parametrize(
    ("strategy", "match"),
    [
        # Neither runs on a CPU: they are made as far as they can be without a GPU and without their libraries.
        (FSDPStrategy, r"AutoLRS: FSDPStrategy .*ModelParallelStrategy\(\) with .*fully_shard"),
        (DeepSpeedStrategy, r"AutoLRS: .*DeepSpeed.*use strategy='ddp'"),
    ],
)
def test_strategies(tmp_path, strategy, match):
    controller = AutoLRS()
    runner = trainer(tmp_path, controller, max_steps=10)
    runner._accelerator_connector.strategy = strategy.__new__(strategy)
    runner.strategy._lightning_module = Tiny()
    with pytest.raises(UnsupportedSetupError, match=match):
        controller.setup(runner, runner.strategy._lightning_module, "fit")


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
        ({"climb": "yes"}, "climb='yes'"),
        ({"forecasts": 0}, "forecasts=0"),
    ],
)
def test_arguments(arguments, match):
    with pytest.raises(ConfigurationError, match=match):
        AutoLRS(**arguments)


def test_only_keywords():
    with pytest.raises(TypeError):
        AutoLRS(1e-3)


class OneShot(IterableDataset):
    """Can be read once: ``__iter__`` hands out what there is left."""

    def __init__(self, itself):
        self.source = iter([(torch.zeros(6), torch.tensor(0))] * 2000)
        self.itself = itself

    def __iter__(self):
        return self if self.itself else self.source

    def __next__(self):
        return next(self.source)


class Renewed(OneShot):
    """Its own iterator too, but made anew for every epoch."""

    def __iter__(self):
        self.source = iter([(torch.zeros(6), torch.tensor(0))] * 2000)
        return self


@pytest.mark.parametrize("itself", [False, True])
def test_a_stream_that_cannot_be_read_twice(tmp_path, itself):
    runner = trainer(tmp_path, AutoLRS(search_budget=0.3), max_steps=100)
    with pytest.raises(UnsupportedSetupError, match=r"OneShot only hands out its iterator 'source'.*from __iter__"):
        runner.fit(Tiny(), DataLoader(OneShot(itself), 4), val_loader())


def test_a_stream_that_is_made_anew(tmp_path):
    callback = AutoLRS(search_budget=0.3)
    runner = trainer(tmp_path, callback, max_steps=100)
    runner.fit(Tiny(), DataLoader(Renewed(True), 4), val_loader())
    assert runner.global_step == 100
    assert callback.trial_steps

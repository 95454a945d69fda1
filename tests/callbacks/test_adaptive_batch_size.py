"""AdaptiveBatchSize on real loaders: examples, updates, validation, rates, memory, and what is refused."""

import re
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from autotune.batch.sampler import ResizableBatchSampler
from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize
from autotune.decision import read_decisions
from autotune.errors import ConfigurationError, UnsupportedSetupError
from tests.batch.toys import (
    QUIET,
    Weighing,
    assert_every_update_is_a_mean,
    assert_once_an_epoch,
    fit,
    loader,
    validation,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive"),
]


class MemoryLimit(L.Callback):
    """Says that memory ends at a micro-batch, as running out of it would have taught."""

    def __init__(self, limit):
        self.limit = limit

    def on_train_start(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, AdaptiveBatchSize):
                callback._windows.piece_limit = self.limit


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_every_example_once_an_epoch_and_every_update_a_mean(tmp_path, workers, shuffle, drop_last):
    train = loader(shuffle=shuffle, num_workers=workers, drop_last=drop_last)
    trainer, model, callback = fit(tmp_path, train=train)
    assert callback.batch_size == 16
    assert_every_update_is_a_mean(model.updates)
    assert_once_an_epoch(model, missing=15 if drop_last else 0)
    assert train.batch_size == 4
    assert type(train.batch_sampler) is torch.utils.data.BatchSampler
    assert trainer.global_step == len(model.updates)
    assert [d.action for d in callback.decisions] == ["set_batch", "grow", "end"]


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 5])
def test_any_accumulation_and_aligned_windows(tmp_path, accumulate, limit):
    """A window that grows at a misaligned batch applies gradients twice: weights would not add up to 1."""
    callback = AdaptiveBatchSize(max_batch_size=40, rule="norm", every_n_steps=1)
    extra = [] if limit is None else [MemoryLimit(limit)]
    trainer, model, _ = fit(tmp_path, callback, extra=extra, accumulate_grad_batches=accumulate)
    assert_every_update_is_a_mean(model.updates)
    assert_once_an_epoch(model)
    assert callback.batch_size > 20
    if limit is not None:
        assert max(len(batch) for batch in model.batches) <= limit
        assert callback.decisions[-2].numbers["accumulate"] > accumulate
    assert trainer.accumulate_grad_batches == accumulate


def test_the_last_partial_window_weighs_right_without_any_growth(tmp_path):
    callback = AdaptiveBatchSize(max_batch_size=1)
    _, model, _ = fit(tmp_path, callback, train=loader(examples=50), model=Weighing(50), accumulate_grad_batches=4)
    assert sorted({int((w > 0).sum()) for w in model.updates}) == [2, 16]
    assert_every_update_is_a_mean(model.updates)


@pytest.mark.parametrize("interval", [1.0, 0.5, 0.25, 10])
@pytest.mark.parametrize("workers", [0, 2])
def test_validation_keeps_its_cadence_in_examples(tmp_path, interval, workers):
    _, plain, _ = fit(tmp_path, AdaptiveBatchSize(max_batch_size=1), val_check_interval=interval)
    train = loader(num_workers=workers)
    _, grown, callback = fit(tmp_path, train=train, val_check_interval=interval)
    assert callback.batch_size == 16
    assert len(grown.validated_at) == len(plain.validated_at)
    for (epoch, at), (epoch_plain, at_plain) in zip(grown.validated_at, plain.validated_at, strict=True):
        assert epoch == epoch_plain
        assert 0 <= at - at_plain < 16


def test_validation_across_epochs_keeps_its_cadence(tmp_path):
    options = {"val_check_interval": 40, "check_val_every_n_epoch": None, "max_epochs": 4}
    _, plain, _ = fit(tmp_path, AdaptiveBatchSize(max_batch_size=1), **options)
    _, grown, _ = fit(tmp_path, **options)
    assert [at for _, at in plain.validated_at] == [160, 320]
    assert [0 <= a - b < 16 for (_, a), (_, b) in zip(grown.validated_at, plain.validated_at, strict=True)] == [
        True
    ] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_schedulers_run_once_an_epoch(tmp_path, workers):
    trainer, _, _ = fit(tmp_path, model=Weighing(epoch_scheduler=True), train=loader(num_workers=workers))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**3)


def test_max_steps_counts_updates_and_limits_count_the_users_batches(tmp_path):
    trainer, _, _ = fit(tmp_path, max_steps=17, max_epochs=-1)
    assert trainer.global_step == 17
    _, model, callback = fit(tmp_path, limit_train_batches=10, max_epochs=2)
    assert callback.batch_size == 16
    assert sum(len(batch) for batch in model.batches) == 2 * 40


def test_a_batch_never_grows_beyond_an_epoch_whose_rest_is_dropped(tmp_path):
    callback = AdaptiveBatchSize(max_batch_size=1000, rule="norm", every_n_steps=1)
    train = DataLoader(TensorDataset(torch.eye(100)[:26]), 4, shuffle=True, drop_last=True)
    trainer, model, _ = fit(tmp_path, callback, train=train, max_epochs=12, limit_train_batches=3)
    assert trainer.current_epoch == 12
    assert callback.batch_size == 12
    assert len(model.updates) == trainer.global_step >= 12


@pytest.mark.parametrize("workers", [0, 2])
def test_effective_step_is_the_first_update_of_the_new_size(tmp_path, workers):
    _, model, callback = fit(tmp_path, train=loader(num_workers=workers))
    grow = next(d for d in callback.decisions if d.action == "grow")
    sizes = [int((w > 0).sum()) for w in model.updates]
    assert sizes.index(16) == grow.effective_step
    assert (grow.effective_step > grow.step) == (workers > 0)


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("scaling", "expected"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0), ("adascale", None), ("auto", None)]
)
def test_the_rate_follows_at_the_effective_step(tmp_path, scaling, expected):
    rates = Rates()
    callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", lr_scaling=scaling, every_n_steps=3)
    trainer, _, _ = fit(tmp_path, callback, extra=[rates])
    grow = next(d for d in callback.decisions if d.action == "grow")
    assert rates.seen[: grow.effective_step] == pytest.approx([1e-3] * grow.effective_step)
    after = 1e-3 * (expected or grow.numbers["lr_gain"])
    assert rates.seen[grow.effective_step :] == pytest.approx([after] * (len(rates.seen) - grow.effective_step))
    assert 1.0 <= grow.numbers["lr_gain"] <= 4.0
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize(("scaling", "power"), [("auto", 1), ("adam_betas", 4)])
def test_adams_averages_reach_back_over_as_many_examples_where_that_is_asked_for(tmp_path, scaling, power):
    callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", lr_scaling=scaling, every_n_steps=3)
    trainer, _, _ = fit(tmp_path, callback, Weighing(optimizer=torch.optim.Adam))
    assert callback.batch_size == 16
    assert trainer.optimizers[0].param_groups[0]["betas"] == pytest.approx((0.9**power, 0.999**power))
    assert callback.decisions[0].numbers["scale_betas"] == (power > 1)


@pytest.mark.parametrize("scaling", ["sqrt_betas", "adam_betas"])
def test_betas_that_are_not_there_are_refused_with_what_to_write(tmp_path, scaling):
    with pytest.raises(UnsupportedSetupError, match=r'SGD has not these.*lr_scaling="auto"'):
        fit(tmp_path, AdaptiveBatchSize(max_batch_size=16, lr_scaling=scaling))


def test_the_default_rule_grows_a_noisy_run(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1000, 8)
    data = TensorDataset(x, x @ torch.ones(8, 1) + 5 * torch.randn(1000, 1))

    class Regression(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    callback = AdaptiveBatchSize(max_batch_size=128, every_n_steps=5, rest_updates=20, noise_multiple=1.0)
    fit(tmp_path, callback, Regression(), DataLoader(data, 8, shuffle=True), val=[], max_epochs=4)
    assert callback.batch_size > 64
    grown = [d.numbers["batch"] for d in callback.decisions if d.action == "grow"]
    assert grown == sorted(grown)
    assert grown == [int(re.search(r"grow to (\d+)", d.reason)[1]) for d in callback.decisions if d.action == "grow"]
    assert read_decisions(tmp_path) == callback.decisions


@pytest.mark.parametrize("limit", [16, 3, 1])
def test_running_out_of_memory_loses_nothing(tmp_path, limit):
    class Short(Weighing):
        """Runs out of memory above ``limit`` examples, in the backward pass, when gradients are half done."""

        def backward(self, loss):
            super().backward(loss)
            if len(self.batches[-1]) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    _, model, callback = fit(tmp_path, model=Short(), accumulate_grad_batches=2, max_epochs=2)
    assert_every_update_is_a_mean(model.updates)
    assert_once_an_epoch(model)
    if limit < 4:
        assert any(d.action == "split" for d in callback.decisions)


def test_an_error_that_is_not_memory_is_the_users(tmp_path):
    class Broken(Weighing):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(tmp_path, model=Broken())


class Stream(IterableDataset):
    def __iter__(self):
        return iter([torch.ones(100)])


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (DataLoader(Stream(), 2), "IterableDataset"),
        (DataLoader(torch.eye(100)), None),
        (DataLoader(torch.eye(100), batch_size=None), "batch_size=None"),
        ([DataLoader(torch.eye(100), 4), DataLoader(torch.eye(100), 4)], "ConcatDataset"),
        ([torch.eye(100)], "torch DataLoader"),
    ],
)
def test_what_cannot_be_resized_is_refused_with_what_to_write(tmp_path, train, words):
    class Plain(Weighing):
        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

    if words is None:
        fit(tmp_path, model=Plain(), train=train, max_steps=1, max_epochs=-1)
        return
    with pytest.raises(UnsupportedSetupError, match=words):
        fit(tmp_path, model=Plain(), train=train)


def test_a_batch_sampler_of_the_users_own_is_refused_and_ours_is_taken(tmp_path):
    class Own(torch.utils.data.BatchSampler):
        pass

    data = TensorDataset(torch.eye(100))
    order = torch.utils.data.SequentialSampler(data)
    with pytest.raises(UnsupportedSetupError, match="ResizableBatchSampler"):
        fit(tmp_path, train=DataLoader(data, batch_sampler=Own(order, 4, False)))
    _, model, callback = fit(tmp_path, train=DataLoader(data, batch_sampler=ResizableBatchSampler(order, 4)))
    assert callback.batch_size == 16
    assert_once_an_epoch(model)


def test_loaders_of_a_datamodule_and_reloading_every_epoch(tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return validation()

    callback = AdaptiveBatchSize(max_batch_size=16, rule="norm", every_n_steps=3)
    model = Weighing()
    trainer = L.Trainer(
        callbacks=[callback], max_epochs=3, default_root_dir=tmp_path, reload_dataloaders_every_n_epochs=1, **QUIET
    )
    trainer.fit(model, datamodule=Data())
    assert callback.batch_size == 16
    assert_every_update_is_a_mean(model.updates)
    assert_once_an_epoch(model)
    assert max(int((w > 0).sum()) for w in model.updates[-5:]) == 16


@pytest.mark.parametrize(
    "bad", [{"max_batch_size": 0}, {"rule": "x"}, {"lr_scaling": "x"}, {"every_n_steps": 0}, {"eta": 0.0}]
)
def test_bad_arguments(bad):
    with pytest.raises(ConfigurationError):
        AdaptiveBatchSize(**bad)


class Coupled(Weighing):
    """Its examples cannot be told apart, so that two updates are compared where there is one micro-batch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1, affine=False)


@pytest.mark.parametrize("rule", ["inner_product", "augmented", "coordinate"])
def test_a_rule_that_has_nothing_to_read_says_so(tmp_path, rule):
    callback = AdaptiveBatchSize(max_batch_size=16, rule=rule, every_n_steps=3)
    with pytest.warns(UserWarning, match="the batch will not grow.*accumulate_grad_batches=2"):
        fit(tmp_path, callback, Coupled())
    assert callback.batch_size == 4
    again = AdaptiveBatchSize(max_batch_size=16, rule=rule, every_n_steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*will not grow")
        fit(tmp_path / "cured", again, Coupled(), accumulate_grad_batches=2)


def test_the_default_leaves_32_updates_an_epoch(tmp_path):
    callback = AdaptiveBatchSize(rule="norm", every_n_steps=2)
    fit(tmp_path, callback, Weighing(448), loader(448, 4), max_epochs=2)
    # 448 / 32 = 14, and a multiple of the loader's 4.
    assert callback.batch_size == 12

"""What data may bring along: streams, limits, several loaders, batches that are objects, state of their own."""

from collections import UserDict
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from tests.callbacks.harness import Tiny, controller, examples, fit, loader, searches, trainer, val_loader

pytestmark = pytest.mark.usefixtures("several_searches")


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter([self.data[index] for index in range(len(self.data))])


class SizedStream(Stream):
    def __len__(self):
        return len(self.data)


class TestData:
    @pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined")
    @pytest.mark.parametrize("kind", [Stream, SizedStream])
    @pytest.mark.parametrize("bound", [{"max_steps": 60}, {"max_epochs": 2, "max_steps": -1}])
    def test_iterable(self, tmp_path, kind, bound):
        train = DataLoader(kind(examples(240)), 8)
        callback, runner, witness = fit(tmp_path, train=train, **bound)
        assert runner.global_step == 60
        assert len(witness.batches) == 60
        assert searches(callback)

    def test_overfit_batches(self, tmp_path):
        callback, runner, _ = fit(tmp_path, train=loader(batch=8, shuffle=False), overfit_batches=3)
        assert runner.global_step == 60
        assert searches(callback)

    def test_fast_dev_run(self, tmp_path):
        callback, runner, _ = fit(tmp_path, fast_dev_run=True)
        assert runner.global_step == 1
        assert not searches(callback)
        assert not (tmp_path / "decisions.jsonl").exists()

    @pytest.mark.parametrize("limit", [5, 0.5])
    def test_limit_train_batches(self, tmp_path, limit):
        callback, runner, witness = fit(tmp_path, limit_train_batches=limit, max_epochs=4, max_steps=-1)
        assert runner.global_step == len(witness.batches) == 4 * (5 if limit == 5 else 15)
        assert callback.decisions[0].numbers["horizon"]["updates"] == runner.global_step

    def test_smaller_than_a_trial(self, tmp_path):
        callback, _, _ = fit(tmp_path, train=loader(12, batch=8), max_steps=120)
        longest = max(leg[1] for one in searches(callback) for leg in one.numbers["legs"])
        assert longest > 2

    @pytest.mark.parametrize("val", [False, True])
    def test_without_validation(self, tmp_path, val):
        settings = {} if not val else {"limit_val_batches": 0}
        callback, _, _ = fit(tmp_path, val=val, **settings)
        assert searches(callback)

    @pytest.mark.parametrize("monitor", [None, "val_loss/dataloader_idx_1"])
    def test_several_validation_loaders(self, tmp_path, monitor):
        callback = controller(min_lr=1e-4, max_lr=3e-2, monitor=monitor)
        fit(tmp_path, val=[val_loader(), val_loader(24)], callback=callback)
        used, why = searches(callback)[0].numbers["monitor"]
        assert used == monitor
        assert why == "as asked" if monitor else "val_loss/dataloader_idx_0, val_loss/dataloader_idx_1" in why

    @pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
    def test_dictionary_of_training_loaders(self, tmp_path):
        class Both(Tiny):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

        train = {"a": loader(batch=8), "b": loader(120, batch=4)}
        callback, runner, _ = fit(tmp_path, Both(), train=train)
        assert searches(callback)
        assert runner.global_step == 60

    def test_datamodule(self, tmp_path):
        class Data(L.LightningDataModule):
            def train_dataloader(self):
                return loader(batch=8)

            def val_dataloader(self):
                return val_loader()

        callback = controller()
        trainer(tmp_path, callback, max_steps=60).fit(Tiny(), datamodule=Data())
        assert searches(callback)

    def test_own_batch_sampler(self, tmp_path):
        train = DataLoader(examples(240), batch_sampler=[list(range(n, n + 8)) for n in range(0, 240, 8)])
        assert searches(fit(tmp_path, train=train)[0])


@dataclass
class Pair:
    """A batch as some collate functions make it: no tree of tensors to torch."""

    x: torch.Tensor
    y: torch.Tensor


class Unpacks(Tiny):
    def training_step(self, batch, batch_idx):
        return super().training_step(_unpacked(batch), batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        super().validation_step(_unpacked(batch), batch_idx)


def _unpacked(batch):
    return (batch.x, batch.y) if isinstance(batch, Pair) else (batch["x"], batch["y"])


KINDS = {"data class": lambda x, y: Pair(x, y), "mapping": lambda x, y: UserDict(x=x, y=y)}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_objects_cost_what_others_do(tmp_path, kind):
    def collate(rows):
        return KINDS[kind](*default_collate(rows))

    costs = []
    for folder, module, options in (("tuples", Tiny(), {}), ("objects", Unpacks(), {"collate_fn": collate})):
        validation = DataLoader(examples(320, seed=1), 16, **options)
        callback, *_ = fit(tmp_path / folder, module, loader(batch=8, **options), validation)
        costs.append([(one.kind, one.cost_steps) for one in callback.decisions])
    assert costs[0] == costs[1]


class Remembers(Dataset):
    """Examples with noise of the data set's own generator: whoever draws from it shows in what others get."""

    def __init__(self):
        self.rows, self.rng = examples(48, seed=1), np.random.default_rng(5)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        x, y = self.rows[index]
        return x + 0.1 * float(self.rng.standard_normal()), y


class Shown(Callback):
    """What the trainer's own validations were given."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(batch[0].clone())


@pytest.mark.parametrize("sanity", [0, 2])
def test_validation_data_with_a_generator_of_its_own(tmp_path, sanity):
    seen = []
    for callbacks in ([], [controller(min_lr=1e-4, max_lr=3e-2)]):
        shown = Shown()
        runner = trainer(tmp_path, *callbacks, shown, max_epochs=2, num_sanity_val_steps=sanity)
        runner.fit(Tiny(), loader(batch=8), DataLoader(Remembers(), 16))
        seen.append(shown.seen)
    assert len(seen[0]) == 6 + sanity
    assert all(map(torch.equal, *seen))


def test_a_data_module_with_a_large_store_is_not_copied(tmp_path):
    class Untouched(list):
        def __iter__(self):
            raise AssertionError("somebody walks through the data")

    class Data(L.LightningDataModule):
        def __init__(self):
            super().__init__()
            self.samples, self.epochs = Untouched([0] * 100_000), [0]

        def train_dataloader(self):
            return loader(batch=8)

        def val_dataloader(self):
            return val_loader()

    class Counts(Tiny):
        def training_step(self, batch, batch_idx):
            self.trainer.datamodule.epochs[0] += 1
            return super().training_step(batch, batch_idx)

    data = Data()
    callback = controller()
    trainer(tmp_path, callback, max_steps=60).fit(Counts(), datamodule=data)
    assert callback.trial_steps
    assert data.epochs == [60]

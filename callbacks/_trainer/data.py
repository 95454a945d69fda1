"""A second iterator over the user's data for trials and probes, that leaves the first alone.

A trial must neither move the main loader nor draw from its generators. So loaders are copied shallowly (same data set,
collation and workers; own sampler and generator), and what cannot be given an own sampler is put back by
:class:`DataState`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from autotune.batch.sampler import ResizableBatchSampler
from autotune.errors import UnsupportedSetupError
from autotune.pystate import Attributes

#: Attributes of datamodules, data sets and samplers with more elements are storage, not state that training changes.
_STATE_ELEMENTS = 4096


def second_loader(combined: Any, seed: int, limits: Sequence[float], largest_batch: int | None = None) -> Any:
    """A copy of a ``CombinedLoader`` that can be iterated without touching the original.

    Args:
        combined: The trainer's loader.
        seed: Of the copy's own order.
        limits: Batches that the run takes from each loader an epoch (``limit_train_batches``); infinite
            where there is no limit.
        largest_batch: Cut batches down to this size where the batching is torch's own.
    """
    clone = copy.copy(combined)
    clone._iterator = None
    clone._limits = None
    loaders = zip(combined.flattened, limits, strict=True)
    clone.flattened = [_second(one, seed + index, limit, largest_batch) for index, (one, limit) in enumerate(loaders)]
    return clone


def second_batches(loader: Any, seed: int, limit: float, largest_batch: int) -> Iterator[Any]:
    """Batches of a copy, made as by :func:`second_loader`, of one loader: no more examples than the run sees of it."""
    clone = _second(loader, seed, limit, largest_batch)
    if math.isinf(limit):
        return iter(clone)
    size, cut = (getattr(getattr(one, "batch_sampler", None), "batch_size", None) for one in (loader, clone))
    return islice(clone, math.ceil(limit * size / cut) if size and cut else int(limit))


def share_of(batches: int, loader: Any, limit: float, largest_batch: int) -> float:
    """The share that so many of :func:`second_batches` are of what the loader itself shows on this rank.

    Zero where it cannot be told, or where a limit cuts a random order, so that other examples are shown each time.
    """
    sampler: Any = getattr(loader, "sampler", None)
    known = isinstance(sampler, SequentialSampler | RandomSampler | DistributedSampler)
    if not known or not isinstance(loader, DataLoader) or loader.batch_size is None:
        return 0.0
    size, shown = len(sampler), limit * loader.batch_size
    if (shown < size and not isinstance(sampler, SequentialSampler)) or getattr(sampler, "replacement", False):
        return 0.0
    # Not what the batches' first dimension says, which may be time.
    return min(1.0, batches * min(loader.batch_size, largest_batch) / max(1, min(size, shown)))


def _second(loader: Any, seed: int, limit: float, largest_batch: int | None) -> Any:
    if not isinstance(loader, DataLoader):
        return loader
    clone = copy.copy(loader)
    generator = torch.Generator().manual_seed(seed)
    own: dict[str, Any] = {"_iterator": None, "persistent_workers": False, "generator": generator}
    size = min(loader.batch_size or 1, largest_batch or loader.batch_size or 1)
    if isinstance(loader.dataset, IterableDataset):
        pass  # a new iterator over the data set is all there is; what it moves is put back by data_state
    elif _standard(loader):
        own["sampler"] = _shuffled(loader, limit, generator)
        own["batch_sampler"] = BatchSampler(own["sampler"], size, drop_last=len(own["sampler"]) >= size)
    elif isinstance(loader.sampler, DistributedSampler):
        own["sampler"] = copy.copy(loader.sampler)
        own["sampler"].set_epoch(seed)
        own["batch_sampler"] = BatchSampler(own["sampler"], size, loader.drop_last)
    elif isinstance(loader.batch_sampler, ResizableBatchSampler):
        # An order of the user's own; the run's batch sampler keeps count of the run's batches and of no others.
        own["batch_sampler"] = BatchSampler(loader.sampler, size, loader.drop_last)
    vars(clone).update(own)
    return clone


def _standard(loader: DataLoader[Any]) -> bool:
    """Whether order and batching are torch's own, so that ours can stand in for them."""
    return (
        type(loader.batch_sampler) in (BatchSampler, ResizableBatchSampler)
        and type(loader.sampler) in (RandomSampler, SequentialSampler)
        and loader.batch_size is not None
    )


def _shuffled(loader: DataLoader[Any], limit: float, generator: torch.Generator) -> RandomSampler:
    size = len(loader.sampler)  # type: ignore[arg-type]
    if isinstance(loader.batch_sampler, ResizableBatchSampler):
        limit = min(limit, loader.batch_sampler.examples / (loader.batch_size or 1))
    if type(loader.sampler) is SequentialSampler:
        # A limited sequential loader never shows the rest: overfit_batches and limit_*_batches.
        size = int(min(size, limit * (loader.batch_size or 1)))
    elif len(loader.dataset) != size:  # type: ignore[arg-type]
        size = len(loader.dataset)  # type: ignore[arg-type]
    return RandomSampler(range(size), generator=generator)


def refuse_one_shot(combined: Any) -> None:
    """Refuses loaders that can be read only once.

    Raises:
        UnsupportedSetupError: Naming the loader or data set, and what to do.
    """
    for loader in combined.flattened:
        if isinstance(loader, DataLoader):
            if isinstance(loader.dataset, IterableDataset):
                _refuse_shared_stream(loader.dataset)
        elif hasattr(loader, "__next__"):
            raise UnsupportedSetupError(
                f"the loader {type(loader).__name__} is its own iterator, so trials would consume the "
                "training data; give the Trainer a DataLoader, or an object whose __iter__ returns a new iterator"
            )


def _refuse_shared_stream(dataset: Any) -> None:
    held = {name: value for name, value in vars(dataset).items() if isinstance(value, Iterator)}
    if not held:
        return
    # A data set that makes its iterators anew in __iter__ is put back by data_state; one that hands them out is not.
    before = Attributes([dataset])
    before.capture()
    read = iter(dataset)
    shared = [
        name for name, value in held.items() if read is value or (read is dataset and vars(dataset)[name] is value)
    ]
    before.restore()
    if shared:
        raise UnsupportedSetupError(
            f"the IterableDataset {type(dataset).__name__} only hands out its iterator {shared[0]!r}, which "
            "cannot be read twice, so trials would consume the training data; return a new iterator from __iter__"
        )


class DataState:
    """What iterating the trainer's loaders may change on their data sets and samplers: counters and generators.

    And what a step may change on the datamodule. The loaders are those of the moment of :meth:`capture`: a trainer may
    reload them.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._kept: list[Attributes] = []

    def capture(self) -> None:
        """Remembers the state as it is now."""
        fit_loop, datamodule = self._trainer.fit_loop, self._trainer.datamodule
        self._kept = [data_state(fit_loop._combined_loader, fit_loop.epoch_loop.val_loop._combined_loader)]
        if datamodule is not None:
            self._kept.append(Attributes([datamodule], largest=_STATE_ELEMENTS))
        for kept in self._kept:
            kept.capture()

    def restore(self) -> None:
        """Puts back what the last :meth:`capture` remembered."""
        for kept in self._kept:
            kept.restore()


def data_state(*combined: Any) -> Attributes:
    """What iterating the loaders may change on data sets and samplers: counters and generators."""
    objects: list[Any] = []
    for loader in [item for whole in combined if whole is not None for item in whole.flattened]:
        for name in ("dataset", "sampler", "batch_sampler"):
            item = getattr(loader, name, None)
            while item is not None and not any(item is seen for seen in objects):
                objects.append(item)
                item = getattr(item, "dataset", None)
    return Attributes(objects, largest=_STATE_ELEMENTS)

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from autotune.batch.sampler import ResizableBatchSampler
from autotune.errors import ConfigurationError, StateError


def run(sampler, resizes, n_batches=None):
    """Iterates, resizing before the batches named; returns batches and the lengths seen on the way."""
    batches, lengths = [], []
    iterator, position = iter(sampler), -1
    while True:
        position += 1
        if position in resizes:
            sampler.resize(resizes[position])
        lengths.append(sampler.epoch_batches())
        batch = next(iterator, None)
        if batch is None or (n_batches is not None and position == n_batches):
            return batches, lengths
        batches.append(batch)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("resizes", [{}, {3: 7}, {0: 9}, {2: 5, 5: 20}, {1: 50}, {4: 2}])
def test_every_example_once_and_the_length_is_exact(resizes, shuffled, drop_last):
    order = RandomSampler(range(50)) if shuffled else SequentialSampler(range(50))
    sampler = ResizableBatchSampler(order, 4, drop_last)
    batches, lengths = run(sampler, resizes)
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen))
    last_size = sampler.batch_size
    assert len(seen) == 50 if not drop_last else 50 - len(seen) < last_size
    after_last_resize = lengths[max(resizes, default=0) :]
    assert set(after_last_resize) == {len(batches)}


def test_without_a_resize_it_is_torchs_own():
    theirs = list(torch.utils.data.BatchSampler(SequentialSampler(range(23)), 5, False))
    ours = ResizableBatchSampler(SequentialSampler(range(23)), 5)
    assert len(ours) == len(theirs)
    assert list(ours) == theirs
    assert list(ours) == theirs


def test_sizes_under_way_are_foreseen():
    sampler = ResizableBatchSampler(SequentialSampler(range(30)), 4)
    iterator = iter(sampler)
    for _ in range(3):
        next(iterator)
    sampler.resize(7)
    assert sampler.sizes(0, 99) == [4, 4, 4, 7, 7, 4]
    assert sampler.sizes(2, 3) == [4, 7, 7]
    assert sampler.seen(4) == 19
    assert [len(batch) for batch in iterator] == [7, 7, 4]


def test_a_resize_with_workers_reaches_what_is_not_yet_under_way():
    data = torch.arange(60)
    sampler = ResizableBatchSampler(SequentialSampler(data), 4)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, prefetch_factor=2)
    seen, sizes = [], []
    for index, batch in enumerate(loader):
        if index == 0:
            first = sampler.resize(10)
        sizes.append(len(batch))
        seen += batch.tolist()
    assert seen == list(range(60))
    assert sizes[:first] == [4] * first
    assert sizes[first] == 10


@pytest.mark.parametrize("trained", [1, 2, 4])
def test_state_goes_on_with_the_same_batches(trained):
    sampler = ResizableBatchSampler(SequentialSampler(range(40)), 4)
    whole, _ = run(sampler, {2: 6})
    again = ResizableBatchSampler(SequentialSampler(range(40)), 4)
    run(again, {2: 6}, n_batches=trained)
    if trained < 2:
        again.resize(6)  # decided after the first batch, with the second under way
    saved = again.state_dict(trained)
    fresh = ResizableBatchSampler(SequentialSampler(range(40)), 4)
    fresh.load_state_dict(saved)
    expected = len(fresh)
    got = list(fresh)
    assert len(got) == expected
    assert sorted(i for batch in got for i in batch) == list(range(40))
    assert got[:trained] == whole[:trained]


def test_the_schedule_is_forgotten_at_the_end_of_its_epoch():
    sampler = ResizableBatchSampler(SequentialSampler(range(20)), 4)
    sampler.load_state_dict({"batch_size": 10, "limit_examples": None, "schedule": [[4, 2]]})
    assert [len(batch) for batch in sampler] == [4, 4, 10, 2]
    sampler.end_epoch()
    assert [len(batch) for batch in sampler] == [10, 10]


def test_a_limit_counts_examples():
    sampler = ResizableBatchSampler(SequentialSampler(range(50)), 4)
    sampler.limit_examples = 22
    assert len(sampler) == 6
    assert sum(len(batch) for batch in sampler) == 22


def test_refusals():
    with pytest.raises(ConfigurationError, match="length"):
        ResizableBatchSampler(iter([1, 2]), 2)
    sampler = ResizableBatchSampler([1, 2], 2)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ConfigurationError, match="batch_size"):
            sampler.resize(bad)
    with pytest.raises(StateError, match="schedule"):
        sampler.load_state_dict({"batch_size": 2})

"""Batches that were read for trials and probes: counted, kept, and handed out again.

Every candidate of a search must see the same batches, so they are kept in a bounded cache and handed out as copies (a
``training_step`` may write into its batch).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from autotune.errors import UnsupportedSetupError
from autotune.randomness import RandomState, random_state, set_random_state

#: Batches a search keeps in memory; what goes beyond is read again for every candidate.
CACHE_BYTES = 512 * 2**20


def _tensors(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch, which may be nested lists, tuples, mappings, data classes or objects of any kind."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type):
            held = [one for one in vars(leaf).values() if isinstance(one, torch.Tensor | dict | list)]
            yield from (one for one in tree_leaves(held) if isinstance(one, torch.Tensor))


def bytes_in(batch: Any) -> int:
    """What the tensors of a batch take."""
    return sum(tensor.nbytes for tensor in _tensors(batch))


def examples_in(batch: Any) -> int:
    """Examples in a batch: the leading dimension that most of its own tensors have, else its first nested one's.

    Nested ones may belong to a single example (an image's boxes). 1 where it holds no tensor.
    """
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else [batch]
    own = Counter(entry.shape[0] for entry in entries if isinstance(entry, torch.Tensor) and entry.ndim)
    if own:
        return int(own.most_common(1)[0][0])
    return int(next((tensor.shape[0] for tensor in _tensors(batch) if tensor.ndim), 1))


class Replay:
    """The same batches again and again: read once, cached within a bound, handed out as copies.

    Reading has its own random generators, so that a candidate that reads and one that is served from the
    cache train under the same randomness.

    Args:
        open_stream: Makes a new iterator over batches, always in the same order.
        repeatable: Whether two iterators give the same batches; if not, a full cache is gone through
            again from its beginning.
    """

    def __init__(
        self, open_stream: Callable[[], Iterator[Any]], *, repeatable: bool = True, cache: int = CACHE_BYTES
    ) -> None:
        self._open = open_stream
        self._repeatable = repeatable
        self._room = cache
        self._cached: list[Any] = []
        self._source: Iterator[Any] | None = None
        self._random = random_state()
        self._full = False

    def __iter__(self) -> Iterator[Any]:
        yield from (copy.deepcopy(batch) for batch in list(self._cached))
        position = len(self._cached)
        if self._full and self._repeatable:
            yield from self._read_again(position)
            return
        while True:
            if position < len(self._cached):
                batch = self._cached[position]
            elif self._full:
                batch = self._cached[position % len(self._cached)]
            else:
                batch = self._read()
                if self._full and self._repeatable and position >= len(self._cached):
                    yield batch
                    yield from self._read_again(position + 1)
                    return
            position += 1
            yield copy.deepcopy(batch)

    def _read(self) -> Any:
        with self._own_randomness():
            if self._source is None:
                self._source = _endless(self._open)
            batch = next(self._source)
        self._room -= bytes_in(batch)
        if self._room >= 0 or not self._cached:
            self._cached.append(batch)
        self._full = self._room < 0
        return batch

    def _read_again(self, position: int) -> Iterator[Any]:
        source, start = _endless(self._open), 0
        while True:
            with self._own_randomness():
                for _ in range(position - start):
                    next(source)
                batch = next(source)
            start = position = position + 1
            yield batch

    def _own_randomness(self) -> _Swapped:
        return _Swapped(self)


def _endless(open_stream: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """One stream after the other. Knows nothing of who reads it, so that its workers end when nobody does.

    Left to the garbage collector, which finds cycles in any order, torch waits five seconds for each worker.
    """
    while True:
        empty = True
        for batch in open_stream():
            empty = False
            yield batch
        if empty:
            raise UnsupportedSetupError("the training loader yields no batch: there is nothing to try")


class _Swapped:
    """Runs a block under the replay's own generators."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._outside = RandomState()

    def __enter__(self) -> None:
        self._outside.capture()
        set_random_state(self._replay._random)

    def __exit__(self, *_: object) -> None:
        self._replay._random = random_state()
        self._outside.restore()


class Batches:
    """A fixed list of batches with a length, handed out as copies: what a probe evaluates on.

    Args:
        batches: The batches.
        examples: How many examples they hold.
        loader: Whose batches they are; a module's hooks may read its data set and batch size.
        share: Of what the loader shows; 0 where it cannot be told.
    """

    def __init__(self, batches: list[Any], examples: int, *, loader: Any = None, share: float = 0.0) -> None:
        self._batches = batches
        self.examples = examples
        self.share = share
        for name in ("dataset", "batch_size", "collate_fn"):
            if hasattr(loader, name):
                setattr(self, name, getattr(loader, name))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return (copy.deepcopy(batch) for batch in self._batches)

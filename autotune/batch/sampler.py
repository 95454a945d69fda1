"""A batch sampler whose size may change while it is iterated.

=============  ===============================================================  ==================
symbol         meaning                                                          unit
=============  ===============================================================  ==================
``n``          examples the epoch shows this process                            examples
schedule       sizes of the batches handed out this epoch, as runs              [size, how many]
position       index of a batch in its epoch, by hand-out order                 batches
=============  ===============================================================  ==================

Workers ask for batches ahead of time, so what has been handed out and what has been trained on differ; the
schedule says which sizes are under way. The order of examples is the wrapped sampler's, untouched: every
example that it names is shown once an epoch, whatever happens to the size.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch.utils.data import BatchSampler, Sampler

from autotune.errors import ConfigurationError, StateError


class ResizableBatchSampler(BatchSampler):
    """Batches of :attr:`batch_size` examples, which :meth:`resize` may change at any time.

    Takes what ``torch.utils.data.BatchSampler`` takes, so that Lightning can put a distributed sampler into
    it.

    Args:
        sampler: Gives the examples' order; it must have a length.
        batch_size: Examples in a batch, on this process.
        drop_last: Whether an epoch's last, smaller batch is left out.

    Raises:
        ConfigurationError: The sampler has no length.
    """

    def __init__(self, sampler: Sampler[int] | Iterable[int], batch_size: int, drop_last: bool = False) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if not hasattr(sampler, "__len__"):
            raise ConfigurationError(
                f"a resizable batch sampler needs a sampler with a length; {type(sampler).__name__} has none: "
                "give it __len__"
            )
        self.limit_examples: int | None = None
        #: Updates an epoch that the run was planned with, before any growth; None until it has grown.
        self.planned_updates: int | None = None
        self._schedule: list[list[int]] = []
        self._replay: list[list[int]] = []
        self._emitted = 0
        self._seen = 0
        self._open = False

    def resize(self, batch_size: int) -> int:
        """Batches handed out from now on hold ``batch_size`` examples.

        Returns:
            The position of the first such batch in the present epoch; the epoch's length, if none is left.

        Raises:
            ConfigurationError: The size is not a positive integer.
        """
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigurationError(f"batch_size counts examples, 1 or more; got {batch_size!r}")
        self.batch_size = batch_size
        return self._emitted

    def __iter__(self) -> Iterator[list[int]]:
        # Not a generator itself: the epoch begins when iter() is called, not at the first batch.
        self._schedule, self._emitted, self._seen, self._open = [], 0, 0, True
        return self._batches(itertools.chain.from_iterable(itertools.repeat(*run) for run in self._replay))

    def _batches(self, first: Iterator[int]) -> Iterator[list[int]]:
        examples = itertools.islice(iter(self.sampler), self.examples)
        while True:
            size = next(first, self.batch_size)
            batch = list(itertools.islice(examples, size))
            if not batch or (self.drop_last and len(batch) < size):
                self._open = False
                return
            self._note(len(batch))
            yield batch

    def _note(self, size: int) -> None:
        self._emitted += 1
        self._seen += size
        if self._schedule and self._schedule[-1][0] == size:
            self._schedule[-1][1] += 1
        else:
            self._schedule.append([size, 1])

    @property
    def examples(self) -> int:
        """``n``, before ``drop_last``."""
        count = len(self.sampler)  # type: ignore[arg-type]
        return count if self.limit_examples is None else min(count, self.limit_examples)

    @property
    def emitted(self) -> int:
        """Batches handed out in the present epoch."""
        return self._emitted

    def _count(self, examples: int, size: int) -> int:
        return examples // size if self.drop_last else -(-examples // size)

    def __len__(self) -> int:
        """Batches of the epoch under way; between two epochs, of the next one."""
        if self._open:
            return self.epoch_batches()
        done = sum(count for _, count in self._replay)
        seen = sum(size * count for size, count in self._replay)
        return done + self._count(self.examples - seen, self.batch_size)

    def epoch_batches(self) -> int:
        """Batches of the epoch whose batches were handed out last, all of them."""
        if not self._open:
            return self._emitted
        ahead = sum(count for _, count in self._replay) - self._emitted
        if ahead > 0:
            return len_after(self._replay, self.examples, self.batch_size, self.drop_last)
        return self._emitted + self._count(self.examples - self._seen, self.batch_size)

    def sizes(self, start: int, count: int) -> list[int]:
        """Sizes of the batches at positions ``start … start + count - 1``, known or foreseen; fewer at the end."""
        found: list[int] = []
        position = 0
        for size, run in self._foreseen(start + count):
            low, high = max(start, position), min(start + count, position + run)
            found += [size] * max(high - low, 0)
            position += run
        return found

    def seen(self, batches: int) -> int:
        """Examples in the present epoch's first ``batches`` batches."""
        total, left = 0, batches
        for size, run in self._foreseen(batches):
            total += size * min(run, left)
            left -= min(run, left)
        return total

    def _foreseen(self, upto: int) -> Iterator[tuple[int, int]]:
        """The schedule as (size, how many), extended at least to position ``upto`` or the epoch's end."""
        yield from ((size, run) for size, run in self._schedule)
        ahead, left = upto - self._emitted, self.examples - self._seen if self._open else 0
        if ahead <= 0 or left <= 0:
            return
        skip = self._emitted
        for size, run in self._replay:
            taken = min(skip, run)
            skip -= taken
            if run > taken:
                yield size, run - taken
                left -= size * (run - taken)
        whole, rest = divmod(max(left, 0), self.batch_size)
        if whole:
            yield self.batch_size, whole
        if rest and not self.drop_last:
            yield rest, 1

    def end_epoch(self) -> None:
        """The epoch has been trained on to its end: a loaded position no longer counts."""
        self._replay, self._schedule, self._emitted, self._seen, self._open = [], [], 0, 0, False

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Size and schedule.

        Args:
            batches: How many of the epoch's batches were trained on; None for all that were handed out. At
                the epoch's end (or its beginning) the schedule is empty.
        """
        inside = self._emitted > 0 and (batches is None or 0 < batches < self.epoch_batches())
        return {
            "batch_size": self.batch_size,
            "limit_examples": self.limit_examples,
            "schedule": [list(run) for run in self._schedule] if inside else [],
        }

    def not_begun(self) -> dict[str, Any] | None:
        """A loaded state of which no batch was handed out yet, to be loaded elsewhere; None without one."""
        if self._emitted or not self._replay:
            return None
        schedule = [list(run) for run in self._replay]
        return {"batch_size": self.batch_size, "limit_examples": self.limit_examples, "schedule": schedule}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next epoch begins with the sizes of the saved schedule, then goes on with the saved size.

        The order of examples is the wrapped sampler's affair: with its generator restored, skipping the
        batches that were trained on leaves exactly the examples that were not.

        Raises:
            StateError: Keys are missing.
        """
        if not {"batch_size", "schedule", "limit_examples"} <= set(state):
            raise StateError(f"a sampler's state has batch_size, schedule and limit_examples; got {sorted(state)}")
        self.resize(int(state["batch_size"]))
        self.limit_examples = state["limit_examples"]
        self._replay = [list(run) for run in state["schedule"]]


def len_after(schedule: list[list[int]], examples: int, size: int, drop_last: bool) -> int:
    """Length of an epoch that begins with ``schedule`` and goes on in batches of ``size``.

    >>> len_after([[4, 2]], 20, 6, drop_last=False), len_after([[4, 2]], 20, 5, drop_last=True)
    (4, 4)
    """
    left = examples - sum(run[0] * run[1] for run in schedule)
    rest = left // size if drop_last else -(-left // size)
    return sum(run[1] for run in schedule) + max(rest, 0)

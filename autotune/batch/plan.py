"""How a global batch is made of micro-batches, accumulation and ranks.

=============  ==============================================  ========
symbol         meaning                                         unit
=============  ==============================================  ========
``B``          global batch, ``b k W``                         examples
``b``          ``micro``: one rank's micro-batch               examples
``k``          ``accumulate``: micro-batches in an update      count
``W``          ``ranks``                                       count
``u``          ``unit``: ``b`` is a multiple of it             examples
=============  ==============================================  ========

The micro-batch grows first: it raises throughput, accumulation does not. Where memory ends, ``k`` is
doubled, and only doubled: a new window length that is a multiple of the old one has its boundaries among
the old ones, so a change needs to wait for one update at the most.

Micro-batches are multiples of the loader's own: then an epoch's last batch holds one example only where it did so
before (batch normalisation refuses a batch of one).
"""

from __future__ import annotations

from dataclasses import dataclass

from autotune.errors import ConfigurationError


@dataclass(frozen=True)
class Split:
    """One way to make a batch."""

    micro: int
    accumulate: int
    ranks: int = 1

    def __post_init__(self) -> None:
        if min(self.micro, self.accumulate, self.ranks) < 1:
            raise ConfigurationError(f"a batch is made of positive parts; got {self}")

    @property
    def examples(self) -> int:
        """``B``."""
        return self.micro * self.accumulate * self.ranks


def plan(
    target: int, now: Split, micro_limit: int | None = None, max_examples: int | None = None, unit: int = 1
) -> Split:
    """The split whose batch comes nearest to ``target``, growing from ``now``.

    Args:
        target: Wanted ``B``, in examples.
        now: The present split; ``k`` never falls below its own.
        micro_limit: Largest micro-batch that memory holds; None where nothing is known to end.
        max_examples: Largest ``B``.
        unit: ``u``; given up only where memory does not hold it.

    >>> plan(256, Split(32, 1), micro_limit=128)
    Split(micro=128, accumulate=2, ranks=1)
    >>> plan(100, Split(16, 3))
    Split(micro=33, accumulate=3, ranks=1)
    >>> plan(100, Split(32, 1), unit=32)
    Split(micro=96, accumulate=1, ranks=1)
    """
    ceiling = target if max_examples is None else min(target, max_examples)
    if micro_limit is not None:
        micro_limit = max(micro_limit, 1)
        unit = unit if unit <= micro_limit else 1
    accumulate = now.accumulate
    while micro_limit is not None and -(-ceiling // (accumulate * now.ranks)) > micro_limit:
        accumulate *= 2
    micro = max(round(ceiling / (accumulate * now.ranks * unit)), 1) * unit
    if micro_limit is not None:
        micro = min(micro, micro_limit // unit * unit)
    if max_examples is not None and micro * accumulate * now.ranks > max_examples:
        if micro > unit:
            micro -= unit
        elif micro_limit is not None and accumulate > now.accumulate:
            micro, accumulate = micro_limit // unit * unit, accumulate // 2
    return Split(micro, accumulate, now.ranks)


def micro_limit_from_memory(peak_bytes: int, fixed_bytes: int, micro: int, total_bytes: int, fill: float = 0.85) -> int:
    """The micro-batch at which a device would be ``fill`` full, if memory is fixed plus proportional to it.

    Args:
        peak_bytes: Most that was allocated while a micro-batch of ``micro`` examples was trained on.
        fixed_bytes: What stays between updates: weights, optimizer state, gradients.
        micro: Examples.
        total_bytes: What this process may use.
        fill: Share of it to plan for; the rest is for fragmentation, and running out is survived anyway.

    >>> micro_limit_from_memory(peak_bytes=3_000, fixed_bytes=1_000, micro=10, total_bytes=10_000, fill=0.9)
    40
    """
    each = max(peak_bytes - fixed_bytes, 1) / micro
    return max(int((fill * total_bytes - fixed_bytes) / each), micro)

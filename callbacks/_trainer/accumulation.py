"""What a micro-batch weighs in its update, and pieces of one that did not fit into memory.

Lightning divides every micro-batch's loss by k, also in an epoch's last window that holds fewer, or
smaller, ones: that update comes out too small. :class:`Windows` multiplies the loss by ``k b_m / B`` so
that every example of an update weighs the same; for a full, even window the factor is 1 and nothing is
touched.

A micro-batch that does not fit is run in two, four, … pieces, each weighted by its examples, inside the same
closure: the loop's own counters, schedules and the other ranks see nothing of it. What the window had
    accumulated before is repeated first, because a backward pass that dies leaves some gradients half
    added.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from autotune.callbacks._trainer.batches import examples_in

_WINDOWS: weakref.WeakKeyDictionary[Any, Windows] = weakref.WeakKeyDictionary()


def current_piece(trainer: Any, batch_examples: int) -> tuple[int, float]:
    """Examples in what is being back-propagated now, and what its loss was multiplied by."""
    windows = _WINDOWS.get(trainer)
    if windows is None or windows.piece is None:
        return batch_examples, 1.0 / float(trainer.accumulate_grad_batches)
    return windows.piece


class Windows:
    """Takes over how a micro-batch is run in automatic optimization; :meth:`attach` and :meth:`detach`.

    Args:
        sizes: Examples of the micro-batches of the window that a batch index belongs to, on this rank.
        on_memory: Called after a micro-batch had to be taken apart, with its examples and the number of
            pieces.
    """

    def __init__(
        self, sizes: Callable[[int], Sequence[int]], on_memory: Callable[[int, int], None] = lambda size, pieces: None
    ) -> None:
        self._sizes = sizes
        self._on_memory = on_memory
        self._limit: int | None = None
        self._done: list[tuple[dict[str, Any], float]] = []
        self.piece: tuple[int, float] | None = None

    @property
    def piece_limit(self) -> int | None:
        """The largest number of examples that is run at once; None before memory was ever short."""
        return self._limit

    @piece_limit.setter
    def piece_limit(self, limit: int | None) -> None:
        self._limit = limit

    def attach(self, trainer: Any) -> None:
        """Stands in for the loop's closure; only this trainer's instance is touched."""
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        original = type(loop)._make_closure

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            closure = original(loop, kwargs, optimizer, batch_idx)
            closure.closure = lambda *_, **__: self._run(trainer, loop, optimizer, batch_idx, kwargs)
            return closure

        loop._make_closure = make_closure
        _WINDOWS[trainer] = self

    def detach(self, trainer: Any) -> None:
        """Undoes :meth:`attach`."""
        vars(trainer.fit_loop.epoch_loop.automatic_optimization).pop("_make_closure", None)
        _WINDOWS.pop(trainer, None)
        self._done = []

    def _run(self, trainer: Any, loop: Any, optimizer: Any, batch_idx: int, kwargs: Any) -> Any:
        with torch.enable_grad():
            sizes = self._sizes(batch_idx)
            place = batch_idx % trainer.accumulate_grad_batches
            if place == 0:
                self._done = []
            weight = sizes[place] / sum(sizes) if place < len(sizes) else 1.0 / trainer.accumulate_grad_batches
            result = self._careful(trainer, loop, optimizer, batch_idx, kwargs, weight)
            if len(sizes) > place + 1:
                self._done.append((dict(kwargs), weight))
            return result

    def _careful(self, trainer: Any, loop: Any, optimizer: Any, batch_idx: int, kwargs: Any, weight: float) -> Any:
        """The micro-batch; in smaller and smaller pieces while memory is short."""
        repeat: list[tuple[dict[str, Any], float]] | None = None
        while True:
            try:
                if repeat is None:
                    zero_grad = loop._make_zero_grad_fn(batch_idx, optimizer)
                    return self._pieces(trainer, loop, optimizer, kwargs, weight, zero_grad)
                for earlier, share in repeat:
                    with _scratch_results(trainer), _no_sync(trainer):
                        self._pieces(trainer, loop, optimizer, earlier, share)
                return self._pieces(trainer, loop, optimizer, kwargs, weight)
            except Exception as error:
                if not is_out_of_memory(error) or not self._shrink(kwargs):
                    raise
            # Out of the except block: the exception holds the dead pass's frames, and so its activations.
            optimizer.zero_grad(set_to_none=True)
            release_memory()
            repeat = list(self._done)

    def _shrink(self, kwargs: Any) -> bool:
        size = _examples(kwargs["batch"])
        present = size if self._limit is None else min(self._limit, size)
        if present <= 1:
            return False
        self._limit = -(-present // 2)
        self._on_memory(size, -(-size // self._limit))
        return True

    def _pieces(
        self, trainer: Any, loop: Any, optimizer: Any, kwargs: Any, weight: float, zero_grad: Any = None
    ) -> Any:
        size = _examples(kwargs["batch"])
        count = 1 if self._limit is None or size <= self._limit else -(-size // self._limit)
        if count == 1:
            return self._one(trainer, loop, optimizer, kwargs, weight, zero_grad)
        whole, result, losses = kwargs["batch"], None, []
        try:
            for index, part in enumerate(split_batch(whole, count)):
                share = _examples(part) / size
                trainer._results.batch, trainer._results.batch_size = part, None
                inputs = {**kwargs, "batch": part}
                with nullcontext() if index == count - 1 else _no_sync(trainer):
                    result = self._one(trainer, loop, optimizer, inputs, weight * share, None if index else zero_grad)
                if result.loss is not None:
                    losses.append(result.loss * share)
        finally:
            trainer._results.batch, trainer._results.batch_size = whole, None
        if result is not None and losses:
            result.loss = torch.stack(losses).sum()
        return result

    def _one(self, trainer: Any, loop: Any, optimizer: Any, kwargs: Any, weight: float, zero_grad: Any = None) -> Any:
        """Lightning's closure on one piece, with the piece's weight: step, clear, backward."""
        step_output = loop._make_step_fn(kwargs)()
        if zero_grad is not None:
            zero_grad()
        loss = step_output.closure_loss
        backward = loop._make_backward_fn(optimizer)
        if loss is None or backward is None:
            return step_output
        factor = weight * trainer.accumulate_grad_batches
        # An even, full window: exactly what Lightning does, to the bit.
        if abs(factor - 1.0) > 1e-9:
            loss = step_output.closure_loss = loss * factor
        self.piece = (_examples(kwargs["batch"]), weight)
        try:
            backward(loss)
        finally:
            self.piece = None
        return step_output


class _scratch_results:
    """What a repeated pass logs is thrown away: it was logged the first time."""

    def __init__(self, trainer: Any) -> None:
        self._loop = trainer.fit_loop.epoch_loop

    def __enter__(self) -> None:
        self._kept = self._loop._results
        scratch = type(self._kept)(training=True)
        scratch.batch = self._kept.batch
        self._loop._results = scratch

    def __exit__(self, *_: object) -> None:
        self._loop._results = self._kept


def _no_sync(trainer: Any) -> AbstractContextManager[Any]:
    backward_sync = getattr(trainer.strategy, "block_backward_sync", None)
    return nullcontext() if backward_sync is None else backward_sync()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of a device or of the host, was what was missing."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    known = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "CUDNN_STATUS_NOT_SUPPORTED")
    return isinstance(error, RuntimeError) and any(words in text for words in known)


def release_memory() -> None:
    """Gives the dead pass's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _examples(batch: Any) -> int:
    """Examples that can be cut apart: one where they lie inside an object."""
    leaves, _ = tree_flatten(batch)
    return examples_in(batch) if any(isinstance(leaf, Tensor) and leaf.ndim for leaf in leaves) else 1


def split_batch(batch: Any, pieces: int) -> list[Any]:
    """``batch`` cut along its tensors' first axis into at most ``pieces`` even parts.

    Tensors whose first axis has another length go whole into every part, and so does what is not a tensor;
    a list or tuple with one non-tensor entry an example is cut as well.
    """
    size = _examples(batch)
    bounds = [round(index * size / pieces) for index in range(pieces + 1)]
    spans = [(low, high) for low, high in pairwise(bounds) if high > low]

    def per_example(node: Any) -> bool:
        flat = isinstance(node, list | tuple) and len(node) == size and size > 1
        return flat and not any(isinstance(item, Tensor | list | tuple | dict) for item in node)

    leaves, spec = tree_flatten(batch, is_leaf=per_example)

    def cut(leaf: Any, low: int, high: int) -> Any:
        if per_example(leaf) or (isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == size):
            return leaf[low:high]
        return leaf

    return [tree_unflatten([cut(leaf, *span) for leaf in leaves], spec) for span in spans]

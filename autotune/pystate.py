"""Saving and putting back plain Python state: counters, queues, dictionaries, random generators.

A trial may change anything a user keeps on a module: a step counter, a queue of embeddings, a running mean
in a dictionary. :func:`save` walks a value and returns a function that puts it back *in place*, so that
whoever else holds the same list or tensor sees the old content again. What it does not know (an arbitrary
object) is kept by reference: the container gets the same object back, the object's inside is its owner's
affair.
"""

from __future__ import annotations

import gc
import operator
import random
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Puts one value back and returns it.
Restore = Callable[[], Any]

#: Nobody can change them: kept by reference, at no cost.
_FIXED = (type(None), bool, int, float, complex, str, bytes)
_RANDOM = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def save(value: Any, memo: dict[int, Restore] | None = None) -> Restore:
    """Remembers ``value``'s content.

    Args:
        value: Tensors, arrays, lists, deques, dictionaries, sets, tuples and random generators are remembered
            by content, nested to any depth; anything else by reference.
        memo: Values already seen, by ``id``: shared and cyclic structure is kept.

    Returns:
        A function that restores the content in place and returns the very object that was saved.

    >>> queue = [1, [2]]
    >>> put_back = save(queue)
    >>> queue[1].append(3); queue.append(4)
    >>> put_back() is queue, queue
    (True, [1, [2]])
    """
    if isinstance(value, _FIXED):
        return lambda: value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)]
    memo[id(value)] = lambda: value  # a cycle meets the object itself, whose content is being put back already
    memo[id(value)] = restore = _save_mutable(value, memo)
    return restore


def _save_mutable(value: Any, memo: dict[int, Restore]) -> Restore:
    if isinstance(value, Tensor):
        return _save_tensor(value)
    if isinstance(value, np.ndarray):
        return _save_array(value)
    if isinstance(value, (list, deque)):
        return _save_sequence(value, memo)
    if isinstance(value, dict):
        return _save_dict(value, memo)
    if isinstance(value, set):
        return _save_set(value)
    if isinstance(value, tuple):
        return _save_tuple(value, memo)
    if isinstance(value, _RANDOM):
        return _save_generator(value)
    return lambda: value


def plain_items(values: dict[str, Any]) -> dict[str, Any]:
    """The entries that are primitives, or tuples of them, which nobody can change afterwards.

    >>> plain_items({"lr": 0.1, "betas": (0.9, 0.99), "params": [1]})
    {'lr': 0.1, 'betas': (0.9, 0.99)}
    """

    def plain(value: Any) -> bool:
        if isinstance(value, tuple):
            return all(plain(item) for item in value)
        # By type: numpy's floats are floats too, and no checkpoint holds them.
        return value is None or type(value) in (bool, int, float, str)

    return {key: value for key, value in values.items() if plain(value)}


def written_once(tensor: Tensor) -> Tensor:
    """A view of ``tensor`` with each memory location once: an expanded tensor cannot be written as a whole.

    >>> written_once(torch.zeros(2, 1).expand(2, 3)).shape
    torch.Size([2, 1])
    """
    if tensor.layout != torch.strided:
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _save_tensor(tensor: Tensor) -> Restore:
    content = written_once(tensor.detach()).clone()

    def restore() -> Tensor:
        if tensor.is_inference():  # may not be written outside inference mode
            return content.expand_as(tensor).clone()
        with torch.no_grad():
            written_once(tensor.detach()).copy_(content)
        return tensor

    return restore


def _save_array(array: np.ndarray[Any, Any]) -> Restore:
    content = array.copy()

    def restore() -> np.ndarray[Any, Any]:
        if array.flags.writeable:
            np.copyto(array, content)
        return array

    return restore


def _save_sequence(sequence: list[Any] | deque[Any], memo: dict[int, Restore]) -> Restore:
    content = list(sequence)
    inside = [(index, save(item, memo)) for index, item in enumerate(content) if not isinstance(item, _FIXED)]

    def restore() -> Any:
        if len(sequence) != len(content) or not all(map(operator.is_, sequence, content)):
            sequence.clear()
            sequence.extend(content)
        for index, restore_item in inside:
            if (item := restore_item()) is not content[index]:
                sequence[index] = item
        return sequence

    return restore


def _save_dict(mapping: dict[Any, Any], memo: dict[int, Restore]) -> Restore:
    content = dict(mapping)
    inside = [(key, save(item, memo)) for key, item in content.items() if not isinstance(item, _FIXED)]

    def restore() -> dict[Any, Any]:
        same = len(mapping) == len(content) and all(map(operator.is_, mapping, content))
        if not (same and all(map(operator.is_, mapping.values(), content.values()))):
            mapping.clear()
            mapping.update(content)
        for key, restore_item in inside:
            if (item := restore_item()) is not content[key]:
                mapping[key] = item
        return mapping

    return restore


def _save_set(members: set[Any]) -> Restore:
    content = set(members)

    def restore() -> set[Any]:
        members.clear()
        members.update(content)
        return members

    return restore


def _save_tuple(items: tuple[Any, ...], memo: dict[int, Restore]) -> Restore:
    restores = [save(item, memo) for item in items if not isinstance(item, _FIXED)]

    def restore() -> tuple[Any, ...]:
        for restore_item in restores:
            restore_item()
        return items

    return restore


def _save_generator(generator: Any) -> Restore:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        put: Callable[[], Any] = lambda: generator.set_state(state)  # noqa: E731
    elif isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        numpy_state = bits.state
        put = lambda: setattr(bits, "state", numpy_state)  # noqa: E731
    elif isinstance(generator, np.random.RandomState):
        legacy_state = generator.get_state()
        put = lambda: generator.set_state(legacy_state)  # noqa: E731
    else:
        python_state = generator.getstate()
        put = lambda: generator.setstate(python_state)  # noqa: E731

    def restore() -> Any:
        put()
        return generator

    return restore


class Attributes:
    """The attributes of some objects: saved by :meth:`capture`, put back by :meth:`restore`.

    Attributes that appeared since are removed, those that were rebound point to the saved object again.

    Args:
        objects: Whose ``__dict__`` to keep.
        skip: Attribute names that are somebody else's affair.
        largest: Containers and tensors with more elements, nested ones included, are left alone (a data set's own
            storage is not state that a trial changes, and copying it would cost its size); None keeps everything.
    """

    def __init__(
        self, objects: Iterable[Any], *, skip: frozenset[str] = frozenset(), largest: int | None = None
    ) -> None:
        self._objects = [item for item in objects if hasattr(item, "__dict__")]
        self._skip = skip
        self._largest = largest
        self._saved: list[tuple[dict[str, Any], dict[str, Restore]]] = []

    def capture(self) -> None:
        """Remembers every attribute as it is now."""
        self._saved = []  # not two copies at a time
        memo: dict[int, Restore] = {}
        collects = gc.isenabled()
        gc.disable()  # what is made here stays, and looking through all of it for garbage takes as long as making it
        try:
            self._saved = [
                (
                    vars(item),
                    {name: save(value, memo) for name, value in vars(item).items() if self._keeps(name, value)},
                )
                for item in self._objects
            ]
        finally:
            if collects:
                gc.enable()

    def restore(self) -> None:
        """Puts back what the last :meth:`capture` remembered."""
        for attributes, restores in self._saved:
            for name in [name for name, value in attributes.items() if name not in restores]:
                if self._keeps(name, attributes[name]) and name not in self._skip:
                    del attributes[name]
            for name, restore in restores.items():
                attributes[name] = restore()

    def _keeps(self, name: str, value: Any) -> bool:
        if name in self._skip:
            return False
        if self._largest is None:
            return True
        return not _exceeds(value, self._largest)


def longest_container(objects: Iterable[Any]) -> tuple[str, int]:
    """The attribute with the longest list, deque, dictionary or set, as ``Class.name``, and its length.

    >>> class Player:
    ...     def __init__(self):
    ...         self.score, self.moves = 3, [1, 2]
    >>> longest_container([Player()])
    ('Player.moves', 2)
    """
    found = [
        (f"{type(item).__name__}.{name}", len(value))
        for item in objects
        for name, value in getattr(item, "__dict__", {}).items()
        if isinstance(value, (list, deque, dict, set))
    ]
    return max(found, key=operator.itemgetter(1), default=("", 0))


def _exceeds(value: Any, most: int) -> bool:
    """Whether there are more than so many elements in a value, looking at no more of them than it takes to say."""
    count, todo, seen = 0, [value], {id(value)}
    while todo and count <= most:
        item = todo.pop()
        if isinstance(item, (Tensor, np.ndarray)):
            count += item.numel() if isinstance(item, Tensor) else int(item.size)
        elif isinstance(item, (list, dict, set, tuple, deque)):
            if count + len(item) > most:
                return True
            inside = [one for one in (item.values() if isinstance(item, dict) else item) if id(one) not in seen]
            seen.update(map(id, inside))
            todo.extend(inside)
        else:
            count += 1
    return count > most

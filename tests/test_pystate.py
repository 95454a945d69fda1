"""Plain Python state comes back in place, whatever was done to it."""

import copy
import gc
import random
from collections import Counter, OrderedDict, defaultdict, deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autotune.pystate import Attributes, longest_container, save

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=2), inner, max_size=4)
        | st.builds(deque, st.lists(inner, max_size=4), st.just(4))
        | st.tuples(inner, inner)
        | st.sets(st.integers(), max_size=4)
    ),
    max_leaves=12,
)


def disturb(value, dice):
    """Changes every container inside ``value`` in place."""
    if isinstance(value, dict):
        for item in list(value.values()):
            disturb(item, dice)
        if value and dice.random() < 0.5:
            value.pop(next(iter(value)))
        value["new"] = [1]
    elif isinstance(value, (list, deque)):
        for item in list(value):
            disturb(item, dice)
        if value and dice.random() < 0.5:
            value.pop()
        value.append({"new": 1})
    elif isinstance(value, tuple):
        for item in value:
            disturb(item, dice)
    elif isinstance(value, set):
        value.add(-1.5)


@given(values, st.integers(0, 100))
def test_nested_structures_come_back(value, seed):
    before = copy.deepcopy(value)
    put_back = save(value)
    for _ in range(2):
        disturb(value, random.Random(seed))
        assert put_back() is value or value is None or isinstance(value, (bool, int, float, str))
        assert value == before
        assert type(value) is type(before)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        (torch.arange(3.0), lambda t: t.mul_(2)),
        (torch.zeros(2, 3).t(), lambda t: t.add_(1)),
        (torch.zeros(1).expand(4), lambda t: t[:1].add_(1)),
        (torch.tensor(2.0, requires_grad=True), lambda t: t.data.add_(1)),
        (np.arange(3), lambda a: a.__setitem__(0, 9)),
        (deque([1, 2], maxlen=2), lambda d: d.append(3)),
        (defaultdict(list, {"a": [1]}), lambda d: d["b"].append(2)),
        (OrderedDict(a=1, b=2), lambda d: d.move_to_end("a")),
        (Counter("aab"), lambda c: c.update("b")),
        ([torch.zeros(2)], lambda x: x[0].add_(1)),
        ({"a": {"b": torch.ones(2)}}, lambda x: x["a"].update(b=None)),
        (([1], [2]), lambda x: x[0].append(2)),
    ],
    ids=lambda item: type(item).__name__,
)
def test_content_is_put_back_in_place(value, change):
    before = copy.deepcopy(value) if not isinstance(value, torch.Tensor) else value.detach().clone()
    put_back = save(value)
    change(value)
    assert put_back() is value
    assert repr(value) == repr(before) or torch.equal(value, before)
    assert not isinstance(value, OrderedDict) or list(value) == list(before)


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator().manual_seed(1), lambda g: float(torch.rand((), generator=g))),
        (np.random.default_rng(1), lambda g: g.random()),
        (np.random.RandomState(1), lambda g: g.rand()),
        (random.Random(1), lambda g: g.random()),
    ],
    ids=["torch", "numpy", "legacy numpy", "python"],
)
def test_generators(generator, draw):
    put_back = save(generator)
    first = [draw(generator) for _ in range(3)]
    assert put_back() is generator
    assert [draw(generator) for _ in range(3)] == first


def test_shared_and_cyclic_structure_is_kept():
    shared = [1]
    value = {"a": shared, "b": shared}
    value["self"] = value
    put_back = save(value)
    shared.append(2)
    value["b"] = [9]
    put_back()
    assert value["a"] is value["b"] is shared
    assert shared == [1]
    assert value["self"] is value


def test_unknown_objects_are_kept_by_reference():
    thing = object()
    value = [thing]
    put_back = save(value)
    value[0] = None
    put_back()
    assert value[0] is thing


def test_a_tensor_made_under_inference_mode():
    with torch.inference_mode():
        value = {"x": torch.zeros(2)}
    put_back = save(value)
    with torch.inference_mode():
        value["x"].add_(1)
    put_back()
    assert torch.equal(value["x"].clone(), torch.zeros(2))


class TestAttributes:
    class Thing:
        pass

    def test_added_removed_and_rebound(self):
        thing = self.Thing()
        thing.count, thing.items, thing.gone = 1, [1], "here"
        items = thing.items
        attributes = Attributes([thing])
        attributes.capture()
        thing.count, thing.new = 5, "new"
        thing.items = [7]
        items.append(2)
        del thing.gone
        attributes.restore()
        assert vars(thing) == {"count": 1, "items": [1], "gone": "here"}
        assert thing.items is items

    def test_skipped_and_large_ones_are_left_alone(self):
        thing = self.Thing()
        thing.skipped, thing.storage, thing.small = 1, list(range(100)), [1]
        thing.parts = {"train": [{"x": n, "y": n} for n in range(6)], "val": []}
        thing.cycle = [1]
        thing.cycle.append(thing.cycle)
        attributes = Attributes([thing], skip=frozenset({"skipped"}), largest=10)
        attributes.capture()
        thing.skipped = 2
        thing.storage.append(100)
        thing.small.append(2)
        thing.parts["train"].append("seventh")
        thing.cycle[0] = 2
        attributes.restore()
        assert thing.skipped == 2
        assert len(thing.parts["train"]) == 7
        assert thing.cycle[0] == 1
        assert len(thing.storage) == 101
        assert thing.small == [1]

    def test_objects_without_attributes(self):
        attributes = Attributes([3, "x", object()])
        attributes.capture()
        attributes.restore()


@pytest.mark.parametrize("kind", [list, deque])
def test_what_did_not_change_is_not_filled_anew(kind):
    class Counting(kind):
        cleared = 0

        def clear(self):
            type(self).cleared += 1
            super().clear()

    inner = [1]
    held = Counting([3, "a", inner])
    put_back = save(held)
    inner.append(2)
    assert put_back() is held
    assert (list(held), Counting.cleared) == ([3, "a", [1]], 0)
    assert held[2] is inner
    held[1] = "b"
    put_back()
    assert (list(held), Counting.cleared) == ([3, "a", [1]], 1)


def test_a_dictionary_gets_its_order_back():
    held = {"a": 1, "b": [2]}
    put_back = save(held)
    held["a"] = held.pop("a")
    put_back()
    assert list(held) == ["a", "b"]


def test_capturing_leaves_the_collector_as_it_was():
    for enabled in (False, True):
        (gc.enable if enabled else gc.disable)()
        Attributes([Attributes([])]).capture()
        assert gc.isenabled() == enabled


def test_the_longest_container_is_found():
    class Player:
        def __init__(self):
            self.moves, self.table, self.score = deque(range(5)), {1: 2}, 7

    assert longest_container([object(), Player()]) == ("Player.moves", 5)
    assert longest_container([]) == ("", 0)

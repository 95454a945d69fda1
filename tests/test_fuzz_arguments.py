"""Any value of any plain type for any argument: the callback is made, or an error of ours names the argument."""

import math
import sys
import typing

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotune.batch.rules import Tolerances
from autotune.callbacks import AdaptiveBatchSize, AutoLRS, DecisionLogger, GradientNoiseMonitor, ReplaySchedule
from autotune.errors import AutotuneError, ConfigurationError

CALLBACKS = (AutoLRS, AdaptiveBatchSize, GradientNoiseMonitor)

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
extremes = st.sampled_from(
    [0, -1, 2**32 - 1, 2**32, 2**64, 10**400, -(10**400), 5e-324, 1e308, math.inf, math.nan, -0.0]
)
plain = st.recursive(
    scalars | extremes,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


def hints(callback):
    found = typing.get_type_hints(callback.__init__)
    return {name: hint for name, hint in found.items() if name != "return"}


def likely(hint):
    """Values of the annotated type, right or wrong in range."""
    parts = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(parts)
    known = {int: st.integers() | st.integers(0, 99), float: st.floats() | st.floats(0, 1), str: st.text(),
             bool: st.booleans(), type(None): st.none()}  # fmt: skip
    return st.one_of(*(known.get(part, st.just(Tolerances())) for part in parts))


def fits(value, hint):
    """Whether ``value`` is of the annotated type, as YAML would read it; floats are finite."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    parts = typing.get_args(hint) or (hint,)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return any(
        (part is float and number and abs(value) <= sys.float_info.max)
        or (part is int and number and isinstance(value, int))
        or (part not in (int, float) and isinstance(value, part))
        for part in parts
    )


def arguments(callback):
    """Some of the callback's arguments, each of any value, more often than not of its own type."""
    return st.fixed_dictionaries({}, optional={name: likely(hint) | plain for name, hint in hints(callback).items()})


def check(callback, given_arguments):
    try:
        callback(**given_arguments)
    except ConfigurationError as error:
        said = str(error)
    else:
        said = ""
    wrong = [name for name, value in given_arguments.items() if not fits(value, hints(callback)[name])]
    assert said or not wrong
    assert not said or any(name in said for name in given_arguments), said


def fuzzed(examples):
    def make(test):
        chosen = settings(
            max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
        )
        return pytest.mark.parametrize("callback", CALLBACKS)(chosen(given(data=st.data())(test)))

    return make


@fuzzed(400)
def test_arguments(callback, data):
    check(callback, data.draw(arguments(callback)))


@pytest.mark.slow
@fuzzed(5000)
def test_arguments_at_length(callback, data):
    check(callback, data.draw(arguments(callback)))


@fuzzed(300)
def test_one_wrong_argument_is_named(callback, data):
    name = data.draw(st.sampled_from(sorted(hints(callback))))
    value = data.draw(plain)
    if fits(value, hints(callback)[name]):
        return
    with pytest.raises(ConfigurationError, match=name):
        callback(**{name: value})


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plain | st.text(st.characters(), min_size=300))
def test_a_path_that_is_none(path):
    with pytest.raises(AutotuneError, match=r"path names a run's directory|cannot read"):
        ReplaySchedule(path)


def test_the_logger_has_no_arguments():
    assert not hints(DecisionLogger)

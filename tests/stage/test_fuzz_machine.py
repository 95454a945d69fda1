"""Any sequence of events: the stage machine raises nothing, and from every state it comes back to training."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune.stage.machine import StageMachine, StageState
from autotune.stage.probe import Probe

#: So many things can be due before one update: a search, a forecast, a stage's end, and a search that it asks for.
MOVES = 4

any_float = st.floats() | st.sampled_from([0.0, 1.0, math.nan, math.inf, -math.inf, 1e308, -1e308, 5e-324])
probes = st.builds(Probe, any_float, st.lists(any_float, max_size=4).map(tuple), st.booleans())
positive = st.floats(1e-12, 1e3)
progresses = st.floats(0.0, 1.2) | st.floats(0.0, 1e6)
levels = st.floats(0.0, 1.0)
forecasts = st.none() | st.tuples(any_float, any_float, any_float)
machines = st.builds(
    StageMachine,
    search=st.sampled_from(["on_evidence", "every_stage"]),
    known_end=st.booleans(),
    first=st.floats(1e-3, 0.5),
    growth=st.floats(1.0, 4.0),
    longest=st.floats(1e-2, 1.0),
    forecast_at=st.floats(0.1, 0.9) | st.just(math.inf),
    guard=st.booleans(),
    patience=st.integers(0, 4),
)

#: Each event as a run may have it: what the machine is told, in any order.
events = st.one_of(
    st.tuples(st.just("searched"), positive, any_float),
    st.tuples(st.just("begun"), progresses, st.integers(0, 10**9), st.none() | probes, any_float),
    st.tuples(st.just("predicted"), forecasts),
    st.tuples(st.just("checked"), probes, any_float, st.integers(0, 10**9), levels),
    st.tuples(st.just("ended"), probes),
    st.tuples(st.just("failed")),
    st.tuples(st.just("asked"), st.text(max_size=5)),
    st.tuples(st.just("cut"), progresses),
)


def happens(machine, state, event):
    name, *told = event
    answer = getattr(machine, name)(state, *told)
    machine.lost(state)
    return answer[0] if isinstance(answer, tuple) else answer


def to_training(machine, state, progress, draw):
    """What a run does before an update, whatever its probes, forecasts and searches say; the moves it took."""
    for moves in range(MOVES + 1):
        due = machine.due(state, progress)
        if due is None:
            return moves, state
        if due == "search":
            state = machine.searched(state, draw(positive), draw(any_float))
            state = state if state.index else machine.begun(state, progress, 0, draw(st.none() | probes), math.nan)
        elif due == "forecast":
            state = machine.predicted(state, draw(forecasts))
        else:
            probe = draw(probes)
            state, verdict, _ = machine.ended(machine.checked(state, probe, draw(any_float), 1, draw(levels)), probe)
            if verdict == "search":
                state = machine.searched(state, draw(positive))
            state = machine.begun(state, progress, 0, probe, draw(any_float))
    return None, state


def check(data):
    machine, state = data.draw(machines), StageState()
    for event in data.draw(st.lists(events, max_size=12)):
        state = happens(machine, state, event)
    assert repr(StageState.from_dict(json.loads(json.dumps(state.to_dict())))) == repr(state)
    progress = data.draw(progresses)
    moves, after = to_training(machine, state, progress, data.draw)
    assert moves is not None, f"still {machine.due(after, progress)} is due at {progress}: {after}"
    assert after.lr is not None
    assert after.lr > 0.0


def fuzzed(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True)


@fuzzed(500)
@given(data=st.data())
def test_every_state_leads_to_training(data):
    check(data)


@pytest.mark.slow
@fuzzed(5000)
@given(data=st.data())
def test_every_state_leads_to_training_at_length(data):
    check(data)


@fuzzed(100)
@given(machines, st.integers(20, 80), st.data())
def test_a_whole_run_trains_between_its_moves(machine, ticks, data):
    """In the order of a run, with losses of any kind: every update is made, and stages and searches are counted."""
    state = StageState()
    for tick in range(ticks):
        if data.draw(st.integers(0, 30)) == 0:
            state = happens(machine, state, data.draw(events.filter(lambda event: event[0] != "begun")))
        before = state
        moves, state = to_training(machine, state, tick / ticks, data.draw)
        assert moves is not None
        assert state.index >= before.index
        assert state.searches >= max(before.searches, 1)
    assert state.end >= state.start

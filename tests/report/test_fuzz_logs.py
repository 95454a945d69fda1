"""Whatever a log holds: its readers read it, or say in an error of ours what is wrong."""

import io
import json
import math
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from autotune import read_decisions
from autotune.errors import AutotuneError, ConfigurationError, LogFormatError
from autotune.replay import load_schedule
from autotune.report.explain import explain
from autotune.report.page import content
from autotune.report.reading import read_run

#: Longer schedules are not written out: a bent step may be anything.
LONG = 10_000
NUMBER = count()

numbers = st.sampled_from([0, 0.0, -1, 1, True, 2**53, 2**64, 10**400, 1e308, 5e-324, math.inf, math.nan]) | st.floats()
texts = st.text(max_size=8) | st.sampled_from(
    ["", "NaN", "setup", "batch", "search", "roll_back", "set_batch", "replan", "steps"]
)
values = st.recursive(
    st.none() | numbers | texts,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts, inner, max_size=3)
        | st.builds(lambda value: {"float": value}, inner)
    ),
    max_leaves=5,
)

#: What a run of both controllers writes that the tiny run does not.
MORE = [
    {"kind": "setup", "action": "begin", "numbers": {"controller": "AutoLRS", "lr_ratios": [1.0, 0.5],
     "horizon": {"unit": "examples", "total": 9000.0, "updates": 140.0}, "shape": {"form": "linear", "warmup": 0.02,
     "decay_from": 0.5}}},
    {"kind": "setup", "action": "set_batch", "numbers": {"batch_size": 16, "epoch_examples": 500, "scale_betas": True}},
    {"kind": "setup", "action": "replan", "step": 9, "numbers": {"total": 12000.0, "shape": {"form": "hold"}}},
    {"kind": "batch", "action": "grow", "step": 30, "numbers": {"batch_size": 64, "batch_before": 16, "lr_gain": 2.0}},
    {"kind": "rollback", "action": "roll_back", "step": 60, "numbers": {"to_step": 20, "lr": 0.01}},
]  # fmt: skip
WHOLE = {"schema": 1, "step": 0, "effective_step": 0, "reason": "why", "cost_steps": 1.5}


@pytest.fixture(scope="module")
def records(tiny):
    found = [decision.to_dict() for decision in tiny.decisions]
    more = [{**WHOLE, **one, "effective_step": one.get("step", 0)} for one in MORE]
    return sorted(more + found, key=lambda record: record["step"])


@pytest.fixture(scope="module")
def short(records):
    """What a schedule is made of, and little else."""
    more = [{**WHOLE, **one, "effective_step": one.get("step", 0)} for one in MORE]
    rates = [{**WHOLE, "kind": kind, "action": "begin", "numbers": {"lr": 0.1}} for kind in ("search", "stage")]
    return [*more[:2], *rates, *more[2:]]


def bend(record, draw):
    """A copy in which one place, found by going down a random way, holds something else, or nothing."""
    record = json.loads(json.dumps(record))
    if not record or draw(st.integers(0, 9)) == 0:
        return draw(values)
    inner = record
    while True:
        key = draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        if not (isinstance(inner[key], (dict, list)) and inner[key]) or draw(st.integers(0, 4)) == 0:
            break
        inner = inner[key]
    if draw(st.integers(0, 3)):
        inner[key] = draw(numbers if isinstance(inner[key], (int, float)) and draw(st.booleans()) else values)
    else:
        del inner[key]
    return record


def mutated(records, draw, most=4):
    """The bytes of a log: records bent, left out, doubled, exchanged; then perhaps cut, or with other bytes in it."""
    chosen = draw(st.permutations(records)) if draw(st.integers(0, 3)) == 0 else list(records)
    for _ in range(draw(st.integers(0, most))):
        place = draw(st.integers(0, len(chosen) - 1))
        chosen[place] = bend(chosen[place], draw) if isinstance(chosen[place], dict) else draw(values)
    for place in draw(st.lists(st.integers(0, len(chosen) - 1), max_size=3)):
        chosen.insert(place, chosen[-1]) if draw(st.booleans()) else chosen.pop()
    log = "".join(json.dumps(record) + "\n" for record in chosen).encode()
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(log)))
        log = log[:place] + draw(st.binary(max_size=8)) + log[place + draw(st.integers(0, 40)) :]
    return log


def read_everything(folder, log):
    """Every reader; returns what the tolerant and the strict one say."""
    path = folder / f"{next(NUMBER)}" / "decisions.jsonl"
    path.parent.mkdir()
    path.write_bytes(log)
    return _tolerantly(path.parent), _strictly(path)


def _tolerantly(folder):
    try:
        run = read_run(folder)
    except LogFormatError:
        return None
    body, figures = content([run])
    assert "What it came to" in body
    json.dumps(figures, allow_nan=False)
    explain(run, Console(file=io.StringIO(), width=80))
    return run


def _strictly(path):
    try:
        decisions = read_decisions(path)
    except LogFormatError:
        return None
    try:
        schedule = load_schedule(path)
    except LogFormatError:
        return decisions
    if schedule.steps <= LONG:
        try:
            schedule.write_csv(io.StringIO())
            schedule.write_json(io.StringIO())
            assert all(math.isfinite(schedule.rate(step)) for step in range(schedule.steps))
        except ConfigurationError:
            assert schedule.rates != "lr"
    return decisions


def fuzzed(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check_mutated(folder, records, data):
    tolerant, strict = read_everything(folder, mutated(records, data.draw))
    if strict:
        assert tolerant is not None
        assert list(map(repr, tolerant.decisions)) == list(map(repr, strict))


def check_schedule(folder, records, data):
    path = folder / "decisions.jsonl"
    path.write_bytes(mutated(records, data.draw, most=8))
    _strictly(path)


@fuzzed(60)
@given(data=st.data())
def test_mutated_logs(records, tmp_path, data):
    check_mutated(tmp_path, records, data)


@pytest.mark.slow
@fuzzed(2000)
@given(data=st.data())
def test_mutated_logs_at_length(records, tmp_path, data):
    check_mutated(tmp_path, records, data)


@fuzzed(400)
@given(data=st.data())
def test_mutated_schedules(short, tmp_path, data):
    check_schedule(tmp_path, short, data)


@pytest.mark.slow
@fuzzed(5000)
@given(data=st.data())
def test_mutated_schedules_at_length(short, tmp_path, data):
    check_schedule(tmp_path, short, data)


@fuzzed(300)
@given(st.binary(max_size=200) | st.lists(values.map(json.dumps), max_size=5).map(lambda ls: "\n".join(ls).encode()))
def test_arbitrary_bytes(tmp_path, log):
    read_everything(tmp_path, log + b"\n")


@fuzzed(300)
@given(texts | st.text(min_size=300))
def test_arbitrary_paths(path):
    for read in (read_run, read_decisions):
        with pytest.raises(AutotuneError):
            read(path + "/no/such/place")


def test_the_log_itself_is_whole(records, tmp_path):
    log = "".join(json.dumps(record) + "\n" for record in records).encode()
    run, decisions = read_everything(tmp_path, log)
    assert run.problems == ()
    assert len(decisions) == len(records)

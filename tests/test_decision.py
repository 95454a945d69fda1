"""The decision record and its log: what is written is what is read."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.decision import SCHEMA, Decision, DecisionLog, encode, read_decisions
from autotune.errors import LogFormatError

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
json_values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
records = st.builds(
    Decision,
    st.text(),
    st.text(),
    st.text(),
    st.integers(0, 10**9),
    st.integers(-1, 10**9),
    st.dictionaries(st.text(), json_values, max_size=4),
    st.floats(0, 1e9),
)


def same(one, other):
    """Equality in which NaN equals NaN."""
    return repr(one) == repr(other)


@given(records)
def test_json_round_trip(decision):
    line = encode(decision)
    assert "\n" not in line
    assert json.loads(line)["schema"] == SCHEMA
    again = Decision.from_dict(json.loads(line))
    assert same(again, decision)
    assert encode(again) == line


@given(st.lists(records, max_size=4), st.lists(records, max_size=4))
def test_log_holds_history_then_what_is_written(tmp_path_factory, history, written):
    folder = tmp_path_factory.mktemp("log")
    log = DecisionLog(folder / "decisions.jsonl", history)
    for decision in written:
        log.write(decision)
    assert log.failure is None
    assert same(read_decisions(folder), history + written)


def test_non_finite_numbers_are_kept_in_strict_json():
    numbers = {"a": math.nan, "b": [math.inf, -math.inf], "c": {"float": "NaN or so"}}
    line = encode(Decision("search", "set_lr", "why", 3, numbers=numbers))
    assert json.loads(line, parse_constant=pytest.fail)
    again = Decision.from_dict(json.loads(line)).numbers
    assert math.isnan(again["a"])
    assert again["b"] == [math.inf, -math.inf]
    assert again["c"] == {"float": "NaN or so"}


def test_effective_step_is_the_step_unless_given():
    assert Decision("a", "b", "c", 7).effective_step == 7
    assert Decision("a", "b", "c", 7, 9).effective_step == 9


def test_lines_are_whole_for_a_reader_beside_the_writer(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    for step in range(5):
        log.write(Decision("stage", "begin", "x" * 2000, step))
        assert [one.step for one in read_decisions(tmp_path)] == list(range(step + 1))


def test_a_torn_last_line_is_left_out(tmp_path):
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.write(Decision("stage", "begin", "one", 0))
    with open(log.path, "a") as file:
        file.write('{"schema": 1, "st')
    assert [one.reason for one in read_decisions(log.path)] == ["one"]


GOOD = Decision("stage", "begin", "one", 0).to_dict()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("not json", "line 2: not JSON"),
        ("[1]", "line 2: a decision is a JSON object; got list"),
        (json.dumps({}), "line 2: .*integer 'schema'"),
        (json.dumps({**GOOD, "schema": "1"}), "line 2: .*integer 'schema'"),
        (json.dumps({**GOOD, "schema": SCHEMA + 1}), f"schema {SCHEMA + 1}.*upgrade"),
        (json.dumps({**GOOD, "step": "0"}), "line 2: .*'step' is missing or has a wrong type: '0'"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "numbers"}), "'numbers' is missing"),
    ],
)
def test_what_is_no_decision_is_named_with_its_line(tmp_path, line, match):
    (tmp_path / "decisions.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(LogFormatError, match=match):
        read_decisions(tmp_path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    if content is not None:
        (tmp_path / "decisions.jsonl").write_bytes(content)
    with pytest.raises(LogFormatError, match="cannot read"):
        read_decisions(tmp_path)


def test_a_directory_that_cannot_be_made_is_a_value_not_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    log = DecisionLog(tmp_path / "file" / "decisions.jsonl")
    assert isinstance(log.failure, OSError)
    log.write(Decision("stage", "begin", "one", 0))

"""Decisions: one frozen record, and the JSON-lines log that keeps them.

A decision says what was changed, when it was taken and when it took effect, why (a sentence and the numbers
behind it), and what it cost. The same record goes unchanged to the log, the loggers, the report and a replay.

Units: ``step`` and ``effective_step`` count real optimizer updates (``trainer.global_step``); ``cost_steps``
counts optimizer steps spent on the decision and nowhere else, an evaluation batch of training size being a
third of one.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

from autotune.errors import LogFormatError

#: Version of the record. A reader accepts its own and older ones, and names a newer one.
SCHEMA = 1

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

_COUNTS = ("step", "effective_step", "cost_steps")
#: More updates than any run makes; NaN is not below it.
_MOST = 2**53
_LARGEST = 10**300
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True)
class Decision:
    """One decision of a controller.

    Attributes:
        kind: What it is about: ``"setup"``, ``"search"``, ``"forecast"``, ``"stage"``, ``"rollback"``,
            ``"plateau"``, ``"setback"``, ``"climb"``, ``"batch"``, ``"finish"``.
        action: What was done, a verb: ``"set_lr"``, ``"keep_lr"``, ``"roll_back"``, …
        reason: One sentence for a person.
        step: Real optimizer updates done when the decision was taken.
        effective_step: The first real update that runs under it.
        numbers: What the reason rests on; values that JSON can hold (non-finite floats are kept).
        cost_steps: Optimizer steps spent on taking it.

    >>> Decision("search", "set_lr", "lowest posterior mean", step=0, numbers={"lr": 0.01}).numbers["lr"]
    0.01
    """

    kind: str
    action: str
    reason: str
    step: int
    effective_step: int = -1
    numbers: Mapping[str, Json] = field(default_factory=dict)
    cost_steps: float = 0.0

    def __post_init__(self) -> None:
        if self.effective_step < 0:
            object.__setattr__(self, "effective_step", self.step)

    def to_dict(self) -> dict[str, Any]:
        """The record as one flat dictionary of primitives, ``schema`` first."""
        return {
            "schema": SCHEMA,
            "step": self.step,
            "effective_step": self.effective_step,
            "kind": self.kind,
            "action": self.action,
            "reason": self.reason,
            "numbers": _plain(self.numbers),
            "cost_steps": self.cost_steps,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Decision:
        """The inverse of :meth:`to_dict`.

        Raises:
            LogFormatError: A key is missing, a value has the wrong type, or the schema is newer than ours.
        """
        if not isinstance(record, Mapping):
            raise LogFormatError(f"a decision is a JSON object; got {type(record).__name__}")
        schema = record.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise LogFormatError(f"a decision has an integer 'schema'; got {schema!r}: not a decision log?")
        if schema > SCHEMA:
            raise LogFormatError(
                f"the log has schema {schema}, this version reads up to {SCHEMA}: upgrade lightning-autotune"
            )
        wanted: dict[str, type | tuple[type, ...]] = {
            "kind": str,
            "action": str,
            "reason": str,
            "step": int,
            "effective_step": int,
            "numbers": Mapping,
            "cost_steps": (int, float),
        }
        for key, kind in wanted.items():
            value = record.get(key)
            if not isinstance(value, kind) or (key in _COUNTS and not _is_count(value)):
                raise LogFormatError(f"a decision's {key!r} is missing or has a wrong type: {value!r}")
        return cls(**{key: _revived(record[key]) if key == "numbers" else record[key] for key in wanted})


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and 0 <= value <= _MOST


def _plain(value: Any) -> Any:
    """``value`` in JSON's own types; floats JSON cannot spell become ``{"float": "NaN"}``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _revived(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == {"float"} and isinstance(value["float"], str) and value["float"] in _NON_FINITE:
            return _NON_FINITE[value["float"]]
        return {key: _revived(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_revived(item) for item in value]
    if isinstance(value, int) and abs(value) > _LARGEST:
        # No number of ours: one that no float can hold would break whoever computes with it.
        return math.inf if value > 0 else -math.inf
    return value


def encode(decision: Decision) -> str:
    """One line of the log, without its newline."""
    return json.dumps(decision.to_dict(), allow_nan=False, separators=(",", ":"))


class DecisionLog:
    """Appends decisions to a ``decisions.jsonl``; a file that cannot be written never stops training.

    Each record is one ``write`` of one whole line to a file opened for append, so that a reader, or a run
    that is killed, sees whole lines. The first failure is kept in :attr:`failure` and later writes are
    skipped; the caller decides how to tell the user.

    Args:
        path: The file. Its directory is made. An existing file is replaced where ``history`` contains all of it
            (a resumed run hands over its earlier decisions, so that every log is whole); another run's is kept
            as ``decisions.1.jsonl``, ``decisions.2.jsonl``, …
        history: Decisions to begin with.
    """

    def __init__(self, path: str | os.PathLike[str], history: Iterable[Decision] = ()) -> None:
        self.path = Path(path)
        self.failure: OSError | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(encode(decision) + "\n" for decision in history).encode("utf-8")
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_bytes(text)
            self._keep_another_runs(text)
            partial.replace(self.path)
        except OSError as failure:
            self.failure = failure

    def _keep_another_runs(self, history: bytes) -> None:
        try:
            earlier = self.path.read_bytes()
        except FileNotFoundError:
            return
        if set(earlier.splitlines(keepends=True)) <= set(history.splitlines(keepends=True)):
            return
        names = (f"{self.path.stem}.{number}{self.path.suffix}" for number in count(1))
        self.path.rename(next(free for name in names if not (free := self.path.with_name(name)).exists()))

    def write(self, decision: Decision) -> None:
        """Appends one line and hands it to the operating system at once."""
        if self.failure is not None:
            return
        line = (encode(decision) + "\n").encode("utf-8")
        try:
            with open(self.path, "ab", buffering=0) as file:
                whole = file.tell()
                if file.write(line) < len(line):
                    # The disk is full: what is left of a line would spoil the next one.
                    file.truncate(whole)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as failure:
            self.failure = failure


def read_decisions(path: str | os.PathLike[str]) -> list[Decision]:
    """Reads a decision log.

    Args:
        path: A ``decisions.jsonl``, or a directory that holds one.

    Returns:
        The decisions in the order of the file.

    Raises:
        LogFormatError: The file is missing, or a line is not a decision; the message names the line. A last
            line without a newline is one that was being written when the run died, and is left out.
    """
    file = Path(path)
    try:
        if file.is_dir():
            file = file / "decisions.jsonl"
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # a path may hold what no path can
        raise LogFormatError(f"cannot read {file}: {error}") from error
    return [_decode(line, file, number) for number, line in _whole_lines(text)]


def _whole_lines(text: str) -> Iterator[tuple[int, str]]:
    lines = text.split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        if line.strip():
            yield number, line


def _decode(line: str, file: Path, number: int) -> Decision:
    try:
        return Decision.from_dict(json.loads(line))
    except LogFormatError as error:
        raise LogFormatError(f"{file}, line {number}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise LogFormatError(f"{file}, line {number}: not JSON ({error})") from error

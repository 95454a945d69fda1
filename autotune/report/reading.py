"""Reads a run directory and never gives up on what is whole.

:func:`autotune.decision.read_decisions` is strict, because a replay must not guess. A person who looks into a
broken log is better served by everything that can be read and a plain list of what could not.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune.decision import SCHEMA, Decision
from autotune.errors import LogFormatError
from autotune.report.metrics import Series, read_metrics

LOG_NAME = "decisions.jsonl"
#: Another run's log, put aside.
_KEPT = re.compile(r"decisions\.\d+\.jsonl")

#: Problems of one sort are told this often, then counted.
_TOLD = 3


@dataclass(frozen=True)
class Run:
    """What could be read of one run.

    Attributes:
        name: A short name for headings and legends.
        path: The decision log; it need not exist when metrics do.
        decisions: Every readable decision, in the order of the file.
        metrics: Logged scalars by name.
        problems: One sentence for each thing that could not be read.
    """

    name: str
    path: Path
    decisions: tuple[Decision, ...]
    metrics: Mapping[str, Series] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def last_step(self) -> int:
        """The last real update that any record speaks of."""
        steps = [decision.step for decision in self.decisions]
        steps += [int(series.steps[-1]) for series in self.metrics.values() if len(series.steps)]
        return max(steps, default=0)


def find_log(path: str | os.PathLike[str]) -> tuple[Path, list[str]]:
    """The decision log that ``path`` means, and what the reader should know about the choice.

    A directory without a log of its own, such as ``lightning_logs``, stands for the newest log below it.

    Raises:
        LogFormatError: Nothing is there.
    """
    place = Path(path)
    try:
        is_file, is_folder = place.is_file(), place.is_dir()
    except (OSError, ValueError) as error:
        raise LogFormatError(f"{place} cannot be looked at ({error})") from error
    if is_file:
        return place, []
    if not is_folder:
        raise LogFormatError(f"{place} does not exist: name a run's directory or its {LOG_NAME}")
    if (place / LOG_NAME).is_file():
        return place / LOG_NAME, []
    logs = sorted(place.glob(f"*/{LOG_NAME}")) + sorted(place.glob(f"*/*/{LOG_NAME}"))
    if not logs:
        return place / LOG_NAME, [
            f"{place} holds no {LOG_NAME}: was a controller among the trainer's callbacks? "
            "It lies under trainer.log_dir, or under trainer.default_root_dir without a logger."
        ]
    newest = max(logs, key=lambda log: log.stat().st_mtime)
    told = [f"{place} holds {len(logs)} logs below it; this is the newest, {newest}."] if len(logs) > 1 else []
    return newest, told


def read_run(path: str | os.PathLike[str]) -> Run:
    """Reads a decision log and the metrics beside it, as far as they can be read.

    Args:
        path: A run's directory, a directory of runs (the newest is taken), or a ``decisions.jsonl``.

    Raises:
        LogFormatError: There is nothing to show: no such path, or neither a decision nor a metric in it.
    """
    log, problems = find_log(path)
    decisions: list[Decision] = []
    if log.is_file():
        decisions, found = _read_tolerantly(log)
        problems += found
    if _KEPT.fullmatch(log.name) and (log.parent / LOG_NAME).is_file():
        metrics: dict[str, Series] = {}
        problems.append(f"{log} was kept when another run began in its folder: the curves there are not its own.")
    else:
        metrics, found = read_metrics(log.parent, min((decision.step for decision in decisions), default=0))
        problems += found
    if not decisions and not metrics:
        raise LogFormatError(" ".join(problems) or f"{log} holds no decision, and there are no metrics beside it")
    return Run(_name_of(log), log, tuple(decisions), metrics, tuple(problems))


def distinct(runs: Sequence[Run]) -> list[Run]:
    """The runs, named by the part of their paths in which they differ (``version_0`` is in every folder)."""
    parts = [run.path.resolve().parent.parts for run in runs]
    for end in (0, -1):  # what all have in common at the front, then at the back, tells nothing
        while min(map(len, parts)) > 1 and len({item[end] for item in parts}) == 1:
            parts = [item[1:] if end == 0 else item[:-1] for item in parts]
    return [replace(run, name="/".join(item)) for run, item in zip(runs, parts, strict=True)]


def _name_of(log: Path) -> str:
    folder = log.resolve().parent
    parts = [part for part in folder.parts[-2:] if part != folder.anchor]
    return "/".join(parts) or str(log)


def _read_tolerantly(log: Path) -> tuple[list[Decision], list[str]]:
    try:
        text = log.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        return [], [f"{log} cannot be read ({error})."]
    if not text.strip():
        return [], [f"{log} is empty: the run died before its first decision, or has not come to it yet."]
    lines = text.split("\n")
    problems: list[str] = []
    if lines[-1].strip():
        problems.append(f"Line {len(lines)}, the last, was cut short while it was written; it is left out.")
    decisions, counts = [], Counter[str]()
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        decision, problem = _read_line(line)
        if decision is not None:
            decisions.append(decision)
        if problem is not None:
            sort, sentence = problem
            counts[sort] += 1
            if counts[sort] <= _TOLD:
                problems.append(f"Line {number}: {sentence}")
    problems += [
        f"{count - _TOLD} more lines of the same sort ({sort})." for sort, count in counts.items() if count > _TOLD
    ]
    return decisions, problems


def _read_line(line: str) -> tuple[Decision | None, tuple[str, str] | None]:
    """The decision, if there is one, and (sort, sentence) of what is wrong, if anything is."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, ("not JSON", f"not JSON ({error}); it is left out.")
    schema = record.get("schema") if isinstance(record, Mapping) else None
    newer = isinstance(schema, int) and schema > SCHEMA
    if newer:
        record = {**record, "schema": SCHEMA}
    try:
        decision = Decision.from_dict(record)
    except LogFormatError as error:
        return None, ("not a decision", f"{error}; it is left out.")
    if newer:
        return decision, (
            "newer schema",
            f"written with schema {schema}, this version knows {SCHEMA}: shown as far as it is understood. "
            "Upgrade lightning-autotune to see all of it.",
        )
    return decision, None

"""The scalars that lie beside a decision log, whichever of the trainer's loggers wrote them."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One scalar over the run.

    Attributes:
        steps: Real optimizer updates, ascending; shape (n,), float64.
        values: Shape (n,), float64; non-finite values are kept.
    """

    steps: FloatArray
    values: FloatArray

    @classmethod
    def of(cls, points: list[tuple[float, float]]) -> Series:
        """From (step, value) pairs in any order; of two at one step the later one counts."""
        table = np.asarray(sorted(dict(points).items()), dtype=np.float64).reshape(-1, 2)
        return cls(table[:, 0], table[:, 1])

    def thinned(self, limit: int) -> Series:
        """At most ``limit`` points, honestly: each bucket keeps its lowest and its highest value.

        The first and the last point, and one non-finite point a bucket (so that an explosion stays visible
        as a gap), are kept too. Averaging would hide exactly the spikes one looks for.

        >>> spike = Series(np.arange(1000.0), np.where(np.arange(1000) == 617, 9.0, 0.0))
        >>> small = spike.thinned(50)
        >>> len(small.steps) <= 50, float(small.values.max()), float(small.steps[small.values.argmax()])
        (True, 9.0, 617.0)
        """
        count = len(self.steps)
        if count <= limit:
            return self
        kept = {0, count - 1}
        for bucket in np.array_split(np.arange(count), max((limit - 2) // 3, 1)):
            values = self.values[bucket]
            finite = bucket[np.isfinite(values)]
            kept.update(bucket[~np.isfinite(values)][:1].tolist())
            if len(finite):
                kept.add(int(finite[self.values[finite].argmin()]))
                kept.add(int(finite[self.values[finite].argmax()]))
        index = np.asarray(sorted(kept))
        return Series(self.steps[index], self.values[index])


def read_metrics(folder: Path, first_step: int = 0) -> tuple[dict[str, Series], list[str]]:
    """Every scalar found in ``folder``: a ``metrics.csv``, TensorBoard event files.

    Args:
        folder: Where the loggers wrote.
        first_step: The step at which the run began; event files of an earlier run are left out.

    Returns:
        Series by name, and one sentence for each file that could not be read or is left out.
    """
    metrics: dict[str, Series] = {}
    problems: list[str] = []
    table = folder / "metrics.csv"
    if table.is_file():
        try:
            metrics.update(_read_csv(table))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            problems.append(f"{table} cannot be read ({error}).")
    if any(folder.glob("events.out.tfevents.*")):
        found, problem = _read_tensorboard(folder, first_step)
        metrics = {**found, **metrics}
        problems += problem
    return metrics, problems


def _read_csv(table: Path) -> dict[str, Series]:
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with open(table, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, text in row.items():
                value = None if name in ("step", None) else _number(text)
                if value is not None:
                    points[name].append((step, value))
    return {name: Series.of(pairs) for name, pairs in points.items()}


def _number(text: object) -> float | None:
    try:
        return float(text) if isinstance(text, str) else None
    except ValueError:
        return None


#: What one event file holds: (step, value) by name, in the order in which they were written.
_Points = dict[str, list[tuple[float, float]]]


def _read_tensorboard(folder: Path, first_step: int) -> tuple[dict[str, Series], list[str]]:
    """A resumed run's later file goes on from where it begins; a later run's own begins before any could go on."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}, [f"{folder} holds TensorBoard files; they can be shown once tensorboard is installed."]
    kept: _Points = {}
    problems: list[str] = []
    for file in sorted(folder.glob("events.out.tfevents.*"), key=_created):
        reader = EventAccumulator(str(file), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
        try:
            reader.Reload()
        except Exception as error:  # the reader raises whatever its record parser met
            problems.append(f"{file} cannot be read ({error}).")
            continue
        points = {name: [(e.step, e.value) for e in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
        begin, another = _beginning(points, first_step)
        before = sum(map(len, kept.values()))
        kept = {} if another else {name: [pair for pair in pairs if pair[0] <= begin] for name, pairs in kept.items()}
        if left_out := before - sum(map(len, kept.values())):
            why = "begins another run" if another else f"goes on from step {begin:.0f}"
            problems.append(f"{file.name} {why}: {left_out} values of files before it are left out.")
        for name, pairs in points.items():
            kept.setdefault(name, []).extend(pairs)
    return {name: Series.of(pairs) for name, pairs in kept.items() if pairs}, problems


def _created(file: Path) -> tuple[int, int, str]:
    """The time in the name of an event file; of one second, in the order of the writer's count at the name's end."""
    seconds = file.name.split(".")[3]
    return int(seconds) if seconds.isdecimal() else 0, len(file.name), file.name


def _beginning(points: _Points, first_step: int) -> tuple[float, bool]:
    """The step from which a file tells of the run, and whether that is the run's very first part.

    The longest curve says so: hyperparameters and results stand at step 0 in every file. Where a file begins before
    the second row of a run could be due, nothing of the run was logged before it.
    """
    if not points:
        return math.inf, False
    steps = [step for step, _ in max(points.values(), key=len)]
    every = steps[1] - steps[0] if len(steps) > 1 else 0.0
    return steps[0], steps[0] < first_step + max(every, 1.0)

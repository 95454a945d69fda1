"""Where results lie: one JSON file a run, in a folder that the user names, and a CSV file with a line for every run.

The lines are what is kept with the code. They hold no curves and no decisions, but all that a table is made of, so that
a table can be made again, or one column of it, from a checkout alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workloads import Workload

FOLDER = Path(__file__).resolve().parent / "results"
Runs = dict[str, dict[int, dict[str, Any]]]  # method -> seed -> result
_NUMBERS = {"loss": float, "budget": int, "updates": int, "cost": float, "trial_steps": int, "seconds": float}
_ORIGIN = ("commit", "machine", "versions")


def path_of(folder: Path, workload: Workload, name: str, seed: int) -> Path:
    """Where a result lies."""
    return folder / f"{workload.name}-{workload.key()}" / f"{name.replace('/', '-')}-s{seed}.json"


def keep(target: Path, result: dict[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(result))
    draft.replace(target)


def load(folder: Path, workloads: Sequence[Workload], label: str) -> dict[str, Runs]:
    """Results of these definitions, by workload, method and seed: the folder's files, and its lines where it has none.

    Args:
        folder: With one folder a workload, a ``runs-<label>.csv``, or both.
        workloads: Others are left out, and so are results of other definitions of these.
        label: Of the file with the lines.
    """
    keys = {workload.name: workload.key() for workload in workloads}
    found: dict[str, Runs] = {name: defaultdict(dict) for name in keys}
    lines = folder / f"runs-{label}.csv"
    if lines.exists():
        with lines.open(newline="") as file:
            for row in csv.DictReader(file):
                if keys.get(row["workload"]) == row["key"]:
                    found[row["workload"]][row["method"]][int(row["seed"])] = _of_line(row)
    for name, key in keys.items():
        for path in sorted((folder / f"{name}-{key}").glob("*.json")):
            result = json.loads(path.read_text())
            if isinstance(result, dict):
                found[name][result["method"]][result["seed"]] = result
    return {name: dict(runs) for name, runs in found.items() if runs}


def _of_line(row: dict[str, str]) -> dict[str, Any]:
    known: dict[str, Any] = {key: kind(row[key]) if row[key] else None for key, kind in _NUMBERS.items()}
    known |= {key: row[key] for key in ("workload", "key", "method", "error") if row[key]}
    origin = {key: row[key] for key in _ORIGIN}
    return known | {"seed": int(row["seed"])} | ({"origin": origin} if any(origin.values()) else {})


def write_lines(found: dict[str, Runs], target: Path) -> None:
    """Every run without its curves and decisions; the file is replaced whole or not at all."""
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    with draft.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["workload", "key", "method", "seed", *_NUMBERS, *_ORIGIN, "error"])
        for workload, runs in sorted(found.items()):
            for method, by_seed in sorted(runs.items()):
                for seed, r in sorted(by_seed.items()):
                    known = [workload, r.get("key"), method, seed, *(r.get(key) for key in _NUMBERS)]
                    rows.writerow([*known, *(r.get("origin", {}).get(key) for key in _ORIGIN), r.get("error")])
    draft.replace(target)


def loss_of(result: dict[str, Any]) -> float:
    """Final loss; a run that crashed or diverged counts as infinite."""
    loss = result["loss"]
    return math.inf if loss is None or not math.isfinite(loss) else float(loss)


def means(runs: Runs, seeds: Sequence[int], prefix: str = "") -> dict[str, float]:
    """Mean loss of every method that has all the seeds."""
    return {
        name: statistics.fmean(loss_of(by_seed[s]) for s in seeds)
        for name, by_seed in runs.items()
        if name.startswith(prefix) and all(s in by_seed for s in seeds)
    }

"""Judges the forecast of a stage's end: interval and error, exponential curve against power law, on the same runs.

    python examples/benchmark/forecast_table.py --seeds 10 11

At every moment at which ``AutoLRS`` forecasts, both families are fitted to what it has seen; what came is the
validation loss it measures at the stage's end. A stage that was broken off counts with the loss at which it was. The
third row is the forecast that nothing changes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from results import FOLDER, path_of  # noqa: E402
from rich.progress import track  # noqa: E402
from run import run_one  # noqa: E402
from suite import SUITE  # noqa: E402

from autotune.stage.outlook import look_ahead  # noqa: E402

FAMILIES = ("exponential", "power")


def judged(name: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Every forecast of one run beside what came; cached."""
    file = path_of(folder, SUITE[name], "forecasts", seed)
    if file.exists():
        return list(json.loads(file.read_text()))
    made: list[dict[str, Any]] = []

    def both(*args: Any) -> Any:
        outlooks = {family: look_ahead(*args, family=family) for family in FAMILIES}
        now = args[2].loss
        row = {family: [o.value, o.low, o.high] if o.trusted else None for family, o in outlooks.items()}
        made.append({"at": args[3], "now": now, **row})
        return outlooks["exponential"]

    with mock.patch("autotune.callbacks._lr_run.look_ahead", both):
        decisions = run_one("autolrs", SUITE[name], seed)["decisions"]
    ends = [d for d in decisions if (d["kind"], d["action"]) == ("stage", "end")]
    rows = []
    for row in made:
        end = next((d["numbers"] for d in ends if d["numbers"]["start_step"] <= row["at"] <= d["step"]), None)
        if end is not None and math.isfinite(end["loss"]):
            rows.append({**row, "came": end["loss"], "before": end["previous_loss"], "workload": name, "seed": seed})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    return rows


def line(label: str, rows: list[dict[str, Any]], family: str | None) -> str:
    """One row of the table; ``family`` None is the forecast that nothing changes."""
    told = rows if family is None else [row for row in rows if row[family] is not None]
    error = [abs((row["now"] if family is None else row[family][0]) - row["came"]) / abs(row["came"]) for row in told]
    inside = [row[family][1] <= row["came"] <= row[family][2] for row in told] if family else []
    cover = f"{statistics.fmean(inside):.1%}" if inside else ""
    width = [(row[family][2] - row[family][1]) / abs(row["came"]) for row in told] if family else []
    wide = f"{statistics.median(width):.1%}" if width else ""
    return f"| {label} | {len(told)} of {len(rows)} | {cover} | {wide} | {statistics.median(error):.2%} |"


def table(rows: list[dict[str, Any]]) -> str:
    """Over all forecasts; then those that both families made."""
    shared = [row for row in rows if all(row[family] is not None for family in FAMILIES)]
    head = ["| forecast | made | inside the 80 % interval | its median width | median error |", "|---|---|---|---|---|"]
    lines = [*head, *(line(family, rows, family) for family in FAMILIES), line("no change", rows, None)]
    lines += [line(f"{family}, where both were made", shared, family) for family in FAMILIES]
    return "\n".join([*lines, line("no change, where both were made", shared, None)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    jobs = [(name, seed) for seed in options.seeds for name in SUITE]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        each = pool.map(functools.partial(judged, folder=options.results), *zip(*jobs, strict=True))
        rows = [row for found in track(each, "forecasts", total=len(jobs)) for row in found]
    print(table(rows))


if __name__ == "__main__":
    main()

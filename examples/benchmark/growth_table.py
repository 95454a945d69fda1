"""Batch growth at equal examples: every fixed batch at its own tuned rate, the published rules, and ours.

    python examples/benchmark/growth_table.py --tune                 # rates for each batch, on seeds 0 and 1
    python examples/benchmark/growth_table.py --seeds 10 11 12       # the table, at those rates; can be resumed
    python examples/benchmark/growth_table.py --seeds 10 11 12 13 14 --rules noise_scale doubling
    python examples/benchmark/growth_table.py --together --seeds 10 11 12   # under AutoLRS, with and without growth
    python examples/benchmark/growth_table.py --seeds 10 11 12 --dry-run    # from the lines kept with the code

Our growing runs begin at the workload's own batch and at the best fixed one, the published rules' at the workload's
own, each with the rate that was tuned for it. A cell is the loss over that of the best fixed batch on the same seeds,
and the updates saved against the fixed batch that the run begins with. "Not growing" is that batch again, under
Lightning and with its order of examples: what it is off by is the noise of the seeds, and what the best of five gains
by being chosen. "The same over not growing" is the cost of growth alone. "Doubling from it" measures nothing: its batch
doubles at every fifth of the examples. ``growth_rates.json`` keeps the tuned rates.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from growth_runs import (  # noqa: E402
    DOUBLING,
    LINES,
    PUBLISHED,
    RATES,
    STILL,
    TOGETHER,
    Run,
    fixed,
    load,
    one,
    quiet,
    rates,
    write_lines,
)
from report import WORST, geometric  # noqa: E402
from results import FOLDER, keep  # noqa: E402
from run import work  # noqa: E402
from suite import SUITE  # noqa: E402
from workloads import Workload  # noqa: E402

#: Fixed batches, in units of the workload's own.
FACTORS = (0.5, 1, 2, 4, 8)
FIRST_GUESS = {"SGD": 0.1, "AdamW": 0.01, "RMSprop": 0.003}
_OURS = ("not growing", "ours from it", "the same over not growing", "doubling from it", "ours from the suite's")
RULES = ("noise_scale", DOUBLING, *PUBLISHED)
Runs = Mapping[Run, Mapping[str, Any]]
Score = tuple[float, float]  # loss over the reference's, share of updates saved


def tuned(workload: Workload, batch: int, guess: float, seeds: list[int]) -> tuple[float, float]:
    """The rate with the lowest mean loss on a grid of factor 2, climbed from ``guess``; and that loss."""
    seen: dict[int, float] = {}

    def mean(step: int) -> float:
        if step not in seen:
            losses = [fixed(workload, batch, guess * 2.0**step, seed)[0] for seed in seeds]
            seen[step] = sum(losses) / len(losses)
        return seen[step]

    best = 0
    while min(mean(best + 1), mean(best - 1)) < mean(best):
        best += 1 if mean(best + 1) < mean(best - 1) else -1
    return guess * 2.0**best, seen[best]


def tune(name: str, seeds: list[int], target: Path) -> str:
    """Writes a rate for each batch of one workload."""
    quiet()
    workload = SUITE[name]
    guess, found = FIRST_GUESS[workload.optimizer], {}
    for factor in reversed(FACTORS):
        batch = int(factor * workload.batch_size)
        guess, _ = tuned(workload, batch, guess, seeds)
        found[str(batch)] = guess
    keep(target.with_name(f"{target.stem}-{name}.json"), found)
    return f"{name}: {found}"


def gather(target: Path) -> None:
    """Puts what :func:`tune` wrote into one file, in the suite's order."""
    found: dict[str, Any] = json.loads(target.read_text()) if target.exists() else {}
    for file in target.parent.glob(f"{target.stem}-*.json"):
        found[file.stem.removeprefix(f"{target.stem}-")] = json.loads(file.read_text())
        file.unlink()
    keep(target, {name: found[name] for name in SUITE if name in found})


def contenders(workload: Workload, best: int, rules: Sequence[str]) -> list[tuple[str, int]]:
    """Rule and first batch of every run but the fixed: the best batch not growing and doubling, ours from it and from
    the suite's, the published from the suite's."""
    ours = [("noise_scale", first) for first in dict.fromkeys((workload.batch_size, best))]
    every = [(STILL, best), (DOUBLING, best), *ours, *((rule, workload.batch_size) for rule in PUBLISHED)]
    return [(rule, first) for rule, first in every if rule in (STILL, *rules)]


def by_seed(runs: Runs, name: str, rule: str, batch: int, seeds: Sequence[int]) -> dict[int, tuple[float, int]]:
    """Loss (infinite where a run diverged) and updates on each of the seeds for which there is a result."""
    found = {seed: runs.get((name, rule, batch, seed)) for seed in seeds}
    return {
        seed: (run["loss"] if math.isfinite(run["loss"]) else math.inf, run["updates"])
        for seed, run in found.items()
        if run is not None and "error" not in run
    }


def best_of(runs: Runs, name: str, seeds: Sequence[int]) -> int | None:
    """The fixed batch with the lowest mean loss; None where a run is missing."""
    sweep = {int(batch): by_seed(runs, name, "fixed", int(batch), seeds) for batch in rates()[name]}
    if any(len(found) < len(seeds) for found in sweep.values()):
        return None
    return min(sweep, key=lambda batch: _mean(sweep[batch], seeds, 0))


def score(runs: Runs, name: str, ours: tuple[str, int], reference: tuple[str, int], seeds: Sequence[int]) -> Score:
    """Mean loss over the reference's and updates saved against the fixed batch begun with, on the seeds all have.

    NaN where there is no such seed.
    """
    three = [by_seed(runs, name, *one, seeds) for one in (ours, reference, ("fixed", ours[1]))]
    common = sorted(set.intersection(*map(set, three)))
    if not common:
        return math.nan, math.nan
    mine, theirs, began = three
    ratio = min(_mean(mine, common, 0) / _mean(theirs, common, 0), WORST)
    return ratio, 1.0 - _mean(mine, common, 1) / _mean(began, common, 1)


def _mean(found: Mapping[int, tuple[float, int]], seeds: Sequence[int], which: int) -> float:
    return statistics.fmean(found[seed][which] for seed in seeds)


def table(names: Sequence[str], seeds: Sequence[int], runs: Runs) -> str:
    """Loss of every contender over the best fixed batch's, and the updates it saved."""
    heads = ["workload (best fixed batch)", *_OURS, *PUBLISHED]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    scores: dict[str, list[Score]] = {head: [] for head in heads[1:]}
    for name in names:
        if name not in rates() or (best := best_of(runs, name, seeds)) is None:
            continue
        start = SUITE[name].batch_size
        pairs = [(STILL, best, "fixed"), ("noise_scale", best, "fixed"), ("noise_scale", best, STILL)]
        pairs += [(DOUBLING, best, "fixed")]
        pairs += [(rule, start, "fixed") for rule in ("noise_scale", *PUBLISHED)]
        cells = []
        for head, (rule, first, against) in zip(heads[1:], pairs, strict=True):
            ratio, saved = score(runs, name, (rule, first), (against, best), seeds)
            cells.append("" if math.isnan(ratio) else f"{ratio:.3f}, {saved:.0%}")
            scores[head] += [] if math.isnan(ratio) else [(ratio, saved)]
        lines.append(f"| {name} ({best}) | {' | '.join(cells)} |")
    titles: list[tuple[str, Callable[[list[Score]], str]]] = [
        ("geometric mean; mean saved", _overall), ("worst; least saved", _worst), ("workloads", _count)
    ]  # fmt: skip
    for title, value in titles:
        lines.append(f"| {title} | {' | '.join(value(scores[head]) for head in heads[1:])} |")
    counts = [len({seed for _, rule, _, seed in runs if rule == one} & {*seeds}) for one in PUBLISHED]
    lines.append(f"| seeds | {' | '.join(map(str, [len(seeds)] * len(_OURS) + counts))} |")
    return "\n".join(lines)


def together_table(names: Sequence[str], seeds: Sequence[int], runs: Runs) -> str:
    """What growth does to a run under ``AutoLRS``: its loss over that of the run without, and the updates saved."""
    lines = ["| workload (batch) | loss with growth over loss without, updates saved |", "|---|---|"]
    scores: list[Score] = []
    for name in names:
        batch = SUITE[name].batch_size
        alone, grew = (by_seed(runs, name, rule, batch, seeds) for rule in TOGETHER)
        common = sorted({*alone} & {*grew})
        if common and math.isfinite(reference := _mean(alone, common, 0)):
            saved = 1.0 - _mean(grew, common, 1) / _mean(alone, common, 1)
            scores.append((min(_mean(grew, common, 0) / reference, WORST), saved))
            lines.append(f"| {name} ({batch}) | {scores[-1][0]:.3f}, {scores[-1][1]:.0%} |")
    lines.append(f"| geometric mean; mean saved | {_overall(scores)} |")
    return "\n".join(lines)


def _overall(scores: list[Score]) -> str:
    if not scores:
        return ""
    return f"{geometric([ratio for ratio, _ in scores]):.3f}, {statistics.fmean(saved for _, saved in scores):.0%}"


def _worst(scores: list[Score]) -> str:
    return f"{max(ratio for ratio, _ in scores):.3f}, {min(saved for _, saved in scores):.0%}" if scores else ""


def _count(scores: list[Score]) -> str:
    return str(len(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=list(SUITE), choices=list(SUITE))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES)
    parser.add_argument("--tune", action="store_true", help="find the rates on --seeds and stop")
    parser.add_argument("--together", action="store_true", help="under AutoLRS, with and without growth")
    parser.add_argument("--dry-run", action="store_true", help="print the table of what is known and run nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.tune:
        names = [name for name in args.workloads if not RATES.with_name(f"{RATES.stem}-{name}.json").exists()]
        work(functools.partial(tune, seeds=args.seeds, target=RATES), [(name,) for name in names], args.workers)
        gather(RATES)
        return
    known = load(args.results)
    names = args.workloads if args.together else [name for name in args.workloads if name in rates()]

    def make(jobs: list[Run]) -> dict[Run, dict[str, Any]]:
        missing = [] if args.dry_run else [job for job in jobs if job not in known]
        if missing:
            work(functools.partial(one, folder=args.results), missing, args.workers)
        return load(args.results)

    if args.together:
        known = make([(n, rule, SUITE[n].batch_size, seed) for n in names for rule in TOGETHER for seed in args.seeds])
        print(together_table(names, args.seeds, known))
    else:
        known = make([(n, "fixed", int(batch), seed) for n in names for batch in rates()[n] for seed in args.seeds])
        known = make([
            (name, rule, first, seed) for name in names if (best := best_of(known, name, args.seeds)) is not None
            for rule, first in contenders(SUITE[name], best, args.rules) for seed in args.seeds
        ])  # fmt: skip
        print(table(names, args.seeds, known))
    if not args.dry_run:
        write_lines(known, args.results / LINES)


if __name__ == "__main__":
    main()

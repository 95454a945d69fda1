"""Turns the results folder into a table (Markdown), one figure per workload, and a line for every run
of ``run.py`` (CSV).

    python examples/benchmark/report.py --seeds 0 1            # prints the table, writes results/figures/*.png

``ratio`` is a method's mean final validation loss over that of the best sweep configuration: the one whose mean over
all the seeds given is lowest, of those that have them all. Both means are over the seeds that the method was run on,
whose number stands in the table.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

from results import FOLDER, Runs, load, loss_of, means, write_lines
from suite import add_options, label, wanted_workloads

WORST = 10.0  # a ratio is cut here, so that one diverged run does not decide a geometric mean alone


def best_of_sweep(runs: Runs, seeds: list[int]) -> tuple[str, float]:
    """The configuration with the lowest mean.

    Raises:
        ValueError: No sweep configuration has all the seeds.
    """
    swept = means(runs, seeds, "sweep/")
    if not swept:
        raise ValueError("no sweep run has all the seeds: run.py --methods sweep (or linear) with the same --seeds")
    name = min(swept, key=swept.__getitem__)
    return name, swept[name]


def ratio(loss: float, best: float) -> float:
    """``loss`` over ``best``, cut at :data:`WORST`."""
    return min(loss / best, WORST)


def tuned_equivalent(runs: Runs, name: str, loss: float, seeds: list[int]) -> float:
    """Share of T after which the best sweep run's curve (mean over seeds) first reached ``loss``; infinite: never.

    A decayed run reaches its loss at its end, so this is an upper bound on what a shorter tuned run would need.
    """
    curves = [runs[name][s]["curve"] for s in seeds]
    budget = runs[name][seeds[0]]["budget"]
    for points in zip(*curves, strict=False):
        if statistics.fmean(p[1] for p in points) <= loss:
            return float(points[0][0] / budget)
    return math.inf


def equivalents(found: dict[str, Runs], seeds: list[int]) -> list[str]:
    """The tuned-equivalent of AutoLRS on every workload where it has all the seeds."""
    said = []
    for workload, runs in found.items():
        if "autolrs" in means(runs, seeds) and all(
            "curve" in runs[name][seed] for name in ("autolrs", best_of_sweep(runs, seeds)[0]) for seed in seeds
        ):
            # Curves are of a part of the validation set: the end of ours is what theirs are compared with.
            loss = statistics.fmean(runs["autolrs"][s]["curve"][-1][1] for s in seeds)
            said.append(f"{workload} {tuned_equivalent(runs, best_of_sweep(runs, seeds)[0], loss, seeds):.2f}")
    return said


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def table(found: dict[str, Runs], seeds: list[int], only: list[str] | None = None) -> str:
    """Workloads down, methods across; below them geometric mean, worst ratio, cost, and pairs AutoLRS is better in."""
    names = sorted({m for runs in found.values() for m in runs if not m.startswith("sweep/")}, key=_order)
    names = [name for name in names if only is None or name in only]
    best = {w: best_of_sweep(runs, seeds) for w, runs in found.items()}
    scores: dict[str, dict[str, float]] = {name: {} for name in names}
    for workload, runs in found.items():
        for name in scores:
            have = [seed for seed in seeds if seed in runs.get(name, {})]
            if have:
                reference = means(runs, have)[best[workload][0]]
                scores[name][workload] = ratio(means(runs, have)[name], reference)
    names = [name for name in names if scores[name]]
    rows = [["workload", "best of sweep", *names]]
    for workload, (name, loss) in best.items():
        cells = [f"{scores[n][workload]:.3f}" if workload in scores[n] else "" for n in names]
        rows.append([workload, f"{loss:.4g} ({name[6:]})", *cells])
    rows += [
        ["**geometric mean**", "1", *(f"**{geometric(list(scores[n].values())):.3f}**" for n in names)],
        ["worst", "1", *(f"{max(scores[n].values()):.2f}" for n in names)],
        ["seeds", f"{len(seeds)}", *(_seeds(found, n, seeds) for n in names)],
        ["search / T", "", *(_cost(found, n) for n in names)],
        ["AutoLRS better", "", *(_beaten(found, n, seeds) for n in names)],
    ]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _seeds(found: dict[str, Runs], name: str, seeds: list[int]) -> str:
    counts = sorted({sum(seed in runs.get(name, {}) for seed in seeds) for runs in found.values()})
    return " to ".join(str(count) for count in (counts if len(counts) < 3 else (counts[0], counts[-1])))


def _order(name: str) -> tuple[bool, str]:
    return not name.startswith("autolrs"), name


def _cost(found: dict[str, Runs], name: str) -> str:
    shares = [
        (r["cost"] - r["updates"]) / r["budget"]
        for runs in found.values() for r in runs.get(name, {}).values() if r["loss"] is not None
    ]  # fmt: skip
    return f"{statistics.fmean(shares):.1%} (max {max(shares):.1%})" if shares else ""


def _beaten(found: dict[str, Runs], name: str, seeds: list[int]) -> str:
    if name.startswith("autolrs"):
        return ""
    pairs = [
        loss_of(runs["autolrs"][s]) < loss_of(runs[name][s])
        for runs in found.values() for s in seeds
        if s in runs.get("autolrs", {}) and s in runs.get(name, {})
    ]  # fmt: skip
    return f"{sum(pairs)} of {len(pairs)}" if pairs else ""


def draw(workload: str, runs: Runs, seeds: list[int], folder: Path) -> Path:
    """Validation loss over total cost (mean and spread over seeds) and the learning rate over updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    best, _ = best_of_sweep(runs, seeds)
    shown = [best, *(m for m in sorted(runs) if m == "autolrs" or not m.startswith(("sweep/", "autolrs")))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    for name in shown:
        ours = [runs[name][s] for s in seeds if "curve" in runs[name].get(s, {})]
        if not ours:
            continue
        points = list(zip(*(r["curve"] for r in ours), strict=False))
        cost = [statistics.fmean(p[0] for p in at) for at in points]
        middle = [statistics.fmean(p[1] for p in at) for at in points]
        style = {"linewidth": 2.5 if name in (best, "autolrs") else 1.0}
        ended = f"{statistics.fmean(map(loss_of, ours)):.3g}, {len(ours)} seed{'s' * (len(ours) > 1)}"
        (line,) = left.plot(cost, middle, label=f"{name}: {ended}", **style)
        low, high = ([f(p[1] for p in at) for at in points] for f in (min, max))
        left.fill_between(cost, low, high, alpha=0.15, color=line.get_color())
        right.plot(*zip(*ours[0]["rates"], strict=True), color=line.get_color(), **style)
    left.set(xlabel="total cost (optimizer steps, searching included)", ylabel="validation loss (mean, range)")
    reached = [point[1] for seed in seeds for point in runs[best].get(seed, {}).get("curve", ())]
    ceiling, floor = max(reached), min(reached)
    left.set(title=workload, ylim=(0.9 * floor, 1.1 * ceiling))
    if floor > 0.0:
        left.set_yscale("log")
    peak = max(rate for result in runs[best].values() for _, rate in result.get("rates", ()))
    right.set(xlabel="real updates", ylabel="learning rate of the first group", yscale="log", title="learning rate")
    right.set_ylim(1e-4 * peak, 1e3 * peak)
    left.legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{workload}.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    add_options(parser)
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("--methods", nargs="*", help="columns of the table (all)")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="print the table and write nothing")
    options = parser.parse_args()
    # Lines are written of the whole set: a table of some workloads must not cost the others theirs.
    whole = wanted_workloads(argparse.Namespace(**{**vars(options), "workloads": None}))
    everything = load(options.results, whole, label(options))
    found = {
        workload.name: {name: runs for name, runs in everything.get(workload.name, {}).items() if {*runs} & seeds}
        for workload in wanted_workloads(options)
        for seeds in [set(options.seeds)]
    }
    found = {workload: runs for workload, runs in found.items() if runs}
    if not found:
        raise SystemExit(f"no results of the present workloads in {options.results}: run run.py first")
    text = table(found, options.seeds, options.methods)
    origins = sorted({tuple(r["origin"].values()) for runs in found.values() for by in runs.values()
                      for seed, r in by.items() if "origin" in r and seed in options.seeds})  # fmt: skip
    text += "\n\n" + "\n".join(" · ".join(origin) for origin in origins)
    if reached := equivalents(found, options.seeds):
        text += "\n\ntuned-equivalent of AutoLRS (share of T at which the best tuned run reached its loss): "
        text += ", ".join(reached)
    print(text)
    if options.dry_run:
        return
    if options.workloads is None:
        (options.results / f"table-{label(options)}.md").write_text(text + "\n")
    write_lines(everything, options.results / f"runs-{label(options)}.csv")
    for workload, runs in {} if options.no_figures else found.items():
        best, _ = best_of_sweep(runs, options.seeds)
        if any("curve" in runs[best][seed] for seed in options.seeds):
            print(draw(workload, runs, options.seeds, options.results / "figures"))
        else:
            print(f"no figure of {workload}: lines without files hold no curves")


if __name__ == "__main__":
    main()

"""The quickstart's model under its rivals: a cosine sweep, AutoLRS, its grid ablation, AutoLRS as published.

    python examples/benchmark/quickstart_table.py --seeds 10 11 12 --out runs/quickstart

Every run costs the same in total, trials and probes included. Runs are cached one JSON each, so that a table that was
broken off goes on; two run side by side, each on one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
COSINES = (1e-4, 3.1e-4, 9.8e-4, 3.1e-3, 9.6e-3, 3e-2)  # six, evenly spaced on a log axis
VARIANTS = {
    "AutoLRS": {},
    "AutoLRS, fixed grid instead of BO": {"proposals": "grid"},
    "AutoLRS as published": {"objective": "forecast", "search_budget": 0.99},
}


def one(name: str, seed: int, steps: int, out: Path) -> None:
    """Runs one configuration in this process and writes its result."""
    sys.path.insert(0, str(HERE.parent))
    import torch

    torch.set_num_threads(1)
    import quickstart

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    args = argparse.Namespace(seed=seed, max_steps=steps, device="cpu", quiet=True)
    began = time.monotonic()
    folder = out / f"{name} {seed} {steps}"
    result = {"name": name, "seed": seed, "steps": steps}
    if name.startswith("cosine"):
        result["loss"] = quickstart.cosine_run(args, float(name.split()[1]), folder)
    else:
        result["loss"], callback = quickstart.auto_run(args, folder, **VARIANTS[name])
        result["lrs"] = [d.numbers["lr"] for d in callback.decisions if d.kind == "search"]
        spent = [d.cost_steps for d in callback.decisions if d.kind != "rollback"]
        result["search_share"] = sum(spent) / (steps - sum(spent))
    result["seconds"] = time.monotonic() - began
    (out / f"{name} {seed} {steps}.json").write_text(json.dumps(result))


def table(results: list[dict], steps: int) -> str:
    """The results as markdown: mean and range over seeds, and the ratio to the sweep's best mean."""
    by_name: dict[str, list[dict]] = {}
    for result in results:
        by_name.setdefault(result["name"], []).append(result)
    means = {name: statistics.mean(r["loss"] for r in runs) for name, runs in by_name.items()}
    best = min(mean for name, mean in means.items() if name.startswith("cosine"))
    lines = [f"| {steps} steps in all | mean | range | ratio to the sweep's best | search |", "|---|---|---|---|---|"]
    for name, runs in sorted(by_name.items(), key=lambda item: means[item[0]]):
        losses = [run["loss"] for run in runs]
        search = statistics.mean(run.get("search_share", 0.0) for run in runs)
        lines.append(
            f"| {name} | {means[name]:.4f} | {min(losses):.4f} – {max(losses):.4f} | {means[name] / best:.3f} | "
            f"{f'{search:.1%}' if search else ''} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--max-steps", type=int, default=4000, help="total cost of every run (4000)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        one(args.one[0], int(args.one[1]), args.max_steps, args.out)
        return
    from rich.progress import track

    names = [*VARIANTS, *(f"cosine {lr:g}" for lr in COSINES)]
    wanted = [(name, seed) for seed in args.seeds for name in names]
    file = lambda name, seed: args.out / f"{name} {seed} {args.max_steps}.json"  # noqa: E731
    missing = [job for job in wanted if not file(*job).exists()]

    def work(job: tuple[str, int]) -> None:
        command = [sys.executable, __file__, "--one", job[0], str(job[1])]
        command += ["--max-steps", str(args.max_steps), "--out", str(args.out)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)

    with ThreadPoolExecutor(args.workers) as pool:
        for _ in track(pool.map(work, missing), total=len(missing), description="runs"):
            pass
    print(table([json.loads(file(*job).read_text()) for job in wanted], args.max_steps))
    print(f"\nseeds {args.seeds}, {platform.machine()}, one thread a run")


if __name__ == "__main__":
    main()

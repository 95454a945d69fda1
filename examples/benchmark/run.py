"""Runs the benchmark, two workers, and can be stopped and started again at any time.

    python examples/benchmark/run.py                              # all that is missing, developing seeds 0 and 1
    python examples/benchmark/run.py --seeds 10 11 12 13 14 --methods autolrs top3
    python examples/benchmark/run.py --workloads parity --scale gpu
    python examples/benchmark/run.py --set held-out --methods linear hold autolrs
    python examples/benchmark/run.py --steps 600 --methods linear hold autolrs

Every result is one JSON file whose folder carries the hash of the workload's definition: a changed workload is run
again, everything else is kept. ``report.py`` reads the folder.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from results import FOLDER, Runs, keep, load, means, path_of  # noqa: E402
from rivals import POLICIES, RIVALS, SHAPES, Fit, bare_trainer, method  # noqa: E402
from suite import add_options, label, wanted_workloads  # noqa: E402
from workloads import Task, Workload  # noqa: E402

POINTS = 20  # measurements along a run's curve; they are the benchmark's own and cost the method nothing
CURVE_EXAMPLES = 512  # of the validation set, for the curve; the loss at the end is that of the whole set


def validation_loss(task: Task, batches: list[Any], optimizer: Any = None) -> float:
    """Mean loss over the whole validation set in evaluation mode; NaN-safe, leaves RNG and modes as they were."""
    averaged = hasattr(optimizer, "train") and hasattr(optimizer, "eval")  # schedule-free keeps two sets of weights
    total = count = 0.0
    state = torch.get_rng_state()
    task.eval()
    if averaged:
        optimizer.eval()
    with torch.no_grad():
        for batch in batches:
            batch = tuple(part.to(task.device) for part in batch)
            total += float(task.loss(batch)) * len(batch[0])
            count += len(batch[0])
    if averaged:
        optimizer.train()
    task.train()
    torch.set_rng_state(state)
    return total / count


class Recorder(L.Callback):
    """Validation loss over total cost and the rate over updates; reads only."""

    def __init__(self, fit: Fit, batches: list[Any]) -> None:
        enough = itertools.accumulate(len(batch[0]) for batch in batches)
        self.fit, self.batches = fit, [b for b, seen in zip(batches, enough, strict=True) if seen <= CURVE_EXAMPLES]
        self.every = max(1, fit.updates // POINTS)
        self.curve: list[list[float]] = []
        self.rates: list[list[float]] = []

    def cost(self, updates: int) -> float:
        """Steps paid so far, searches included."""
        controller = self.fit.controller
        if controller is None:
            return updates + self.fit.spent * (updates / self.fit.updates)
        return updates + sum(d.cost_steps for d in controller.decisions if d.kind != "rollback")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = _inner(trainer)
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):
            optimizer.train()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every == 0 or step == 1:
            loss = validation_loss(pl_module, self.batches, _inner(trainer))
            self.curve.append([self.cost(step), loss])
            self.rates.append([step, trainer.optimizers[0].param_groups[0]["lr"]])


def _inner(trainer: Any) -> Any:
    optimizer = trainer.optimizers[0]
    return getattr(optimizer, "optimizer", optimizer)


def run_one(name: str, workload: Workload, seed: int) -> dict[str, Any]:
    """Trains once and returns everything the report needs, as JSON types."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    L.seed_everything(seed, verbose=False)
    began = time.perf_counter()
    fit = method(name, workload)(workload, seed)
    batches = list(workload.val_loader())
    recorder = Recorder(fit, batches)
    trainer = bare_trainer(workload, fit.updates, [*fit.callbacks, recorder], fit.validations)
    trainer.fit(fit.task, workload.train_loader(seed), workload.val_loader())
    loss = validation_loss(fit.task, batches, _inner(trainer))
    controller = fit.controller
    cost = recorder.cost(trainer.global_step)
    # A last rollback comes after the last update.
    recorder.curve.append([cost, validation_loss(fit.task, recorder.batches, _inner(trainer))])
    return {
        "workload": workload.name, "key": workload.key(), "method": name, "seed": seed, "loss": loss,
        "budget": workload.steps, "updates": trainer.global_step, "cost": cost,
        "curve": recorder.curve, "rates": recorder.rates, "seconds": time.perf_counter() - began,
        "decisions": [] if controller is None else [d.to_dict() for d in controller.decisions],
        "trial_steps": 0 if controller is None else controller.trial_steps,
        "origin": origin(),
    }  # fmt: skip


def origin() -> dict[str, str]:
    """Commit, machine kind and versions: what a figure needs to be believed."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "commit": found.stdout.strip() or "unknown",
        "machine": f"{device}, {os.cpu_count()} cores",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}",
    }


def job(name: str, workload: Workload, seed: int, folder: Path) -> str:
    """One run in a worker: its result, or why there is none, goes to disk whole or not at all."""
    try:
        result = run_one(name, workload, seed)
    except Exception as error:
        # A rival that crashes (a finder on a loss that is not finite, say) has lost, and the table says why.
        why = repr(error)[:500]
        known = {"workload": workload.name, "key": workload.key(), "method": name, "seed": seed}
        result = known | {"loss": None, "error": why}
    keep(path_of(folder, workload, name, seed), result)
    return f"{workload.name} {name} s{seed}: {result['loss']}"


def top(runs: Runs, count: int, workload: str, seeds: tuple[int, ...] = (0, 1)) -> list[str]:
    """The sweep's configurations with the lowest mean loss over the developing seeds: those worth the reporting ones.

    Raises:
        ValueError: No configuration of the sweep was run on the developing seeds.
    """
    found = means(runs, seeds, "sweep/")
    if not found:
        raise ValueError(f"{workload}: run the sweep on seeds {seeds} first (--methods sweep --seeds 0 1)")
    return sorted(found, key=found.__getitem__)[:count]


def wanted(names: list[str], runs: Runs, workload: str) -> list[str]:
    """Method names: ``sweep`` stands for 7 rates times 3 shapes and a shape's name for its 7, ``rivals`` and
    ``policies`` for all of a kind, ``top3`` for the sweep's best three on the developing seeds.
    """
    groups = {
        "sweep": [f"sweep/{form}/{i}" for form in SHAPES for i in range(7)],
        **{form: [f"sweep/{form}/{i}" for i in range(7)] for form in SHAPES},
        "rivals": list(RIVALS),
        "policies": list(POLICIES),
    }
    return [one for name in names for one in (top(runs, 3, workload) if name == "top3" else groups.get(name, [name]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--methods", nargs="*", default=["sweep", "rivals", "policies"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FOLDER)
    options = parser.parse_args()
    workloads = wanted_workloads(options)
    # The best three of a sweep may be known from the lines that are kept with the code.
    known = load(options.results, workloads, label(options))
    jobs = [
        (name, workload, seed) for seed in options.seeds for workload in workloads
        for name in wanted(options.methods, known.get(workload.name, {}), workload.name)
        if not path_of(options.results, workload, name, seed).exists()
    ]  # fmt: skip
    random.Random(0).shuffle(jobs)  # so that an interrupted night has a bit of everything
    work(functools.partial(job, folder=options.results), jobs, options.workers)


def work(call: Callable[..., str], jobs: Sequence[tuple[Any, ...]], workers: int) -> None:
    """``call(*job)`` for every job, in so many processes, under a progress bar that shows what the last one said.

    A job that fails is named with its error and left out: the next call makes it up.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar, ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        shown = bar.add_task("benchmark", total=len(jobs))
        jobs_of = {pool.submit(call, *one): one for one in jobs}
        running = set(jobs_of)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if error is not None:
                    bar.console.print(f"failed: {jobs_of[future]}: {error!r}", markup=False)
                bar.update(shown, advance=1, description=(future.result() if error is None else repr(error))[:60])


if __name__ == "__main__":
    main()

"""Batch growth at equal examples: every fixed batch at its own tuned rate, the published rules, and ours.

    python examples/benchmark/growth_table.py --tune                 # rates for each batch, on seeds 0 and 1
    python examples/benchmark/growth_table.py --seeds 10 11 12       # the table, at those rates; can be resumed
    python examples/benchmark/growth_table.py --together --seeds 10 11 12   # under AutoLRS, with and without growth

All runs of a workload see the same number of examples and decay linearly to zero over them. Our growing runs begin
at the workload's own batch and at the best fixed one, the published rules' at the workload's own, each with the rate
that was tuned for it. A cell is the loss over that of the best fixed batch, and the updates saved against the fixed
batch that the run begins with. "Not growing" is that batch again, under Lightning and with its order of examples: what
it is off by is the noise of the seeds, and what the best of five gains by being chosen. "The same over not growing"
is the cost of growth alone. ``growth_rates.json`` keeps the tuned rates.
"""

from __future__ import annotations

import argparse
import csv
import functools
import inspect
import json
import logging
import math
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from data import TensorBatches, as_is  # noqa: E402
from report import WORST, geometric  # noqa: E402
from results import FOLDER, keep, path_of  # noqa: E402
from run import origin, validation_loss, work  # noqa: E402
from suite import SUITE  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from workloads import Task, Workload  # noqa: E402

from autotune.callbacks import AdaptiveBatchSize, AutoLRS  # noqa: E402
from autotune.errors import AutotuneError  # noqa: E402

RATES = HERE / "growth_rates.json"
#: Fixed batches, in units of the workload's own.
FACTORS = (0.5, 1, 2, 4, 8)
MOST = 16  # max_batch_size of the growing runs, in units of the batch they begin with
FIRST_GUESS = {"SGD": 0.1, "AdamW": 0.01, "RMSprop": 0.003}
_TOGETHER = ("autolrs", "autolrs_grown")
_STILL = "still"
_PUBLISHED = ("norm", "inner_product", "augmented", "coordinate")


def training_set(workload: Workload) -> TensorBatches:
    """The workload's own, or where its steps are less than an epoch a part of it that they make one of."""
    train, examples = workload.sets()[0], workload.steps * workload.batch_size
    if len(train) <= examples:
        return train
    return TensorBatches(*train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:examples]])


def epochs_of(workload: Workload) -> int:
    """As many as come nearest to the suite's own number of examples."""
    return max(1, round(workload.steps * workload.batch_size / len(training_set(workload))))


def fixed(workload: Workload, batch: int, lr: float, seed: int) -> tuple[float, int]:
    """Final validation loss and updates of a plain loop at one batch; infinite where it explodes."""
    task, train = workload.build(seed, lr), training_set(workload)
    optimizer = task.plain_optimizer()
    generator = torch.Generator().manual_seed(2000 + seed)
    updates = epochs_of(workload) * math.ceil(len(train) / batch)
    done = 0
    for _ in range(epochs_of(workload)):
        for rows in torch.randperm(len(train), generator=generator).split(batch):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - done / updates)
            optimizer.zero_grad()
            loss = task.loss(train.__getitems__(rows))
            loss.backward()
            if workload.clip is not None:
                torch.nn.utils.clip_grad_norm_(task.parameters(), workload.clip)
            optimizer.step()
            done += 1
        if not math.isfinite(float(loss)):
            return math.inf, done
    return validation_loss(task, list(workload.val_loader())), done


class Decayed(L.LightningModule):
    """The workload's module with a linear decay to zero over the planned updates, as a user would write it."""

    def __init__(self, task: Task, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.task, self.optimizer = task, optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.task.loss(batch)

    def configure_optimizers(self) -> Any:
        planned = self.trainer.estimated_stepping_batches
        decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: max(0.0, 1 - step / planned))
        return [self.optimizer], [{"scheduler": decay, "interval": "step"}]


def fit(workload: Workload, module: L.LightningModule, callbacks: list[L.Callback], seed: int, first: int) -> int:
    """Trains under Lightning on the workload's examples, from a batch of ``first`` on; updates made."""
    generator = torch.Generator().manual_seed(2000 + seed)
    loader = DataLoader(training_set(workload), first, shuffle=True, generator=generator, collate_fn=as_is)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs_of(workload), callbacks=callbacks, gradient_clip_val=workload.clip, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, check_val_every_n_epoch=10**9,
        )  # fmt: skip
        trainer.fit(module, loader, workload.val_loader())
        return int(trainer.global_step)


def grown(
    workload: Workload, callback: AdaptiveBatchSize, lr: float, seed: int, first: int | None = None
) -> tuple[float, int]:
    """Final validation loss and updates of a Lightning run whose batch grows from ``first`` (the workload's own) on."""
    task = workload.build(seed, lr)
    module = Decayed(task, task.plain_optimizer())
    updates = fit(workload, module, [callback], seed, first or workload.batch_size)
    return validation_loss(task, list(workload.val_loader())), updates


def together(workload: Workload, growing: bool, seed: int) -> tuple[float, int]:
    """Final validation loss and updates under ``AutoLRS``, at the workload's own batch or growing from it."""
    task = workload.build(seed)
    growth: list[L.Callback] = [AdaptiveBatchSize(max_batch_size=MOST * workload.batch_size)] if growing else []
    updates = fit(workload, task, [AutoLRS(), *growth], seed, workload.batch_size)
    return validation_loss(task, list(workload.val_loader())), updates


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


def tune(name: str, seeds: list[int], rates: Path) -> str:
    """Writes a rate for each batch of one workload."""
    _quiet()
    workload = SUITE[name]
    guess, found = FIRST_GUESS[workload.optimizer], {}
    for factor in reversed(FACTORS):
        batch = int(factor * workload.batch_size)
        guess, _ = tuned(workload, batch, guess, seeds)
        found[str(batch)] = guess
    keep(rates.with_name(f"{rates.stem}-{name}.json"), found)
    return f"{name}: {found}"


def gather(rates: Path) -> None:
    """Puts what :func:`tune` wrote into one file, in the suite's order."""
    found: dict[str, Any] = json.loads(rates.read_text()) if rates.exists() else {}
    for file in rates.parent.glob(f"{rates.stem}-*.json"):
        found[file.stem.removeprefix(f"{rates.stem}-")] = json.loads(file.read_text())
        file.unlink()
    keep(rates, {name: found[name] for name in SUITE if name in found})


def contenders(workload: Workload, best: int) -> list[tuple[str, int]]:
    """Rule and first batch of every run under Lightning: ours from the suite's batch and the best one, the published
    from the suite's, and one that does not grow."""
    firsts = dict.fromkeys((workload.batch_size, best))
    published = [(rule, workload.batch_size) for rule in _PUBLISHED]
    return [(_STILL, best), *(("noise_scale", first) for first in firsts), *published]


def one(name: str, rule: str, batch: int, seed: int, folder: Path) -> str:
    """One run, its batch ``"fixed"`` or grown by a rule; the result goes to disk."""
    _quiet()
    workload, lr, began = SUITE[name], _rates().get(name, {}).get(str(batch), math.nan), time.perf_counter()
    if rule == "fixed":
        loss, updates = fixed(workload, batch, lr, seed)
    elif rule in _TOGETHER:
        loss, updates = together(workload, rule == "autolrs_grown", seed)
    else:
        options: dict[str, Any] = {"rule": rule, "lr_scaling": "none"} if rule in _PUBLISHED else {}
        callback = AdaptiveBatchSize(max_batch_size=batch if rule == _STILL else MOST * batch, **options)
        try:
            loss, updates = grown(workload, callback, lr, seed, batch)
        except AutotuneError as error:  # a rule that cannot be had on a workload, with the reason
            said = {"error": repr(error)[:500], "lr": lr, "origin": origin()}
            keep(place(folder, workload, rule, batch, seed), said)
            return f"{name} {rule} {batch} s{seed}: {error!r}"
    result = {
        "workload": name, "rule": rule, "batch": batch, "lr": lr, "seed": seed, "loss": loss, "updates": updates,
        "seconds": time.perf_counter() - began, "origin": origin(), **_ours(rule),
    }  # fmt: skip
    keep(place(folder, workload, rule, batch, seed), result)
    return f"{name} {rule} {batch} s{seed}: {loss:.4g}"


def _ours(rule: str) -> dict[str, Any]:
    """What else a result of ours depends on."""
    defaults = inspect.signature(AdaptiveBatchSize).parameters
    names = ("noise_multiple", "lr_scaling", "decay_growth") if rule in ("noise_scale", "autolrs_grown") else ()
    return {name: defaults[name].default for name in names}


def place(folder: Path, workload: Workload, rule: str, batch: int, seed: int) -> Path:
    """Where a run's result lies."""
    return path_of(folder / "growth", workload, f"{rule}/{batch}", seed)


def read(folder: Path, name: str, rule: str, batch: int, seeds: list[int]) -> tuple[float, float] | None:
    """Mean loss (infinite where a run diverged) and updates; None where a run is missing or was refused."""
    files = [place(folder, SUITE[name], rule, batch, seed) for seed in seeds]
    results = [json.loads(file.read_text()) for file in files if file.exists()]
    if len(results) < len(seeds) or any("error" in result for result in results):
        return None
    losses = [loss if math.isfinite(loss := result["loss"]) else math.inf for result in results]
    return statistics.fmean(losses), statistics.fmean(result["updates"] for result in results)


def best_of(folder: Path, name: str, seeds: list[int]) -> tuple[int, tuple[float, float]] | None:
    """The fixed batch with the lowest mean loss, and its loss and updates."""
    sweep = {int(batch): read(folder, name, "fixed", int(batch), seeds) for batch in _rates()[name]}
    whole = {batch: figures for batch, figures in sweep.items() if figures is not None}
    return min(whole.items(), key=lambda pair: pair[1][0]) if len(whole) == len(sweep) else None


def table(names: list[str], seeds: list[int], folder: Path) -> str:
    """Loss of every contender over the best fixed batch's, and the updates it saved."""
    ours = ("not growing", "ours from it", "the same over not growing", "ours from the suite's")
    heads = ["workload (best fixed batch)", *ours, *_PUBLISHED]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    scores: dict[str, list[tuple[float, float]]] = {head: [] for head in heads[1:]}
    for name in names:
        if name not in _rates() or (found := best_of(folder, name, seeds)) is None:
            continue
        best, start = found[0], SUITE[name].batch_size
        # Rule, first batch, and what at the best fixed batch the loss is compared with.
        runs = [(_STILL, best, "fixed"), ("noise_scale", best, "fixed"), ("noise_scale", best, _STILL)]
        runs += [(rule, start, "fixed") for rule in ("noise_scale", *_PUBLISHED)]
        cells = []
        for head, (rule, first, against) in zip(heads[1:], runs, strict=True):
            seen = read(folder, name, rule, first, seeds)
            reference = read(folder, name, against, best, seeds)
            began = read(folder, name, "fixed", first, seeds)
            if seen is None or reference is None or began is None:
                cells.append("")
                continue
            scores[head].append((min(seen[0] / reference[0], WORST), 1.0 - seen[1] / began[1]))
            cells.append(f"{scores[head][-1][0]:.3f}, {scores[head][-1][1]:.0%}")
        lines.append(f"| {name} ({best}) | {' | '.join(cells)} |")
    for title, value in (
        ("geometric mean; mean saved", _overall), ("worst; least saved", _worst), ("workloads", _count)
    ):  # fmt: skip
        lines.append(f"| {title} | {' | '.join(value(scores[head]) for head in heads[1:])} |")
    return "\n".join(lines)


def together_table(names: list[str], seeds: list[int], folder: Path) -> str:
    """What growth does to a run under ``AutoLRS``: its loss over that of the run without, and the updates saved."""
    lines = ["| workload (batch) | loss with growth over loss without, updates saved |", "|---|---|"]
    scores: list[tuple[float, float]] = []
    for name in names:
        batch = SUITE[name].batch_size
        alone, grew = (read(folder, name, rule, batch, seeds) for rule in _TOGETHER)
        if alone is not None and grew is not None and math.isfinite(alone[0]):
            scores.append((min(grew[0] / alone[0], WORST), 1.0 - grew[1] / alone[1]))
            lines.append(f"| {name} ({batch}) | {scores[-1][0]:.3f}, {scores[-1][1]:.0%} |")
    lines.append(f"| geometric mean; mean saved | {_overall(scores)} |")
    return "\n".join(lines)


def write_runs(folder: Path, target: Path) -> None:
    """Every run as a line: what the tables are made of, small enough to be kept with the code."""
    keys = ["workload", "rule", "batch", "lr", "seed", "loss", "updates", "seconds"]
    with target.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*keys, "commit", "machine", "versions"])
        for found in sorted((folder / "growth").glob("*/*.json")):
            run = json.loads(found.read_text())
            if "error" not in run:
                rows.writerow([*(run[key] for key in keys), *run["origin"].values()])


def _overall(scores: list[tuple[float, float]]) -> str:
    if not scores:
        return ""
    return f"{geometric([ratio for ratio, _ in scores]):.3f}, {statistics.fmean(saved for _, saved in scores):.0%}"


def _worst(scores: list[tuple[float, float]]) -> str:
    return f"{max(ratio for ratio, _ in scores):.3f}, {min(saved for _, saved in scores):.0%}" if scores else ""


def _count(scores: list[tuple[float, float]]) -> str:
    return str(len(scores))


def _rates() -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads(RATES.read_text())
    return found


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=list(SUITE), choices=list(SUITE))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tune", action="store_true", help="find the rates on --seeds and stop")
    parser.add_argument("--together", action="store_true", help="under AutoLRS, with and without growth")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--results", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.together:
        jobs = [
            (n, rule, SUITE[n].batch_size, seed) for n in args.workloads for rule in _TOGETHER for seed in args.seeds
        ]
        work(functools.partial(one, folder=args.results), _missing(jobs, args.results), args.workers)
        print(together_table(args.workloads, args.seeds, args.results))
        write_runs(args.results, args.results / "growth-cpu.csv")
        return
    if args.tune:
        names = [name for name in args.workloads if not RATES.with_name(f"{RATES.stem}-{name}.json").exists()]
        work(functools.partial(tune, seeds=args.seeds, rates=RATES), [(name,) for name in names], args.workers)
        gather(RATES)
        return
    names = [name for name in args.workloads if name in _rates()]
    call = functools.partial(one, folder=args.results)
    sweeps = [(n, "fixed", int(batch), seed) for n in names for batch in _rates()[n] for seed in args.seeds]
    work(call, _missing(sweeps, args.results), args.workers)
    growing = [
        (name, rule, first, seed) for name in names if (found := best_of(args.results, name, args.seeds)) is not None
        for rule, first in contenders(SUITE[name], found[0]) for seed in args.seeds
    ]  # fmt: skip
    work(call, _missing(growing, args.results), args.workers)
    print(table(names, args.seeds, args.results))
    write_runs(args.results, args.results / "growth-cpu.csv")


def _missing(jobs: list[tuple[str, str, int, int]], folder: Path) -> list[tuple[str, str, int, int]]:
    """The jobs without a result, or with one at a rate or under a rule that is not the present one any more."""

    def done(name: str, rule: str, batch: int, seed: int) -> bool:
        file = place(folder, SUITE[name], rule, batch, seed)
        if not file.exists():
            return False
        found = json.loads(file.read_text())
        tuned = rule in _TOGETHER or found.get("lr") == _rates()[name][str(batch)]
        return tuned and _ours(rule).items() <= found.items()

    return [one for one in jobs if not done(*one)]


if __name__ == "__main__":
    main()

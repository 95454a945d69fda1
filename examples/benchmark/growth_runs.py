"""One run of the growth benchmark, and where its result lies: files of this machine's, and lines kept with the code.

All runs of a workload see the same number of examples, and but for those under ``AutoLRS`` they decay linearly to zero.
"""

from __future__ import annotations

import csv
import inspect
import json
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import TensorBatches, as_is
from results import keep, path_of
from run import origin, validation_loss
from suite import SUITE
from torch.utils.data import DataLoader
from workloads import Task, Workload

from autotune.callbacks import AdaptiveBatchSize, AutoLRS
from autotune.errors import AutotuneError

LINES = "growth-cpu.csv"
RATES = Path(__file__).resolve().with_name("growth_rates.json")
MOST = 16  # max_batch_size of the growing runs, in units of the batch they begin with
STILL = "still"
DOUBLING = "doubling"
DOUBLINGS = (
    4  # at every fifth of the examples (AdaBatch: Devarakonda et al. 2017, arXiv 1712.02029): 16 times at the end
)
TOGETHER = ("autolrs", "autolrs_grown")
PUBLISHED = ("norm", "inner_product", "augmented", "coordinate")
Run = tuple[str, str, int, int]  # workload, rule, first batch, seed
_NUMBERS = {"lr": float, "loss": float, "updates": int, "seconds": float}
_OURS = {"noise_multiple": float, "lr_scaling": str, "decay_growth": float}
_ORIGIN = ("commit", "machine", "versions")


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
    updates = epochs_of(workload) * math.ceil(len(training_set(workload)) / batch)
    return _plain(workload, lr, seed, lambda done, seen: (batch, 1 - done / updates))


def doubled(workload: Workload, first: int, lr: float, seed: int) -> tuple[float, int]:
    """The same with a batch that doubles at fixed shares of the examples, and a rate that follows by the rule of its
    optimizer's family: linear for SGD, the square root for the others."""
    examples = epochs_of(workload) * len(training_set(workload))
    power = 1.0 if workload.optimizer == "SGD" else 0.5

    def plan(done: int, seen: int) -> tuple[int, float]:
        growth = 2 ** (seen * (DOUBLINGS + 1) // examples)
        return first * growth, (1 - seen / examples) * growth**power

    return _plain(workload, lr, seed, plan)


def _plain(
    workload: Workload, lr: float, seed: int, plan: Callable[[int, int], tuple[int, float]]
) -> tuple[float, int]:
    """A plain loop; ``plan`` makes of the updates made and the examples seen a batch and a share of the rate."""
    task, train = workload.build(seed, lr), training_set(workload)
    optimizer = task.plain_optimizer()
    generator = torch.Generator().manual_seed(2000 + seed)
    done = seen = 0
    for _ in range(epochs_of(workload)):
        order = torch.randperm(len(train), generator=generator)
        while len(order):
            batch, share = plan(done, seen)
            rows, order = order[:batch], order[batch:]
            for group in optimizer.param_groups:
                group["lr"] = lr * share
            optimizer.zero_grad()
            loss = task.loss(train.__getitems__(rows))
            loss.backward()
            if workload.clip is not None:
                torch.nn.utils.clip_grad_norm_(task.parameters(), workload.clip)
            optimizer.step()
            done, seen = done + 1, seen + len(rows)
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


def one(name: str, rule: str, batch: int, seed: int, folder: Path) -> str:
    """One run, its batch ``"fixed"``, ``"doubling"`` or grown by a rule; the result goes to disk."""
    quiet()
    workload, lr, began = SUITE[name], rates().get(name, {}).get(str(batch), math.nan), time.perf_counter()
    known = {"workload": name, "key": workload.key(), "rule": rule, "batch": batch, "lr": lr, "seed": seed}
    if rule == "fixed":
        loss, updates = fixed(workload, batch, lr, seed)
    elif rule == DOUBLING:
        loss, updates = doubled(workload, batch, lr, seed)
    elif rule in TOGETHER:
        loss, updates = together(workload, rule == "autolrs_grown", seed)
    else:
        options: dict[str, Any] = {"rule": rule, "lr_scaling": "none"} if rule in PUBLISHED else {}
        callback = AdaptiveBatchSize(max_batch_size=batch if rule == STILL else MOST * batch, **options)
        try:
            loss, updates = grown(workload, callback, lr, seed, batch)
        except AutotuneError as error:  # a rule that cannot be had on a workload, with the reason
            keep(place(folder, workload, rule, batch, seed), known | {"error": repr(error)[:500], "origin": origin()})
            return f"{name} {rule} {batch} s{seed}: {error!r}"
    made = {"loss": loss, "updates": updates, "seconds": time.perf_counter() - began, "origin": origin()}
    keep(place(folder, workload, rule, batch, seed), known | made | _ours(rule))
    return f"{name} {rule} {batch} s{seed}: {loss:.4g}"


def _ours(rule: str) -> dict[str, Any]:
    """What else a result of ours depends on."""
    defaults = inspect.signature(AdaptiveBatchSize).parameters
    return {name: defaults[name].default for name in _OURS} if rule in ("noise_scale", "autolrs_grown") else {}


def place(folder: Path, workload: Workload, rule: str, batch: int, seed: int) -> Path:
    """Where a run's result lies."""
    return path_of(folder / "growth", workload, f"{rule}/{batch}", seed)


def load(folder: Path) -> dict[Run, dict[str, Any]]:
    """Results of the present definitions, rates and rules: the folder's files, and its lines where it has none."""
    results: list[dict[str, Any]] = []
    if (lines := folder / LINES).exists():
        with lines.open(newline="") as file:
            results += [_of_line(row) for row in csv.DictReader(file)]
    results += [json.loads(path.read_text()) for path in sorted((folder / "growth").glob("*/*.json"))]
    keys, present = {name: workload.key() for name, workload in SUITE.items()}, rates()

    def valid(run: dict[str, Any]) -> bool:
        name, rule = run["workload"], run["rule"]
        at_its_rate = rule in TOGETHER or run["lr"] == present.get(name, {}).get(str(run["batch"]))
        return run["key"] == keys.get(name) and at_its_rate and _ours(rule).items() <= run.items()

    return {(run["workload"], run["rule"], run["batch"], run["seed"]): run for run in results if valid(run)}


def _of_line(row: dict[str, str]) -> dict[str, Any]:
    known: dict[str, Any] = {key: row[key] for key in ("workload", "key", "rule")}
    known |= {key: kind(row[key]) for key, kind in {**_NUMBERS, **_OURS}.items() if row[key]}
    known |= {key: int(row[key]) for key in ("batch", "seed")}
    return known | {"origin": {key: row[key] for key in _ORIGIN}}


def write_lines(runs: Mapping[Run, Mapping[str, Any]], target: Path) -> None:
    """A line for every run that was made: what the tables are made of; the file is replaced whole or not at all."""
    draft = target.with_suffix(f".{os.getpid()}.tmp")
    first = ["workload", "key", "rule", "batch", "seed", *_NUMBERS, *_OURS]
    with draft.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*first, *_ORIGIN])
        for _, run in sorted(runs.items()):
            if "error" not in run:
                rows.writerow([*(run.get(key) for key in first), *(run["origin"].get(key) for key in _ORIGIN)])
    draft.replace(target)


def rates() -> dict[str, dict[str, float]]:
    """The tuned rate of every workload and batch."""
    found: dict[str, dict[str, float]] = json.loads(RATES.read_text())
    return found


def quiet() -> None:
    """One thread a run, and no word of Lightning's on every one."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)

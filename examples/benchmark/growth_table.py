"""Batch growth at equal examples: every fixed batch at its own tuned rate, the published norm test, and our rule.

    python examples/benchmark/growth_table.py --tune                 # rates for each batch, on seeds 0 and 1
    python examples/benchmark/growth_table.py --seeds 10 11 12       # the table, at those rates

All runs of a workload see the same number of examples and decay linearly to zero over them. The growing runs begin
at the workload's own batch and at the best fixed one, each with the rate that was tuned for it.
``growth_rates.json`` keeps the tuned rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from data import as_is  # noqa: E402
from run import validation_loss  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from workloads import SUITE, Task, Workload  # noqa: E402

from autotune.callbacks import AdaptiveBatchSize  # noqa: E402

RATES = HERE / "growth_rates.json"
NAMES = ("cnn_sgd", "friedman_sgd", "label_noise", "saturating", "parity_bn", "autoencoder")
#: Fixed batches, in units of the workload's own.
FACTORS = (0.5, 1, 2, 4, 8)
CONTENDERS: dict[str, dict[str, Any]] = {
    "noise_scale (default)": {},
    "norm test as published": {"rule": "norm", "lr_scaling": "none"},
}
FIRST_GUESS = {"SGD": 0.1, "AdamW": 0.01}


def epochs_of(workload: Workload) -> int:
    """As many as come nearest to the suite's own number of examples."""
    return max(1, round(workload.steps * workload.batch_size / len(workload.sets()[0])))


def fixed(workload: Workload, batch: int, lr: float, seed: int) -> tuple[float, int]:
    """Final validation loss and updates of a plain loop at one batch; infinite where it explodes."""
    task, train = workload.build(seed, lr), workload.sets()[0]
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


def grown(
    workload: Workload, callback: AdaptiveBatchSize, lr: float, seed: int, length: Workload | None = None
) -> tuple[float, int]:
    """Final validation loss and updates of a Lightning run whose batch grows from the workload's own.

    ``length`` is the workload whose number of examples counts, where the starting batch is another.
    """
    task, train = workload.build(seed, lr), workload.sets()[0]
    generator = torch.Generator().manual_seed(2000 + seed)
    loader = DataLoader(train, workload.batch_size, shuffle=True, generator=generator, collate_fn=as_is)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs_of(length or workload), callbacks=[callback], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(Decayed(task, task.plain_optimizer()), loader)
    return validation_loss(task, list(workload.val_loader())), trainer.global_step


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


def tune(names: list[str], seeds: list[int]) -> None:
    """Writes a rate for each batch of each workload."""
    found: dict[str, Any] = json.loads(RATES.read_text()) if RATES.exists() else {}
    for name in names:
        workload = SUITE[name]
        guess, found[name] = FIRST_GUESS[workload.optimizer], {}
        for factor in reversed(FACTORS):
            batch = int(factor * workload.batch_size)
            guess, loss = tuned(workload, batch, guess, seeds)
            found[name][str(batch)] = guess
            print(f"{name:14s} batch {batch:5d}  lr {guess:8.5f}  loss {loss:.5f}", flush=True)
        RATES.write_text(json.dumps(found, indent=1) + "\n")


def table(names: list[str], seeds: list[int]) -> None:
    """Prints loss and updates of each contender, as shares of the best fixed batch's."""
    ratios: dict[str, list[float]] = {}
    for name in names:
        workload, rates = SUITE[name], json.loads(RATES.read_text())[name]
        start = workload.batch_size
        sweep = {int(b): _mean(fixed(workload, int(b), lr, s) for s in seeds) for b, lr in rates.items()}
        best = min(sweep, key=lambda batch: sweep[batch][0])
        print(f"\n{name}: {epochs_of(workload)} epochs of {len(workload.sets()[0])} examples")
        for batch, (loss, updates) in sweep.items():
            _row(f"fixed {batch}, lr {rates[str(batch)]:.4g}", loss, updates, sweep[best], sweep[batch])
        for first in sorted({start, best}, reverse=True):
            for title, kwargs in CONTENDERS.items():
                if title == "norm test as published" and first != start:
                    continue
                own = dataclasses.replace(workload, batch_size=first)
                runs = (
                    grown(
                        own, AdaptiveBatchSize(max_batch_size=16 * first, **kwargs), rates[str(first)], seed, workload
                    )
                    for seed in seeds
                )
                loss, updates = _mean(runs)
                _row(f"{title} from {first}", loss, updates, sweep[best], sweep[first])
                label = f"{title} from {'the suite batch' if first == start else 'the best batch'}"
                ratios.setdefault(label, []).append(loss / sweep[best][0])
                if first == start == best:
                    ratios.setdefault(f"{title} from the best batch", []).append(loss / sweep[best][0])
    print()
    for label, values in ratios.items():
        print(f"{label}: geometric mean of loss ratios {math.exp(sum(map(math.log, values)) / len(values)):.3f}")


def _mean(runs: Iterable[tuple[float, int]]) -> tuple[float, float]:
    losses, updates = zip(*runs, strict=True)
    return sum(losses) / len(losses), sum(updates) / len(updates)


def _row(title: str, loss: float, updates: float, best: tuple[float, float], own: tuple[float, float]) -> None:
    saved = f"saved {1 - updates / best[1]:5.0%} of best's, {1 - updates / own[1]:4.0%} of start's"
    ratios = f"{loss / best[0]:5.3f} of best, {loss / own[0]:5.3f} of start"
    print(f"  {title:32s} loss {loss:.5f} ({ratios})  updates {updates:5.0f} ({saved})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", default=list(NAMES), choices=list(SUITE))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1])
    parser.add_argument("--tune", action="store_true", help="find the rates on --seeds and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if args.tune:
        tune(args.workloads, args.seeds)
    else:
        table(args.workloads, args.seeds)


if __name__ == "__main__":
    main()

"""Every way of choosing a learning rate that the table compares, AutoLRS among them, at equal total cost.

A method turns (workload, seed) into a :class:`Fit`: a module, callbacks, the number of real updates, and what was or
will be spent besides. Real updates and everything else add up to the workload's ``steps``, T, for every method.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.tuner import Tuner
from workloads import OPTIMIZERS, Task, Workload

from autotune.callbacks import AutoLRS

WARMUP = 0.02
SHAPES = ("linear", "cosine", "hold")
#: log10 of the middle of the seven-LR sweep, by workload where it is not the optimizer family's.
_CENTRES = {
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RMSprop", "Adamax", "RAdam"), -2.5),
    **{"Adagrad": -1.5, "SGD": -1.0, "ASGD": -1.0, "Adadelta": 0.0, "Adafactor": -2.0},
}
_SPECIAL = {
    **{"finetune": -1.5, "overfit": -2.5, "saturating": 0.0, "gpt_sgd": -0.5, "vae_sgd": -2.5},
    **{"large_targets_adam": -1.5, "large_targets_sgd": -4.5, "raw_targets_adamw": -1.5, "raw_targets_sgd": -2.5},
    **{"bytes_adam": -3.5, "bytes_sgd": -3.5, "summed_mlp_sgd": -4.0, "summed_conv_sgd": -3.0, "summed_gpt_sgd": -3.0},
    "faint_sgd": 1.0,
}
CHECKS = 40  # validation checks that feedback schedulers get; they count a third of a step a batch
VALIDATIONS = 30  # of the trainer's own in "autolrs_validated", evenly over the run; these are not counted


@dataclasses.dataclass
class Fit:
    """What the runner trains. ``spent`` is paid already (steps); so many ``validations`` are the trainer's own."""

    task: Task
    updates: int
    callbacks: list[L.Callback] = dataclasses.field(default_factory=list)
    spent: float = 0.0
    controller: AutoLRS | None = None
    validations: int = 0


Method = Callable[[Workload, int], Fit]


def shape(name: str, progress: float) -> float:
    """Share of the peak at ``progress`` in (0, 1]: 2 % warm-up, then the named decay to zero."""
    if progress < WARMUP:
        return progress / WARMUP
    rest = (progress - WARMUP) / (1.0 - WARMUP)
    if name == "linear":
        return 1.0 - rest
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * rest))
    return min(1.0, 2.0 * (1.0 - rest))


def sweep_lrs(workload: Workload) -> list[float]:
    """Seven rates half a decade apart, around what the optimizer's users would try first."""
    name, *_ = workload.name.split("-")  # a twin's name ends in what it is
    centre = _SPECIAL.get(name, _CENTRES[workload.optimizer])
    return [10 ** (centre + 0.5 * i) for i in range(-3, 4)]


def _per_step(optimizer: torch.optim.Optimizer, rate: Callable[[int], float]) -> dict[str, Any]:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def scheduled(name: str, lr: float) -> Method:
    """One run of a sweep: a peak and a shape."""

    def build(workload: Workload, seed: int) -> Fit:
        task, steps = workload.build(seed, lr), workload.steps
        task.recipe = lambda t: _per_step(t.plain_optimizer(), lambda s: shape(name, (s + 1) / (steps + 1)))
        return Fit(task, steps)

    return build


def default_lr(workload: Workload) -> float:
    """torch's own default for the optimizer: what someone gets who sets nothing."""
    return float(inspect.signature(OPTIMIZERS[workload.optimizer]).parameters["lr"].default)


def constant(workload: Workload, seed: int) -> Fit:
    """torch's default rate, held."""
    return Fit(workload.build(seed, default_lr(workload)), workload.steps)


def one_cycle(workload: Workload, seed: int) -> Fit:
    """Lightning's LR finder (its 100 steps counted), then torch's one-cycle with its defaults."""
    task = workload.build(seed, 1e-3)
    tries = min(100, workload.steps // 10)
    trainer = bare_trainer(workload, tries)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Tuner(trainer).lr_find(task, workload.train_loader(seed), num_training=tries, update_attr=False)
    peak = (found.suggestion() if found is not None else None) or default_lr(workload)
    steps = workload.steps - tries

    def recipe(task: Task) -> dict[str, Any]:
        optimizer = task.plain_optimizer()
        # Adagrad has no momentum to cycle.
        cycled = any(name in optimizer.defaults for name in ("momentum", "betas"))
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1, cycle_momentum=cycled)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    task = workload.build(seed, peak)
    task.recipe = recipe
    return Fit(task, steps, spent=tries)


class Feedback(L.Callback):
    """Reads the validation loss ``CHECKS`` times and lets ``react`` change the rate; what it reads is paid for."""

    def __init__(self, workload: Workload, updates: int, batches: int, react: Callable[[Any, float], None]) -> None:
        self.every, self.react = max(1, updates // CHECKS), react
        whole = list(workload.val_loader())
        self.batches = whole[:batches]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every == 0:
            pl_module.eval()
            with torch.no_grad():
                loss = sum(float(pl_module.loss(b)) for b in self.batches) / len(self.batches)
            pl_module.train()
            self.react(trainer.optimizers[0], loss)


def _with_feedback(reaction: Callable[[torch.optim.Optimizer], Callable[[float], None]]) -> Method:
    def build(workload: Workload, seed: int) -> Fit:
        batches = max(1, min(8, round(0.03 * workload.steps / CHECKS)))
        spent = CHECKS * batches / 3
        updates = workload.steps - math.ceil(spent)
        held: list[Callable[[float], None]] = []

        def react(optimizer: torch.optim.Optimizer, loss: float) -> None:
            if not held:
                held.append(reaction(optimizer))
            held[0](loss)

        task = workload.build(seed, default_lr(workload))
        return Fit(task, updates, [Feedback(workload, updates, batches, react)], spent=spent)

    return build


def _plateau(optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=2)
    return lambda loss: scheduler.step(loss)


def _greedy(optimizer: torch.optim.Optimizer, factor: float = 0.7, patience: int = 1) -> Callable[[float], None]:
    """Up after improvements, down after setbacks (the scheme of recent greedy schedulers, patience counted apart)."""
    state = {"best": math.inf, "good": 0, "bad": 0}

    def step(loss: float) -> None:
        better = loss < state["best"]
        state["best"] = min(state["best"], loss)
        state["good"], state["bad"] = (state["good"] + 1, 0) if better else (0, state["bad"] + 1)
        if max(state["good"], state["bad"]) > patience:
            scale = 1.0 / factor if better else factor
            for group in optimizer.param_groups:
                group["lr"] = min(max(group["lr"] * scale, 1e-6), 10.0)
            state["good"] = state["bad"] = 0

    return step


def _replaced(make: Callable[[Task, Workload], Any]) -> Method:
    def build(workload: Workload, seed: int) -> Fit:
        task = workload.build(seed)
        task.recipe = lambda t: make(t, workload)
        return Fit(task, workload.steps)

    return build


def _prodigy(task: Task, workload: Workload) -> dict[str, Any]:
    from prodigyopt import Prodigy

    optimizer = Prodigy(task.parameters(), lr=1.0, weight_decay=task.options.get("weight_decay", 0.0))
    return _per_step(optimizer, lambda s: 0.5 * (1.0 + math.cos(math.pi * s / workload.steps)))


def _dadapt(task: Task, workload: Workload) -> Any:
    from dadaptation import DAdaptAdam

    return DAdaptAdam(task.parameters(), lr=1.0, weight_decay=task.options.get("weight_decay", 0.0))


def _schedule_free(task: Task, workload: Workload) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(task.parameters(), warmup_steps=round(WARMUP * workload.steps))


def autolrs(budget: float = 0.1, lr: float = 1e-3, validations: int = 0, **settings: Any) -> Method:
    """AutoLRS with T updates in all: ``int(T / (1 + budget))`` real ones."""

    def build(workload: Workload, seed: int) -> Fit:
        controller = AutoLRS(search_budget=budget, **settings)
        updates = int(workload.steps / (1.0 + budget))
        task = workload.build(seed, lr)
        return Fit(task, updates, [controller], controller=controller, validations=validations)

    return build


def bare_trainer(
    workload: Workload, updates: int, callbacks: list[L.Callback] | None = None, validations: int = 0
) -> L.Trainer:
    """A Trainer with nothing that costs time or prints, but so many validations."""
    if validations:
        when: dict[str, Any] = {"check_val_every_n_epoch": None, "val_check_interval": max(1, updates // validations)}
    else:
        when = {"check_val_every_n_epoch": 10**9}
    return L.Trainer(
        max_steps=updates, max_epochs=-1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks or [], num_sanity_val_steps=0,
        **when, gradient_clip_val=workload.clip, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip


RIVALS: dict[str, Method] = {
    "constant": constant,
    "plateau": _with_feedback(_plateau),
    "one_cycle": one_cycle,
    "prodigy": _replaced(_prodigy),
    "dadapt": _replaced(_dadapt),
    "schedule_free": _replaced(_schedule_free),
    "greedy": _with_feedback(_greedy),
    "forecast": autolrs(budget=0.9, objective="forecast", search="every_stage"),
}
POLICIES: dict[str, Method] = {
    "autolrs": autolrs(),
    "autolrs_validated": autolrs(validations=VALIDATIONS),
    "autolrs_grid": autolrs(proposals="grid"),
    "autolrs_constant_lr": autolrs(objective="forecast"),
    "autolrs_no_climb": autolrs(climb=False),
    "autolrs_no_early_stop": autolrs(stop_early=False),
    "autolrs_no_forecasts": autolrs(forecasts=False),
    "autolrs_every_stage": autolrs(search="every_stage"),
    "autolrs_from_1e-6": autolrs(lr=1e-6),
    "autolrs_from_10": autolrs(lr=10.0),
}


def method(name: str, workload: Workload) -> Method:
    """The method of a name: ``sweep/<shape>/<index>``, a rival or a policy.

    Raises:
        KeyError: There is none of that name.
    """
    if name.startswith("sweep/"):
        _, form, index = name.split("/")
        return scheduled(form, sweep_lrs(workload)[int(index)])
    return {**RIVALS, **POLICIES}[name]

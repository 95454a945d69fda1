"""A small run with both controllers that searches twice and grows twice, on one process or several, and what it did.

Runs that must die, or that need several ranks, are forked from a process that has imported everything once.
"""

import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks import AdaptiveBatchSize, AutoLRS, _lr_search
from autotune.stage.policy import SearchPolicy

EXAMPLES, BATCH, EPOCHS = 600, 8, 4
CONTROLLERS = ("lrs", "batch", "both")
#: Searches so small that a run of a few dozen updates has two of them.
SMALL = SearchPolicy(coarse=3, fine=0, shortest_fine=3, ranking=0.0)


def small_searches():
    _lr_search.SearchPolicy = lambda: SMALL


class Net(L.LightningModule):
    """Counts the steps of trials; ``at_trial_step(n)`` is called in the middle of the n-th."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.at_trial_step = None

    def in_trial(self):
        return not any(isinstance(one, (AutoLRS, Track)) for one in self.trainer.callbacks)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.at_trial_step is not None and self.in_trial():
            self.at_trial_step(self)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def data(count=EXAMPLES):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    y = (x[:, :3] + 1.5 * torch.randn(count, 3, generator=generator)).argmax(1)
    return TensorDataset(x, y)


def weights_of(module):
    state = hashlib.sha1()
    for value in module.state_dict().values():
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        state.update(value.numpy().tobytes())
    return state.hexdigest()


class Track(Callback):
    """One row a batch: update, weights, rate, examples."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.rows.append((trainer.global_step, weights_of(pl_module), rate, len(batch[0])))


class Points(Callback):
    """Saves a checkpoint at named moments: two in the middle of trials, one in mid-epoch, one after growth."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.batches = 0
        self.growth = None

    def save(self, trainer, name):
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_start(self, trainer, pl_module):
        pl_module.at_trial_step = self.trial_step
        self.trial_steps, self.later = 0, 0
        self.real = trainer.fit_loop.epoch_loop

    def trial_step(self, module):
        trainer = module.trainer
        self.trial_steps += 1
        self.later += self.real.global_step > 0
        if self.trial_steps == 5 and self.real.global_step == 0:
            self.save(trainer, "in the first search")
        if self.later == 2:
            self.save(trainer, "in a later search")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if self.batches == 13:
            self.save(trainer, "mid epoch")
        if trainer.current_epoch == 2 and batch_idx == 3:
            self.save(trainer, "mid epoch 2")
        found = [one for one in trainer.callbacks if isinstance(one, AdaptiveBatchSize)]
        if found and self.growth is None and found[0].batch_size > BATCH * trainer.world_size:
            self.growth = self.batches
        if self.growth is not None and self.batches == self.growth + 2:
            self.save(trainer, "after growth")


def controllers(which):
    lrs = AutoLRS(search_budget=0.5, search="every_stage", min_lr=1e-3, max_lr=1.0)
    batch = AdaptiveBatchSize(max_batch_size=64, every_n_steps=2, rest_updates=8)
    return {"lrs": [lrs], "batch": [batch], "both": [lrs, batch]}[which]


class Journey:
    """One fit. ``decisions`` leave out wall times, which no two runs share."""

    def __init__(self, folder, which="both", ckpt=None, callbacks=(), seed=1, module=None, train=None, ranks=1,
                 namespace=L, **more):  # fmt: skip
        small_searches()
        self.module = Net() if module is None else module
        self.track = Track()
        self.controllers = controllers(which) if isinstance(which, str) else which
        options = {
            "accelerator": "cpu",
            "devices": ranks,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            "max_epochs": EPOCHS,
        }
        if ranks > 1:
            environment = LightningEnvironment()
            options["strategy"] = DDPStrategy(process_group_backend="gloo", cluster_environment=environment)
        everybody = [*self.controllers, self.track, *callbacks]
        self.trainer = namespace.Trainer(callbacks=everybody, **{**options, **more})
        L.seed_everything(seed, verbose=False)
        train = DataLoader(data(), BATCH, shuffle=True) if train is None else train
        validation = DataLoader(data(100), 50)
        self.trainer.fit(self.module, train, validation, ckpt_path=ckpt, weights_only=True if ckpt else None)
        self.weights = weights_of(self.module)

    @property
    def decisions(self):
        return [[timeless(one) for one in controller.decisions] for controller in self.controllers]

    @property
    def all_decisions(self):
        return [one for decisions in self.decisions for one in decisions]


def timeless(decision):
    record = decision.to_dict()
    return {**record, "numbers": {key: value for key, value in record["numbers"].items() if "seconds" not in key}}


def same_course(resumed, whole):
    """What differs between a resumed run and the rest of the whole one; empty where nothing does."""
    start = len(whole.track.rows) - len(resumed.track.rows)
    found = []
    for number, (ours, theirs) in enumerate(zip(resumed.track.rows, whole.track.rows[start:], strict=True)):
        if ours != theirs:
            found.append(f"batch {start + number}: {ours} instead of {theirs}")
            break
    if resumed.weights != whole.weights:
        found.append("final weights")
    if resumed.decisions != whole.decisions:
        ours, theirs = resumed.all_decisions, whole.all_decisions
        pair = next(((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), (len(ours), len(theirs)))
        found.append(f"decisions: {pair[0]} instead of {pair[1]}")
    return found


# ---------------------------------------------------------------------- forked processes


def in_child(function, *arguments):
    """Runs ``function`` in a fork of this process and returns it; its exit code says whether it raised."""

    def main():
        try:
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=main)
    child.start()
    return child


def on_ranks(world, function, *arguments, timeout=150):
    """Runs ``function(rank, *arguments)`` on so many forked ranks; raises where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank_main(rank):
        places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank, "NODE_RANK": 0}
        os.environ.update({name: str(value) for name, value in places.items()})
        function(rank, *arguments)

    children = [in_child(rank_main, rank) for rank in range(world)]
    deadline = time.monotonic() + timeout
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    codes = [child.exitcode for child in children]
    for child in children:
        if child.is_alive():
            child.kill()
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")
    if None in codes:
        raise SystemExit(f"ranks hang: {codes}")


def main(name, *arguments):
    """What ``python -c`` calls: a function of a test module, under quiet warnings and one thread."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    module, _, function = name.partition(":")
    getattr(__import__(module, fromlist=["x"]), function)(*arguments)


def run_apart(name, *arguments, timeout=500):
    """Calls a function of a test module in a fresh process, from which it may fork; its output where it fails."""
    call = f"from tests.callbacks.journey import main; main({name!r}, *{[str(one) for one in arguments]!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout

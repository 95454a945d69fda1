"""Runs that are saved, resumed and compared: weights, rates, batches and decisions, bit for bit."""

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.harness import Tiny, Witness, controller, loader, trainer, val_loader

EPOCH = 30
BOUNDS = {"steps": {"max_steps": 120}, "epochs": {"max_epochs": 4}}
LOADERS = {
    "global generator": {},
    "own generator": {"generator": 5},
    "random items": {"noisy": True},
    "workers": {"num_workers": 2, "noisy": True},
    "workers, own generator": {"num_workers": 2, "generator": 5},
}


class Run:
    """One fit, its witness and its controller."""

    def __init__(
        self, folder, seed=3, data=None, val=None, module=None, ckpt=None, callbacks=(), tuned=True, **settings
    ):
        L.seed_everything(seed, verbose=False)
        self.folder = folder
        self.witness = Witness()
        self.callback = controller(min_lr=1e-4, max_lr=3e-2)
        self.module = module or Tiny("batchnorm", "dropout", "random")
        ours = [self.callback] if tuned else []
        self.trainer = trainer(
            folder, *ours, *callbacks, self.witness, enable_checkpointing=bool(callbacks), **settings
        )
        self.trainer.fit(self.module, loader(**{"batch": 8, **(data or {})}), val_loader(**(val or {})), ckpt_path=ckpt)

    @property
    def decisions(self):
        return [timeless(decision) for decision in self.callback.decisions]


def timeless(decision):
    record = decision.to_dict()
    return {**record, "numbers": {key: value for key, value in record["numbers"].items() if "seconds" not in key}}


def savers(folder):
    """Checkpoints every 13 updates, at each epoch's end, and after each validation."""
    common = {"dirpath": folder / "saved", "save_top_k": -1}
    name = "{step}"
    return [
        ModelCheckpoint(every_n_train_steps=13, filename=name, **common),
        ModelCheckpoint(every_n_epochs=1, save_on_train_epoch_end=True, filename="end={step}",
                        auto_insert_metric_name=False, **common),
        ModelCheckpoint(monitor="val_loss", save_on_train_epoch_end=False, filename="val={step}",
                        auto_insert_metric_name=False, **common),
    ]  # fmt: skip


def saved_run(folder, **kwargs):
    return Run(folder, callbacks=savers(folder), **kwargs)


def saved(folder, name):
    return folder / "saved" / f"{name}.ckpt"


def assert_continues(resumed, whole, update):
    done = len(whole.witness.states) - len(resumed.witness.states)
    assert done == update
    assert resumed.witness.batches == whole.witness.batches[done:]
    assert resumed.witness.lrs == whole.witness.lrs[done:]
    for number, (ours, theirs) in enumerate(zip(resumed.witness.states, whole.witness.states[done:], strict=True)):
        # What was logged since the epoch's start is not in Lightning's checkpoints.
        different = [key for key in theirs if key != "metrics" and ours[key] != theirs[key]]
        assert not different, f"batch {done + number}: {different}"
    assert resumed.decisions == whole.decisions
    assert resumed.callback.trial_steps == whole.callback.trial_steps
    assert resumed.callback.lr == whole.callback.lr

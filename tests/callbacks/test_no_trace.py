"""Trials leave no trace: a run under AutoLRS equals the same run in plain Lightning at the same rates, bit for bit."""

import csv
import gc
import multiprocessing

import lightning as L
import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from autotune.stage.machine import StageMachine
from tests.callbacks.harness import PlayRates, Spy, Tiny, Witness, controller, loader, searches, trainer, val_loader

STEPS = 120

MODULES = {
    "plain": Tiny,
    "batchnorm": lambda: Tiny("batchnorm"),
    "dropout": lambda: Tiny("dropout", "random"),
    "metrics": lambda: Tiny("metrics"),
    "state": lambda: Tiny("state"),
    "groups": lambda: Tiny("groups"),
    "frozen": lambda: Tiny("frozen"),
    "tensor lr": lambda: Tiny("tensor_lr"),
    "sgd": lambda: Tiny(optimizer="sgd"),
    "lambda": lambda: Tiny(scheduler="lambda"),
    "onecycle": lambda: Tiny(scheduler="onecycle", optimizer="sgd"),
    "plateau": lambda: Tiny(scheduler="plateau"),
}
SETTINGS = {
    "accumulate": {"accumulate_grad_batches": 3},
    "clip by norm": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"},
    "clip by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
    "bf16 throughout": {"precision": "bf16-true"},
    "double": {"precision": "64-true"},
    "epochs": {"max_steps": -1, "max_epochs": 4},
}
LOADERS = {
    "own generator": {"generator": 5},
    "random items": {"noisy": True},
    "workers": {"num_workers": 2, "noisy": True, "count": 480},
    "workers, own generator": {"num_workers": 2, "noisy": True, "generator": 5, "count": 480},
}


class Rows:
    """What one run left behind."""

    def __init__(self, folder, make_module, controllers, settings, data, validation=True, play=None):
        L.seed_everything(3, verbose=False)
        self.witness, self.spy = Witness(), Spy()
        module = make_module()
        self.witness.observe(module)
        callbacks = [*controllers, *([] if play is None else [play]), self.spy, self.witness]
        logger = CSVLogger(folder, name="", version="")
        self.trainer = trainer(folder, *callbacks, **{"max_steps": STEPS, "logger": logger, **settings})
        self.trainer.fit(module, loader(batch=8, **data), val_loader() if validation else None)
        self.logged = [row for row in _rows(folder / "metrics.csv") if set(row) - {"step", "epoch"}]


def _rows(path):
    with open(path, newline="") as file:
        return [
            {key: value for key, value in row.items() if value and not key.startswith("autotune/")}
            for row in csv.DictReader(file)
        ]


@pytest.fixture(autouse=True)
def no_way_back(monkeypatch):
    """A run that goes back to earlier weights is not the run that had the same rates and did not."""
    monkeypatch.setattr(StageMachine, "lost", lambda self, state: False)


def compare(folder, make_module=Tiny, settings=None, data=None, validation=True, callbacks=(), **arguments):
    settings, data = settings or {}, data or {}
    callback = controller(min_lr=1e-4, max_lr=3e-2, **arguments)
    tuned = Rows(folder / "tuned", make_module, [callback, *callbacks], settings, data, validation)
    assert len(searches(callback)) >= 2
    assert not any(decision.kind == "rollback" for decision in callback.decisions)
    assert tuned.witness.steps > len(tuned.witness.lrs), "no trial was seen at the optimizer"
    scheduled = bool(tuned.trainer.lr_scheduler_configs)
    play = PlayRates(tuned.witness.lrs, scheduled)
    plain = Rows(folder / "plain", make_module, callbacks, settings, data, validation, play)
    assert plain.witness.steps == len(tuned.witness.lrs)
    assert tuned.witness.lrs == plain.witness.lrs
    assert tuned.witness.batches == plain.witness.batches
    for number, (ours, theirs) in enumerate(zip(tuned.witness.states, plain.witness.states, strict=True)):
        different = [key for key in theirs if ours[key] != theirs[key]]
        assert not different, f"batch {number}: {different}"
    assert tuned.spy.calls == plain.spy.calls
    assert tuned.logged == plain.logged
    assert tuned.trainer.global_step == plain.trainer.global_step
    return callback, tuned


@pytest.mark.usefixtures("several_searches")
class TestNoTrace:
    @pytest.mark.parametrize("module", MODULES)
    def test_modules(self, tmp_path, module):
        compare(tmp_path, MODULES[module])

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_trainer_settings(self, tmp_path, setting):
        compare(tmp_path, lambda: Tiny("dropout", "metrics"), settings=SETTINGS[setting])

    @pytest.mark.parametrize("data", LOADERS)
    def test_loaders(self, tmp_path, data):
        compare(tmp_path, lambda: Tiny("dropout"), data=LOADERS[data])

    def test_everything_at_once(self, tmp_path):
        traits = ("batchnorm", "dropout", "random", "metrics", "state", "groups")
        compare(
            tmp_path,
            lambda: Tiny(*traits, scheduler="lambda"),
            settings={"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed"},
            data={"noisy": True},
        )

    def test_without_validation(self, tmp_path):
        compare(tmp_path, lambda: Tiny("batchnorm", "dropout", "state"), validation=False)

    def test_several_validations_an_epoch(self, tmp_path):
        compare(tmp_path, lambda: Tiny("dropout", "random"), settings={"val_check_interval": 7})

    def test_as_published(self, tmp_path):
        compare(tmp_path, lambda: Tiny("dropout"), {"max_steps": 600}, objective="forecast", search_budget=0.9)


class Processes(Callback):
    """How many processes there are at each update, and during trials."""

    def __init__(self):
        self.between, self.within = set(), 0

    def on_train_batch_start(self, *args):
        self.between.add(len(multiprocessing.active_children()))

    def setup(self, trainer, pl_module, stage):
        pl_module.register_forward_hook(lambda *_: self.count())

    def count(self):
        self.within = max(self.within, len(multiprocessing.active_children()))


@pytest.mark.usefixtures("several_searches")
@pytest.mark.parametrize("settings", [{"max_steps": 120}, {"max_epochs": -1, "max_time": {"seconds": 3}}])
@pytest.mark.parametrize("validation", [True, False])
def test_no_worker_is_left_over(tmp_path, validation, settings):
    """Not even until the garbage is collected: torch waits for five seconds then, for each worker."""
    seen, plain, callback = Processes(), Processes(), controller()
    gc.disable()
    try:
        for callbacks, end in [([callback, seen], settings), ([plain], {"max_steps": 120})]:
            validated = val_loader(num_workers=1) if validation else None
            trainer(tmp_path, *callbacks, **end).fit(Tiny(), loader(480, 8, num_workers=2), validated)
    finally:
        gc.enable()
    assert searches(callback)
    assert seen.between == plain.between
    assert seen.within == plain.within + 2

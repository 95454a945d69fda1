"""Where a user's schedule is highest is known before a step is made, and looking for it leaves no trace."""

import functools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from autotune.callbacks import AutoLRS, ReplaySchedule
from autotune.callbacks._trainer import peaks
from tests.callbacks.harness import Save, Tiny, Witness, loader, searches, trainer, val_loader


class Scheduled(Tiny):
    """Two groups under a scheduler of the user's."""

    def __init__(self, make, lr=1e-3, **config):
        super().__init__("groups", lr=lr)
        self.make, self.config = make, config

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


class Look(Callback):
    """What is foreseen, and the highest rate of each group in an update."""

    def on_train_start(self, trainer, pl_module):
        self.foreseen, self.highest = peaks.peak_rates(trainer), [0.0] * len(trainer.optimizers[0].param_groups)
        trainer.optimizers[0].register_step_pre_hook(self.note)

    def note(self, optimizer, *_):
        rates = [group["lr"] for group in optimizer.param_groups]
        self.highest = [max(pair) for pair in zip(self.highest, rates, strict=True)]


def look(folder, module, *callbacks, **settings):
    found = Look()
    L.seed_everything(5, verbose=False)
    runner = trainer(folder, *callbacks, found, **{"max_steps": 100, "max_epochs": -1, **settings})
    runner.fit(module, loader(batch=8), val_loader())
    return found


def table(step):
    """Absolute rates out of a list that ends with the run."""
    return [0.02 * min(1.0, (at + 1) / 20) for at in range(101)][step]


STEP, BY_EPOCH = {"interval": "step"}, {"interval": "epoch"}
SCHEDULES = {
    "shares": (lambda o: LambdaLR(o, lambda s: 1 / (1 + s)), STEP),
    "absolute": (lambda o: LambdaLR(o, lambda s: 5.0 * min(1.0, s / 40)), STEP),
    "a list": (lambda o: LambdaLR(o, table), STEP),
    "rises after its end": (lambda o: LambdaLR(o, lambda s: (1 - s / 100) ** 2), STEP),
    "cosine": (lambda o: CosineAnnealingLR(o, 100), STEP),
    "restarts": (lambda o: CosineAnnealingWarmRestarts(o, 15, 2), STEP),
    "one cycle": (lambda o: OneCycleLR(o, 0.1, total_steps=101), STEP),
    "in sequence": (lambda o: SequentialLR(o, [LinearLR(o, 0.1), LambdaLR(o, lambda s: 3.0)], [4]), STEP),
    "groups apart": (lambda o: LambdaLR(o, [lambda s: 0.9**s, lambda s: min(1.0, s / 40)]), STEP),
    "every 20 batches": (lambda o: LinearLR(o, 0.01, total_iters=20), {**STEP, "frequency": 20}),
    "more batches than an epoch": (lambda o: LinearLR(o, 0.01, total_iters=8), {**STEP, "frequency": 40}),
    "epochs": (lambda o: LambdaLR(o, lambda e: 10.0**e), BY_EPOCH),
    "two epochs": (lambda o: LambdaLR(o, lambda e: 10.0**e), {**BY_EPOCH, "frequency": 2}),
}


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_is_the_highest_rate_of_the_run(tmp_path, name, stops):
    make, config = SCHEDULES[name]
    callbacks = [EarlyStopping("val_loss", patience=1000)] if stops else []
    found = look(tmp_path, Scheduled(make, **config), *callbacks)
    assert found.foreseen == pytest.approx(found.highest, rel=0.011)


@pytest.mark.parametrize("frequency", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulate", [3, 4])
def test_it_is_stepped_when_lightning_steps_it(tmp_path, frequency, accumulate):
    """Every so many batches, if an update is made then, counted anew in every epoch."""
    module = Scheduled(lambda o: LinearLR(o, 0.01, total_iters=60), interval="step", frequency=frequency)
    found = look(tmp_path, module, accumulate_grad_batches=accumulate, max_steps=50)
    assert found.foreseen == pytest.approx(found.highest, rel=0.011)


@pytest.mark.parametrize(
    "limits", [{"max_steps": -1, "max_time": {"seconds": 60}}, {"max_steps": -1, "max_epochs": -1}]
)
def test_without_a_limit_of_updates_it_is_the_top_before_it_comes_down(tmp_path, limits):
    class End(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step > 60

    make = lambda o: LambdaLR(o, lambda s: 3.0 * min(1.0, s / 40) if s < 50 else 3.0 * (1 - s / 400) ** 2)  # noqa: E731
    found = look(tmp_path, Scheduled(make, interval="step"), End(), **limits)
    assert found.foreseen == pytest.approx(found.highest, rel=0.011)
    assert found.foreseen[0] == pytest.approx(3e-3)


@pytest.mark.parametrize(("by", "top"), [(1.0, 1e-3), (0.1, 1e-3), (40.0, 0.01)])
def test_what_still_rises_where_nobody_looks_on_is_at_least_what_the_optimizer_was_built_with(
    tmp_path, monkeypatch, by, top
):
    monkeypatch.setattr(peaks, "_AHEAD", 0)
    monkeypatch.setattr(peaks, "_LEAST_AHEAD", 26)
    found = look(tmp_path, Scheduled(lambda o: LambdaLR(o, lambda s: by * s / 100), interval="step"))
    assert found.foreseen[0] == pytest.approx(top)


def test_a_rate_of_zero_to_the_end_is_no_reason_to_refuse_the_run(tmp_path):
    make = lambda o: LambdaLR(o, [lambda s: float(s > 200), lambda s: 1.0])  # noqa: E731
    found = look(tmp_path, Scheduled(make, interval="step"), AutoLRS(search_budget=0.3))
    assert found.foreseen[0] == 1e-3


class Anneals(LRScheduler):
    """A scheduler that writes into the module as well: an attribute, a buffer, and what is trained."""

    def __init__(self, optimizer, module):
        self.module = module
        super().__init__(optimizer)

    def get_lr(self):
        self.module.temperature = 0.9**self.last_epoch
        self.module.heat.fill_(self.module.temperature)
        self.module.counted += 1
        self.module.head.requires_grad_(self.last_epoch < 60)
        return [group["initial_lr"] * min(1.0, self.module.counted / 50) for group in self.optimizer.param_groups]


class Annealed(Scheduled):
    def __init__(self):
        super().__init__(lambda optimizer: Anneals(optimizer, self), interval="step")
        self.counted, self.seen = 0, []
        self.register_buffer("heat", torch.ones(()))

    def on_train_batch_start(self, batch, batch_idx):
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((rate, self.counted, float(self.heat), self.head.weight.requires_grad))


def test_what_a_scheduler_does_to_the_module_is_undone(tmp_path):
    alone, watched = Annealed(), Annealed()
    L.seed_everything(5, verbose=False)
    trainer(tmp_path, max_steps=80, max_epochs=-1).fit(alone, loader(batch=8), val_loader())
    look(tmp_path, watched, AutoLRS(search_budget=0.3), max_steps=80)
    assert watched.seen == alone.seen


class Uncopied(nn.Module):
    def __deepcopy__(self, memo):
        raise AssertionError("a part of the model is copied")

    def share(self, step, by=2.0):
        return by * min(1.0, step / 40)


@pytest.mark.parametrize("how", ["method", "partial", "attribute"])
def test_nothing_of_the_model_is_copied(tmp_path, how):
    class Holds(Scheduled):
        def __init__(self):
            super().__init__(self.scheduler, interval="step")
            self.part = Uncopied()

        def scheduler(self, optimizer):
            factor = self.part.share if how != "partial" else functools.partial(Uncopied.share, self.part)
            made = LambdaLR(optimizer, factor)
            made.parts = [self.part, *self.parameters()]
            return made

    assert look(tmp_path, Holds()).foreseen[0] == pytest.approx(2e-3)


class ByDefaults(LRScheduler):
    """It reads what the optimizer was built with from its defaults."""

    def get_lr(self):
        share = min(1.0, (self.last_epoch + 1) / 20)
        return [self.optimizer.defaults["lr"] * share for _ in self.optimizer.param_groups]


class ByGroups(LRScheduler):
    """It has a list of the groups of its own."""

    def __init__(self, optimizer):
        self.groups = optimizer.param_groups
        super().__init__(optimizer)

    def step(self, epoch=None):
        self.last_epoch += 1
        for group in self.groups:
            group["lr"] = group["initial_lr"] * (1.0 + self.last_epoch / 50)


class StepsItself(Scheduled):
    def lr_scheduler_step(self, scheduler, metric):
        if self.global_step < 30:
            scheduler.step()


def test_schedulers_that_go_through_defaults_or_groups_are_followed_and_hooks_are_not(tmp_path):
    for kind in (ByDefaults, ByGroups):
        found = look(tmp_path / kind.__name__, Scheduled(kind, interval="step"))
        assert found.foreseen == pytest.approx(found.highest, rel=0.011)
    stepped = look(tmp_path / "hook", StepsItself(lambda o: LinearLR(o, 0.1, total_iters=20), interval="step"))
    assert stepped.foreseen[0] == pytest.approx(1e-3)


def test_a_replay_that_goes_on_has_the_top_behind_it(tmp_path):
    make = functools.partial(LambdaLR, lr_lambda=lambda s: max(0.0, 1 - s / 100))

    def run(folder, *callbacks, **kwargs):
        witness = Witness()
        L.seed_everything(5, verbose=False)
        runner = trainer(tmp_path / folder, *callbacks, witness, max_steps=120, max_epochs=-1)
        runner.fit(Scheduled(make, interval="step"), loader(batch=8), val_loader(), **kwargs)
        return [lrs[0] for lrs in witness.lrs]

    tuned = AutoLRS(search_budget=0.3)
    run("logged", tuned)
    assert searches(tuned)
    savers = [Save(tmp_path / f"{at}.ckpt", at) for at in (70, 105)]
    whole = run("whole", ReplaySchedule(tmp_path / "logged"), *savers)
    for at in (70, 105):
        path = tmp_path / f"{at}.ckpt"
        assert run(str(at), ReplaySchedule(tmp_path / "logged"), ckpt_path=path, weights_only=True) == whole[at:]

"""Runs whose loss gets worse for good by their probes: where they go back to, when, and what is left in a replay."""

from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks import AutoLRS, ReplaySchedule
from tests.callbacks.harness import Tiny, loader, trainer, val_loader

EXAMPLES, HELD_OUT, UPDATES = 64, 16, 600


class Regression(L.LightningModule):
    """Far more weights than there are examples."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


class Past(Callback):
    """The weights after each update."""

    def __init__(self):
        self.after = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after[trainer.global_step] = [parameter.detach().clone() for parameter in pl_module.parameters()]


class Scheduled(Regression):
    """Under a scheduler of the user's, which makes ``share`` of the rate at every update."""

    def __init__(self, share):
        super().__init__()
        self.share = share

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, self.share), "interval": "step"}
        ]


def overfit(folder, controller, seed=1, module=Regression, *more, ckpt_path=None, **limits):
    """So few examples are held out that a probe is of all of them; the trainer validates seldom or not at all."""
    L.seed_everything(seed, verbose=False)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES + HELD_OUT, 6, generator=generator)
    y = x[:, :1] + torch.randn(len(x), 1, generator=generator)
    train, val = TensorDataset(x[:EXAMPLES], y[:EXAMPLES]), TensorDataset(x[EXAMPLES:], y[EXAMPLES:])
    module, past = module(), Past()
    limits = {"check_val_every_n_epoch": UPDATES, **(limits or {"max_steps": UPDATES})}
    saves = any(isinstance(one, ModelCheckpoint) for one in more)
    logger = CSVLogger(folder, name="", version="")
    trainer(folder, controller, past, *more, logger=logger, enable_checkpointing=saves, **limits).fit(
        module, DataLoader(train, 8, shuffle=True), DataLoader(val, 8), ckpt_path=ckpt_path
    )
    return [parameter.detach().clone() for parameter in module.parameters()], past


def checks(callback):
    """Step and loss of every probe of the run's own weights."""
    made = [d for d in callback.decisions if d.kind in ("stage", "forecast") and "loss" in d.numbers]
    return [(d.step, d.numbers["loss"]) for d in made]


def returns(callback):
    return [d for d in callback.decisions if d.action == "roll_back"]


@pytest.mark.parametrize("seed", range(4))
def test_it_ends_at_the_best_weights_it_was_checked_at_or_better(tmp_path, seed):
    callback = AutoLRS()
    end, past = overfit(tmp_path, callback, seed)
    began, best = checks(callback)[0][1], min(loss for _, loss in checks(callback))
    step, last = checks(callback)[-1]
    assert step == UPDATES
    back = [d for d in returns(callback) if d.step == UPDATES]
    if not back:
        assert last <= best + 0.025 * (began - best) + 1e-6, "worse than it was, and nothing was undone"
        return
    (move,) = back
    assert dict(checks(callback))[move.numbers["to_step"]] == best
    if move.numbers["to_step"]:
        assert all(map(torch.equal, end, past.after[move.numbers["to_step"]]))


def test_with_the_rate_coming_down_one_bad_check_is_enough(tmp_path):
    callback = AutoLRS()
    overfit(tmp_path, callback, seed=3)
    late = [pair for pair in pairwise(returns(callback)) if 0.75 * UPDATES < pair[1].step < UPDATES]
    assert late
    for before, move in late:
        assert {step for step, _ in checks(callback) if before.step < step <= move.step} == {move.step}
        assert move.numbers["lr"] == pytest.approx(move.numbers["previous_lr"] * 10**-0.5)
        (evidence,) = [d.numbers["evidence"] for d in callback.decisions if d.step == move.step and d.action == "end"]
        assert evidence[0].startswith("worse: ")


@pytest.mark.slow
def test_without_forecasts_the_checks_are_made_all_the_same(tmp_path):
    said, made = {}, {}
    for forecasts in (True, False):
        L.seed_everything(5, verbose=False)
        callback = AutoLRS(forecasts=forecasts)
        trainer(tmp_path / str(forecasts), callback, max_steps=UPDATES).fit(Tiny(), loader(batch=8), val_loader())
        said[forecasts] = [d.action for d in callback.decisions if d.kind == "forecast"]
        made[forecasts] = checks(callback)
    assert "predict" in said[True]
    assert set(said[False]) == {"refuse"}
    assert made[False] == made[True]


class Hooked(Callback):
    """Counts updates at the optimizer, from a while into the run on."""

    def __init__(self):
        self.counted = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == UPDATES // 2:
            trainer.optimizers[0].register_step_post_hook(self.count)

    def count(self, *_):
        self.counted += 1


def test_what_others_have_hooked_onto_the_optimizer_since_the_best_stays(tmp_path):
    callback, hooked = AutoLRS(), Hooked()
    overfit(tmp_path, callback, 3, Regression, hooked)
    assert any(
        UPDATES // 2 < move.step < UPDATES and move.numbers["to_step"] < UPDATES // 2 for move in returns(callback)
    )
    assert hooked.counted == UPDATES - UPDATES // 2


@pytest.mark.parametrize("every", [UPDATES, 25])
def test_at_the_end_one_bad_check_is_enough_though_the_rate_never_came_down(tmp_path, every):
    """Whether or not the trainer's own validation, too seldom to go by, comes with the last update."""
    callback = AutoLRS()
    limits = {"max_steps": UPDATES, "check_val_every_n_epoch": every}
    overfit(tmp_path, callback, 1, lambda: Scheduled(lambda update: 1.0), **limits)
    (move,) = returns(callback)
    assert move.step == UPDATES


class Stop(Callback):
    """Ends a run whose end nobody knew."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 700


def test_where_the_end_is_not_known_a_low_rate_may_still_rise_and_no_check_is_late(tmp_path):
    callback = AutoLRS()
    stoppers = (EarlyStopping("val_loss", patience=1000), Stop())
    often = {"check_val_every_n_epoch": 1}
    overfit(tmp_path, callback, 0, lambda: Scheduled(lambda update: 0.1), *stoppers, max_epochs=1000, **often)
    horizon = callback.decisions[0].numbers["horizon"]
    assert horizon["unit"] == "none"
    assert any(0.5 * horizon["updates"] < step < 700 for step, _ in checks(callback))
    assert not [d for d in callback.decisions for item in d.numbers.get("evidence", []) if item.startswith("worse: ")]


@pytest.mark.slow
def test_a_return_to_the_middle_of_a_stage_is_replayed(tmp_path):
    callback = AutoLRS()
    end, _ = overfit(tmp_path / "a", callback, seed=2)
    begins = {d.step for d in callback.decisions if d.kind == "stage"}
    assert any(move.numbers["to_step"] not in begins for move in returns(callback))
    again, _ = overfit(tmp_path / "b", ReplaySchedule(tmp_path / "a"), seed=2)
    assert all(map(torch.equal, end, again))

"""The trainer's own validations: what a run that is validated often goes back to, when, and that it costs nothing."""

import math
from itertools import pairwise

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks import AutoLRS, ReplaySchedule
from autotune.errors import MonitorError
from tests.callbacks.harness import trainer
from tests.callbacks.journey import on_ranks, run_apart
from tests.callbacks.test_guard import Past, Regression, returns

EPOCH, EPOCHS = 15, 40
UPDATES = EPOCH * EPOCHS
BATCH, HELD_OUT = 8, 400


class Validated(Callback):
    """Update and loss of every validation, as anybody may read them."""

    def __init__(self, name="val_loss"):
        self.name, self.losses = name, {}

    def on_validation_end(self, trainer, pl_module):
        if self.name is not None:
            self.losses[trainer.global_step] = float(trainer.callback_metrics[self.name])

    @property
    def best(self):
        return min(self.losses, key=self.losses.__getitem__)


def data():
    """Few examples to learn from, with noise on them, and many more held out than a probe can pay for."""
    generator = torch.Generator().manual_seed(0)
    train = EPOCH * BATCH
    x = torch.randn(train + HELD_OUT, 6, generator=generator)
    y = x[:, :1] + torch.randn(len(x), 1, generator=generator)
    return TensorDataset(x[:train], y[:train]), TensorDataset(x[train:], y[train:])


class Fit:
    """One run that is validated after every epoch."""

    def __init__(self, folder, controller=None, *more, seed=1, module=Regression, ckpt=None, name="val_loss", **limits):
        L.seed_everything(seed, verbose=False)
        train, val = data()
        self.callback = AutoLRS() if controller is None else controller
        self.past, self.validated, self.module = Past(), Validated(name), module()
        self.trainer = trainer(
            folder, self.callback, self.past, self.validated, *more, logger=CSVLogger(folder, name="", version=""),
            num_sanity_val_steps=0, enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in more),
            **({"max_steps": UPDATES} | limits),
        )  # fmt: skip
        self.trainer.fit(self.module, DataLoader(train, BATCH, shuffle=True), DataLoader(val, BATCH), ckpt_path=ckpt)
        self.weights = [parameter.detach().clone() for parameter in self.module.parameters()]

    @property
    def judged(self):
        """The ways back that a validation was the reason of."""
        return [move for move in returns(self.callback) if move.reason.startswith("validation says")]

    @property
    def probed(self):
        return [move for move in returns(self.callback) if not move.reason.startswith("validation says")]


@pytest.mark.parametrize("seed", range(3))
def test_it_ends_at_the_weights_that_validation_liked_best_or_better(tmp_path, seed):
    run = Fit(tmp_path, seed=seed)
    seen = run.validated
    assert list(seen.losses) == list(range(EPOCH, UPDATES + 1, EPOCH))
    at_end = [move for move in returns(run.callback) if move.step == UPDATES]
    if at_end:
        assert at_end[0].numbers["to_step"] == seen.best
        assert all(map(torch.equal, run.weights, run.past.after[seen.best]))
    else:
        spread = [after - before for before, after in pairwise(list(seen.losses.values())[-6:])]
        noise = 2.0 * math.sqrt(sum(step * step for step in spread) / len(spread))
        assert seen.losses[UPDATES] <= seen.losses[seen.best] + noise


@pytest.mark.parametrize("seed", range(3))
def test_with_the_rate_coming_down_it_goes_back_to_what_validation_liked_best(tmp_path, seed):
    run = Fit(tmp_path, seed=seed)
    assert run.judged, "the run overfits, and nothing was undone"
    for move in run.judged:
        assert move.step >= 0.75 * UPDATES
        assert move.step % EPOCH == 0
        earlier = {step: loss for step, loss in run.validated.losses.items() if step < move.step}
        assert move.numbers["to_step"] == min(earlier, key=earlier.__getitem__)
        if move.step < UPDATES:
            assert move.numbers["lr"] == pytest.approx(move.numbers["previous_lr"] * 10**-0.5)


def test_probes_cannot_see_it_and_validations_cost_nothing(tmp_path):
    """So many examples are held out that the budget pays for few: what validations say comes without a price."""
    run = Fit(tmp_path)
    shares = [d.numbers["probe_share"] for d in run.callback.decisions if "probe_share" in d.numbers]
    assert 0.0 < max(shares) < 0.5
    cost = sum(d.cost_steps for d in run.callback.decisions if d.kind != "rollback")
    assert cost <= 0.1 * UPDATES
    # At rates that learn the noise by heart, which the search's own answer here hardly does.
    high = {"min_lr": 3e-2}
    seeing = Fit(tmp_path / "seeing", AutoLRS(**high))
    blind = Fit(tmp_path / "blind", AutoLRS(**high), check_val_every_n_epoch=EPOCHS)
    assert seeing.judged
    assert not blind.judged
    ends = [one.trainer.validate(one.module, DataLoader(data()[1], BATCH), verbose=False) for one in (seeing, blind)]
    assert ends[0][0]["val_loss"] < 0.9 * ends[1][0]["val_loss"]


@pytest.mark.parametrize(("epochs", "seed"), [(8, 2), (EPOCHS, 0)])
def test_validations_that_come_seldom_leave_the_work_to_probes(tmp_path, epochs, seed):
    run = Fit(tmp_path, seed=seed, check_val_every_n_epoch=epochs)
    assert list(run.validated.losses)[-1] == UPDATES
    assert not run.judged
    assert run.probed
    checked = {d.step for d in run.callback.decisions if d.kind in ("stage", "forecast") and "loss" in d.numbers}
    assert all(move.numbers["to_step"] in checked for move in run.probed)


class Endless(Regression):
    """Nothing to learn by heart, as no example comes twice."""

    def training_step(self, batch, batch_idx):
        x = torch.randn(32, 6)
        return self.loss((x, self.truth(x) + 0.5 * torch.randn(32, 1)))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        noise = y - x[:, :1]
        self.log("val_loss", self.loss((x, self.truth(x) + 0.5 * noise)), batch_size=len(x))

    def truth(self, x):
        return torch.sin(2.0 * x[:, :1]) + x[:, 1:2] * x[:, 2:3]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_overfits_nothing_goes_its_way_however_often_it_is_validated(tmp_path, seed):
    every = {"check_val_every_n_epoch": None, "limit_val_batches": 20}
    often = Fit(tmp_path / "a", seed=seed, module=Endless, val_check_interval=3, **every)
    never = Fit(tmp_path / "b", seed=seed, module=Endless, val_check_interval=UPDATES, **every)
    assert len(often.validated.losses) == UPDATES // 3
    assert len(often.judged) <= 3
    assert often.validated.losses[UPDATES] <= 1.05 * never.validated.losses[UPDATES]


class Accurate(Regression):
    """Logs what is better the higher it is."""

    def validation_step(self, batch, batch_idx):
        self.log("score", -self.loss(batch), batch_size=len(batch[0]))


def test_a_score_that_is_better_the_higher(tmp_path):
    plain, score = Fit(tmp_path / "a"), Fit(tmp_path / "b", AutoLRS(monitor="score", mode="max"), module=Accurate,
                                            name="score")  # fmt: skip
    assert plain.judged
    assert [move.step for move in score.judged] == [move.step for move in plain.judged]
    assert all(map(torch.equal, plain.weights, score.weights))


class Forgetful(Regression):
    """Logs no loss once the rate has begun to come down; in probes it does, or not even there."""

    in_probes = True

    def validation_step(self, batch, batch_idx):
        probed = not any(isinstance(one, AutoLRS) for one in self.trainer.callbacks)
        if self.trainer.global_step <= UPDATES // 2 or (probed and self.in_probes):
            super().validation_step(batch, batch_idx)


class Reader(Callback):
    """Reads the metrics after everybody else."""

    def on_validation_end(self, trainer, pl_module):
        self.seen = dict(trainer.callback_metrics)


class Forgotten(Forgetful):
    in_probes = False


class Strange(Regression):
    """Its validation loss is not a number once the rate has come down."""

    def validation_step(self, batch, batch_idx):
        broken = math.nan if 0.8 * UPDATES < self.trainer.global_step < UPDATES else 1.0
        self.log("val_loss", self.loss(batch) * broken, batch_size=len(batch[0]))


def test_a_validation_without_the_monitored_value_says_nothing(tmp_path):
    assert not Fit(tmp_path / "a", module=Forgetful, name=None).judged
    # Whoever reads the trainer's metrics is handed new tensors.
    assert not Fit(tmp_path / "b", None, Reader(), module=Forgetful, name=None).judged


class Broken(Endless):
    """Its validations log nothing from a tenth of the run on, and near the end it diverges, once."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if 0.9 * UPDATES <= self.trainer.global_step < 0.9 * UPDATES + 10 else loss

    def validation_step(self, batch, batch_idx):
        if self.trainer.global_step <= UPDATES // 10 or not self.watched():
            super().validation_step(batch, batch_idx)

    def watched(self):
        return any(isinstance(one, AutoLRS) for one in self.trainer.callbacks)


def test_once_validations_have_stopped_probes_choose_the_weights_again(tmp_path):
    run = Fit(tmp_path, module=Broken, name=None)
    back = [move for move in returns(run.callback) if "not finite" in move.reason]
    assert back
    made = {d.step for d in run.callback.decisions if d.kind in ("stage", "forecast") and "loss" in d.numbers}
    assert all(move.numbers["to_step"] > UPDATES // 2 for move in back), "weights of long ago"
    assert all(move.numbers["to_step"] in made for move in back)


def test_a_probe_without_it_is_refused(tmp_path):
    with pytest.raises(MonitorError, match=r"'val_loss', which validation logged when training began.*logs nothing"):
        Fit(tmp_path, module=Forgotten, name=None)


def test_a_loss_that_is_not_a_number_is_worse_than_any(tmp_path):
    run = Fit(tmp_path, module=Strange)
    assert any("validation says nan" in move.reason for move in run.judged)


def test_it_is_replayed(tmp_path):
    run = Fit(tmp_path / "a")
    assert run.judged
    again = Fit(tmp_path / "b", ReplaySchedule(tmp_path / "a"))
    assert all(map(torch.equal, run.weights, again.weights))


def test_one_in_the_middle_of_an_accumulation_window_is_of_weights_that_are_gone(tmp_path):
    """An update is of two batches, an epoch of fifteen: of three validations in it one stands between two updates."""
    half = {"accumulate_grad_batches": 2, "val_check_interval": EPOCH // 3, "max_steps": UPDATES // 2}
    run = Fit(tmp_path / "a", **half)
    updates = {(batches + 1) // 2 for batches in (10, EPOCH)}
    whole = {update for update in run.validated.losses if update % ((EPOCH + 1) // 2) in updates | {0}}
    assert set(run.validated.losses) > whole
    assert run.judged
    assert all({move.step, move.numbers["to_step"]} <= whole for move in run.judged)
    again = Fit(tmp_path / "b", ReplaySchedule(tmp_path / "a"), **half)
    assert all(map(torch.equal, run.weights, again.weights))


def timeless(callback):
    return [{key: value for key, value in d.to_dict().items() if key != "numbers"} for d in callback.decisions]


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_any_validation(tmp_path):
    """Saved at its end, before anything was made of it, and just before it, which Lightning passes over on resuming."""
    common = {"save_top_k": -1, "filename": "{step}"}
    after = ModelCheckpoint(tmp_path / "after", monitor="val_loss", save_on_train_epoch_end=False, **common)
    before = ModelCheckpoint(tmp_path / "before", every_n_train_steps=EPOCH, save_on_train_epoch_end=False, **common)
    run = Fit(tmp_path / "whole", None, after, before)
    back = run.judged[0]
    steps = {EPOCH, back.numbers["to_step"], back.step, back.step + EPOCH}
    for when, step in [(when, step) for when in ("after", "before") for step in sorted(steps)]:
        resumed = Fit(tmp_path / f"{when}{step}", None, seed=9, ckpt=tmp_path / when / f"step={step}.ckpt")
        assert min(resumed.past.after) == step + 1
        assert all(map(torch.equal, run.weights, resumed.weights)), (when, step)
        assert timeless(resumed.callback) == timeless(run.callback), (when, step)


def test_a_run_that_is_made_longer_is_validated_often_from_there_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="last", monitor="val_loss", save_on_train_epoch_end=False)
    Fit(tmp_path / "a", None, saver, max_steps=5 * EPOCH)
    longer = Fit(tmp_path / "b", None, seed=9, ckpt=tmp_path / "last.ckpt")
    assert longer.judged


def test_weights_that_are_averaged_for_validation_are_not_what_a_rollback_brings_back(tmp_path):
    averaging = getattr(lightning_callbacks, "EMAWeightAveraging", None)
    if averaging is None:
        pytest.skip("this Lightning averages no weights")
    run = Fit(tmp_path, None, averaging(decay=0.9))
    assert len(run.validated.losses) == EPOCHS
    assert not run.judged


class OfRank(Regression):
    """Every rank logs the loss of its own part."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=False)


def rank(number, folder):
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=LightningEnvironment())
    run = Fit(folder, module=OfRank, devices=2, strategy=strategy, max_steps=UPDATES // 2)
    losses = run.validated.losses
    torch.save({"back": [move.to_dict() for move in run.judged], "losses": losses, "weights": run.weights},
               f"{folder}/{number}.pt")  # fmt: skip


def fork(folder):
    on_ranks(2, rank, folder)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_ranks_that_see_other_losses_go_back_together(tmp_path):
    run_apart("tests.callbacks.test_validations:fork", tmp_path)
    ours, theirs = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert ours["losses"] != theirs["losses"]
    assert ours["back"]
    assert ours["back"] == theirs["back"]
    assert all(map(torch.equal, ours["weights"], theirs["weights"]))
    mean = {step: (loss + theirs["losses"][step]) / 2.0 for step, loss in ours["losses"].items()}
    first = ours["back"][0]
    earlier = {step: loss for step, loss in mean.items() if step < first["step"]}
    assert first["numbers"]["to_step"] == min(earlier, key=earlier.__getitem__)

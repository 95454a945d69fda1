"""A replay resizes the batch as the run did, and is that run bit for bit."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from autotune import read_decisions
from autotune.callbacks import AdaptiveBatchSize, AutoLRS, ReplaySchedule
from autotune.errors import ConfigurationError, UnsupportedSetupError
from autotune.replay import load_schedule

pytestmark = pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")


class Net(L.LightningModule):
    """Noisy labels, so that a larger batch pays; ``explodes`` makes one above 64 examples fail."""

    def __init__(self, optimizer, scheduler=False, explodes=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.optimizer, self.scheduler, self.explodes = optimizer, scheduler, explodes
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=True)
        self.log("examples", float(len(batch[0])), on_step=True)
        if self.explodes and len(batch[0]) > 64:
            loss = loss + 1e4 * sum(parameter.square().sum() for parameter in self.parameters())
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(batch[2].tolist())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameters())
        if not self.scheduler:
            return optimizer
        if self.scheduler == "step":
            decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, self.trainer.estimated_stepping_batches)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]


def train(folder, callbacks, ckpt_path=None, workers=0, batch=8, drop_last=False, count=905, **settings):
    module = {key: settings.pop(key) for key in ("optimizer", "scheduler", "explodes") if key in settings}
    L.seed_everything(1, verbose=False)
    model = Net(**{"optimizer": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), **module})
    generator = torch.Generator().manual_seed(0)
    # Not a multiple of any window: an epoch's last update is a short one.
    x = torch.randn(905, 8, generator=generator)
    y = (x[:, :3] + 1.5 * torch.randn(905, 3, generator=generator)).argmax(1)
    data = TensorDataset(x, y, torch.arange(905))
    trainer = L.Trainer(
        **{
            "max_epochs": 4,
            "accelerator": "cpu",
            "logger": CSVLogger(folder),
            "callbacks": callbacks,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **settings,
        }
    )
    shown = Subset(data, range(count))
    train_set = DataLoader(shown, batch, shuffle=True, num_workers=workers, drop_last=drop_last)
    trainer.fit(model, train_set, DataLoader(TensorDataset(x[:200], y[:200]), 200), ckpt_path=ckpt_path)
    return trainer, model


def column(trainer, name):
    with open(f"{trainer.log_dir}/metrics.csv", newline="") as file:
        return [row[name] for row in csv.DictReader(file) if row.get(name)]


def growing(**arguments):
    return AdaptiveBatchSize(**{"max_batch_size": 64, "every_n_steps": 4, "rest_updates": 16, **arguments})


def same(first, second, names=("train_loss", "val_loss", "examples")):
    (trainer, model), (other_trainer, other) = first, second
    assert model.seen == other.seen
    for name in names:
        assert column(trainer, name) == column(other_trainer, name), name
    weights = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    return True


def actions(trainer):
    return [decision.action for decision in read_decisions(trainer.log_dir) if decision.kind == "batch"]


SGD = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)}
ADAM = {"optimizer": lambda p: torch.optim.AdamW(p, lr=3e-3)}


@pytest.mark.parametrize(
    ("controllers", "settings"),
    [
        (lambda: [AutoLRS(search_budget=0.3), growing()], {}),
        pytest.param(lambda: [growing(), AutoLRS(search_budget=0.3)], ADAM, marks=pytest.mark.slow),
        (lambda: [growing()], {**SGD, "scheduler": True, "val_check_interval": 0.5}),
        pytest.param(lambda: [growing(lr_scaling="sqrt_betas")], ADAM, marks=pytest.mark.slow),
        pytest.param(
            lambda: [AutoLRS(search_budget=0.3), growing(rule="norm", max_batch_size=60)],
            {"scheduler": True, "accumulate_grad_batches": 3, **ADAM},
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda: [growing()], {"scheduler": "step", **SGD}, marks=pytest.mark.slow),
        pytest.param(lambda: [growing()], {"workers": 2, **SGD}, marks=pytest.mark.slow),
        pytest.param(
            lambda: [AutoLRS(search_budget=0.3), growing()],
            {"max_steps": 300, "max_epochs": -1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["both", "batch first", "batch alone", "betas", "accumulation", "step scheduler", "workers", "steps"],
)
def test_a_replay_with_growth_is_the_run_bit_for_bit(tmp_path, controllers, settings):
    first = train(tmp_path / "a", controllers(), **settings)
    assert "grow" in actions(first[0])
    assert len(set(column(first[0], "examples"))) > 1
    replay = ReplaySchedule(first[0].log_dir)
    second = train(tmp_path / "b", [replay], **settings)
    names = ("train_loss", "val_loss", "examples")
    both = len(controllers()) > 1
    assert same(first, second, (*names, "autotune/lr") if both else names)
    played, found = read_decisions(second[0].log_dir), read_decisions(first[0].log_dir)
    assert load_schedule(second[0].log_dir).steps == load_schedule(first[0].log_dir).steps == first[0].global_step
    assert [(d.kind, d.action, d.step, d.effective_step) for d in played] == [
        (d.kind, d.action, d.step, d.effective_step) for d in found
    ]
    assert played == replay.decisions
    loader = vars(second[0].fit_loop.epoch_loop.automatic_optimization)
    assert "_make_closure" not in loader
    assert not second[0].optimizers[0]._optimizer_step_pre_hooks
    third = train(tmp_path / "c", [ReplaySchedule(second[0].log_dir)], **settings)
    assert same(second, third, (*names, "autotune/lr"))


@pytest.mark.parametrize("alone", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_growth_that_was_undone_is_undone_again(tmp_path, alone):
    def controllers():
        grown = growing(max_batch_size=128, rule="norm", lr_scaling="linear")
        return [grown] if alone else [AutoLRS(search_budget=0.3), grown]

    first = train(tmp_path / "a", controllers(), explodes=True, **SGD)
    assert "undo_growth" in actions(first[0])
    second = train(tmp_path / "b", [ReplaySchedule(first[0].log_dir)], explodes=True, **SGD)
    assert same(first, second, ("train_loss", "val_loss", "examples", *(() if alone else ("autotune/lr",))))
    assert actions(second[0]) == actions(first[0])


@pytest.mark.filterwarnings("ignore:autotune. the log's schedule is over")
def test_a_replay_that_ended_early_goes_on_from_a_checkpoint_of_afterwards(tmp_path):
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.3), growing()])
    log = first[0].log_dir
    half, model = train(tmp_path / "half", [ReplaySchedule(log)], max_epochs=3)
    assert len({len(batch) for batch in model.seen}) > 2
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, rest = train(tmp_path / "rest", [ReplaySchedule(log)], ckpt_path=tmp_path / "half.ckpt")
    assert model.seen + rest.seen == first[1].seen
    weights = zip(first[1].state_dict().values(), rest.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


class Save(L.Callback):
    """A checkpoint after so many batches."""

    def __init__(self, path, batches):
        self.path, self.batches, self.count = path, batches, 0

    def on_train_batch_end(self, trainer, *_):
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("when", ["in flight", pytest.param("later", marks=pytest.mark.slow)])
def test_a_resumed_replay_goes_on_bit_for_bit(tmp_path, when):
    """Saved between a growth's decision and its effect, and somewhere in the middle of an epoch afterwards."""
    settings = {"workers": 2, "max_epochs": 3, **SGD}
    first = train(tmp_path / "a", [growing()], **settings)
    grow = next(d for d in read_decisions(first[0].log_dir) if d.action == "grow")
    assert grow.effective_step > grow.step
    at = grow.step + 1 if when == "in flight" else grow.effective_step + 5
    path = first[0].log_dir
    train(tmp_path / "b", [ReplaySchedule(path), Save(tmp_path / "mid.ckpt", at)], **settings)
    callback = ReplaySchedule(path)
    trainer, model = train(tmp_path / "c", [callback], ckpt_path=tmp_path / "mid.ckpt", **settings)
    assert model.seen == first[1].seen[at:]
    assert column(trainer, "train_loss") == column(first[0], "train_loss")[at:]
    assert read_decisions(trainer.log_dir) == callback.decisions
    assert actions(trainer) == actions(first[0])


def test_what_does_not_fit_is_said(tmp_path):
    first = train(tmp_path / "a", [growing(noise_multiple=1.0)], **SGD)
    path = first[0].log_dir
    with pytest.raises(UnsupportedSetupError, match="ReplaySchedule and AdaptiveBatchSize both set the batch"):
        train(tmp_path / "b", [ReplaySchedule(path), growing()], **SGD)
    with pytest.raises(UnsupportedSetupError, match="keep one of them"):
        train(tmp_path / "b", [ReplaySchedule(path), AutoLRS()], **SGD)
    with pytest.warns(UserWarning, match="began with 8 examples an update, this one with 16"):
        _, model = train(tmp_path / "b", [ReplaySchedule(path)], batch=16, max_epochs=4, **SGD)
    largest = max(d.numbers["batch"] for d in read_decisions(path) if d.kind == "batch")
    assert max(map(len, model.seen)) == largest
    schedule = load_schedule(path)
    with pytest.raises(ConfigurationError, match="multipliers on your own learning rate"):
        schedule.rate(0)
    grow = next(d for d in read_decisions(path) if d.action == "grow")
    row = {row["step"]: row for row in schedule.rows()}.get(grow.effective_step)
    assert row is None or row == {
        "step": grow.effective_step,
        "lr_multiplier": grow.numbers["lr_gain"],
        "batch_size": grow.numbers["batch"],
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = schedule.lambda_lr(optimizer)
    for _ in range(grow.effective_step):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 * grow.numbers["lr_gain"]


def test_a_batch_is_kept_within_an_epoch_of_less_data(tmp_path):
    """Where the last batch is dropped no update would be made any more."""
    first = train(tmp_path / "a", [growing()], **SGD)
    largest = max(batch for _, batch in load_schedule(first[0].log_dir).batches)
    assert largest > 20
    replay = ReplaySchedule(first[0].log_dir)
    updates = first[0].global_step
    settings = {"count": 20, "drop_last": True, "max_epochs": -1, "max_steps": updates}
    with pytest.warns(UserWarning, match=f"grows to {largest} examples, .* kept to 16 at most") as told:
        trainer, model = train(tmp_path / "b", [replay], **settings, **SGD)
    assert sum("kept to" in str(one.message) for one in told) == 1
    assert trainer.global_step == updates
    assert [len(batch) for batch in (model.seen[0], model.seen[-1])] == [8, 16]


@pytest.mark.parametrize("settings", [{}, {"drop_last": True}], ids=["whole", "cut off"])
def test_the_exported_schedule_follows_the_examples(tmp_path, settings):
    """In a run bounded by epochs there are fewer updates than were planned: the rate still ends at nothing."""
    first = train(tmp_path / "a", [AutoLRS(search_budget=0.3), growing()], **settings)
    rows = load_schedule(first[0].log_dir).rows()
    logged = [float(text) for text in column(first[0], "autotune/lr")]
    assert len(rows) == first[0].global_step == len(logged)
    assert [row["lr"] for row in rows] == logged
    assert rows[-1]["batch_size"] > rows[0]["batch_size"] == 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
def test_the_exported_schedule_knows_what_workers_had_ready_at_an_undone_growth(tmp_path):
    controllers = [AutoLRS(search_budget=0.3), growing(max_batch_size=128, rule="norm", lr_scaling="linear")]
    trainer, model = train(tmp_path, controllers, explodes=True, workers=2, max_epochs=3, **SGD)
    undone = next(d for d in read_decisions(trainer.log_dir) if d.action == "undo_growth")
    assert undone.numbers["batch_from"] > undone.effective_step
    rows = load_schedule(trainer.log_dir).rows()
    assert [row["lr"] for row in rows] == [float(text) for text in column(trainer, "autotune/lr")]
    assert rows[undone.step]["batch_size"] == len(model.seen[undone.step]) == undone.numbers["batch_before"]

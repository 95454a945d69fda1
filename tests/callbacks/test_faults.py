"""Faults, injected: training goes on or stops with the user's own exception; the weights are the training weights."""

import os
import resource
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader, Dataset

from autotune.decision import Decision, DecisionLog, read_decisions
from autotune.search import surrogate
from tests.callbacks.journey import Journey, Net, controllers, data, run_apart, same_course, weights_of

pytestmark = [pytest.mark.filterwarnings("ignore")]


class Steps:
    """An object of its own class, which no snapshot puts back."""

    count = 0


class Trouble(Net):
    """Calls ``trouble()`` in the n-th step of trials that comes ``later`` than the first update, or before it."""

    def __init__(self, trouble, later=False, at=4):
        super().__init__()
        self.steps, self.trouble, self.later, self.at = Steps(), trouble, later, at
        self.at_trial_step = self.step_of_trial

    def step_of_trial(self, _):
        if (self.trainer.global_step > 10) == self.later:
            self.steps.count += 1
            if self.steps.count == self.at:
                self.trouble()


class Last(Callback):
    """The weights after the last update that was made."""

    def __init__(self, at_start=lambda: None):
        self.at_start = at_start

    def on_train_start(self, trainer, pl_module):
        self.at_start()
        self.weights = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights = weights_of(pl_module)


def saved_weights(path):
    net = Net()
    net.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return weights_of(net)


def interrupt():
    raise KeyboardInterrupt


def fail():
    raise ZeroDivisionError("the user's own")


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("later", [False, True], ids=["first search", "later search"])
@pytest.mark.parametrize(
    ("trouble", "raised"), [(interrupt, SystemExit), (fail, ZeroDivisionError), (terminate, SIGTERMException)]
)
def test_stopped_in_a_trial(tmp_path, trouble, raised, later):
    last = Last()
    savers = [OnExceptionCheckpoint(tmp_path), ModelCheckpoint(tmp_path, save_last=True, save_on_exception=True)]
    net = Trouble(trouble, later)
    with pytest.raises(raised):
        Journey(tmp_path, "both", module=net, callbacks=[last, *savers])
    assert net.steps.count >= net.at
    assert weights_of(net) == last.weights
    for name in ("on_exception", "last"):
        if (tmp_path / f"{name}.ckpt").exists():
            assert saved_weights(tmp_path / f"{name}.ckpt") == last.weights
    whole = Journey(tmp_path / "whole", "both")
    resumed = Journey(tmp_path / "resumed", "both", ckpt=tmp_path / "on_exception.ckpt", seed=8)
    assert not same_course(resumed, whole)


def ask_for_too_much():
    torch.empty(2**58, dtype=torch.uint8)


def test_memory_that_runs_out_in_a_trial(tmp_path):
    run = Journey(tmp_path, "both", module=Trouble(ask_for_too_much))
    first = next(one for one in run.all_decisions if one["kind"] == "search")
    assert "memory ran out in a trial" in first["reason"]
    assert run.trainer.current_epoch == 4
    assert all(torch.isfinite(value).all() for value in run.module.state_dict().values())


@pytest.mark.parametrize("what", ["fit_map", "_model"])
def test_a_fit_that_fails(tmp_path, what, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("not positive definite")

    monkeypatch.setattr(surrogate, what, fails)
    run = Journey(tmp_path, "lrs")
    first = next(one for one in run.all_decisions if one["kind"] == "search")
    assert first["numbers"]["lr"] > 0
    assert run.trainer.current_epoch == 4


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_numbers_that_are_not_finite(tmp_path, where):
    class Broken(Net):
        broken = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            bad = not self.in_trial() and 40 <= self.trainer.global_step < 52 and not self.healed()
            return loss * torch.nan if bad and where == "loss" else loss

        def healed(self):
            return any(one.kind == "rollback" for one in run_of["lrs"].decisions)

        def on_after_backward(self):
            if where == "gradients" and not self.in_trial() and self.trainer.global_step == 40 and not self.broken:
                self.broken = True
                for parameter in self.parameters():
                    parameter.grad.fill_(torch.nan)

    run_of = dict(zip(["lrs"], controllers("lrs"), strict=True))
    run = Journey(tmp_path, list(run_of.values()), module=Broken())
    assert [one for one in run.all_decisions if one["action"] == "roll_back"]
    assert all(torch.isfinite(value).all() for value in run.module.state_dict().values())


class Dying(Dataset):
    """Raises, or ends its worker, once ``armed``."""

    def __init__(self, how):
        self.inner, self.how, self.armed = data(100), how, False

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        if self.armed and self.how == "raise":
            raise ZeroDivisionError("loader")
        if self.armed:
            os._exit(1)
        return self.inner[index]


@pytest.mark.parametrize("how", ["raise", "die"])
def test_a_training_loader_that_breaks(tmp_path, how):
    """The second iterator's batches, read in the first trial, come from the broken loader."""
    broken = Dying(how)
    last = Last(lambda: setattr(broken, "armed", True))
    net = Net()
    train = DataLoader(broken, 8, shuffle=True, num_workers=int(how == "die"))
    with pytest.raises(ZeroDivisionError if how == "raise" else RuntimeError, match=r"loader|worker"):
        Journey(tmp_path, "lrs", module=net, train=train, callbacks=[last])
    assert weights_of(net) == last.weights


def test_a_validation_loader_that_raises(tmp_path):
    class Refusing(Net):
        def val_dataloader(self):
            return None

        def validation_step(self, batch, batch_idx):
            if not self.trainer.sanity_checking:
                raise ZeroDivisionError("validation")

    last, net = Last(), Refusing()
    with pytest.raises(ZeroDivisionError):
        Journey(tmp_path, "lrs", module=net, callbacks=[last])
    assert weights_of(net) == last.weights


# ---------------------------------------------------------------------- the log


def full_disk(folder, room):
    """A file may hold so many bytes: a write beyond is cut short, the next one fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), int(room)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Journey(folder, "both")
    assert sum("decision log cannot be written" in str(one.message) for one in caught) == 1
    assert run.trainer.current_epoch == 4
    assert 0 < len(read_decisions(folder)) < len(run.all_decisions)
    assert Path(folder, "decisions.jsonl").read_text()[-1] == "\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE")
@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    run_apart("tests.callbacks.test_faults:full_disk", tmp_path, 3000)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_log_on_a_full_device(tmp_path):
    log = DecisionLog(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").unlink()
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log.write(Decision("stage", "begin", "one", 0))
    assert isinstance(log.failure, OSError)
    log.write(Decision("stage", "begin", "two", 0))


def test_a_read_only_folder(tmp_path):
    """Root may write anywhere but in /proc: the log goes nowhere, the run to its end."""
    with pytest.warns(UserWarning, match="decision log cannot be written"):
        run = Journey("/proc/self", "lrs", max_epochs=1)
    assert run.trainer.current_epoch == 1


def test_a_half_written_line(tmp_path):
    whole = Journey(tmp_path, "lrs", max_epochs=1)
    with open(tmp_path / "decisions.jsonl", "a") as file:
        file.write('{"schema":1,"step":3,"ki')
    assert len(read_decisions(tmp_path)) == len(whole.all_decisions)
    again = Journey(tmp_path, "lrs", max_epochs=1)
    assert len(read_decisions(tmp_path)) == len(again.all_decisions)

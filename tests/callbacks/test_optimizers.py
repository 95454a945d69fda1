"""AutoLRS drives every optimizer of the support matrix: search, stages, decay, and trials that leave no trace in it."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from pytorch_optimizer import Lamb, Lion
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import nn

from autotune.optim import AdaGradNorm
from tests.callbacks.harness import CLASSES, FEATURES, Tiny
from tests.callbacks.test_no_trace import compare

SHORT = {"max_steps": 90}
OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, amsgrad=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters),
    "RAdam": lambda parameters: torch.optim.RAdam(parameters),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, momentum=0.5, centered=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr_decay=1e-3),
    "AdaGradNorm": lambda parameters: AdaGradNorm(parameters, lr=1e-2),
    "Muon": lambda parameters: torch.optim.Muon(parameters),
    "Lion": lambda parameters: Lion(parameters, lr=1e-4),
    "LAMB": lambda parameters: Lamb(parameters),
}


class Any(Tiny):
    """Any optimizer, on a net of matrices alone, which is all that Muon takes."""

    def __init__(self, make):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 12, bias=False), nn.Tanh())
        self.head = nn.Linear(12, CLASSES, bias=False)
        self.make = make

    def configure_optimizers(self):
        return self.make(self.parameters())


@pytest.mark.usefixtures("several_searches")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(tmp_path, name):
    callback, run = compare(tmp_path, lambda: Any(OPTIMIZERS[name]), SHORT)
    assert type(run.trainer.optimizers[0]).__name__.lower() == name.lower()
    assert run.witness.lrs[-1][0] < 0.05 * max(rate for (rate,) in run.witness.lrs)
    assert {"setup", "search", "stage", "finish"} <= {one.kind for one in callback.decisions}


class ScheduleFree(Any):
    """Writes down what is validated: the average, or the weights that are trained."""

    modes = None  # not an attribute of the module's own: a trial would put it back

    def validation_step(self, batch, batch_idx):
        ScheduleFree.modes.append(self.trainer.optimizers[0].param_groups[0]["train_mode"])
        super().validation_step(batch, batch_idx)


class Switching(ScheduleFree):
    """As the optimizer's authors ask for: it is switched where the model is."""

    def on_train_start(self):
        self.trainer.optimizers[0].train()

    def on_validation_model_eval(self):
        super().on_validation_model_eval()
        self.trainer.optimizers[0].eval()

    def on_validation_model_train(self):
        super().on_validation_model_train()
        self.trainer.optimizers[0].train()


class Switch(Callback):
    """The same in a callback, which trials do without."""

    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].train()

    def on_validation_start(self, trainer, pl_module):
        trainer.optimizers[0].eval()

    def on_validation_end(self, trainer, pl_module):
        trainer.optimizers[0].train()


@pytest.mark.usefixtures("several_searches")
@pytest.mark.parametrize("make", [AdamWScheduleFree, SGDScheduleFree])
@pytest.mark.parametrize("by", ["module", "callback"])
def test_schedule_free(tmp_path, make, by):
    """Trials are judged by the average, the modes are put back, and the rate is held rather than decayed."""
    ScheduleFree.modes = []
    kind = Switching if by == "module" else ScheduleFree
    more = {"callbacks": [Switch()]} if by == "callback" else {}
    _, run = compare(tmp_path, lambda: kind(make), {**SHORT, "num_sanity_val_steps": 0}, **more)
    assert set(ScheduleFree.modes) == {False}
    assert run.trainer.optimizers[0].param_groups[0]["train_mode"]
    assert run.witness.lrs[-1] == run.witness.lrs[-2]


def first_trial(folder, kind):
    """The first search of a run of 400 updates, its first candidate, and the rates of that one's steps by its own."""
    rates = []

    class Noted(kind):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    callback, _ = compare(folder, lambda: Any(Noted), {"max_steps": 400})
    search = next(one for one in callback.decisions if one.kind == "search")
    first = search.numbers["candidates"][0]
    return search, first, [rate / first["lr"] for rate in rates[: first["steps"]]]


def test_a_trial_under_radam_leaves_its_steps_by_the_gradient_out_and_lengthens_the_others(tmp_path):
    search, first, tried = first_trial(tmp_path, torch.optim.RAdam)
    assert first["steps"] >= 5 + 3
    assert tried[:5] == [0.0] * 5
    # r is .0258, .0327, .0387 in the sixth to the eighth step; in a run of 400 .29 in the mean.
    told = [share * r for share, r in zip(tried[5:], (0.0258, 0.0327, 0.0387), strict=False)]
    decay = [1.0 - t / (first["horizon_steps"] - 5) for t in range(3)]
    assert all(0.25 * d < t < 0.5 * d for t, d in zip(told, decay, strict=True)), tried
    assert "RAdam's first steps are down to 1/" in search.reason


def test_a_trial_under_rmsprop_begins_with_steps_as_short_as_the_runs(tmp_path):
    search, first, tried = first_trial(tmp_path, torch.optim.RMSprop)
    # A mean of squares at 1 - .99^t of what it comes to, and a decay; a run of 400 has steps of 1.35 in the mean.
    bare = [(1.0 - 0.99 ** (t + 1)) ** 0.5 * (1.0 - t / first["horizon_steps"]) for t in range(first["steps"])]
    assert first["steps"] >= 3
    assert all(b <= t <= 1.5 * b for t, b in zip(tried, bare, strict=True)), (tried, bare)
    assert "RMSprop's first steps are up to" in search.reason

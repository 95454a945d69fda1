import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autotune.batch.scaling import scale_group_betas
from autotune.callbacks import AdaptiveBatchSize, AutoLRS
from autotune.callbacks._growth import Rates
from autotune.callbacks._lr_ledger import BestWeights
from autotune.decision import Decision, read_decisions
from tests.batch.toys import QUIET
from tests.callbacks.harness import Save

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.sizes, self.rates, self.seen, self.losses = [], [], [], []

    def training_step(self, batch, batch_idx):
        if self.trainer.callbacks and any(isinstance(c, AutoLRS) for c in self.trainer.callbacks):
            self.sizes.append(len(batch[0]))
            self.seen += batch[2].tolist()
            self.rates.append(self.optimizers().param_groups[0]["lr"])
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if len(self.losses) < len(self.sizes):
            self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def loaders(n=1200):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator)
    y = (x[:, :3] + 1.5 * torch.randn(n, 3, generator=generator)).argmax(1)
    data = TensorDataset(x, y, torch.arange(n))
    return DataLoader(data, 8, shuffle=True), DataLoader(TensorDataset(x[:200], y[:200], torch.arange(200)), 200)


def run(path, *callbacks, ckpt=None, model=None, **kwargs):
    L.seed_everything(1, verbose=False)  # the weights too: whether a run before this one drew numbers must not matter
    model = model or Net()
    options = {**QUIET, "max_epochs": 4, "default_root_dir": path, "num_sanity_val_steps": 0, **kwargs}
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    L.seed_everything(1, verbose=False)
    train, val = loaders()
    trainer.fit(model, train, val, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer, model


@pytest.mark.parametrize("first", ["lrs", pytest.param("batch", marks=pytest.mark.slow)])
def test_one_story(tmp_path, first):
    """Growth, the rate at once, a search at four times the batch, a decay that ends with the examples; one log."""
    lrs = AutoLRS(search_budget=0.3)
    batch = AdaptiveBatchSize(64, every_n_steps=4, rest_updates=16, lr_scaling="sqrt", decay_growth=8.0)
    order = (lrs, batch) if first == "lrs" else (batch, lrs)
    _, model = run(tmp_path, *order)
    assert batch.batch_size >= 32
    for epoch in range(4):
        assert sorted(model.seen[1200 * epoch : 1200 * epoch + 1200]) == list(range(1200))
    grown = [d for d in batch.decisions if d.action == "grow"]
    for decision in grown:
        assert re.search(rf"grow to {decision.numbers['batch']}\b", decision.reason), "rounded to the loader's"
        step = decision.effective_step
        last = len(model.seen) % 1200 == 0 and sum(model.sizes[: step + 1]) % 1200 == 0
        assert last or model.sizes[step] == decision.numbers["batch"] > model.sizes[step - 1]
        searched = any(d.kind == "search" and d.step == step for d in lrs.decisions)
        rolled = any(d.kind in ("rollback", "search", "stage") and d.step == step for d in lrs.decisions)
        if not (searched or rolled):
            scheduled = [min(1.0, 2.0 * (1.0 - sum(model.sizes[:at]) / 4800)) for at in (step - 1, step)]
            expected = decision.numbers["lr_gain"] * scheduled[1] / scheduled[0]
            assert model.rates[step] / model.rates[step - 1] == pytest.approx(expected, rel=0.1)
    asked = [d for d in lrs.decisions if "batch has grown" in d.reason or "batch has grown" in str(d.numbers)]
    assert asked
    # The shape ends with the examples, though there are far fewer updates than were planned. An update at which
    # something was decided, the last one too, may carry a gain or another rate besides.
    decided = {d.effective_step for d in batch.decisions} | {d.step for d in (*batch.decisions, *lrs.decisions)}
    shape = [2.0 * (1.0 - sum(model.sizes[:at]) / 4800) for at in range(len(model.sizes))]
    assert shape[-1] == pytest.approx(2.0 * model.sizes[-1] / 4800)
    quiet = [at for at in range(1, len(shape)) if shape[at - 1] < 1.0 and at not in decided]
    assert len(quiet) >= 10
    for at in quiet:
        assert model.rates[at] / model.rates[at - 1] == pytest.approx(shape[at] / shape[at - 1], rel=0.01), at
    log = read_decisions(tmp_path)
    assert len(log) == len(lrs.decisions) + len(batch.decisions)
    assert {d.kind for d in log} >= {"setup", "search", "batch", "stage", "finish"}
    assert [d.step for d in log] == sorted(d.step for d in log)


@pytest.mark.slow
@pytest.mark.parametrize("at", [40, 120])
@pytest.mark.parametrize("first", ["lrs", "batch"])
def test_resuming_both_is_exact(tmp_path, at, first):
    def pair():
        lrs = AutoLRS(search_budget=0.3)
        batch = AdaptiveBatchSize(max_batch_size=64, every_n_steps=4, rest_updates=16)
        return (lrs, batch) if first == "lrs" else (batch, lrs)

    _, whole = run(tmp_path / "a", *pair(), Save(tmp_path / "mid.ckpt", at))
    _, resumed = run(tmp_path / "b", *pair(), ckpt=tmp_path / "mid.ckpt")
    assert resumed.sizes == whole.sizes[at:]
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert resumed.rates == whole.rates[at:]
    assert resumed.losses == whole.losses[at:]
    assert story(tmp_path / "b") == story(tmp_path / "a")


@pytest.mark.parametrize("first", ["lrs", "batch"])
def test_a_resumed_log_keeps_the_order_of_what_both_decided_at_one_step(tmp_path, first):
    def pair():
        lrs = AutoLRS(search_budget=0.3)
        batch = AdaptiveBatchSize(max_batch_size=64, every_n_steps=4, rest_updates=16)
        return (lrs, batch) if first == "lrs" else (batch, lrs)

    run(tmp_path / "a", *pair(), Save(tmp_path / "mid.ckpt", 170), max_epochs=2)
    run(tmp_path / "b", *pair(), ckpt=tmp_path / "mid.ckpt", max_epochs=2)
    told = story(tmp_path / "a")
    assert {"search", "batch"} <= {kind for kind, *_ in told if kind != "setup"}
    assert story(tmp_path / "b") == told


def story(folder):
    """What was decided, in the order of the log; not how long it took."""
    return [(d.kind, d.action, d.step, d.reason) for d in read_decisions(folder)]


def test_a_rollback_leaves_the_betas_with_the_batch():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    best = BestWeights(model, optimizer)
    best.capture(0)
    scale_group_betas(optimizer, 4.0)
    optimizer.param_groups[0]["weight_decay"] = 0.1
    best.restore()
    group = optimizer.param_groups[0]
    assert group["weight_decay"] == 0.3
    assert group["betas"] == pytest.approx((0.9**4, 0.999**4))


@pytest.mark.parametrize(("action", "base"), [("set_lr", 32), ("keep_lr", 8), ("skip", 8)])
def test_only_a_rate_that_is_set_anew_makes_the_present_batch_the_peaks(tmp_path, action, base):
    trainer, _ = run(tmp_path, lrs := AutoLRS(search_budget=0.3), max_epochs=1)
    rates = Rates()
    rates.attach(trainer, 8)
    rates.level(trainer)
    rates.grown(32)
    lrs._decisions.append(Decision("search", action, "by hand", 99, 99, {}))
    rates.level(trainer)
    assert rates.base == base

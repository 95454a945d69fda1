import csv
import math
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from autotune.callbacks.gradient_noise import GradientNoiseMonitor
from autotune.errors import ConfigurationError, UnsupportedSetupError
from tests.batch.toys import QUIET
from tests.callbacks.harness import Break
from tests.noise.twins import chunked_variance, per_example_gradients, variance

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive"),
]


def data(n=96, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))


class Net(L.LightningModule):
    def __init__(self, norm=None, reduction="mean", rate=0.05, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        norm_layer = [] if norm is None else [norm(12)]
        self.net = nn.Sequential(nn.Linear(6, 12), *norm_layer, nn.Tanh(), nn.Dropout(dropout), nn.Linear(12, 3))
        self.reduction, self.rate = reduction, rate

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1], reduction=self.reduction)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.rate)


class Records(GradientNoiseMonitor):
    """Keeps what the monitor smooths."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.found = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._pending is not None:
            from autotune.noise.statistics import GradientRecord

            self.found.append(GradientRecord.unpack(self._pending))


def fit(tmp_path, model, *callbacks, batch_size=12, shuffle=False, dataset=None, **kwargs):
    options = {**QUIET, "max_epochs": 2, "default_root_dir": tmp_path, **kwargs}
    trainer = L.Trainer(callbacks=list(callbacks), **options)
    L.seed_everything(3, verbose=False)
    trainer.fit(model, DataLoader(dataset or data(), batch_size, shuffle=shuffle))
    return trainer


CASES = {
    "per_example": ({}, {}),
    "micro-batches": ({}, {"accumulate_grad_batches": 4}),
    "consecutive": ({"norm": nn.BatchNorm1d}, {}),
    "bf16": ({}, {"precision": "bf16-mixed", "accumulate_grad_batches": 2}),
    "clipping": ({}, {"gradient_clip_val": 0.1}),
    "accumulated per example": ({}, {"accumulate_grad_batches": 3, "source": "per_example"}),
}


@pytest.mark.parametrize("case", CASES)
def test_watching_changes_nothing_to_the_bit(tmp_path, case):
    model_options, options = CASES[case]
    source = options.get("source", "auto")
    options = {key: value for key, value in options.items() if key != "source"}
    plain, watched = Net(dropout=0.3, **model_options), Net(dropout=0.3, **model_options)
    fit(tmp_path, plain, shuffle=True, **options)
    monitor = GradientNoiseMonitor(every_n_steps=2, source=source, by_module=True)
    trainer = fit(tmp_path, watched, monitor, shuffle=True, **options)
    assert monitor._state.measured >= 2
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in watched.modules())
    assert not any(p._backward_hooks for p in watched.parameters())
    assert trainer.callback_metrics["autotune/noise_scale"] >= 0
    assert "autotune/noise_scale/net.0" in trainer.callback_metrics


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_first_record_is_that_of_the_slow_twin(tmp_path, reduction, accumulate):
    """Under Lightning's own weighting, last partial window and all, from the definition."""
    monitor = Records(every_n_steps=1, loss_reduction=reduction)
    model = Net(reduction=reduction, rate=0.0)
    fit(tmp_path, model, monitor, accumulate_grad_batches=accumulate, max_epochs=1, dataset=data(76))
    x, y = data(76).tensors
    rows = per_example_gradients(model.net, F.cross_entropy, x, y, list(model.parameters()))
    window = 12 * accumulate
    first = rows[:window]
    expected = variance(first) if accumulate == 1 else chunked_variance(first, [12] * 4)
    assert float(monitor.found[0].variance()) == pytest.approx(expected, rel=1e-5)
    assert float(monitor.found[0].mean_sq) == pytest.approx(float(first.mean(0).square().sum()), rel=1e-5)
    last = monitor.found[-1]
    if accumulate == 1:
        assert float(last.variance()) == pytest.approx(variance(rows[72:]), rel=1e-5)
    else:
        # Lightning weighs the window's 12, 12, 4 examples by chunk: the same two equations, other factors.
        means = torch.stack([rows[48:60].mean(0), rows[60:72].mean(0), rows[72:].mean(0)])
        weights = torch.tensor([1.0, 1.0, 1.0] if reduction == "mean" else [12.0, 12.0, 4.0], dtype=torch.double)
        weights = weights / weights.sum()
        sizes = torch.tensor([12.0, 12.0, 4.0], dtype=torch.double)
        mean = weights @ means
        effective = 1 / float((weights.square() / sizes).sum())
        spread = float(sizes @ means.square().sum(1)) - 28 * float(mean.square().sum())
        assert float(last.variance()) == pytest.approx(spread / (3 - 28 / effective), rel=1e-5)
        assert float(last.effective) == pytest.approx(effective, rel=1e-6)


def test_norm_test_is_the_edge_of_the_published_test(tmp_path):
    from autotune.batch.rules import norm_test

    monitor = Records(every_n_steps=1)
    fit(tmp_path, Net(), monitor, max_steps=3, max_epochs=-1)
    record = monitor.found[-1]
    assert norm_test(record, monitor.norm_test * 1.001).passes
    assert not norm_test(record, monitor.norm_test * 0.999).passes


def test_preconditioned_differs_from_raw(tmp_path):
    raw, own = GradientNoiseMonitor(5), GradientNoiseMonitor(5, preconditioned=True)
    fit(tmp_path, Net(), raw, own, max_epochs=4)
    assert 0 < own.noise_scale != raw.noise_scale > 0
    low, high = raw.interval
    assert low <= raw.noise_scale <= high


def test_measures_on_its_schedule_and_is_saved(tmp_path):
    monitor = GradientNoiseMonitor(every_n_steps=3)
    fit(tmp_path, Net(), monitor)
    assert monitor._state.measured == math.ceil(16 / 3)
    fresh = GradientNoiseMonitor(every_n_steps=3)
    fresh.load_state_dict(monitor.state_dict())
    assert fresh.estimate == monitor.estimate


class Evaluated(Net):
    def test_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("broken_off", [False, True])
def test_between_two_compared_updates_a_resumed_run_logs_what_the_unbroken_one_does(tmp_path, broken_off):
    """Every fourth update and the one after it are compared: a checkpoint after an epoch of nine lies between."""

    def run(where, *callbacks, ckpt=None):
        logger = CSVLogger(where, flush_logs_every_n_steps=1)
        options = {**QUIET, "logger": logger, "log_every_n_steps": 1, "enable_checkpointing": True, "max_epochs": 2}
        watched = [GradientNoiseMonitor(every_n_steps=4), *callbacks]
        trainer = L.Trainer(callbacks=watched, default_root_dir=where, **options)
        L.seed_everything(3, verbose=False)
        trainer.fit(Net(nn.BatchNorm1d), DataLoader(data(108), 12), ckpt_path=ckpt)
        logger.save()
        with open(Path(logger.log_dir) / "metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row.get("autotune/noise_scale")]
        return [[row[f"autotune/{name}"] for name in ("noise_scale", "norm_test")] for row in rows]

    whole = run(tmp_path / "whole", ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=9, save_top_k=-1))
    checkpoint = tmp_path / "step=9.ckpt"
    if broken_off:
        checkpoint = tmp_path / "broken.ckpt"
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "first", Break(9, checkpoint))
    resumed = run(tmp_path / "resumed", ckpt=checkpoint)
    assert len(resumed) == 3
    assert resumed == whole[-3:]


def test_a_second_fit_begins_anew_and_an_evaluated_checkpoint_says_nothing(tmp_path):
    torch.manual_seed(0)
    monitor, fresh = (GradientNoiseMonitor(every_n_steps=3) for _ in range(2))
    first, second = Evaluated(), Evaluated()
    weights = {name: value.clone() for name, value in second.state_dict().items()}
    fit(tmp_path, first, monitor).save_checkpoint(tmp_path / "first.ckpt")
    trainer = fit(tmp_path, second, monitor)
    second.load_state_dict(weights)
    fit(tmp_path, second, fresh)
    assert monitor.estimate == fresh.estimate
    trainer.test(second, DataLoader(data(), 12), ckpt_path=tmp_path / "first.ckpt", verbose=False)
    assert monitor.estimate == fresh.estimate


def test_non_finite_gradients_are_left_out(tmp_path):
    class Bad(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (math.inf if self.global_step == 2 else 1.0)

        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 2:
                self.zero_grad()

    monitor = GradientNoiseMonitor(every_n_steps=1)
    fit(tmp_path, Bad(), monitor, max_epochs=1)
    assert monitor._state.skipped == 1
    assert math.isfinite(monitor.noise_scale)


@pytest.mark.parametrize(
    ("source", "model", "words"),
    [
        ("microbatch", {}, "accumulate_grad_batches=2"),
        ("ranks", {}, "devices=2"),
        ("per_example", {"norm": nn.BatchNorm1d}, "neighbours"),
    ],
)
def test_sources_that_do_not_exist_here_are_refused(tmp_path, source, model, words):
    with pytest.raises(UnsupportedSetupError, match=words):
        fit(tmp_path, Net(**model), GradientNoiseMonitor(source=source))


@pytest.mark.parametrize("bad", [{"every_n_steps": 0}, {"source": "x"}, {"loss_reduction": "x"}, {"decay": 1.0}])
def test_bad_arguments(bad):
    with pytest.raises(ConfigurationError):
        GradientNoiseMonitor(**bad)


def test_partial_coverage_is_told_by_name(tmp_path):
    class Mixed(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] * self.scale, batch[1]), batch_idx)

    with pytest.warns(UserWarning, match=r"leaves out scale \(no use of it"):
        fit(tmp_path, Mixed(), GradientNoiseMonitor(every_n_steps=1), max_epochs=1)


def test_an_uneven_window_of_single_examples_knows_how_few_its_mean_is_worth(tmp_path):
    """Lightning gives 32 examples and one the same weight: the two equations of the record, with B_e of 3.9."""
    monitor, dataset = Records(every_n_steps=1, source="per_example"), data(33)
    model = Net(rate=0.0)
    fit(tmp_path, model, monitor, batch_size=32, dataset=dataset, accumulate_grad_batches=2, max_epochs=1)
    rows = per_example_gradients(model.net, F.cross_entropy, *dataset.tensors, list(model.parameters()))
    weights = torch.tensor([1 / 64] * 32 + [0.5], dtype=torch.double)
    effective, mean_sq = 1 / float(weights.square().sum()), float((weights @ rows).square().sum())
    expected = (float(rows.square().sum()) - 33 * mean_sq) / (33 - 33 / effective)
    assert float(monitor.found[0].variance()) == pytest.approx(expected, rel=1e-5)
    assert float(monitor.found[0].signal()) == pytest.approx(mean_sq - expected / effective, rel=1e-5)


class Freeze(L.Callback):
    """Freezes the first layer from an update on, or lets it train from then on."""

    def __init__(self, update, trains):
        self.update, self.trains = update, trains

    def on_fit_start(self, trainer, pl_module):
        pl_module.net[0].requires_grad_(not self.trains)

    def on_train_batch_start(self, trainer, pl_module, *args):
        if trainer.global_step == self.update:
            pl_module.net[0].requires_grad_(self.trains)


@pytest.mark.filterwarnings("ignore:autotune. other parameters train now")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("trains", [True, False])
def test_layers_may_freeze_and_thaw_on_the_way(tmp_path, trains, accumulate):
    monitor, model = Records(every_n_steps=1, by_module=True), Net(rate=0.0)
    options = {"accumulate_grad_batches": accumulate, "batch_size": 12 // accumulate, "max_epochs": 1}
    fit(tmp_path, model, Freeze(4, trains), monitor, **options)
    x, y = (column[48:60] for column in data().tensors)
    trained = [p for name, p in model.named_parameters() if trains or name.startswith("net.3")]
    rows = per_example_gradients(model.net, F.cross_entropy, x, y, trained)
    expected = variance(rows) if accumulate == 1 else chunked_variance(rows, [6, 6])
    assert len(monitor.found) == 8
    assert float(monitor.found[4].variance().sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode")
@pytest.mark.filterwarnings("ignore:autotune. per-example gradient noise covers")
def test_batch_normalisation_that_wakes_on_the_way_stops_the_measuring(tmp_path):
    class Wakes(Net):
        def on_train_epoch_start(self):
            self.net[1].train(self.current_epoch > 0)

    monitor = Records(every_n_steps=1, source="per_example")
    model = Wakes(nn.BatchNorm1d)
    model.net[1].eval()
    with pytest.warns(UserWarning, match=r"no gradient noise is measured while 'net\.1'"):
        fit(tmp_path, model, monitor)
    assert len(monitor.found) == 8


def test_gradients_that_are_edited_are_not_the_sum_of_their_parts(tmp_path):
    class Edits(Net):
        def on_after_backward(self):
            self.net[0].weight.grad.zero_()

    monitor = Records(every_n_steps=1)
    with pytest.warns(UserWarning, match="gradients are written between"):
        fit(tmp_path, Edits(), monitor)
    assert monitor.found == []


BATCHES = {
    "a mask first": lambda x, y: {"mask": torch.ones(3, 3), "x": x, "y": y},
    "boxes of each example": lambda x, y: {"x": x, "boxes": [{"box": torch.ones(1, 4)} for _ in x], "y": [*y]},
    "nested": lambda x, y: {"both": [x, y]},
}


@pytest.mark.parametrize("case", BATCHES)
def test_the_batch_is_as_long_as_most_of_its_own_tensors(tmp_path, case):
    class Packed(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch["both"] if "both" in batch else (batch["x"], batch["y"])
            return super().training_step((x, torch.as_tensor(y)), batch_idx)

    def collate(items):
        return BATCHES[case](*(torch.stack(column) for column in zip(*items, strict=True)))

    monitor = Records(every_n_steps=1)
    trainer = L.Trainer(callbacks=[monitor], **{**QUIET, "max_epochs": 1, "default_root_dir": tmp_path})
    trainer.fit(Packed(), DataLoader(data(), 12, collate_fn=collate))
    assert {float(record.sums.examples) for record in monitor.found} == {12.0}


def test_complex_weights_in_micro_batches_are_that_of_the_slow_twin(tmp_path):
    class Complex(Net):
        def __init__(self):
            super().__init__(rate=0.0)
            self.net[0] = nn.Linear(6, 12, dtype=torch.complex64)

        def training_step(self, batch, batch_idx):
            hidden = self.net[0](batch[0].to(torch.complex64)).abs()
            return F.cross_entropy(self.net[3](hidden), batch[1])

    monitor, model, dataset = Records(every_n_steps=1), Complex(), data(24)
    fit(tmp_path, model, monitor, dataset=dataset, accumulate_grad_batches=2, max_epochs=1)
    means = []
    for begin in (0, 12):
        model.zero_grad()
        x, y = (column[begin : begin + 12] for column in dataset.tensors)
        model.training_step((x, y), 0).backward()
        found = [torch.view_as_real(p.grad) if p.is_complex() else p.grad for p in model.parameters()]
        means.append(torch.cat([gradient.double().flatten() for gradient in found]))
    expected = 12 * float((means[0] - means[1]).square().sum()) / 2
    assert float(monitor.found[0].variance()) == pytest.approx(expected, rel=1e-5)

"""What a model may bring along: odd losses, odd modules, hooks that write, runs of a few steps."""

import math
import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.checkpoint import checkpoint

from autotune.callbacks import AdaptiveBatchSize, AutoLRS, _trials
from autotune.decision import read_decisions
from autotune.errors import StateError
from tests.callbacks.harness import Tiny, controller, fit, loader, searches, trainer, val_loader

pytestmark = pytest.mark.usefixtures("several_searches")


class TestLosses:
    def test_nan_before_the_first_step(self, tmp_path):
        class Broken(Tiny):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) * math.nan

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", torch.tensor(math.nan))

        L.seed_everything(3, verbose=False)
        callback = controller()
        trainer(tmp_path, callback, max_steps=30).fit(Broken(), loader(batch=8), val_loader())
        first = next(one for one in callback.decisions if one.kind == "search")
        assert first.numbers["lr"] == 1e-3
        assert "nan" in first.reason
        assert "usual rate for AdamW" in first.reason
        assert read_decisions(tmp_path) == callback.decisions or "nan" in repr(callback.decisions)

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    def test_steps_that_are_skipped(self, tmp_path):
        class Sometimes(Tiny):
            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                return None if batch_idx % 10 == 1 else loss

        callback, runner, witness = fit(tmp_path, Sometimes(), max_epochs=2, max_steps=-1)
        assert len(witness.batches) == 60
        assert searches(callback)
        assert runner.current_epoch == 2

    @pytest.mark.parametrize(("proposals", "highest"), [("bayesian", 10.0), ("grid", 1e12)])
    def test_exploding_candidates(self, tmp_path, proposals, highest):
        class Cubic(Tiny):
            def forward(self, x):
                return (3.0 * super().forward(x)) ** 3

        callback = controller(max_lr=highest, proposals=proposals)
        fit(tmp_path, Cubic(optimizer="sgd"), callback=callback)
        first = searches(callback)[0].numbers
        exploded = [one for one in first["candidates"] if not one["loss"] < 100.0 * first["initial_loss"]]
        assert exploded
        assert first["lr"] < min(one["lr"] for one in exploded)
        if proposals == "grid":
            assert exploded[-1]["status"] == "diverged"

    def test_maximised_metric(self, tmp_path):
        class Scored(Tiny):
            def validation_step(self, batch, batch_idx):
                self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

        callback = controller(monitor="val_acc", mode="max", min_lr=1e-4, max_lr=3e-2)
        fit(tmp_path, Scored(), callback=callback, max_steps=120)
        trials = searches(callback)[0].numbers["candidates"]
        assert all(-1.0 <= one["loss"] <= 0.0 for one in trials if one["status"] == "finished")
        assert {one.numbers["sign"] for one in callback.decisions if one.kind == "forecast"} == {-1.0}


class TestModules:
    @pytest.mark.parametrize("traits", [("frozen",), ("tensor_lr",), ("groups",), ("groups", "tensor_lr")])
    def test_optimizers(self, tmp_path, traits):
        _, _, witness = fit(tmp_path, Tiny(*traits))
        if "groups" in traits:
            assert all(head == pytest.approx(0.125 * body, rel=1e-5) for body, head in witness.lrs)

    def test_frozen_parameters_stay(self, tmp_path):
        module = Tiny("frozen")
        before = module.body[0].weight.clone()
        fit(tmp_path, module)
        assert torch.equal(module.body[0].weight, before)

    def test_activation_checkpointing(self, tmp_path):
        class Checkpointed(Tiny):
            def forward(self, x):
                return self.head(checkpoint(self.body, x.requires_grad_(), use_reentrant=False))

        assert searches(fit(tmp_path, Checkpointed("dropout"))[0])

    # torch and Lightning warn while they compile.
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
    def test_compiled(self, tmp_path, whole):
        module = Tiny("batchnorm")
        if whole:
            module = torch.compile(module, backend="aot_eager")
        else:
            module.body = torch.compile(module.body, backend="aot_eager")
        callback, runner, _ = fit(tmp_path, module)
        assert searches(callback)
        assert runner.global_step == 60

    def test_a_module_that_unfreezes_itself(self, tmp_path):
        class Unfreezing(Tiny):
            def on_train_batch_start(self, batch, batch_idx):
                if self.trainer.global_step == 20:
                    self.body[0].requires_grad_(True)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        fit(tmp_path, Unfreezing("frozen"))

    def test_own_state_through_the_hooks(self, tmp_path):
        class Counter:
            def __init__(self):
                self.count = 0

        class Hooked(Tiny):
            def __init__(self):
                super().__init__()
                self.counter = Counter()

            def on_trial_snapshot(self):
                return self.counter.count

            def on_trial_restore(self, saved):
                self.counter.count = saved

            def training_step(self, batch, batch_idx):
                self.counter.count += 1
                return super().training_step(batch, batch_idx)

        module = Hooked()
        _, _, witness = fit(tmp_path, module)
        assert witness.forwards > 60
        assert module.counter.count == 60

    @pytest.mark.parametrize("length", [_trials._LONG, _trials._LONG + 1])
    def test_long_containers_are_named_where_they_take_time(self, tmp_path, monkeypatch, recwarn, length):
        monkeypatch.setattr(_trials, "_SLOW", 0.0)
        module = Tiny()
        module.replay = [0.0] * length
        fit(tmp_path, module)
        told = [str(one.message) for one in recwarn if "Tiny.replay" in str(one.message)]
        assert len(told) == (length > _trials._LONG)
        assert module.replay == [0.0] * length


class Writes(Tiny):
    """Validation hooks that use what a trainer has: its log's directory, and the loaders."""

    def on_validation_epoch_end(self):
        count = len(self.trainer.val_dataloaders.dataset)
        for folder in (self.trainer.log_dir, self.logger.log_dir):
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "validations.txt"), "a") as file:
                file.write(f"{self.logger.name} {self.logger.version} {count}\n")


@pytest.mark.parametrize("name", ["CSVLogger", "TensorBoardLogger"])
def test_validation_hooks_that_write_into_the_log_directory(tmp_path, name):
    logger = getattr(L.pytorch.loggers, name)(tmp_path, name="mine")
    callback, *_ = fit(tmp_path, Writes(), logger=logger, max_epochs=2, num_sanity_val_steps=0)
    assert searches(callback)
    lines = (tmp_path / "mine" / "version_0" / "validations.txt").read_text().splitlines()
    assert lines == ["mine 0 48"] * 4


class Asks(Tiny):
    """A module that asks the trainer for its callbacks and for what was logged, and lets that flow into the loss."""

    def on_validation_epoch_end(self):
        best = self.trainer.checkpoint_callback.best_model_score
        if best is not None:
            self.log("best_val", best)

    def training_step(self, batch, batch_idx):
        self.trainer.checkpoint_callback.asked = True
        metrics = self.trainer.callback_metrics
        waits = self.trainer.early_stopping_callback.wait_count
        loss = super().training_step(batch, batch_idx)
        return loss * (1 + metrics["val_loss"] + 0.1 * waits) if self.current_epoch else loss


def test_modules_that_ask_the_trainer_for_callbacks_and_metrics(tmp_path):
    class Asked(Callback):
        def on_train_batch_start(self, trainer, *_):
            found.add((trainer.global_step > 0, hasattr(trainer.checkpoint_callback, "asked")))

    found = set()
    extra = [ModelCheckpoint(tmp_path / "saved", monitor="val_loss"), EarlyStopping("val_loss", patience=50), Asked()]
    settings = {"max_epochs": 4, "max_steps": -1, "enable_checkpointing": True}
    callback, runner, _ = fit(tmp_path, Asks(), callbacks=extra, **settings)
    assert any(one.step > 30 and one.cost_steps for one in searches(callback))
    assert found == {(False, False), (True, True)}  # what a trial notes on a callback is not there in the run
    assert 0 < float(runner.callback_metrics["best_val"]) < 2


class TestShortRuns:
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_shorter_than_a_search(self, tmp_path, steps):
        callback, runner, _ = fit(tmp_path, callback=AutoLRS(), max_steps=steps)
        skipped = next(one for one in callback.decisions if one.kind == "search")
        assert skipped.action == "skip"
        assert "too short" in skipped.reason
        assert skipped.numbers["lr"] == 1e-3
        assert runner.global_step == steps
        assert callback.trial_steps == 0

    def test_one_batch_an_epoch(self, tmp_path):
        _, runner, _ = fit(tmp_path, train=loader(8, batch=8), max_epochs=30, max_steps=-1)
        assert runner.global_step == 30

    def test_a_second_fit_starts_anew(self, tmp_path):
        callback = controller()
        for number in range(2):
            runner = trainer(tmp_path / str(number), callback, max_steps=60)
            runner.fit(Tiny(), loader(batch=8), val_loader())
            assert callback.decisions[0].step == 0
            assert sum(one.kind == "setup" for one in callback.decisions) == 1
        assert read_decisions(tmp_path / "1") == callback.decisions

    @pytest.mark.parametrize("make", [controller, AdaptiveBatchSize])
    def test_and_does_so_after_a_checkpoint_was_evaluated(self, tmp_path, make):
        """As in cross-validation: nothing of the first fold reaches the second."""
        ends = []
        for reused in (True, False):
            callback = make()
            for fold in range(2):
                L.seed_everything(fold, verbose=False)
                folder = tmp_path / f"{reused}{fold}"
                saver = ModelCheckpoint(folder, save_last=True)
                callback = callback if reused else make()
                runner = trainer(folder, callback, saver, max_epochs=2, enable_checkpointing=True)
                module = Tiny()
                runner.fit(module, loader(batch=8), val_loader())
                runner.validate(module, val_loader(), ckpt_path=str(folder / "last.ckpt"), verbose=False)
            ends.append([module.state_dict(), [one.kind for one in callback.decisions]])
        assert ends[0][1] == ends[1][1]
        assert all(torch.equal(value, ends[1][0][key]) for key, value in ends[0][0].items())

    def test_a_checkpoint_of_other_settings_may_be_evaluated(self, tmp_path):
        saver = ModelCheckpoint(tmp_path, save_last=True)
        fit(tmp_path, callback=AutoLRS(), callbacks=[saver], enable_checkpointing=True)
        runner = trainer(tmp_path, AutoLRS(search_budget=0.2), AdaptiveBatchSize(eta=0.1), max_steps=80)
        assert runner.validate(Tiny(), val_loader(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
        with pytest.raises(StateError, match="search_budget"):
            runner.fit(Tiny(), loader(batch=8), val_loader(), ckpt_path=str(tmp_path / "last.ckpt"))


class WritesAfterwards(Tiny):
    """A warm-up by hand as it is often written: the rate of the next step, set after this one."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for group in optimizer.param_groups:
            group["lr"] = 0.5


def test_a_rate_that_is_written_after_the_step_is_not_taken_for_ours(tmp_path):
    callback, _, witness = fit(tmp_path, WritesAfterwards())
    assert callback.lr == witness.lrs[-1][0]
    assert not [lrs for lrs in witness.lrs if 0.5 in lrs]


def test_attention_and_layer_norm(tmp_path):
    class Attending(Tiny):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            tokens = x.unsqueeze(1).repeat(1, 3, 1)
            return super().forward(self.norm(self.attend(tokens, tokens, tokens)[0]).mean(1))

    assert searches(fit(tmp_path, Attending())[0])

"""What runs beside a search: other callbacks, limits of time, and an end in the midst of a trial."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from autotune.decision import read_decisions
from tests.callbacks.harness import Tiny, Witness, controller, fit, loader, searches, trainer, val_loader

pytestmark = pytest.mark.usefixtures("several_searches")


class Stopwatch(Callback):
    """No timer of Lightning's, for all its attribute."""

    def time_elapsed(self):
        return 1.0


class TestBeside:
    def test_a_callback_that_measures_time(self, tmp_path):
        assert searches(fit(tmp_path, callbacks=[Stopwatch()])[0])

    def test_early_stopping(self, tmp_path):
        stopper = EarlyStopping("val_loss", patience=2)
        callback, _, _ = fit(tmp_path, callbacks=[stopper], max_epochs=6, max_steps=-1)
        assert "EarlyStopping may end" in callback.decisions[0].reason
        assert callback.decisions[-1].kind == "finish"

    def test_checkpoints_never_see_a_trial(self, tmp_path):
        class Record(Callback):
            def __init__(self):
                self.weights = {}

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.weights[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}

        record = Record()
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        callback, runner, witness = fit(tmp_path, callbacks=[record, saver], enable_checkpointing=True)
        assert len(searches(callback)) >= 2
        assert witness.steps > 60
        files = sorted((tmp_path / "saved").iterdir())
        assert len(files) == 60
        for file in files:
            content = torch.load(file, weights_only=True)
            step = content["global_step"]
            assert file.name == f"step={step}.ckpt"
            for name, value in record.weights[step].items():
                assert torch.equal(content["state_dict"][name], value)
        assert saver.best_model_path
        assert runner.checkpoint_callback is saver

    def test_best_checkpoint_by_our_own_scalar(self, tmp_path):
        saver = ModelCheckpoint(tmp_path / "saved", monitor="autotune/lr", save_top_k=1, every_n_train_steps=10)
        fit(tmp_path, callbacks=[saver], enable_checkpointing=True)
        assert saver.best_model_score is not None

    def test_max_time(self, tmp_path):
        callback, _, _ = fit(tmp_path, max_steps=-1, max_epochs=-1, max_time={"seconds": 2})
        assert callback.decisions[0].numbers["horizon"]["unit"] == "seconds"
        assert callback.decisions[-1].kind == "finish"
        assert callback.lr < 0.2 * max(one.numbers["lr"] for one in callback.decisions if one.kind == "search")

    def test_manual_calls_of_validate_and_test(self, tmp_path):
        callback, runner, _ = fit(tmp_path)
        module = Tiny()
        assert "val_loss" in runner.validate(module, val_loader(), verbose=False)[0]
        assert callback.decisions


class TestInterruptions:
    """Stopped inside a trial, the module has the training weights, and the trainer its own parts back."""

    @pytest.mark.parametrize("during", ["first search", "later search"])
    @pytest.mark.parametrize("failure", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
    def test_inside_a_trial(self, tmp_path, failure, during):
        class Failing(Tiny):
            def training_step(self, batch, batch_idx):
                if witness.steps - len(witness.lrs) == fails_at:
                    raise failure
                return super().training_step(batch, batch_idx)

        fails_at = -1
        witness = Witness()
        callback, _, witness = fit(tmp_path / "probe", Tiny(), callback=controller(min_lr=1e-4, max_lr=3e-2))
        first = searches(callback)[0].numbers["trial_steps"]
        assert callback.trial_steps > first
        fails_at = first // 2 if during == "first search" else first + 1

        L.seed_everything(3, verbose=False)
        module, witness = Failing(), Witness()
        initial = {name: value.clone() for name, value in module.state_dict().items()}
        record, callback = _Last(), controller(min_lr=1e-4, max_lr=3e-2)
        runner = trainer(tmp_path, callback, record, witness, max_steps=60)
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)) as caught:
            runner.fit(module, loader(batch=8), val_loader())
        assert caught.value is failure or isinstance(caught.value, SystemExit)
        expected = record.weights or initial
        assert (during == "later search") == bool(record.weights)
        assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())
        assert runner.global_step == len(witness.lrs)
        assert runner.callbacks[0] is callback
        assert read_decisions(tmp_path) == callback.decisions

    def test_error_in_validation_propagates(self, tmp_path):
        class Failing(Tiny):
            def validation_step(self, batch, batch_idx):
                if not self.trainer.sanity_checking:
                    raise ZeroDivisionError("validation")
                return super().validation_step(batch, batch_idx)

        module = Failing()
        initial = module.head.weight.clone()
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, controller(), max_steps=60).fit(module, loader(batch=8), val_loader())
        assert torch.equal(module.head.weight, initial)


class _Last(Callback):
    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

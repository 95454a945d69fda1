"""A run resumed from a checkpoint goes on bit for bit: weights, rates, batches and decisions."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from autotune.callbacks import AdaptiveBatchSize
from autotune.decision import read_decisions
from autotune.errors import StateError
from autotune.replay import load_schedule
from tests.callbacks.harness import Tiny, controller, loader, searches, trainer, val_loader
from tests.callbacks.resumed import BOUNDS, EPOCH, LOADERS, Run, assert_continues, saved, saved_run, savers, timeless

#: Which checkpoint of the first run is resumed: (update, which of the two callbacks wrote it).
POINTS = {"first epoch": "step=13", "mid epoch": "step=52", "epoch end": "end=60", "after validation": "val=60"}

pytestmark = pytest.mark.usefixtures("several_searches")


class Reduced(Tiny):
    """ReduceLROnPlateau finds no progress, and so has lowered the rate before any checkpoint."""

    def __init__(self):
        super().__init__(scheduler="plateau")

    def configure_optimizers(self):
        found = super().configure_optimizers()
        found["lr_scheduler"]["scheduler"].threshold = 1e9
        found["lr_scheduler"]["scheduler"].threshold_mode = "abs"
        return found


class TestExactResume:
    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("data", LOADERS)
    def test_continues_bit_for_bit(self, tmp_path, data, bound):
        whole = saved_run(tmp_path / "whole", data=LOADERS[data], **BOUNDS[bound])
        assert len(searches(whole.callback)) >= 2
        points = [name for name in POINTS if "workers" not in data or name in ("mid epoch", "epoch end")]
        for name in points:
            checkpoint = saved(tmp_path / "whole", POINTS[name])
            folder = tmp_path / name
            # Another seed: nothing may depend on how the second process begins.
            resumed = Run(folder, seed=77, data=LOADERS[data], ckpt=checkpoint, **BOUNDS[bound])
            assert_continues(resumed, whole, int(POINTS[name].partition("=")[2]))
            assert [timeless(one) for one in read_decisions(folder)] == whole.decisions

    @pytest.mark.parametrize("module", ["accumulate", "lambda", "plateau", "groups", "no validation", "forecast due"])
    def test_with(self, tmp_path, module):
        make = {"groups": lambda: Tiny("groups"), "lambda": lambda: Tiny(scheduler="lambda"),
                "plateau": lambda: Tiny(scheduler="plateau")}.get(module, Tiny)  # fmt: skip
        settings = {"max_epochs": 4}
        if module == "accumulate":
            settings |= {"accumulate_grad_batches": 2, "max_epochs": 8}
        if module == "no validation":
            settings["limit_val_batches"] = 0
        whole = saved_run(tmp_path, module=make(), **settings)
        updates = {"accumulate": [52], "forecast due": [26, 39, 78, 104]}.get(module, [52])
        for update in updates:
            resumed = Run(tmp_path / str(update), seed=9, module=make(), ckpt=saved(tmp_path, f"step={update}"),
                          **settings)  # fmt: skip
            batches = update * settings.get("accumulate_grad_batches", 1)
            done = len(whole.witness.states) - len(resumed.witness.states)
            assert done == batches
            assert [one["weights"] for one in resumed.witness.states] == [
                one["weights"] for one in whole.witness.states[done:]
            ]
            assert resumed.witness.lrs == whole.witness.lrs[update:]
            assert resumed.decisions == whole.decisions

    @pytest.mark.parametrize("point", ["end=90", "step=78"])
    def test_under_a_scheduler_that_has_lowered_the_rate(self, tmp_path, point):
        """Rates are a multiple of what the scheduler began with, which it does not keep."""
        whole = saved_run(tmp_path, module=Reduced(), max_epochs=5)
        resumed = Run(tmp_path / "resumed", seed=9, module=Reduced(), ckpt=saved(tmp_path, point), max_epochs=5)
        first, lowered = whole.witness.lrs[59][0], whole.witness.lrs[60][0]
        assert lowered == 0.5 * first
        # Lightning itself may lower once less after it has gone on, but never raises.
        assert max(lrs[0] for lrs in resumed.witness.lrs) <= lowered

    def test_resumed_twice(self, tmp_path):
        whole = saved_run(tmp_path, max_epochs=4)
        once = Run(tmp_path / "once", seed=8, ckpt=saved(tmp_path, "step=13"), callbacks=savers(tmp_path / "once"),
                   max_epochs=4)  # fmt: skip
        assert_continues(once, whole, 13)
        twice = Run(tmp_path / "twice", seed=9, ckpt=saved(tmp_path / "once", "step=52"), max_epochs=4)
        assert_continues(twice, whole, 52)

    @pytest.mark.parametrize("data", ["global generator", "own generator"])
    def test_with_loaders_that_are_set_up_every_epoch(self, tmp_path, data):
        settings = {"data": LOADERS[data], "max_epochs": 4, "reload_dataloaders_every_n_epochs": 1}
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=15, save_top_k=-1)
        whole = Run(tmp_path / "whole", callbacks=[saver], **settings)
        for update in (45, 60):
            resumed = Run(tmp_path / str(update), seed=77, ckpt=saved(tmp_path, f"step={update}"), **settings)
            assert_continues(resumed, whole, update)


VALIDATED = {
    "within epochs": {"val_check_interval": 0.3},
    "within and at the end": {"val_check_interval": 5},
    "some epochs": {"check_val_every_n_epoch": 2},
    "across epochs": {"check_val_every_n_epoch": None, "val_check_interval": 7},
    "never": {"limit_val_batches": 0},
    "loaders set up anew": {"check_val_every_n_epoch": 2, "reload_dataloaders_every_n_epochs": 1},
    "epochs of one batch": {"data": {"count": 8}, "max_epochs": 40, "check_val_every_n_epoch": 10},
    "so many steps": {"max_steps": 40, "check_val_every_n_epoch": 2},
}


@pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")
class TestAtAnEpochsLastBatch:
    """Lightning goes on with the next epoch, and asks that one whether the old one was to be validated."""

    @pytest.mark.parametrize("tuned", [True, False])
    @pytest.mark.parametrize("validated", VALIDATED)
    def test_continues_bit_for_bit(self, tmp_path, validated, tuned):
        settings = {"data": {"count": 80}, "max_epochs": 4, "tuned": tuned} | VALIDATED[validated]

        def callbacks(folder):
            saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=10, save_top_k=-1)
            return [saver] if tuned else [AdaptiveBatchSize(), saver]

        whole = Run(tmp_path, callbacks=callbacks(tmp_path), **settings)
        for update in (10, 20):
            folder = tmp_path / str(update)
            resumed = Run(folder, seed=77, ckpt=saved(tmp_path, f"step={update}"), callbacks=callbacks(folder),
                          **settings)  # fmt: skip
            assert_continues(resumed, whole, update)
            assert resumed.trainer.current_epoch == whole.trainer.current_epoch
            epoch_loop = resumed.trainer.fit_loop.epoch_loop
            assert not {"on_run_start", "reset", "increment_progress_to_evaluation_end"} & (
                set(vars(epoch_loop)) | set(vars(epoch_loop.val_loop))
            )

    def test_which_a_growth_made_the_last(self, tmp_path):
        """All that is left of the epoch is less than a grown batch, and dropped."""
        settings = {"data": {"count": 243, "batch": 4, "drop_last": True}, "max_epochs": 3, "tuned": False}

        def growing():
            return AdaptiveBatchSize(max_batch_size=32, rule="norm", every_n_steps=3)

        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        controller = growing()
        L.seed_everything(4, verbose=False)
        whole = Run(tmp_path, module=Tiny("dropout"), callbacks=[controller, saver], **settings)
        progress = torch.load(saved(tmp_path, "step=19"), weights_only=True)["loops"]["fit_loop"]
        assert not progress["epoch_loop.batch_progress"]["is_last_batch"]
        assert [one.step for one in controller.decisions if one.action == "grow"][:2] == [1, 19]
        for update in (18, 19, 20):
            again = growing()
            resumed = Run(tmp_path / str(update), seed=77, module=Tiny("dropout"), callbacks=[again],
                          ckpt=saved(tmp_path, f"step={update}"), **settings)  # fmt: skip
            assert_continues(resumed, whole, update)
            assert [timeless(one) for one in again.decisions] == [timeless(one) for one in controller.decisions]
            assert resumed.trainer.current_epoch == whole.trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")
class TestBetweenTwoUpdatesOfAMeasurement:
    def test_the_first_ones_gradient_is_in_the_checkpoint(self, tmp_path):
        def growing():
            return AdaptiveBatchSize(max_batch_size=32, rule="norm", every_n_steps=3)

        controller = growing()
        saver = ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=1, save_top_k=-1)
        settings = {"max_epochs": 2, "tuned": False}
        whole = Run(tmp_path, module=Tiny("batchnorm"), callbacks=[controller, saver], **settings)
        kept = [torch.load(saved(tmp_path, f"step={update}"), weights_only=True) for update in (3, 4, 5)]
        meters = [content["callbacks"]["AdaptiveBatchSize"]["meter"] for content in kept]
        assert [meter is None for meter in meters] == [True, False, True]
        for update in (3, 4, 5):
            again = growing()
            resumed = Run(tmp_path / str(update), seed=77, module=Tiny("batchnorm"), callbacks=[again],
                          ckpt=saved(tmp_path, f"step={update}"), **settings)  # fmt: skip
            assert_continues(resumed, whole, update)
            assert again.state_dict()["noise"] == controller.state_dict()["noise"]

    def test_but_not_that_of_an_update_that_is_made_again(self, tmp_path):
        """It breaks off once its gradient was looked at."""

        class Late(Callback):
            def on_before_optimizer_step(self, trainer, *_):
                if trainer.global_step == 3:
                    raise ZeroDivisionError

            def on_exception(self, trainer, *_):
                trainer.save_checkpoint(tmp_path / "broken.ckpt")

        class Armed(Callback):
            def on_train_batch_start(self, trainer, *_):
                armed.append(again._meter._pairs.armed)

        again, armed = AdaptiveBatchSize(rule="norm", every_n_steps=3), []
        callbacks = [AdaptiveBatchSize(rule="norm", every_n_steps=3), Late()]
        with pytest.raises(ZeroDivisionError):
            Run(tmp_path, module=Tiny("batchnorm"), callbacks=callbacks, max_epochs=2, tuned=False)
        state = torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"]["AdaptiveBatchSize"]
        assert state["meter"]["update"] == 3
        settings = {"ckpt": tmp_path / "broken.ckpt", "max_epochs": 2, "tuned": False}
        Run(tmp_path / "b", module=Tiny("batchnorm"), callbacks=[again, Armed()], **settings)
        assert armed[:2] == [False, True]


@pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")
class TestPersistentWorkers:
    """Their iterator draws a seed when it is created, and none when a later epoch resets it."""

    @pytest.mark.parametrize(("which", "tuned"), [("data", True), ("data", False), ("val", True)])
    def test_continue_bit_for_bit(self, tmp_path, which, tuned):
        settings = {"data": {"count": 80}, "val": {}, "max_epochs": 3, "tuned": tuned}
        settings[which] = {**settings[which], "num_workers": 1, "persistent_workers": True}

        def callbacks(folder):
            saver = ModelCheckpoint(folder / "saved", "{step}", every_n_train_steps=4, save_top_k=-1)
            return [saver] if tuned else [AdaptiveBatchSize(), saver]

        whole = Run(tmp_path, callbacks=callbacks(tmp_path), **settings)
        for update in (4, 12, 20):
            folder = tmp_path / str(update)
            resumed = Run(folder, seed=77, ckpt=saved(tmp_path, f"step={update}"), callbacks=callbacks(folder),
                          **settings)  # fmt: skip
            assert_continues(resumed, whole, update)


ENDS = {
    "steps": {"max_steps": 120, "max_epochs": -1},
    "epochs": {"max_epochs": 3},
    "none": {"max_epochs": -1, "max_steps": -1},
    "seconds": {"max_epochs": -1, "max_time": {"seconds": 20}},
}


class TestAnEndOfAnotherKind:
    @pytest.mark.parametrize(
        ("first", "second"), [("steps", "epochs"), ("none", "steps"), ("none", "epochs"), ("seconds", "steps")]
    )
    def test_is_in_the_log_and_so_in_what_is_read_from_it(self, tmp_path, first, second):
        class Stop(Callback):
            def on_train_batch_end(self, trainer, *_):
                if trainer.global_step == 52:
                    trainer.save_checkpoint(tmp_path / "mid.ckpt")
                    trainer.should_stop = True

        Run(tmp_path / "first", callbacks=[Stop()], **ENDS[first])
        resumed = Run(tmp_path / "second", ckpt=tmp_path / "mid.ckpt", **ENDS[second])
        plans = [(one.action, one.step) for one in resumed.callback.decisions if one.kind == "setup" and one.step]
        assert plans == [("replan", 52)]
        schedule = load_schedule(tmp_path / "second")
        rates = [schedule.rate(step) for step in range(52, resumed.trainer.global_step)]
        assert rates == pytest.approx([lrs[0] for lrs in resumed.witness.lrs], rel=1e-9)
        assert rates[-1] < 0.1 * max(rates)


class TestCheckpointFile:
    def test_holds_primitives_and_tensors_only(self, tmp_path):
        saved_run(tmp_path, max_steps=40)
        content = torch.load(saved(tmp_path, "step=39"), weights_only=True)
        state = content["callbacks"]["AutoLRS"]
        assert state["decisions"]
        assert state["run"]["stage"]["index"] >= 1

    def test_more_epochs_plan_the_rest_anew(self, tmp_path):
        first = saved_run(tmp_path, max_epochs=2)
        longer = Run(tmp_path / "longer", ckpt=saved(tmp_path, f"end={2 * EPOCH}"), max_epochs=4)
        replanned = [one for one in longer.callback.decisions if one.action == "replan"]
        assert [one.step for one in replanned] == [2 * EPOCH]
        assert replanned[0].numbers["total"] == 4 * EPOCH * 8
        assert longer.trainer.global_step == 4 * EPOCH
        # Half of the run is left, so the rate is far from where the short run had decayed to.
        assert longer.witness.lrs[0][0] > 5 * first.witness.lrs[-1][0]
        assert longer.witness.lrs[-1][0] < longer.witness.lrs[0][0]

    @pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")
    @pytest.mark.parametrize("batch", [False, True])
    def test_one_that_is_written_after_the_fit_goes_on_too(self, tmp_path, batch):
        def more():
            return [AdaptiveBatchSize(64, every_n_steps=4)] if batch else []

        def net():
            L.seed_everything(4, verbose=False)
            return Tiny("dropout", "random")  # without pairs of updates, of which only one may have been seen

        first = Run(tmp_path / "first", module=net(), callbacks=[*savers(tmp_path), *more()], max_epochs=2)
        first.trainer.validate(first.module, first.trainer.val_dataloaders, verbose=False)
        first.trainer.save_checkpoint(tmp_path / "after.ckpt")
        content = torch.load(tmp_path / "after.ckpt", weights_only=True)
        assert content["callbacks"]["AutoLRS"]["run"]["best"] == {}
        longer = Run(tmp_path / "longer", module=net(), callbacks=more(), ckpt=tmp_path / "after.ckpt", max_epochs=4)
        at_end = saved(tmp_path, f"end={first.trainer.global_step}")
        as_ever = Run(tmp_path / "as_ever", module=net(), callbacks=more(), ckpt=at_end, max_epochs=4)
        assert [one.action for one in longer.callback.decisions if one.kind == "setup"] == ["begin", "replan"]
        assert longer.witness.lrs == as_ever.witness.lrs
        assert longer.witness.batches == as_ever.witness.batches

    @pytest.mark.filterwarnings("ignore:autotune. gradient noise is taken from consecutive")
    @pytest.mark.parametrize("tuned", [True, False])
    def test_fewer_batches_than_were_trained_on_are_refused(self, tmp_path, tuned):
        more = [] if tuned else [AdaptiveBatchSize()]
        Run(tmp_path, callbacks=[*savers(tmp_path), *more], tuned=tuned, max_steps=20)
        again = [] if tuned else [AdaptiveBatchSize()]
        with pytest.raises(StateError, match=r"13 batches.*10 batches.*batch size"):
            Run(tmp_path / "b", ckpt=saved(tmp_path, "step=13"), data={"count": 80}, callbacks=again, tuned=tuned,
                max_steps=20)  # fmt: skip

    def test_other_settings_are_refused(self, tmp_path):
        saved_run(tmp_path, max_steps=20)
        for name, value in [("search_budget", 0.2), ("seed", 4), ("max_lr", 0.5)]:
            other = controller(**{"min_lr": 1e-4, "max_lr": 3e-2, name: value})
            fresh = trainer(tmp_path / name, other, max_steps=40)
            module, checkpoint = Tiny("batchnorm"), saved(tmp_path, "step=13")
            with pytest.raises(StateError, match=f"{name}={value}.*start a new fit"):
                fresh.fit(module, loader(batch=8), val_loader(), ckpt_path=checkpoint)

    def test_another_version_is_refused(self, tmp_path):
        saved_run(tmp_path, max_steps=20)
        content = torch.load(saved(tmp_path, "step=13"), weights_only=True)
        content["callbacks"]["AutoLRS"]["version"] = 99
        torch.save(content, tmp_path / "newer.ckpt")
        with pytest.raises(StateError, match="version 99"):
            Run(tmp_path / "b", ckpt=tmp_path / "newer.ckpt", max_steps=40)

    def test_a_plain_checkpoint_starts_a_fresh_controller(self, tmp_path):
        Run(tmp_path, tuned=False, callbacks=savers(tmp_path), max_steps=60)
        resumed = Run(tmp_path / "b", ckpt=saved(tmp_path, "step=39"), max_steps=160)
        assert resumed.callback.decisions[0].kind == "setup"
        assert resumed.callback.decisions[0].step == 39
        assert searches(resumed.callback)[0].step == 39
        assert resumed.trainer.global_step == 160
        assert resumed.witness.steps <= 121 + 0.5 * 160

    @pytest.mark.parametrize("at", [39, 117, 143])
    def test_a_fresh_controller_serves_what_is_left_of_the_run(self, tmp_path, monkeypatch, at):
        """Its budget is a share of that, and it begins at no less than it can come back from."""
        monkeypatch.undo()  # several searches
        Run(tmp_path, tuned=False, callbacks=savers(tmp_path), max_steps=160)
        resumed = Run(tmp_path / "b", ckpt=saved(tmp_path, f"step={at}"), max_steps=240)
        budget = 0.5 * (240 - at)
        assert sum(one.cost_steps for one in resumed.callback.decisions if one.kind != "rollback") <= budget
        reason = searches(resumed.callback)[0].reason
        assert ("because it can rise from there" in reason) == (at == 39)
        assert ("because the rate is coming down already" in reason) == (at == 143)
        done = resumed.callback.decisions[-1]
        assert done.reason.endswith(f"of {240 - at} updates")

    def test_without_the_callback_the_checkpoint_is_plain(self, tmp_path):
        saved_run(tmp_path, max_steps=40)
        with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
            plain = Run(tmp_path / "b", ckpt=saved(tmp_path, "step=39"), tuned=False, max_steps=60)
        assert plain.trainer.global_step == 60
        assert plain.callback.decisions == []

    def test_the_log_is_whole_and_holds_no_line_twice(self, tmp_path):
        whole = saved_run(tmp_path, max_steps=120)
        resumed = Run(tmp_path / "b", ckpt=saved(tmp_path, "step=52"), max_steps=120)
        lines = (tmp_path / "b" / "decisions.jsonl").read_text().splitlines()
        earlier = (tmp_path / "decisions.jsonl").read_text().splitlines()
        before = sum(decision.step < 52 for decision in whole.callback.decisions)
        assert lines[:before] == earlier[:before]
        assert len(set(lines)) == len(lines)
        assert read_decisions(tmp_path / "b") == resumed.callback.decisions

"""A run that broke off inside a validation or a step goes on bit for bit from what was saved there."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from autotune.callbacks._trainer.rates import ScaledSteps
from tests.callbacks.harness import Break, Tiny
from tests.callbacks.resumed import LOADERS, Run, assert_continues, saved, saved_run

pytestmark = pytest.mark.usefixtures("several_searches")


class Stopped(Tiny):
    """Stops the run inside one of its validations: in a step of it, or before or after its steps."""

    def __init__(self, moment, update):
        L.seed_everything(4, verbose=False)
        super().__init__("batchnorm", "dropout", "random")
        self.moment, self.update = moment, update

    def _stop(self, moment):
        if (moment, self.trainer.global_step) == (self.moment, self.update):
            raise ZeroDivisionError

    def on_validation_start(self):
        self._stop("start")

    def on_validation_batch_start(self, batch, batch_idx):
        self._stop(f"before {batch_idx}")

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self._stop(batch_idx)

    def on_validation_end(self):
        self._stop("end")


class SaverOnException(Callback):
    """Saves whatever state an exception leaves."""

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/stopped.ckpt")


class TestStoppedInsideAValidation:
    @pytest.mark.parametrize(
        ("data", "moment", "update"),
        [("global generator", moment, update) for moment in ("start", "before 1", 1, "end") for update in (45, 60)]
        + [(data, 1, 45) for data in LOADERS if data != "global generator"],
    )
    def test_continues_bit_for_bit(self, tmp_path, data, moment, update):
        settings = {"data": LOADERS[data], "max_steps": 90, "val_check_interval": 15}
        whole = Run(tmp_path / "whole", module=Stopped(None, None), **settings)
        with pytest.raises(ZeroDivisionError):
            Run(tmp_path, module=Stopped(moment, update), callbacks=[SaverOnException()], **settings)
        resumed = Run(tmp_path / "resumed", seed=77, ckpt=tmp_path / "stopped.ckpt", **settings)
        assert_continues(resumed, whole, update)

    @pytest.mark.parametrize("point", ["step=52", "end=60", "val=45", "val=60"])
    def test_and_resumed_once_more_from_later_in_the_epoch(self, tmp_path, point):
        settings = {"max_steps": 90, "val_check_interval": 15}
        whole = Run(tmp_path / "whole", module=Stopped(None, None), **settings)
        with pytest.raises(ZeroDivisionError):
            Run(tmp_path, module=Stopped(1, 45), callbacks=[SaverOnException()], **settings)
        once = saved_run(tmp_path / "once", seed=77, ckpt=tmp_path / "stopped.ckpt", **settings)
        assert_continues(once, whole, 45)
        twice = Run(tmp_path / "twice", seed=78, ckpt=saved(tmp_path / "once", point), **settings)
        assert_continues(twice, whole, int(point.partition("=")[2]))


class TestBrokenOffInAStep:
    """Lightning runs the module's step inside ``optimizer.step``, where the rates are those that a scheduler is not to
    see; a checkpoint that is written there must have the scheduler's."""

    @pytest.mark.parametrize("scheduler", ["", "lambda", "epoch"])
    @pytest.mark.parametrize("update", [45, 59, 60])
    def test_continues_bit_for_bit(self, tmp_path, scheduler, update):
        def module():
            L.seed_everything(4, verbose=False)
            return EpochDecay() if scheduler == "epoch" else Tiny("batchnorm", "dropout", "random", scheduler=scheduler)

        whole = Run(tmp_path / "whole", module=module(), max_epochs=4)
        broken = [Break(update, tmp_path / "broken.ckpt")]
        with pytest.raises(ZeroDivisionError):
            Run(tmp_path / "broken", module=module(), callbacks=broken, max_epochs=4)
        resumed = Run(tmp_path / "resumed", module=module(), seed=77, ckpt=tmp_path / "broken.ckpt", max_epochs=4)
        assert_continues(resumed, whole, update)

    def test_after_a_validation_that_lightning_would_pass_over_once_more(self, tmp_path):
        def module():
            L.seed_everything(4, verbose=False)
            return Tiny("dropout")

        settings = {"max_epochs": 2, "val_check_interval": 15}
        whole = Run(tmp_path / "whole", module=module(), **settings)
        with pytest.raises(ZeroDivisionError):
            Run(tmp_path, module=module(), callbacks=[Break(45, tmp_path / "broken.ckpt")], **settings)
        resumed = Run(tmp_path / "resumed", module=module(), seed=77, ckpt=tmp_path / "broken.ckpt", **settings)
        assert_continues(resumed, whole, 45)

    def test_the_rates_of_an_optimizer_that_is_saved_in_its_step(self):
        for rate in (0.5, torch.tensor(0.5)):
            optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], lr=rate)
            scaled = ScaledSteps(optimizer)
            scaled.multiplier = 4.0
            inside = []

            def closure(optimizer=optimizer, inside=inside):
                inside += [float(optimizer.param_groups[0]["lr"]), optimizer.state_dict()["param_groups"][0]["lr"]]
                raise ZeroDivisionError

            for _ in range(2):  # a step that is made again after it has failed is not scaled twice
                with pytest.raises(ZeroDivisionError):
                    optimizer.step(closure)
            assert list(map(float, inside)) == [2.0, 0.5] * 2
            scaled.remove()
            assert float(optimizer.param_groups[0]["lr"]) == 0.5
            assert type(optimizer.param_groups[0]["lr"]) is type(inside[1]) is type(rate)


class EpochDecay(Tiny):
    """A rate that is halved after every epoch, which shows no rate to who has not seen the last one."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

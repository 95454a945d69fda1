"""Under ``pytorch_lightning`` everything is as under ``lightning.pytorch``; a mix of both is refused."""

import lightning as L
import pytest
import pytorch_lightning as pl

from autotune.callbacks import AdaptiveBatchSize, AutoLRS, DecisionLogger, GradientNoiseMonitor, ReplaySchedule
from autotune.errors import UnsupportedSetupError
from tests.callbacks.journey import Journey, Net, Points, same_course

pytestmark = [pytest.mark.filterwarnings("ignore")]


class OtherNet(pl.LightningModule):
    """``Net`` of the other namespace."""

    def __init__(self):
        super().__init__()
        self.net = Net().net
        self.at_trial_step = None

    in_trial = Net.in_trial
    training_step = Net.training_step
    validation_step = Net.validation_step
    configure_optimizers = Net.configure_optimizers


def journey(folder, *arguments, **more):
    return Journey(folder, *arguments, module=OtherNet(), namespace=pl, **more)


def test_the_same_course_under_either_name(tmp_path):
    ours = Journey(tmp_path / "ours", callbacks=[GradientNoiseMonitor(), DecisionLogger()])
    saved = pl.callbacks.ModelCheckpoint(tmp_path, "saved", every_n_epochs=1)
    watching = [Points(tmp_path), GradientNoiseMonitor(), DecisionLogger(), saved, pl.callbacks.TQDMProgressBar()]
    logger = pl.loggers.CSVLogger(tmp_path / "theirs")
    theirs = journey(tmp_path / "theirs", callbacks=watching, logger=logger,
                     enable_checkpointing=True, enable_progress_bar=True)  # fmt: skip
    assert not same_course(theirs, ours)
    for point in ("in the first search", "mid epoch 2"):
        assert not same_course(journey(tmp_path / point, ckpt=tmp_path / f"{point}.ckpt", seed=77), ours)
    # A checkpoint of one is one of the other.
    assert not same_course(Journey(tmp_path / "back", ckpt=tmp_path / "mid epoch.ckpt", seed=77), ours)
    replayed = journey(tmp_path / "replayed", [ReplaySchedule(str(logger.log_dir))])
    assert replayed.track.rows == ours.track.rows


@pytest.mark.parametrize(
    ("trainer", "other", "match"),
    [
        (L, pl.callbacks.ModelCheckpoint, "lightning.pytorch and ModelCheckpoint from pytorch_lightning"),
        (pl, L.pytorch.callbacks.EarlyStopping, "pytorch_lightning and EarlyStopping from lightning.pytorch"),
    ],
)
@pytest.mark.parametrize("controller", [AutoLRS, AdaptiveBatchSize])
def test_a_mix(tmp_path, trainer, other, match, controller):
    callback = other(monitor="val_loss")
    module = Net() if trainer is L else OtherNet()
    with pytest.raises(UnsupportedSetupError, match=f"{controller.__name__}: the Trainer comes from {match}.*import"):
        Journey(tmp_path, [controller()], callbacks=[callback], module=module, namespace=trainer)


def test_a_module_of_the_other_name_is_refused_by_lightning(tmp_path):
    with pytest.raises(TypeError, match="must be a `LightningModule`"):
        Journey(tmp_path, [AutoLRS()], module=OtherNet())

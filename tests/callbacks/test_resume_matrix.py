"""The resume matrix: each controller and both, resumed at every kind of moment, on one rank and two."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.callbacks.journey import CONTROLLERS, Journey, Points, on_ranks, run_apart, same_course

POINTS = {
    "lrs": ["in the first search", "in a later search", "mid epoch", "mid epoch 2", "end of epoch 1"],
    "batch": ["mid epoch", "mid epoch 2", "after growth", "end of epoch 1"],
    "both": ["in the first search", "in a later search", "mid epoch", "mid epoch 2", "after growth", "end of epoch 1"],
}

pytestmark = [pytest.mark.filterwarnings("ignore")]


def whole_run(folder, which, ranks=1):
    ends = ModelCheckpoint(folder, "end of epoch {epoch}", auto_insert_metric_name=False, every_n_epochs=1,
                           save_on_train_epoch_end=True, save_top_k=-1)  # fmt: skip
    return Journey(folder, which, callbacks=[Points(folder), ends], ranks=ranks)


def differences(folder, which, ranks=1):
    """Runs once, resumes from every point, and says what was not the same."""
    whole = whole_run(folder, which, ranks)
    kinds = [one["kind"] for one in whole.all_decisions]
    grown = [one for one in whole.all_decisions if one["action"] == "grow"]
    assert which == "batch" or kinds.count("search") >= 2
    assert which == "lrs" or grown
    # What the checkpoints in trials left behind: nothing.
    plain = Journey(folder / "plain", which, ranks=ranks)
    found = [f"the saving itself: {one}" for one in same_course(plain, whole)]
    for point in POINTS[which]:
        resumed = Journey(folder / point, which, ckpt=folder / f"{point}.ckpt", seed=77, ranks=ranks)
        found += [f"{point}: {one}" for one in same_course(resumed, whole)]
    return found


@pytest.mark.parametrize("which", ["both", *(pytest.param(w, marks=pytest.mark.slow) for w in ("lrs", "batch"))])
def test_one_rank(tmp_path, which):
    assert not differences(tmp_path, which)


def _rank(rank, folder):
    found = {which: differences(Path(folder) / which, which, ranks=2) for which in CONTROLLERS}
    torch.save(found, f"{folder}/{rank}.pt")


def fork_two(folder):
    on_ranks(2, _rank, folder)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks(tmp_path):
    run_apart("tests.callbacks.test_resume_matrix:fork_two", tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found == {which: [] for which in CONTROLLERS}

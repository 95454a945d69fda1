"""Killed by SIGKILL at random moments, and resumed each time, a run ends where an unbroken one ends."""

import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from autotune.decision import read_decisions
from tests.callbacks.journey import Journey, in_child, run_apart, timeless

KILLS = 24

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def train(folder):
    with open(folder / "resumed.txt", "a") as file:
        print(newest(folder) and newest(folder).stem, file=file)
    saver = ModelCheckpoint(folder / "saved", "{step:04d}", every_n_train_steps=2, save_top_k=-1)
    run = Journey(folder, "both", ckpt=newest(folder), callbacks=[saver], seed=random.SystemRandom().randrange(9999))
    torch.save({"weights": run.weights, "decisions": run.decisions}, folder / "result.pt")


def newest(folder):
    """The last checkpoint that can be read: one that was being written when the process died cannot."""
    for path in sorted((folder / "saved").glob("step=*.ckpt"), reverse=True):
        try:
            torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, OSError):
            continue
        return path
    return None


def log_of(folder):
    return sorted(repr(timeless(one)) for one in read_decisions(folder))


def journeys(folder):
    """Unbroken once, then killed until so many kills are done; prints how many, and at how many moments in searches."""
    root, chance = Path(folder), random.Random(5)
    (root / "whole").mkdir()
    # The order of the data follows from the seed: all first processes begin with the same.
    random.SystemRandom.randrange = lambda *_: 1
    began = time.monotonic()
    child = in_child(train, root / "whole")
    child.join()
    length = time.monotonic() - began
    assert child.exitcode == 0
    whole = torch.load(root / "whole" / "result.pt", weights_only=True)
    actions = [one["action"] for one in read_dicts(root / "whole")]
    assert actions.count("grow") >= 2
    assert sum(one["kind"] == "search" for one in read_dicts(root / "whole")) >= 2
    kills = number = 0
    while kills < KILLS:
        number += 1
        place = root / f"killed {number}"
        place.mkdir()
        patience = length
        while True:
            child = in_child(train, place)
            # On a busy machine a run takes longer than the first one did, and has to end some day.
            patience *= 1.1
            child.join(chance.uniform(0.05, 0.9) * patience)
            if child.exitcode is not None:
                break
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            check_log(place)
        assert child.exitcode == 0
        ended = torch.load(place / "result.pt", weights_only=True)
        assert ended["weights"] == whole["weights"], (place / "resumed.txt").read_text()
        assert ended["decisions"] == whole["decisions"]
        assert log_of(place) == log_of(root / "whole")
    print(f"{kills} kills in {number} runs of {length:.1f} s")


def read_dicts(folder):
    return [one.to_dict() for one in read_decisions(folder)]


def check_log(folder):
    """It can be read at every moment, and holds no line twice."""
    if (folder / "decisions.jsonl").exists():
        lines = log_of(folder)
        assert len(set(lines)) == len(lines)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and SIGKILL")
def test_killed_at_random_moments(tmp_path):
    said = run_apart("tests.callbacks.test_kill:journeys", tmp_path, timeout=580)
    assert f"{KILLS} kills" in said or int(said.split(" kills")[0].split()[-1]) >= KILLS

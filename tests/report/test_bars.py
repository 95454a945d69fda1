"""The two real progress bars, as a terminal shows them."""

import contextlib
import logging
import re
import sys
import warnings

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from real_run import train
from terminal import Stream, screen

from autotune import read_decisions
from autotune.callbacks import AdaptiveBatchSize, AutoLRS, DecisionLogger
from autotune.callbacks._trainer.bar import SearchBar
from autotune.callbacks._trainer.facts import inform, warn

SAID = ["autotune: something is not as it should be", "and this is only for your information"]


class Chatty(L.Callback):
    """Says something in the middle of an epoch, as any of our callbacks may."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 5:
            warn(SAID[0].removeprefix("autotune: "))
            inform(SAID[1])


class ToStderr(logging.Handler):
    def emit(self, record):
        if record.getMessage() in SAID:
            print(record.getMessage(), file=sys.stderr, flush=True)


@pytest.fixture
def spoken():
    """Warnings and the log go to the terminal, as outside of a test."""
    logger, handler = logging.getLogger("autotune"), ToStderr()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message="autotune: something")
        warnings.showwarning = lambda message, *_, **__: print(message, file=sys.stderr, flush=True)
        yield
    logger.removeHandler(handler)
    logger.setLevel(level)


def watched(folder, name):
    """A run with both controllers under a real bar: (what went to the terminal, decisions)."""
    stream = Stream()
    if name == "tqdm":
        bar = TQDMProgressBar(refresh_rate=1)
    else:
        bar = RichProgressBar(refresh_rate=1, console_kwargs={"file": stream, "force_terminal": True, "width": 160})
    callbacks = [AutoLRS(search_budget=0.5), AdaptiveBatchSize(max_batch_size=64), DecisionLogger(), Chatty(), bar]
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        trainer, _ = train(folder, callbacks, enable_progress_bar=True)
    return stream.getvalue(), read_decisions(trainer.log_dir)


@pytest.mark.parametrize("name", ["tqdm", "rich"])
def test_the_bar_tells_rate_batch_and_search_and_nothing_is_printed_over_it(tmp_path, spoken, name):
    text, decisions = watched(tmp_path, name)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    search = next(d for d in decisions if d.kind == "search")
    total, made = sum(trials for trials, _ in search.numbers["legs"]), len(search.numbers["candidates"])
    told = {int(number): left for number, left in re.findall(rf"Searching (\d+)/{total}, ([\d.]+ (?:s|min|h))", plain)}
    assert set(told) == set(range(1, made + 1))
    assert re.search(r"lr[:=] ?[\d.e-]+", plain)
    assert re.search(r"batch[:=] ?32", plain)
    # The phase is over when the search is.
    last = plain.rindex("Searching")
    assert re.search(r"Epoch", plain[last:])
    shown = screen(text)
    for words in SAID:
        assert [line for line in shown if words in line] == [words]
    assert not any("Searching" in line for line in shown)


def test_a_small_rate_is_not_rounded_to_nothing(tmp_path):
    trainer, _ = train(tmp_path, [AutoLRS(min_lr=1e-6, max_lr=3e-5, search_budget=0.5)], max_steps=60)
    shown = trainer.progress_bar_metrics["lr"]
    assert isinstance(shown, str)
    assert 0 < float(shown) < 3e-5


class FakeText:
    """Where the words go, instead of onto a bar."""

    def __init__(self):
        self.words = []

    def show(self, text):
        self.words.append(text)

    def clear(self):
        self.words.append("")


def test_the_time_left_is_that_of_the_steps_left(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("autotune.callbacks._trainer.bar.time.monotonic", lambda: clock[0])
    bar = SearchBar(type("NoBar", (), {"progress_bar_callback": None})(), [(4, 10), (3, 100)])
    bar._text = text = FakeText()
    bar.trial(0, 0)
    for _ in range(10):
        clock[0] += 2.0
        bar.step()
    assert text.words[0] == "Searching 1/7, 11 min 18 s left"  # 339 steps of 2 s
    assert text.words[-1] == "Searching 1/7, 11 min 0 s left"  # 330
    bar.trial(1, 2)  # the second leg's last, whatever was left out before it
    clock[0] += 2.0
    bar.step()
    assert text.words[-1] == "Searching 7/7, 3 min 18 s left"
    bar.clear()
    assert text.words[-1] == ""

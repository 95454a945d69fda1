"""What the trainer's progress bar shows of us, and printing that does not run into it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from autotune.report.values import spell, spell_seconds


class BarItems:
    """Shows further items on a Lightning progress bar until :meth:`remove`.

    The bar's own ``get_metrics`` is asked first and ours are added. Logging them instead would round a rate of 3e-5
    to 0.000 on the rich bar, cost a little on every batch, and put them among the metrics that others monitor.

    Args:
        trainer: Its progress bar, of whatever kind, is used; without one nothing happens.
        items: Returns what to show, as text; asked only when the bar is redrawn.
    """

    def __init__(self, trainer: Any, items: Callable[[], dict[str, str]]) -> None:
        self._bar = trainer.progress_bar_callback
        if self._bar is None:
            return
        own = self._bar.get_metrics

        def get_metrics(*args: Any, **kwargs: Any) -> dict[str, Any]:
            return {**own(*args, **kwargs), **items()}

        self._bar.get_metrics = get_metrics

    def remove(self) -> None:
        """Gives the bar its own method back."""
        if self._bar is not None:
            vars(self._bar).pop("get_metrics", None)


def beside_bars() -> AbstractContextManager[Any]:
    """What is printed inside stands on lines of its own: live tqdm bars are cleared and drawn again below it.

    The rich bar needs no help; it redirects what is printed while it is live.
    """
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stderr)


def show_on_bar(trainer: Any, values: dict[str, float]) -> None:
    """Adds values to what the progress bar shows, as text: a bar of its own accord would round 3e-5 to 0.000."""
    trainer.progress_bar_metrics.update({name: spell(value) for name, value in values.items()})


class BarText:
    """Writes a phase ("Searching 3/7") where the trainer's progress bar shows "Epoch n".

    Knows Lightning's tqdm and rich bars; with another bar, or none, it does nothing.
    """

    def __init__(self, trainer: Any) -> None:
        self._bar = trainer.progress_bar_callback
        self._before: str | None = None

    def show(self, text: str) -> None:
        """Puts ``text`` on the bar."""
        tqdm_bar = self._tqdm()
        if tqdm_bar is not None:
            if self._before is None:
                self._before = tqdm_bar.desc
            tqdm_bar.set_description(text)
            return
        progress, task = self._rich()
        if progress is not None:
            if self._before is None:
                self._before = next(t.description for t in progress.tasks if t.id == task)
            progress.update(task, description=text)
            progress.refresh()

    def clear(self) -> None:
        """Puts the bar's own text back."""
        if self._before is not None:
            self.show(self._before)
            self._before = None

    def _tqdm(self) -> Any:
        bar = getattr(self._bar, "_train_progress_bar", None)
        return bar if hasattr(bar, "set_description") and not getattr(bar, "disable", True) else None

    def _rich(self) -> tuple[Any, Any]:
        progress = getattr(self._bar, "progress", None)
        task = getattr(self._bar, "train_progress_bar_id", None)
        if progress is None or task is None or not any(t.id == task for t in progress.tasks):
            return None, None
        return progress, task


class SearchBar:
    """Says on the bar how far a search is: the trial, of how many, and the time it will still take.

    The time counts every trial that is left at its full length, so that it is met or, where trials are stopped
    early, undercut.

    Args:
        trainer: Its progress bar is used; without one nothing happens.
        legs: (trials, steps of each), one a leg.
    """

    def __init__(self, trainer: Any, legs: Sequence[tuple[int, int]]) -> None:
        self._text = BarText(trainer)
        self._legs = list(legs)
        self._index = 0
        self._left = 0
        self._made = 0
        self._began = time.monotonic()
        self._shown = 0.0

    def trial(self, leg: int, number: int) -> None:
        """Trial ``number`` of leg ``leg`` begins, both from 0."""
        self._index = sum(trials for trials, _ in self._legs[:leg]) + number
        own, later = self._legs[leg], self._legs[leg + 1 :]
        self._left = (own[0] - number) * own[1] + sum(trials * steps for trials, steps in later)
        self._shown = 0.0

    def step(self) -> None:
        """A step of the trial was made; drawn five times a second at most."""
        self._left, self._made = self._left - 1, self._made + 1
        now = time.monotonic()
        if now - self._shown > 0.2:
            self._shown = now
            left = spell_seconds((now - self._began) / self._made * max(self._left, 0))
            self._text.show(f"Searching {self._index + 1}/{sum(trials for trials, _ in self._legs)}, {left} left")

    def clear(self) -> None:
        """Puts the bar's own text back."""
        self._text.clear()

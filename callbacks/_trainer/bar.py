"""Adds to what the trainer's progress bar shows beside "v_num"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


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


def quiet_bars(trainer: Any) -> list[Any]:
    """The trainer's progress bar as a callback that hears nothing, to stand in for all callbacks during a trial.

    The rich bar is redrawn by a thread of its own, whose columns ask the trainer for "the" progress bar and fail
    where there is none. The stand-in shares the bar's state, and only its hooks do nothing.
    """
    bar = trainer.progress_bar_callback
    if bar is None:
        return []
    hooks = [name for name in dir(bar) if name.startswith("on_") or name in ("setup", "teardown")]
    quiet = type(type(bar).__name__, (type(bar),), dict.fromkeys(hooks, _nothing))
    stand_in = object.__new__(quiet)
    stand_in.__dict__ = vars(bar)
    return [stand_in]


def _nothing(*_: Any, **__: Any) -> None:
    """A hook that does not listen."""

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

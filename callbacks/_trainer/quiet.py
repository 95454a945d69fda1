"""Callbacks as somebody may ask the trainer for them during a trial: they have their state and hear nothing."""

from __future__ import annotations

from typing import Any


def stand_ins(trainer: Any) -> list[Any]:
    """In the place of all callbacks during a trial: those that the trainer has a name for.

    A module may look up ``trainer.checkpoint_callback.best_model_score``, or the patience of early stopping.
    The rich bar is redrawn by a thread of its own, whose columns ask the trainer for "the" progress bar and fail where
    there is none; its stand-in shares the bar's state, the others have a copy, which a trial may write to.
    """
    bar = trainer.progress_bar_callback
    asked_for = [*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks]
    quiet = [_quiet(callback, dict(vars(callback))) for callback in asked_for]
    return quiet if bar is None else [_quiet(bar, vars(bar)), *quiet]


def _quiet(callback: Any, state: dict[str, Any]) -> Any:
    kind = type(callback)
    hooks = [name for name in dir(callback) if name.startswith("on_") or name in ("setup", "teardown")]
    stand_in: Any = object.__new__(type(kind.__name__, (kind,), dict.fromkeys(hooks, _nothing)))
    stand_in.__dict__ = state
    return stand_in


def _nothing(*_: Any, **__: Any) -> None:
    """A hook that does not listen."""

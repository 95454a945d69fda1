"""``lightning.pytorch`` and ``pytorch_lightning``: one code base under two names, strangers to each other."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def namespace_of(item: Any) -> str | None:
    """The namespace its nearest Lightning class comes from; None where it has none.

    A class that is built on ``Callback`` alone has none: Lightning calls its hooks and asks nothing of its type, so
    that it serves a Trainer of either name (ours do).
    """
    for cls in type(item).__mro__:
        for name in _NAMES:
            if cls.__module__.startswith(name + ".") and cls.__name__ != "Callback":
                return name
    return None


def sibling(trainer: Any, module: str) -> Any:
    """A module of the namespace that the trainer comes from."""
    return import_module(f"{namespace_of(trainer)}.{module}")

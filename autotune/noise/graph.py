"""Which parameters a loss reaches, and how often: a walk over its autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Reached:
    """What the graph of a loss says.

    Attributes:
        uses: How often it uses each parameter, by id. What lies in a reentrant checkpoint is not seen.
        coupled: Whether a batch normalisation in training mode is in it, whoever called it.
    """

    uses: Counter[int]
    coupled: bool


def reached(loss: Tensor) -> Reached:
    """Walks over the graph of ``loss``."""
    nodes = list(_nodes(loss))
    edges = Counter(following for node in nodes for following, _ in node.next_functions if following is not None)
    uses: Counter[int] = Counter()
    for node in nodes:
        # Autocast keeps a parameter's copy: each use of the copy is one of the parameter.
        times = edges[node] if type(node).__name__.startswith("ToCopyBackward") else 1
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None:
                uses[id(variable)] += times
    coupled = any("BatchNorm" in type(node).__name__ and getattr(node, "_saved_training", False) for node in nodes)
    return Reached(uses, coupled)


def _nodes(loss: Tensor) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)

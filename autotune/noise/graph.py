"""Which parameters a loss reaches, and how often: a walk over its autograd graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor


def unaccounted(loss: Tensor, uses: Counter[int]) -> dict[int, int]:
    """Parameters that the graph of ``loss`` reaches more often than their layers' calls explain."""
    edges: Counter[int] = Counter()
    for node in _nodes(loss):
        for following, _ in node.next_functions:
            variable = getattr(following, "variable", None)
            if variable is not None:
                edges[id(variable)] += 1
    return {key: count for key, count in edges.items() if count > uses[key] > 0}


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

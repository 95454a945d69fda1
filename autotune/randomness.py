"""The global random generators: their state as something a checkpoint can hold."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class RandomState:
    """The global generators of torch (CPU and every CUDA device), numpy and random."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}

    def capture(self) -> None:
        """Remembers the generators' states."""
        self._state = random_state()

    def restore(self) -> None:
        """Puts them back."""
        set_random_state(self._state)


def random_state() -> dict[str, Any]:
    """The global generators' states as primitives and tensors (a checkpoint can hold them)."""
    legacy: tuple[Any, ...] = np.random.get_state(legacy=True)  # type: ignore[assignment]  # noqa: NPY002 - the global one
    name, keys, position, has_gauss, gauss = legacy
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), next_gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of :func:`random_state`. CUDA devices that are not there are passed over."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state.cpu(), device)
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))

"""What a per-example measurement notes: uses of layers, and what it covers in the end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from autotune.noise.attention import Inputs


@dataclass(frozen=True)
class Coverage:
    """What an estimate covers.

    Attributes:
        share: Part of the trainable parameters (by count of numbers) that is covered.
        excluded: Name -> why it is not.
    """

    share: float
    excluded: dict[str, str]


@dataclass
class Call:
    """One use of a layer in the forward pass that has not been back-propagated yet."""

    name: str
    layer: nn.Module
    inputs: Tensor | Inputs
    gradient: Tensor | None = None
    learned: bool = False

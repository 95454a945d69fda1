"""What one fit under learning-rate control remembers beside its stage: what was spent, and its best weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from autotune.batch.scaling import scaled_settings_kept
from autotune.snapshot import OptimizerState, Weights


@dataclass
class Costs:
    """What searching has cost so far.

    Attributes:
        trial_steps: Optimizer steps made in trials.
        spent: The same plus evaluations at their price, in steps.
        first: The part of ``spent`` that the first search took.
        seconds: Wall time of the searches.
    """

    trial_steps: int = 0
    spent: float = 0.0
    first: float = 0.0
    seconds: float = 0.0

    def pay(self, cost: float, trial_steps: int = 0, *, first: bool = False) -> None:
        """Books ``cost`` steps, ``trial_steps`` of them made in trials."""
        self.spent += cost
        self.trial_steps += trial_steps
        if first:
            self.first += cost

    def state_dict(self) -> dict[str, Any]:
        """As primitives."""
        return asdict(self)


class BestWeights:
    """The weights and the optimizer's state that a rollback goes to.

    Args:
        module: The fit's.
        optimizer: Its only one.
    """

    def __init__(self, module: Any, optimizer: Any) -> None:
        self._weights, self._optimizer, self._of = Weights(module), OptimizerState(optimizer, hooks=False), optimizer
        #: Real updates that had been made of them.
        self.step = 0

    def capture(self, step: int) -> None:
        """The present, after ``step`` updates, is the best so far."""
        self.step = step
        self._weights.capture()
        self._optimizer.capture()

    def restore(self) -> None:
        """Goes back to it; what a growth of the batch has made of Adam's betas stays, as the batch does."""
        self._weights.restore()
        with scaled_settings_kept(self._of):
            self._optimizer.restore()

    def state_dict(self) -> dict[str, Any]:
        """As primitives and tensors; call only after :meth:`capture`."""
        return {"step": self.step, "weights": self._weights.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.step = saved["step"]
        self._weights.load_state_dict(saved["weights"])
        self._optimizer.load_state_dict(saved["optimizer"])

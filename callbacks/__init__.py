"""The Lightning callbacks. Shipped as ``autotune.callbacks``; never import this folder as ``callbacks``."""

from autotune.callbacks.auto_lrs import AutoLRS
from autotune.callbacks.decision_logger import DecisionLogger
from autotune.callbacks.replay import ReplaySchedule

__all__ = ["AutoLRS", "DecisionLogger", "ReplaySchedule"]

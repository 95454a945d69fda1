"""The Lightning callbacks. Shipped as ``autotune.callbacks``; never import this folder as ``callbacks``."""

from autotune.callbacks.adaptive_batch_size import AdaptiveBatchSize
from autotune.callbacks.auto_lrs import AutoLRS
from autotune.callbacks.decision_logger import DecisionLogger
from autotune.callbacks.gradient_noise import GradientNoiseMonitor
from autotune.callbacks.replay import ReplaySchedule

__all__ = ["AdaptiveBatchSize", "AutoLRS", "DecisionLogger", "GradientNoiseMonitor", "ReplaySchedule"]

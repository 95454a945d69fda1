"""The Lightning callbacks. Shipped as ``autotune.callbacks``; never import this folder as ``callbacks``."""

from autotune.callbacks.auto_lrs import AutoLRS

__all__ = ["AutoLRS"]

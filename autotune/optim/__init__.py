"""Optimizers that torch has not."""

from autotune.optim.adagrad_norm import AdaGradNorm

__all__ = ["AdaGradNorm"]

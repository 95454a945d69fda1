"""The Lightning callbacks. Shipped as ``autotune.callbacks``; never import this folder as ``callbacks``."""

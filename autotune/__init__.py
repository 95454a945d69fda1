"""Learning rate and batch size, chosen while a PyTorch Lightning run trains.

The algorithms live here and import no Lightning; :mod:`autotune.callbacks` connects them to a ``Trainer``.
"""

from autotune.decision import Decision, read_decisions

__version__ = "0.1.0"

__all__ = ["Decision", "__version__", "read_decisions"]

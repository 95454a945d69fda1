"""One log for one run: whatever its controllers decide goes to the same file, loggers and subscribers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autotune.callbacks._trainer.facts import logging_step, warn
from autotune.decision import Decision, DecisionLog

_RUNS: weakref.WeakKeyDictionary[Any, RunLog] = weakref.WeakKeyDictionary()


class RunLog:
    """The run's decision log: ``decisions.jsonl``, the trainer's loggers, and who subscribes.

    Every controller of a trainer asks for the same object by :meth:`of`; :meth:`end` lets the trainer's next
    fit begin another. Only rank zero writes. A checkpoint holds each controller's own decisions with their places
    in the log (:meth:`saved`), so that the log of a resumed run tells one story in one order.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = weakref.proxy(trainer)
        self._places: list[tuple[int, Decision]] = []
        self._log: DecisionLog | None = None
        self._subscribers: list[Callable[[Decision], None]] = []
        self._hear_earlier: list[Callable[[Sequence[Decision]], None]] = []
        self._warned = False
        self._opened = False

    @classmethod
    def of(cls, trainer: Any) -> RunLog:
        """The log of ``trainer``'s current fit."""
        if trainer not in _RUNS:
            _RUNS[trainer] = cls(trainer)
        return _RUNS[trainer]

    @classmethod
    def end(cls, trainer: Any) -> None:
        """Forgets the log: the next fit of this trainer starts another."""
        _RUNS.pop(trainer, None)

    def restore(self, records: Iterable[Mapping[str, Any]]) -> list[Decision]:
        """Adds what :meth:`saved` said of a controller of the run that goes on here; call before :meth:`open`.

        Returns:
            The controller's decisions.
        """
        restored = [(int(record["place"]), Decision.from_dict(record)) for record in records]
        self._places = sorted([*self._places, *restored], key=lambda placed: placed[0])
        return [decision for _, decision in restored]

    def saved(self, decisions: Iterable[Decision]) -> list[dict[str, Any]]:
        """One controller's decisions as primitives, each with its place among those of all controllers."""
        places = {id(decision): place for place, decision in self._places}
        return [{**decision.to_dict(), "place": places[id(decision)]} for decision in decisions]

    def open(self) -> Path | None:
        """Creates the file with the earlier decisions in it; None on ranks that do not write.

        The directory is ``trainer.log_dir`` or, without one, ``trainer.default_root_dir``. Every rank must
        call this: the trainer broadcasts the directory.
        """
        # Asking for the directory is collective: once on every rank, however many callbacks open the log.
        if not self._opened:
            self._opened = True
            directory = Path(self._trainer.log_dir or self._trainer.default_root_dir)
            if not self._trainer.is_global_zero or getattr(self._trainer, "fast_dev_run", False):
                return None
            history = [decision for _, decision in self._places]
            for hear in self._hear_earlier:
                hear(history)
            self._log = DecisionLog(directory / "decisions.jsonl", history)
            self._complain()
        return self.path

    @property
    def path(self) -> Path | None:
        """Where the log lies; None before :meth:`open`, or on a rank that does not write."""
        return None if self._log is None else self._log.path

    def subscribe(self, listener: Callable[[Decision], None], earlier: Callable[[Sequence[Decision]], None]) -> None:
        """On rank zero ``earlier`` is called with a resumed run's first part, ``listener`` with every decision since.

        The first part is whole when the log is opened, before any decision since.
        """
        self._subscribers.append(listener)
        self._hear_earlier.append(earlier)

    def write(self, decision: Decision) -> None:
        """Records one decision everywhere."""
        self._places.append((self._places[-1][0] + 1 if self._places else 0, decision))
        if not self._trainer.is_global_zero:
            return
        if self._log is not None:
            self._log.write(decision)
            self._complain()
        for listener in self._subscribers:
            listener(decision)

    def scalars(self, values: Mapping[str, float]) -> None:
        """Sends ``autotune/<name>`` to every logger at the step Lightning's own rows have now.

        They go into ``trainer.callback_metrics`` too, on every rank, so that checkpoints and early stopping
        can monitor them.
        """
        named = {f"autotune/{name}": float(value) for name, value in values.items()}
        self._trainer.callback_metrics.update({name: torch.tensor(value) for name, value in named.items()})
        if self._trainer.is_global_zero:
            step = logging_step(self._trainer)
            for logger in self._trainer.loggers:
                logger.log_metrics(named, step=step)

    def _complain(self) -> None:
        failure = None if self._log is None else self._log.failure
        if failure is not None and not self._warned:
            self._warned = True
            warn(f"the decision log cannot be written ({failure}); training goes on without it")

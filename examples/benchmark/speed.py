"""What the controller costs beside its trials: hooks, a proposal, a rollback.

    python examples/benchmark/speed.py

Each figure is a median over repetitions in one run, beside what it is measured against.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import quickstart

from autotune.callbacks import AutoLRS
from autotune.search import LRSearch, Outcome
from autotune.snapshot import Snapshot


class Timed(AutoLRS):
    """Notes how long each update's hooks take, and the time from one update to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: list[float] = []
        self.updates: list[float] = []
        self._last = 0.0

    def on_train_batch_start(self, *args) -> None:
        now = time.perf_counter()
        if self._last:
            self.updates.append(now - self._last)
        super().on_train_batch_start(*args)
        self._last = time.perf_counter()
        self.hooks.append(self._last - now)

    def on_train_batch_end(self, *args) -> None:
        now = time.perf_counter()
        super().on_train_batch_end(*args)
        self.hooks[-1] += time.perf_counter() - now


def hooks(steps: int) -> tuple[float, float, float]:
    """Median and mean seconds an update spends in our hooks where nothing was tried, and an update's median."""
    args = argparse.Namespace(seed=0, max_steps=steps, device="cpu", quiet=True)
    callback = Timed()
    quickstart.fit(quickstart.ByteGPT(), steps, args, callback, Path("runs/speed"))
    update = statistics.median(callback.updates)
    plain = [seconds for seconds in callback.hooks if seconds < 0.5 * update]  # the others ran trials or probes
    return statistics.median(plain), statistics.mean(plain), update


def proposal(observations: int = 30) -> float:
    """Median seconds to take in a trial and propose the next, with so many observations."""
    search = LRSearch(candidates=observations + 10)
    state = search.init(5.0, 100, 1000)
    generator = torch.Generator().manual_seed(0)
    times = []
    for index in range(observations + 5):
        began = time.perf_counter()
        asked = search.ask(state)
        assert asked is not None
        loss = 2.0 + 0.1 * (asked.log_lr + 5.0) ** 2 + 0.02 * float(torch.randn((), generator=generator))
        state = search.tell(state, Outcome(asked.log_lr, 100, loss, 100))
        if index >= observations:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def rollback(width: int) -> tuple[float, float, float]:
    """Median seconds of a rollback and of a plain copy of the same bytes, and the bytes."""
    module = torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(4)])
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.randn(8, width)).sum().backward()
    optimizer.step()
    snapshot = Snapshot.of_training(module, optimizer)
    snapshot.capture()
    moved = [p.detach() for p in module.parameters()] + [p.grad for p in module.parameters()]
    moved += [v for state in optimizer.state.values() for v in state.values()]
    copies = [tensor.clone() for tensor in moved]

    def plain() -> None:
        for target, source in zip(moved, copies, strict=True):
            target.copy_(source)

    def median(action) -> float:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            action()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return median(snapshot.restore), median(plain), sum(t.nbytes for t in moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="updates of the quickstart to time (800)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    median, mean, update = hooks(args.steps)
    print(f"hooks outside trials: median {1e6 * median:.0f} us, mean {1e6 * mean:.0f} us of {1e3 * update:.1f} ms an ")
    print(f"    update: {median / update:.2%} (median), {mean / update:.2%} (mean)")
    print(f"proposal with 30 observations: {1e3 * proposal():.0f} ms")
    for width in (128, 1024):
        restore, copy, size = rollback(width)
        print(f"rollback of {size / 2**20:.1f} MiB: {1e3 * restore:.2f} ms, {restore / copy:.2f} x a plain copy")


if __name__ == "__main__":
    main()

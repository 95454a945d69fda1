"""Real data that every machine has: no download, the same tensors on every call.

Each source returns ``(train, validation)``, two :class:`TensorBatches`. Sizes are examples, not batches.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


class TensorBatches(Dataset[Any]):
    """Pairs of tensors that are fetched a whole batch at a time.

    ``DataLoader`` calls ``__getitems__`` with all the indices of a batch, so that a batch costs one gather and
    not one Python call an example; pass :func:`as_is` as its ``collate_fn``.
    """

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        rows = torch.as_tensor(indices)
        return self.inputs[rows], self.targets[rows]


class ByteWindows(TensorBatches):
    """Windows of ``context`` bytes and the same windows one byte later, cut from one long text."""

    def __init__(self, text: Tensor, context: int) -> None:
        starts = torch.arange(0, len(text) - context - 1, context)
        rows = text.unfold(0, context + 1, 1)[starts]
        super().__init__(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def as_is(batch: Any) -> Any:
    """Collate function for data sets that already return batches."""
    return batch


def _pair(inputs: Any, targets: Any, train: int) -> tuple[TensorBatches, TensorBatches]:
    x = torch.as_tensor(np.asarray(inputs), dtype=torch.float32)
    y = torch.as_tensor(np.asarray(targets))
    y = y.float() if y.is_floating_point() else y.long()
    return TensorBatches(x[:train], y[:train]), TensorBatches(x[train:], y[train:])


@functools.cache
def stdlib_bytes(context: int = 64, limit: int = 1_500_000, part: str = "[!t]*") -> tuple[ByteWindows, ByteWindows]:
    """The standard library's top-level modules as ASCII bytes; every tenth file is kept for validation.

    Args:
        context: bytes in a window.
        limit: bytes of training text (validation gets at most 64 KiB).
        part: glob over file stems; two disjoint globs make a source and a target for fine-tuning.
    """
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob(f"{part}.py"))
    texts: list[list[bytes]] = [[], []]
    for i, file in enumerate(files):
        texts[i % 10 == 5].append(file.read_bytes())
    cut = []
    for text, size in zip(texts, (limit, 65_536), strict=True):
        raw = np.frombuffer(b"\n".join(text)[:size], dtype=np.uint8)
        cut.append(torch.from_numpy(np.where(raw < 128, raw, 63).astype(np.int64)))
    return ByteWindows(cut[0], context), ByteWindows(cut[1], context)


@functools.cache
def mnist1d(
    flip: float = 0.0, train: int = 4000, seed: int = 42, size: int = 5000, mirror: bool = False
) -> tuple[TensorBatches, TensorBatches]:
    """MNIST-1D (Greydanus and Kobak 2020): 40 samples a signal, 10 classes; ``flip`` labels replaced at random.

    ``mirror`` turns the signals round in time and upside down: a neighbouring task to fine-tune on.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.seed, args.num_samples, args.train_split = seed, size, 0.8
    # The package seeds numpy's global generator: give it back as it was.
    state = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    made = make_dataset(args)
    np.random.set_state(state[0])  # noqa: NPY002
    torch.set_rng_state(state[1])
    x, y = np.concatenate([made["x"], made["x_test"]]), np.concatenate([made["y"], made["y_test"]])
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < flip, rng.integers(0, 10, len(y)), y)
    x = -x[:, ::-1] if mirror else x
    held_out = size // 5
    x = np.concatenate([x[:train], x[-held_out:]])
    y = np.concatenate([y[:train], y[-held_out:]])
    return _pair(x, y, train)


@functools.cache
def digits(train: int = 1297, flip: float = 0.0, reconstruct: bool = False) -> tuple[TensorBatches, TensorBatches]:
    """scikit-learn's 8x8 digits in [0, 1]; 500 held out. ``reconstruct`` makes the image its own target."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    found = load_digits()
    order = rng.permutation(len(found.target))
    x, y = found.data[order] / 16.0, found.target[order]
    y = np.where(rng.random(len(y)) < flip, rng.integers(0, 10, len(y)), y)
    x, y = np.concatenate([x[:train], x[-500:]]), np.concatenate([y[:train], y[-500:]])
    return _pair(x, x.astype(np.float32) if reconstruct else y, train)


@functools.cache
def friedman(train: int = 2000, noise: float = 1.0, kind: int = 1) -> tuple[TensorBatches, TensorBatches]:
    """Friedman's regression number ``kind`` (1 or 2), inputs and target standardised; 1000 held out."""
    from sklearn.datasets import make_friedman1, make_friedman2

    total = train + 1000
    if kind == 1:
        x, y = make_friedman1(total, noise=noise, random_state=0)
    else:
        x, y = make_friedman2(total, noise=noise, random_state=0)
    x, y = (x - x[:train].mean(0)) / x[:train].std(0), (y - y[:train].mean()) / y[:train].std()
    return _pair(x, y.astype(np.float32)[:, None], train)


@functools.cache
def parity(
    bits: int = 24, relevant: int = 3, train: int = 8000, flip: float = 0.1
) -> tuple[TensorBatches, TensorBatches]:
    """Sparse parity: the label is the parity of ``relevant`` hidden bits; ``flip`` keeps the best loss off zero."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, (train + 1000, bits))
    y = x[:, :relevant].sum(1) % 2
    y = np.where(rng.random(len(y)) < flip, 1 - y, y)
    return _pair(2.0 * x - 1.0, y.astype(np.int64), train)


@functools.cache
def pixels(index: int = 0, noise: float = 0.05) -> tuple[TensorBatches, TensorBatches]:
    """Coordinates to grey value over a strip of ten digits: few noisy points, a model that overfits them."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(index)
    strip = np.concatenate(list(load_digits().images[10 * index : 10 * index + 10] / 16.0), axis=1)
    rows, columns = np.meshgrid(np.linspace(-1, 1, 8), np.linspace(-4, 4, 80), indexing="ij")
    x = np.stack([rows.ravel(), columns.ravel()], 1)
    y = strip.ravel() + noise * rng.standard_normal(strip.size)
    order = rng.permutation(len(y))
    return _pair(x[order], y[order, None].astype(np.float32), 448)


@functools.cache
def ratings(
    train: int = 12_000, rows: int = 300, columns: int = 200, rank: int = 5, noise: float = 0.3
) -> tuple[TensorBatches, TensorBatches]:
    """Noisy entries of a matrix of low rank, as (row, column) -> value; 2000 held out."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((rows, rank)), rng.standard_normal((columns, rank))
    total = train + 2000
    i, j = rng.integers(0, rows, total), rng.integers(0, columns, total)
    y = (left[i] * right[j]).sum(1) / 2.0 + noise * rng.standard_normal(total)
    x, y = torch.from_numpy(np.stack([i, j], 1)), torch.from_numpy(y.astype(np.float32))[:, None]
    return TensorBatches(x[:train], y[:train]), TensorBatches(x[train:], y[train:])


@functools.cache
def cancer(train: int = 400) -> tuple[TensorBatches, TensorBatches]:
    """scikit-learn's breast cancer measurements, thirty standardised features, two classes; the rest held out."""
    from sklearn.datasets import load_breast_cancer

    return _tabular(load_breast_cancer(), train)


@functools.cache
def diabetes(train: int = 300) -> tuple[TensorBatches, TensorBatches]:
    """scikit-learn's diabetes progression, ten features to one number, both standardised; the rest held out."""
    from sklearn.datasets import load_diabetes

    return _tabular(load_diabetes(), train)


def _tabular(found: Any, train: int) -> tuple[TensorBatches, TensorBatches]:
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = found.data[order], found.target[order]
    x = (x - x[:train].mean(0)) / x[:train].std(0)
    if np.issubdtype(y.dtype, np.floating):
        y = ((y - y[:train].mean()) / y[:train].std()).astype(np.float32)[:, None]
    return _pair(x, y, train)


@functools.cache
def heavy_tails(train: int = 3000, freedom: float = 1.5) -> tuple[TensorBatches, TensorBatches]:
    """Friedman's first regression under Student's t noise of ``freedom`` degrees; standardised by the clean target."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(train + 1000, noise=0.0, random_state=1)
    noise = np.random.default_rng(1).standard_t(freedom, len(y))
    y = (y - y[:train].mean()) / y[:train].std() + 0.2 * noise
    return _pair((x - 0.5) / 0.29, y.astype(np.float32)[:, None], train)


@functools.cache
def noisy_digits(noise: float = 0.4, train: int = 1297) -> tuple[TensorBatches, TensorBatches]:
    """Digits under Gaussian noise -> the clean digits; 500 held out."""
    clean = [part.inputs for part in digits(train)]
    generator = torch.Generator().manual_seed(0)
    made = [TensorBatches(x + noise * torch.randn(x.shape, generator=generator), x) for x in clean]
    return made[0], made[1]


@functools.cache
def sorting(symbols: int = 16, length: int = 10, train: int = 20_000) -> tuple[TensorBatches, TensorBatches]:
    """Random sequences -> the same sequences sorted; 1000 held out."""
    x = np.random.default_rng(0).integers(0, symbols, (train + 1000, length))
    rows, targets = torch.from_numpy(x), torch.from_numpy(np.sort(x, 1))
    return TensorBatches(rows[:train], targets[:train]), TensorBatches(rows[train:], targets[train:])


@functools.cache
def adding(length: int = 25, train: int = 10_000, noise: float = 0.1) -> tuple[TensorBatches, TensorBatches]:
    """Hochreiter and Schmidhuber's adding problem: the sum of the two marked numbers of a sequence; 1000 held out.

    ``noise`` on the sum keeps the best loss off zero.
    """
    rng = np.random.default_rng(0)
    total = train + 1000
    numbers, marks = rng.random((total, length)), np.zeros((total, length))
    for half in (slice(0, length // 2), slice(length // 2, length)):
        places = np.arange(length)[half]
        marks[np.arange(total), rng.choice(places, total)] = 1.0
    sums = (numbers * marks).sum(1) + noise * rng.standard_normal(total)
    return _pair(np.stack([numbers, marks], 2), sums.astype(np.float32)[:, None], train)


@functools.cache
def authors(context: int = 64, grams: int = 4096, train: int = 8000) -> tuple[TensorBatches, TensorBatches]:
    """Hashed byte trigrams of a window of one of eight of the standard library's modules -> which; a fifth held out."""
    names = ("argparse", "ast", "inspect", "ipaddress", "smtplib", "statistics", "tarfile", "typing")
    folder = Path(sysconfig.get_paths()["stdlib"])
    rows, labels = [], []
    for label, name in enumerate(names):
        raw = np.frombuffer((folder / f"{name}.py").read_bytes(), dtype=np.uint8).astype(np.int64)
        hashed = (raw[:-2] * 65_599 + raw[1:-1] * 257 + raw[2:]) % grams
        cut = hashed[: len(hashed) // context * context].reshape(-1, context)
        rows.append(cut)
        labels.append(np.full(len(cut), label))
    x, y = np.concatenate(rows), np.concatenate(labels)
    order = np.random.default_rng(0).permutation(len(y))
    x, y = torch.from_numpy(x[order]), torch.from_numpy(y[order])
    cut_at = min(train, len(y) * 4 // 5)  # of some 10,600 windows `train` leaves a quarter
    return TensorBatches(x[:cut_at], y[:cut_at]), TensorBatches(x[cut_at:], y[cut_at:])


@functools.cache
def unscaled(name: str) -> tuple[TensorBatches, TensorBatches]:
    """Data as they come: Friedman's regressions (targets from 0 to 30, or to 1700), digits of 0 to 255."""
    from sklearn.datasets import load_digits, make_friedman1, make_friedman2

    if name == "digits":
        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.target))
        return _pair(found.data[order] * 255.0 / 16.0, found.target[order], 1297)
    if name == "friedman1":
        x, y = make_friedman1(3000, noise=1.0, random_state=0)
    else:
        x, y = make_friedman2(3000, noise=50.0, random_state=0)
        x = (x - x[:2000].mean(0)) / x[:2000].std(0)
    return _pair(x, y.astype(np.float32)[:, None], 2000)


SOURCES = {
    source.__name__: source
    for source in (
        *(stdlib_bytes, mnist1d, digits, friedman, parity, pixels, ratings),
        *(cancer, diabetes, heavy_tails, noisy_digits, sorting, adding, authors, unscaled),
    )
}

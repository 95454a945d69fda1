"""The record every producer of gradient noise hands over, and the pure formulas that read it.

============  ==========================================  ========  =======================================
symbol        meaning                                     shape     unit, sign
============  ==========================================  ========  =======================================
``b_m``       examples in chunk m                         scalar    examples
``g_m``       mean gradient of chunk m                    P         of the *mean* loss, unscaled
``g``         gradient of the update, ``sum_m w_m g_m``   P         the same; ``w_m = b_m / B`` unless told
``M``         ``chunks``                                  scalar    count
``B``         ``examples = sum_m b_m``                    scalar    examples
``B_e``       ``effective = 1 / sum_m w_m^2 / b_m``       scalar    examples; ``B`` for the b-weighted mean
``S``         ``chunk_sq = sum_m b_m |g_m|^2``            G         examples x gradient^2
``|g|^2``     ``mean_sq``                                 G         gradient^2
``I``         ``inner_sq = sum_m b_m (g_m . g)^2``        scalar    examples x gradient^4
``V``         :meth:`GradientRecord.variance`             G         gradient^2, one example's
``|G|^2``     :meth:`GradientRecord.signal`               G         gradient^2, may be negative
============  ==========================================  ========  =======================================

``G`` is the number of groups of parameters that are told apart, 1 by default: everything here is linear in
the squared norms, so groups add up to the whole. A chunk is a micro-batch, one rank's micro-batch, or one
example (``b_m = 1``); P is the number of parameters.

Two expectations carry all of it: ``E|g_m|^2 = |G|^2 + V/b_m`` and ``E|g|^2 = |G|^2 + V/B_e``. Solved for
the two unknowns they give McCandlish et al. 2018 (arXiv 1812.06162, appendix A) with any number of uneven
chunks:

    V     = (S - B |g|^2) / (M - B/B_e)
    |G|^2 = |g|^2 - V/B_e
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkSums:
    """What adds up over chunks, wherever they were computed.

    Attributes:
        examples: ``B``, shape ().
        chunks: ``M``, shape ().
        chunk_sq: ``S``, shape (G,).
        inner_sq: ``I``, shape (); NaN where no producer computed it.
    """

    examples: Tensor
    chunks: Tensor
    chunk_sq: Tensor
    inner_sq: Tensor

    @classmethod
    def of(
        cls,
        sizes: Sequence[float],
        squared_norms: Tensor,
        inner: Tensor | None = None,
    ) -> ChunkSums:
        """Sums over chunks that lie side by side.

        Args:
            sizes: ``b_m`` of the M chunks, in examples.
            squared_norms: ``|g_m|^2``, shape (M,) or (M, G).
            inner: ``g_m . g``, shape (M,), where it is known.
        """
        squares = squared_norms if squared_norms.ndim == 2 else squared_norms[:, None]
        weights = torch.as_tensor(sizes, dtype=squares.dtype, device=squares.device)
        return cls(
            examples=weights.sum(),
            chunks=torch.full_like(weights.sum(), len(sizes)),
            chunk_sq=weights @ squares,
            inner_sq=torch.full_like(weights.sum(), torch.nan) if inner is None else weights @ inner.square(),
        )

    def __add__(self, other: ChunkSums) -> ChunkSums:
        return ChunkSums(
            self.examples + other.examples,
            self.chunks + other.chunks,
            self.chunk_sq + other.chunk_sq,
            self.inner_sq + other.inner_sq,
        )

    def spoiled(self) -> ChunkSums:
        """The same with nothing known in it: whatever it is added to is left out by its reader."""
        return replace(self, chunk_sq=torch.full_like(self.chunk_sq, torch.nan))

    def pack(self) -> Tensor:
        """One flat vector, shape (3 + G,), so that ranks can be joined by a single sum."""
        return torch.cat([torch.stack([self.examples, self.chunks, self.inner_sq]), self.chunk_sq])

    @classmethod
    def unpack(cls, packed: Tensor) -> ChunkSums:
        """The inverse of :meth:`pack`."""
        return cls(packed[0], packed[1], packed[3:], packed[2])

    def close(
        self, mean_sq: Tensor, effective: float | None = None, coordinate: Tensor | None = None
    ) -> GradientRecord:
        """The record of the joined chunks, once the update's gradient is known.

        Args:
            mean_sq: ``|g|^2``, shape (G,) or ().
            effective: ``B_e`` in examples; None for the b-weighted mean, where it is ``B``.
            coordinate: See :attr:`GradientRecord.coordinate`.
        """
        return GradientRecord(
            sums=self,
            mean_sq=mean_sq.reshape(-1),
            effective=self.examples if effective is None else torch.full_like(self.examples, effective),
            coordinate=torch.full_like(self.examples, torch.nan) if coordinate is None else coordinate,
        )


@dataclass(frozen=True)
class GradientRecord:
    """Sufficient statistics of one update's gradient. All tensors lie on one device; reading never syncs.

    Attributes:
        sums: What adds up over chunks.
        mean_sq: ``|g|^2``, shape (G,).
        effective: ``B_e`` in examples, shape ().
        coordinate: ``max_j V_j / g_j^2`` or the stated quantile of it, in examples, shape (); NaN where no
            producer computed it.
    """

    sums: ChunkSums
    mean_sq: Tensor
    effective: Tensor
    coordinate: Tensor

    def merge(self, other: GradientRecord, mean_sq: Tensor) -> GradientRecord:
        """The record of two sets of chunks of the *same* update.

        Args:
            other: The other set.
            mean_sq: ``|g|^2`` of the joined, b-weighted gradient. It cannot be had from the two records
                alone: it depends on the angle between their gradients.
        """
        return (self.sums + other.sums).close(mean_sq)

    def variance(self) -> Tensor:
        """``V`` per group, shape (G,): unbiased, non-negative for the b-weighted mean up to rounding.

        Non-finite where there is one chunk only: nothing is known then.
        """
        sums = self.sums
        freedom = sums.chunks - sums.examples / self.effective
        return (sums.chunk_sq - sums.examples * self.mean_sq) / freedom

    def signal(self) -> Tensor:
        """``|G|^2`` per group, shape (G,), debiased: ``|g|^2 - V/B_e``."""
        return self.mean_sq - self.variance() / self.effective

    def inner_product_variance(self) -> Tensor:
        """``Var_i(g_i . g)``, shape (): Bollapragada et al. 2018 (arXiv 1710.11258, eq. 2.6).

        Taken over the whole gradient. The released AdAdaGrad code sums it per parameter tensor instead, which
        loses the covariance between tensors. From chunks: ``b Var_m(g_m . g)``.
        """
        sums = self.sums
        square = self.mean_sq.sum().square()
        return (sums.inner_sq - sums.examples * square) / (sums.chunks - sums.examples / self.effective)

    def orthogonal_variance(self) -> Tensor:
        """``Var_i(g_i - (g_i.g/|g|^2) g)``, shape (): what of ``V`` is not along ``g``."""
        return self.variance().sum() - self.inner_product_variance() / self.mean_sq.sum()

    def total(self) -> GradientRecord:
        """The same record with its groups added up."""
        sums = replace(self.sums, chunk_sq=self.sums.chunk_sq.sum(0, keepdim=True))
        return replace(self, sums=sums, mean_sq=self.mean_sq.sum(0, keepdim=True))

    def pack(self) -> Tensor:
        """One flat vector, shape (5 + 2G,): the whole record in one copy to the host."""
        return torch.cat([self.sums.pack(), torch.stack([self.effective, self.coordinate]), self.mean_sq])

    @classmethod
    def unpack(cls, packed: Tensor) -> GradientRecord:
        """The inverse of :meth:`pack`."""
        groups = (len(packed) - 5) // 2
        head = 3 + groups
        return cls(ChunkSums.unpack(packed[:head]), packed[head + 2 :], packed[head], packed[head + 1])


def two_batch_estimate(small_sq: float, big_sq: float, small: float, big: float) -> tuple[float, float]:
    """``(V, |G|^2)`` from mean squared gradient norms at two batch sizes.

    McCandlish et al. 2018, appendix A.1, as printed there; :class:`GradientRecord` is the same for even
    chunks (a test holds the two together).

    Args:
        small_sq: Mean of ``|g_b|^2``.
        big_sq: ``|g_B|^2``.
        small: ``b`` in examples.
        big: ``B`` in examples, above ``small``.

    >>> two_batch_estimate(small_sq=3.0, big_sq=1.5, small=2, big=8)
    (4.0, 1.0)
    """
    variance = (small_sq - big_sq) / (1 / small - 1 / big)
    return variance, (big * big_sq - small * small_sq) / (big - small)


def kish_effective(weights: Sequence[float], sizes: Sequence[float]) -> float:
    """``B_e``: how many examples a gradient with these chunk weights is worth (Kish's effective sample size).

    >>> kish_effective([0.5, 0.5], [4, 4])
    8.0
    >>> round(kish_effective([0.5, 0.5], [4, 1]), 3)
    3.2
    """
    total = sum(weights)
    return 1.0 / sum((weight / total) ** 2 / size for weight, size in zip(weights, sizes, strict=True))

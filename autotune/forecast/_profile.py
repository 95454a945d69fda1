"""The arithmetic behind :mod:`autotune.forecast.curve`; its notation table holds here too.

Everything is in normalised units: x in spans of the steps, y in ranges of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import stdtr

Array = NDArray[np.float64]
Family = Literal["exponential", "power"]

_NODES = {"exponential": (61,), "power": (31, 15)}
_BOX = {
    "exponential": ((math.log(0.01), math.log(100.0)),),
    "power": ((math.log(1e-3), math.log(100.0)), (math.log(0.05), math.log(20.0))),
}
_LOG_WEIGHT_KEPT = -14.0
_ZOOMS = 8


@dataclass(frozen=True)
class Nodes:
    """The profile at K shapes, in normalised units."""

    theta: Array  # (K, d)
    a: Array  # (K,)
    c: Array  # (K,)
    rss: Array  # (K,) weighted residual sum of squares
    covariance: Array  # (K, 3) of (a, c): var a, cov, var c, per unit of noise variance


@dataclass(frozen=True)
class Mixture:
    """The predictive distribution: a Student-t at each node, weighted by the profile likelihood."""

    nodes: Nodes
    weight: Array  # (K,) sums to 1
    best: int
    family: Family
    variance: float  # of one observation, normalised
    inflation: float  # (1 + r) / (1 - r)
    dof: int
    shift: float
    scale: float
    bound: float  # normalised; -inf without one

    def at(self, x: float, level: float, noisy: bool) -> tuple[float, float, float]:
        with np.errstate(all="ignore"):
            phi = _basis(np.array([x]), self.nodes.theta, self.family)[:, 0]
            mean = self.nodes.a * phi + self.nodes.c
            var_a, cov, var_c = self.nodes.covariance.T
            spread = self.inflation * (var_a * phi**2 + 2.0 * cov * phi + var_c)
            sd = np.sqrt(self.variance * (np.maximum(spread, 0.0) + float(noisy))) + 1e-15
        reach = 1e3 * float(sd.max())
        ends = [
            brentq(
                lambda v, q=q: float(self.weight @ stdtr(self.dof, (v - mean) / sd)) - q,
                float(mean.min()) - reach,
                float(mean.max()) + reach,
                xtol=1e-14,
            )
            for q in (0.5 - level / 2, 0.5 + level / 2)
        ]
        value = float(mean[self.best])
        low = max(min(ends[0], value), min(self.bound, value))
        return tuple(self.shift + self.scale * v for v in (value, low, max(ends[1], value)))  # type: ignore[return-value]


def _tail(y: Array) -> int:
    return max(3, y.size // 4)


def last_smoothed(y: Array) -> float:
    """Mean of the last quarter; a falling curve's last value lies a little below it."""
    tail = y[-_tail(y) :]
    return float(np.sum(tail / tail.size))


def _basis(x: Array, theta: Array, family: Family) -> Array:
    """Basis at K shapes and n places, shape (K, n)."""
    ratio = x[None, :] / np.exp(theta[:, :1])
    if family == "exponential":
        return np.asarray(np.exp(-ratio))
    return np.asarray(np.exp(-np.exp(theta[:, 1:]) * np.log1p(ratio)))


def profile(x: Array, y: Array, w: Array, family: Family, bound: float, dof: int) -> tuple[Nodes, Array, float]:
    """Nodes over theta that resolve the profile likelihood, its logarithm there, and the noise inflation."""
    limits = np.array(_BOX[family])
    frame, box = np.eye(len(limits)), limits
    for _ in range(_ZOOMS):
        theta, step = _grid(box, frame, limits, _NODES[family])
        nodes, residual = _project(x, y, w, theta, family, bound)
        log_weight = _log_weight(nodes.rss, dof, 1.0)
        kept = theta[log_weight > _LOG_WEIGHT_KEPT]
        if frame.size > 1 and len(kept) > 2:
            # Scale and exponent of a power law trade against each other: turn the grid along their ridge.
            frame = np.linalg.eigh(np.cov(kept.T) + np.diag(step**2) * 1e-3)[1]
        margin, along = np.abs(frame.T) @ step, kept @ frame
        zoomed = np.stack([along.min(0) - margin, along.max(0) + margin], axis=1)
        if np.prod(np.ptp(zoomed, axis=1)) > 0.6 * np.prod(np.ptp(box, axis=1)):
            break
        box = zoomed
    # Only at the best shape do correlated residuals mean correlated noise and not a bad shape.
    inflation = _inflation(residual)
    if inflation > 1.0:
        wider = 0.5 * math.sqrt(inflation) * np.ptp(box, axis=1)
        box = np.stack([box.mean(1) - wider, box.mean(1) + wider], axis=1)
        theta, _ = _grid(box, frame, limits, _NODES[family])
        nodes, _ = _project(x, y, w, theta, family, bound)
    return nodes, _log_weight(nodes.rss, dof, inflation), inflation


def _grid(box: Array, frame: Array, limits: Array, counts: Sequence[int]) -> tuple[Array, Array]:
    """Nodes of a box turned by ``frame``, inside the limits, shape (K, d), and their spacing, shape (d,)."""
    if frame.size == 1:
        box = np.clip(box, limits[0, 0], limits[0, 1])
    axes = [np.linspace(low, high, k) for (low, high), k in zip(box, counts, strict=True)]
    theta = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1) @ frame.T
    theta = theta[((theta >= limits[:, 0] - 1e-9) & (theta <= limits[:, 1] + 1e-9)).all(1)]
    return theta, np.abs(frame) @ np.array([axis[1] - axis[0] for axis in axes])


def _log_weight(rss: Array, dof: int, inflation: float) -> Array:
    floor = max(float(rss.min()), 1e-26 * dof)
    return np.asarray(-0.5 * dof / inflation * np.log(np.maximum(rss, floor) / floor))


def _inflation(residual: Array) -> float:
    """(1 + r) / (1 - r): by how much correlated residuals carry less information than independent ones."""
    energy = float(residual @ residual)
    r = float(residual[1:] @ residual[:-1]) / energy if energy > 0 else 0.0
    # Below twice its standard error r is noise.
    r = min(r, 0.9) if r > 2.0 / math.sqrt(residual.size) else 0.0
    return (1.0 + r) / (1.0 - r)


def _project(x: Array, y: Array, w: Array, theta: Array, family: Family, bound: float) -> tuple[Nodes, Array]:
    """Best (a, c) under their bounds at each shape, and the residuals at the best shape, shape (n,)."""
    phi = _basis(x, theta, family)
    total = float(w.sum())
    mean_y, mean_phi = float(w @ y) / total, phi @ w / total
    centred = phi - mean_phi[:, None]
    s_cc = np.maximum((centred**2) @ w, 1e-300)
    s_pp = np.maximum((phi**2) @ w, 1e-300)
    free_a = (centred @ (w * (y - mean_y))) / s_cc
    free_c = mean_y - free_a * mean_phi
    ceiling = max(last_smoothed(y), bound)
    inside = (free_a >= 0) & (free_c >= bound) & (free_c <= ceiling)
    faces_a, faces_c = [np.zeros_like(free_a)], [np.full_like(free_a, max(mean_y, bound))]
    for limit in (bound, ceiling):
        faces_a.append(np.maximum(phi @ (w * (y - limit)) / s_pp, 0.0))
        faces_c.append(np.full_like(free_a, limit))
    a, c = np.stack([free_a, *faces_a]), np.stack([free_c, *faces_c])
    rss = np.stack([((y - ai[:, None] * phi - ci[:, None]) ** 2) @ w for ai, ci in zip(a, c, strict=True)])
    rss[0, ~inside] = np.inf
    rss[2] = np.nan_to_num(rss[2], nan=np.inf)  # the face of a bound that is not there
    face = np.argmin(rss, axis=0)
    pick = (face, np.arange(face.size))
    a, c, rss = a[pick], c[pick], rss[pick]
    zero = np.zeros_like(a)
    covariances = np.stack(
        [
            np.stack([1 / s_cc, -mean_phi / s_cc, 1 / total + mean_phi**2 / s_cc], axis=1),
            np.stack([zero, zero, zero + 1 / total], axis=1),
            np.stack([1 / s_pp, zero, zero], axis=1),
            # The ceiling is itself a mean of noisy losses.
            np.stack([1 / s_pp, zero, zero + 1 / _tail(y)], axis=1),
        ]
    )
    best = int(np.argmin(rss))
    residual = np.sqrt(w) * (y - a[best] * phi[best] - c[best])
    return Nodes(theta, a, c, rss, covariances[pick]), residual

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
from scipy.optimize import brentq, minimize, minimize_scalar
from scipy.special import stdtr

Array = NDArray[np.float64]
Family = Literal["exponential", "power"]

_NODES = {"exponential": (61,), "power": (31, 15)}
_BOX = {
    "exponential": ((math.log(0.01), math.log(100.0)),),
    "power": ((math.log(1e-3), math.log(100.0)), (math.log(0.05), math.log(20.0))),
}
_LOG_WEIGHT_KEPT = -14.0
_ZOOMS = 6
_REACH = 6.0  # standard deviations from the best shape to the first fine grid's edge
_VARIANCE_FLOOR = 1e-26  # of an exact curve, in squared ranges: its residuals are rounding


@dataclass(frozen=True)
class Problem:
    """What is to be fitted, in normalised units."""

    x: Array  # (n,)
    y: Array  # (n,)
    w: Array  # (n,) of mean 1
    family: Family
    bound: float  # -inf without one


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
    log_weight: Array  # (K,)
    best: int
    family: Family
    variance: float  # of an observation of weight 1, normalised
    inflation: float  # (1 + r) / (1 - r)
    dof: int
    shift: float
    scale: float
    floor: float  # in units of the loss; -inf without one
    future: float | None = None  # variance of an observation to come, if not that of one of weight 1

    @property
    def noise(self) -> float:
        """Variance of an observation to come."""
        return max(self.variance if self.future is None else self.future, _VARIANCE_FLOOR)

    def spread(self, x: Array, y: Array) -> float:
        """Mean squared distance of observations from the best curve."""
        phi = _basis(x, self.nodes.theta[self.best : self.best + 1], self.family)[0]
        return float(np.mean((y - self.nodes.a[self.best] * phi - self.nodes.c[self.best]) ** 2))

    def at(self, x: float, level: float, noisy: bool) -> tuple[float, float, float]:
        """Value of the curve at ``x`` and ends of the central interval, in units of the loss."""
        weight = np.exp(self.log_weight - self.log_weight.max())
        weight /= weight.sum()
        with np.errstate(all="ignore"):
            phi = _basis(np.array([x]), self.nodes.theta, self.family)[:, 0]
            mean = self.nodes.a * phi + self.nodes.c
            var_a, cov, var_c = self.nodes.covariance.T
            spread = self.inflation * (var_a * phi**2 + 2.0 * cov * phi + var_c)
            sd = np.sqrt(max(self.variance, _VARIANCE_FLOOR) * np.maximum(spread, 0.0) + noisy * self.noise) + 1e-15
        reach = 1e3 * float(sd.max())
        ends = [
            brentq(
                lambda v, q=q: float(weight @ stdtr(self.dof, (v - mean) / sd)) - q,
                float(mean.min()) - reach,
                float(mean.max()) + reach,
                xtol=1e-14,
            )
            for q in (0.5 - level / 2, 0.5 + level / 2)
        ]
        value, low, high = (self.shift + self.scale * v for v in (float(mean[self.best]), *ends))
        value = max(value, self.floor)
        return value, max(min(low, value), self.floor), max(high, value)


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


def profile(problem: Problem, dof: int) -> tuple[Nodes, Array, float]:
    """Nodes over theta that resolve the profile likelihood, its logarithm there, and the noise inflation.

    A coarse grid finds the region and Nelder-Mead its best shape; there the Jacobian of the residuals gives the
    axes and widths of a fine grid, which is stretched or shrunk until it holds the likelihood's mass.
    """
    limits = np.array(_BOX[problem.family])
    coarse = _grid(limits, np.eye(len(limits)), limits, _NODES[problem.family])
    start = coarse[int(np.argmin(_project(problem, coarse)[0].rss))]
    best = _polished(problem, start, limits)
    residual = _project(problem, best[None])[1]
    inflation = _inflation(residual)
    variance = max(float(residual @ residual) / dof, _VARIANCE_FLOOR)
    frame, sd = _axes(problem, best, variance * inflation)
    centre = best @ frame
    half = np.minimum(_REACH * sd, np.ptp(limits, axis=1).max())
    box = np.stack([centre - half, centre + half], axis=1)
    for _ in range(_ZOOMS):
        # The best shape is a node of its own, so that no grid can miss it.
        theta = np.concatenate([best[None], _grid(box, frame, limits, _NODES[problem.family])])
        nodes, _ = _project(problem, theta)
        log_weight = _log_weight(nodes.rss, dof, inflation)
        along = theta[log_weight > _LOG_WEIGHT_KEPT] @ frame
        step = np.ptp(box, axis=1) / (np.array(_NODES[problem.family]) - 1)
        wanted = np.stack([along.min(0) - step, along.max(0) + step], axis=1)
        grown = np.where(np.stack([wanted[:, 0] < box[:, 0] + step, wanted[:, 1] > box[:, 1] - step], axis=1), 1, 0)
        room = 0.5 * np.ptp(box, axis=1)[:, None] * grown * np.array([[-1.0, 1.0]])
        new = _within(wanted + room, frame, limits)
        if (np.abs(new - box) < 0.25 * np.ptp(box, axis=1)[:, None]).all():
            break
        box = new
    return nodes, log_weight, inflation


def _polished(problem: Problem, start: Array, limits: Array) -> Array:
    """The best shape near ``start``, a node of the coarse grid."""
    step = np.ptp(limits, axis=1) / (np.array(_NODES[problem.family]) - 1)

    def rss(theta: Array) -> float:
        return float(_project(problem, np.clip(theta, *limits.T)[None])[0].rss[0])

    if start.size == 1:
        edges = np.clip([start[0] - step[0], start[0] + step[0]], *limits[0])
        found = minimize_scalar(lambda v: rss(np.array([v])), bounds=edges, method="bounded", options={"xatol": 1e-7})
        return np.array([found.x])
    simplex = np.stack([start, *(start + np.diag(step))])
    options = {"initial_simplex": simplex, "xatol": 1e-6, "fatol": math.inf, "maxfev": 250}
    return np.asarray(np.clip(minimize(rss, start, method="Nelder-Mead", options=options).x, *limits.T))


def _axes(problem: Problem, best: Array, variance: float) -> tuple[Array, Array]:
    """Principal axes of the likelihood at its best shape, shape (d, d), and its width along each, shape (d,)."""
    shifts = 1e-4 * np.eye(best.size)
    jacobian = np.stack(
        [(_project(problem, (best + h)[None])[1] - _project(problem, (best - h)[None])[1]) / 2e-4 for h in shifts]
    )
    value, frame = np.linalg.eigh(jacobian @ jacobian.T / variance)
    return frame, 1.0 / np.sqrt(np.maximum(value, 1e-6))


def _within(box: Array, frame: Array, limits: Array) -> Array:
    """``box`` cut to what the limits span along the axes of ``frame``."""
    corners = np.stack([v.ravel() for v in np.meshgrid(*limits, indexing="ij")], axis=1) @ frame
    return np.asarray(np.clip(box, corners.min(0)[:, None], corners.max(0)[:, None]))


def _grid(box: Array, frame: Array, limits: Array, counts: Sequence[int]) -> Array:
    """Nodes of a box turned by ``frame`` that lie inside the limits, shape (K, d)."""
    axes = [np.linspace(low, high, k) for (low, high), k in zip(box, counts, strict=True)]
    theta = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1) @ frame.T
    return np.asarray(theta[((theta >= limits[:, 0] - 1e-9) & (theta <= limits[:, 1] + 1e-9)).all(1)])


def _log_weight(rss: Array, dof: int, inflation: float) -> Array:
    floor = max(float(rss.min()), _VARIANCE_FLOOR * dof)
    return np.asarray(-0.5 * dof / inflation * np.log(np.maximum(rss, floor) / floor))


def _inflation(residual: Array) -> float:
    """(1 + r) / (1 - r): by how much correlated residuals carry less information than independent ones."""
    energy = float(residual @ residual)
    r = float(residual[1:] @ residual[:-1]) / energy if energy > 0 else 0.0
    # Below twice its standard error r is noise.
    r = min(r, 0.9) if r > 2.0 / math.sqrt(residual.size) else 0.0
    return (1.0 + r) / (1.0 - r)


def _project(problem: Problem, theta: Array) -> tuple[Nodes, Array]:
    """Best (a, c) under their bounds at each shape, and the weighted residuals at the best shape, shape (n,)."""
    y, w, bound = problem.y, problem.w, problem.bound
    phi = _basis(problem.x, theta, problem.family)
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

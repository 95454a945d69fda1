"""Noise scale over time: numerator and denominator smoothed apart, divided, with an interval.

=============  ==============================================  ============================================
symbol         meaning                                         unit, sign
=============  ==============================================  ============================================
``v_t, s_t``   one record's ``V`` and ``|G|^2``                gradient^2; unbiased; ``s_t`` may be negative
``d``          ``decay`` a measurement                         in (0, 1)
``W``          ``sum_t d^(T-t)``                               count; divides, so no start-up bias is left
``N, D``       weighted means of ``v_t`` and ``s_t``           gradient^2
``n``          ``W^2 / sum_t d^(2(T-t))``                      effective number of measurements
``GNS``        ``N / D``                                       examples
=============  ==============================================  ============================================

The ratio of averages is used, never the average of ratios: a single record's ratio is negative in about every
sixth measurement. The interval is Fieller's (1954) for a ratio of two correlated means; their covariance
comes from successive differences, ``E (x_t - x_{t-1})^2 / 2 = Var x`` (von Neumann 1941), so that a slow
drift of the gradient does not pass for noise. Student's t with ``2 n / 3`` degrees of freedom, the
efficiency of that estimate. Where the denominator cannot be told from zero the interval is open above: the
noise scale is then only known to be large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist

from autotune.arguments import is_number
from autotune.errors import ConfigurationError, StateError
from autotune.noise.statistics import GradientRecord


@dataclass(frozen=True)
class NoiseState:
    """What evolves: decayed sums, all Python floats. ``last_*`` are NaN before the first record."""

    weight: float = 0.0
    weight_sq: float = 0.0
    variance: float = 0.0
    signal: float = 0.0
    difference_weight: float = 0.0
    difference_vv: float = 0.0
    difference_ss: float = 0.0
    difference_vs: float = 0.0
    last_variance: float = math.nan
    last_signal: float = math.nan
    measured: int = 0
    skipped: int = 0

    def state_dict(self) -> dict[str, float]:
        """Primitives only."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float]) -> NoiseState:
        """The inverse of :meth:`state_dict`.

        Raises:
            StateError: Keys are missing or unknown.
        """
        if set(state) != set(cls.__dataclass_fields__):
            raise StateError(f"a noise state has the keys {sorted(cls.__dataclass_fields__)}; got {sorted(state)}")
        return cls(**state)  # type: ignore[arg-type]


@dataclass(frozen=True)
class NoiseEstimate:
    """The noise scale as it is known now.

    Attributes:
        noise_scale: ``N / D`` in examples; infinite where ``D <= 0``, NaN before the first record.
        low: Lower end of the interval, in examples, never negative.
        high: Upper end, possibly infinite.
        variance: ``N``, gradient^2.
        signal: ``D``, gradient^2.
        measurements: The effective number of records behind it.
    """

    noise_scale: float
    low: float
    high: float
    variance: float
    signal: float
    measurements: float


class NoiseSmoother:
    """Debiased exponential smoothing of records (init/step).

    Args:
        decay: Weight that a measurement keeps when the next one comes, in [0, 1).
        level: Coverage of the interval, in (0, 1).

    Raises:
        ConfigurationError: A value is out of range.
    """

    def __init__(self, decay: float = 0.9, level: float = 0.8) -> None:
        if not (is_number(decay) and 0.0 <= decay < 1.0):
            raise ConfigurationError(f"decay must lie in [0, 1); got {decay!r}. Try decay=0.9.")
        if not (is_number(level) and 0.0 < level < 1.0):
            raise ConfigurationError(f"level must lie in (0, 1); got {level!r}. Try level=0.8.")
        self.decay = decay
        self.level = level

    def init(self) -> NoiseState:
        """Nothing measured yet."""
        return NoiseState()

    def step(self, state: NoiseState, record: GradientRecord) -> NoiseState:
        """Takes one record in, read on the host; a non-finite one is counted in ``skipped`` and left out."""
        host = GradientRecord.unpack(record.pack().double().cpu())
        return self.step_values(state, float(host.variance().sum()), float(host.signal().sum()))

    def step_values(self, state: NoiseState, variance: float, signal: float) -> NoiseState:
        """The same, from ``V`` and ``|G|^2`` themselves."""
        if not (math.isfinite(variance) and math.isfinite(signal)):
            return replace(state, skipped=state.skipped + 1)
        d = self.decay
        known = state.measured > 0
        dv = variance - state.last_variance if known else 0.0
        ds = signal - state.last_signal if known else 0.0
        return NoiseState(
            weight=d * state.weight + 1.0,
            weight_sq=d * d * state.weight_sq + 1.0,
            variance=d * state.variance + variance,
            signal=d * state.signal + signal,
            difference_weight=d * state.difference_weight + float(known),
            difference_vv=d * state.difference_vv + dv * dv / 2,
            difference_ss=d * state.difference_ss + ds * ds / 2,
            difference_vs=d * state.difference_vs + dv * ds / 2,
            last_variance=variance,
            last_signal=signal,
            measured=state.measured + 1,
            skipped=state.skipped,
        )

    def estimate(self, state: NoiseState) -> NoiseEstimate:
        """What is known now; before the third record the interval is (0, infinity)."""
        if state.measured == 0:
            return NoiseEstimate(math.nan, 0.0, math.inf, math.nan, math.nan, 0.0)
        mean_v, mean_s = state.variance / state.weight, state.signal / state.weight
        count = state.weight**2 / state.weight_sq
        scale = max(mean_v, 0.0) / mean_s if mean_s > 0 else math.inf
        low, high = 0.0, math.inf
        if state.measured >= 3:
            share = 1.0 / (state.difference_weight * count)
            t = _student_quantile(0.5 + self.level / 2, max(2.0 * (count - 1) / 3, 1.0))
            low, high = _fieller(
                mean_v,
                mean_s,
                t * t * share * state.difference_vv,
                t * t * share * state.difference_ss,
                t * t * share * state.difference_vs,
            )
        return NoiseEstimate(scale, low, high, mean_v, mean_s, count)


def _fieller(top: float, bottom: float, tt: float, bb: float, tb: float) -> tuple[float, float]:
    """All r >= 0 with ``(top - r bottom)^2 <= tt - 2 r tb + r^2 bb``; variances times t^2."""
    a = bottom * bottom - bb
    b = top * bottom - tb
    c = top * top - tt
    disc = b * b - a * c
    if a <= 0 or bottom <= 0:
        # The denominator may be zero: the set reaches infinity. It begins at the larger root, if there is
        # one.
        if disc <= 0 or a == 0 or bottom <= 0:
            return 0.0, math.inf
        return max((b - math.sqrt(disc)) / a, 0.0), math.inf
    root = math.sqrt(max(disc, 0.0))
    return max((b - root) / a, 0.0), max((b + root) / a, 0.0)


def _student_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t, Abramowitz and Stegun 26.7.5: within 1 % from three degrees on."""
    z = NormalDist().inv_cdf(p)
    if freedom <= 1.0:
        return math.tan(math.pi * (p - 0.5))
    if freedom <= 2.0:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3

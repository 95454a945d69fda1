"""How large a batch the noise asks for: the published tests, and ours.

======  ==============================================  ========
symbol  meaning                                         unit
======  ==============================================  ========
``B``   examples behind the measured gradient           examples
``V``   one example's variance (trace)                  gradient^2
``g``   the measured gradient, with its own noise       gradient
``eta, theta, nu``  tolerances                          1
``b``   batch whose rate the schedule's peak is         examples
``s``   rate that is scheduled now, in units of the     1
        schedule's peak
======  ==============================================  ========

=====================  =====================================================  ===================================
test                   passes when                                            source
=====================  =====================================================  ===================================
norm                   ``V/B <= eta^2 |g|^2``                                 Byrd et al. 2012
inner product          ``Var_i(g_i.g)/B <= theta^2 |g|^4``                    Bollapragada et al. 2018, eq. 2.6
orthogonality          ``Var_i(g_i - (g_i.g/|g|^2) g)/B <= nu^2 |g|^2``       the same, eq. 2.9
augmented              inner product and orthogonality                        the same
coordinate             ``V_j/B <= eta^2 g_j^2`` for every coordinate j        AdAdaGrad (arXiv 2402.11215)
noise scale            ``B >= multiple x GNS``, debiased and smoothed         ours, where no rate decays
decay                  ``B >= b + (b + multiple x GNS) (1/s - 1)``, or        ours, where the rate decays
                       ``B >= most x b``
=====================  =====================================================  ===================================

Decay: with the rate ``s k`` instead of ``s`` a batch ``B = k b`` goes as far with each example, and adds as much noise,
as ``b`` did (Smith et al. 2018; Seesaw, arXiv 2510.14717, for steps). It is stable while the rate stays at what a
batch ``B`` may have: AdaScale's ``(GNS + b) / (GNS/k + b)`` peaks. ``s k`` reaches it at the ``B`` above; with
``multiple`` 0 the rate never rises above its peak. ``B`` stops at ``most x b``, so that some of the decay is left for
the rate: what swings at a rate that never falls is never taken out.

The published tests read the raw ``|g|^2``, which holds V/B of noise, from one measurement. With it the norm
test comes to rest at ``GNS (1 - eta^2) / eta^2``; debiased it would be ``GNS / eta^2``: eta is a multiplier
of the noise scale, and the published 0.1 asks for a hundred times it. They are here as published, beside
the rule we recommend.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from autotune.arguments import is_number
from autotune.errors import ConfigurationError
from autotune.noise.smoothing import NoiseEstimate
from autotune.noise.statistics import GradientRecord

Rule: TypeAlias = Literal["noise_scale", "norm", "inner_product", "augmented", "coordinate"]
RULES = ("noise_scale", "norm", "inner_product", "augmented", "coordinate")


@dataclass(frozen=True)
class Verdict:
    """What a test says.

    Attributes:
        passes: Whether the present batch is large enough.
        wanted: Examples it asks for; infinite where nothing would be enough, NaN where nothing is known.
        numbers: What it read.
    """

    passes: bool
    wanted: float
    numbers: dict[str, float]


@dataclass(frozen=True)
class Tolerances:
    """The tests' parameters, by default the authors' for image classification of medium size."""

    eta: float = 0.5
    theta: float = 0.5
    nu: float = 1.0

    def __post_init__(self) -> None:
        for name in ("eta", "theta", "nu"):
            value = getattr(self, name)
            if not (is_number(value) and value > 0):
                raise ConfigurationError(f"{name} must be a positive number; got {value!r}. Try {name}=0.5.")


def norm_test(record: GradientRecord, eta: float) -> Verdict:
    """The norm test; asks for ``ceil(V / (eta^2 |g|^2))``."""
    variance, square = float(record.variance().sum()), float(record.mean_sq.sum())
    return _verdict(record, variance, eta * eta * square, {"variance": variance, "mean_sq": square})


def inner_product_test(record: GradientRecord, theta: float) -> Verdict:
    """The inner-product test; asks for ``ceil(Var_i(g_i.g) / (theta^2 |g|^4))``."""
    along, square = float(record.inner_product_variance()), float(record.mean_sq.sum())
    return _verdict(record, along, theta * theta * square**2, {"inner_product_variance": along, "mean_sq": square})


def orthogonality_test(record: GradientRecord, nu: float) -> Verdict:
    """The orthogonality test; asks for ``ceil(V_orth / (nu^2 |g|^2))``."""
    across, square = float(record.orthogonal_variance()), float(record.mean_sq.sum())
    return _verdict(record, across, nu * nu * square, {"orthogonal_variance": across, "mean_sq": square})


def augmented_test(record: GradientRecord, theta: float, nu: float) -> Verdict:
    """Inner product and orthogonality; asks for the larger of the two."""
    first, second = inner_product_test(record, theta), orthogonality_test(record, nu)
    wanted = math.nan if math.isnan(first.wanted + second.wanted) else max(first.wanted, second.wanted)
    return Verdict(first.passes and second.passes, wanted, {**first.numbers, **second.numbers})


def coordinate_test(record: GradientRecord, eta: float) -> Verdict:
    """The norm test in every coordinate; asks for ``ceil(max_j V_j / (eta^2 g_j^2))``.

    Infinite where a coordinate's mean gradient is 0 and its variance is not: there no batch is large
    enough. The producer may report a quantile over coordinates instead of the maximum
    (``Extras.quantile``).
    """
    ratio = float(record.coordinate)
    return _verdict(record, ratio, eta * eta, {"coordinate_ratio": ratio})


def noise_scale_test(estimate: NoiseEstimate, batch: float, multiple: float) -> Verdict:
    """Ours: fails once even the interval's lower end, times ``multiple``, is above the batch.

    The lower end, because growing is hard to take back: a wrong small batch costs time, a wrong large one
    costs loss.
    """
    wanted = multiple * estimate.low
    return Verdict(not wanted > batch, wanted, _noise(estimate))


def decay_test(
    estimate: NoiseEstimate, batch: float, multiple: float, base: float, level: float, most: float
) -> Verdict:
    """Ours while the rate decays: fails where a larger batch can take the decay's place.

    Args:
        estimate: The noise; its lower end counts.
        batch: ``B``.
        multiple: Of the noise scale.
        base: ``b``.
        level: ``s``, in (0, 1].
        most: Largest ``B`` in units of ``b``.

    >>> quiet = NoiseEstimate(0.0, 0.0, 0.0, 0.0, 1.0, 10.0)
    >>> [decay_test(quiet, 32, 0.25, base=32, level=level, most=3.0).wanted for level in (0.5, 0.1)]
    [64.0, 96.0]
    """
    wanted = min(base + (base + multiple * estimate.low) * (1.0 / max(level, 1e-6) - 1.0), most * base)
    return Verdict(not wanted > batch, wanted, {**_noise(estimate), "level": level, "base": base})


def _noise(estimate: NoiseEstimate) -> dict[str, float]:
    return {
        "noise_scale": estimate.noise_scale,
        "noise_scale_low": estimate.low,
        "noise_scale_high": estimate.high,
        "measurements": estimate.measurements,
    }


def published(rule: Rule, record: GradientRecord, tolerances: Tolerances) -> Verdict:
    """The published test of that name."""
    if rule == "norm":
        return norm_test(record, tolerances.eta)
    if rule == "inner_product":
        return inner_product_test(record, tolerances.theta)
    if rule == "augmented":
        return augmented_test(record, tolerances.theta, tolerances.nu)
    if rule == "coordinate":
        return coordinate_test(record, tolerances.eta)
    raise ConfigurationError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")


def _verdict(record: GradientRecord, variance: float, scale: float, numbers: dict[str, float]) -> Verdict:
    examples = float(record.sums.examples)
    if math.isnan(variance) or math.isnan(scale):
        return Verdict(True, math.nan, {**numbers, "examples": examples})
    passes = variance / examples <= scale
    wanted = variance / scale if scale > 0 else (0.0 if variance <= 0 else math.inf)
    return Verdict(passes, math.ceil(wanted) if math.isfinite(wanted) else wanted, {**numbers, "examples": examples})

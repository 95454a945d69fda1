"""What the learning rate becomes when the batch grows.

======  =======================================================  ========
symbol  meaning                                                  unit
======  =======================================================  ========
``B``   batch before                                             examples
``k``   growth, batch after over batch before                    1
``r``   gain: learning rate after over before                    1
======  =======================================================  ========

===========  =====================================================  ==============================================
rule         ``r``                                                  source
===========  =====================================================  ==============================================
linear       ``k``                                                  Goyal et al. 2017
sqrt         ``sqrt(k)``                                            Malladi et al. 2022; Granziol et al. 2020
sqrt_betas   ``sqrt(k)``, with :func:`scaled_betas`                 Malladi et al. 2022, definition 5.3
adascale     ``(GNS/B + 1) / (GNS/(k B) + 1)``, in [1, k]           Johnson et al. 2020 (arXiv 2007.05105), eq. 4
adam         ``sqrt(k (k + GNS/B) / (1 + GNS/B))``, in [sqrt(k), k] ours: below
adam_betas   the same, with :func:`scaled_betas`
none         1                                                      AdAdaGrad
===========  =====================================================  ==============================================

AdaScale's gain ``(s^2 + m^2) / (s^2/k + m^2)`` is written with the variance ``s^2 = V/B`` of the batch's
gradient and its mean's square ``m^2 = |G|^2``, so it is a function of the noise scale alone.

The square root for Adam holds where noise is all there is: Adam divides by the root of ``m^2 + s^2``. One step on
``k B`` examples goes as far as ``k`` steps on ``B`` did if the rate grows by ``k sqrt((1 + r/k) / (1 + r))`` with
``r = GNS/B``: the square root where noise rules (``r`` large), ``k`` where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from autotune.errors import ConfigurationError, UnsupportedSetupError

Scaling: TypeAlias = Literal["auto", "linear", "sqrt", "sqrt_betas", "adascale", "adam", "adam_betas", "none"]
SCALINGS = ("auto", "linear", "sqrt", "sqrt_betas", "adascale", "adam", "adam_betas", "none")


def gain(rule: Scaling, growth: float, noise_scale: float, batch: float) -> float:
    """``r``.

    Args:
        rule: Any but ``"auto"``.
        growth: ``k``, positive.
        noise_scale: ``GNS`` in examples; infinite is a gradient of pure noise (the gain is ``k``), NaN is not
            known (the gain is the cautious ``sqrt(k)``).
        batch: ``B`` in examples.

    >>> gain("adascale", 4, noise_scale=0.0, batch=32), gain("adascale", 4.0, math.inf, 32)
    (1.0, 4.0)
    """
    if rule == "linear":
        return growth
    if rule in ("sqrt", "sqrt_betas"):
        return math.sqrt(growth)
    if rule == "none":
        return 1.0
    if rule not in ("adascale", "adam", "adam_betas"):
        raise ConfigurationError(f"lr_scaling must be one of {', '.join(SCALINGS)}; got {rule!r}")
    if math.isnan(noise_scale):
        return math.sqrt(growth)
    if math.isinf(noise_scale):
        return growth if rule == "adascale" else math.sqrt(growth)
    ratio = max(noise_scale, 0.0) / batch
    if rule != "adascale":
        return math.sqrt(growth * (growth + ratio) / (1.0 + ratio))
    return (ratio + 1.0) / (ratio / growth + 1.0)


def rule_for(optimizer: Any, in_decay: bool = False) -> Scaling:
    """``"auto"``, by optimizer family.

    SGD takes AdaScale; in the place of a decay (``in_decay``) the batch only grows as far as the linear rule is
    stable, and that is what it takes. What divides by a root of squared gradients takes ``"adam"``, apart from the
    AdaGrad family, whose accumulated sum shrinks with the batch by itself (AdAdaGrad does not rescale).
    """
    names = {cls.__name__ for cls in type(optimizer).__mro__}
    if "SGD" in names:
        return "linear" if in_decay else "adascale"
    if names & {"Adagrad", "AdaGradNorm"}:
        return "none"
    return "adam"


def scales_betas(rule: Scaling) -> bool:
    """Whether Adam's betas and eps go with the rate."""
    return rule in ("sqrt_betas", "adam_betas")


def refuse_betas(rule: Scaling, optimizer: Any) -> None:
    """Checks that the betas can go with the rate, where the rule wants that.

    Raises:
        UnsupportedSetupError: A group has not the two betas and the number eps of Adam, or is of a schedule-free
            optimizer, whose first beta is a place between two weights and no memory.
    """
    if scales_betas(rule) and not all(_is_adams(group) for group in optimizer.param_groups):
        raise UnsupportedSetupError(
            f"lr_scaling={rule!r} changes the two betas and the eps that Adam has, and {type(optimizer).__name__} has "
            'not these in every parameter group: use lr_scaling="auto"'
        )


def scaled_betas(betas: tuple[float, float], eps: float, growth: float) -> tuple[tuple[float, float], float]:
    """Adam's ``beta^k`` and ``eps / sqrt(k)``: averages that reach back over as many examples as before.

    Malladi et al. 2022 (arXiv 2205.10287), definition 5.3, state it as ``1 - k (1 - beta)``; the power
    agrees to first order and stays positive for every ``k``.

    >>> scaled_betas((0.9, 0.99), 1e-8, 1.0)
    ((0.9, 0.99), 1e-08)
    """
    return (betas[0] ** growth, betas[1] ** growth), eps / math.sqrt(growth)


def scale_group_betas(optimizer: Any, growth: float) -> None:
    """Applies :func:`scaled_betas` to every group that has what Adam has; a replay may be of another optimizer.

    torch's Adam divides its averages by ``1 - beta^step``: its counted steps are divided by ``k``, so that this stays
    what it was (``(beta^k)^(step/k) = beta^step``).
    """
    counted = {"Adam", "AdamW"} & {cls.__name__ for cls in type(optimizer).__mro__}
    for group in filter(_is_adams, optimizer.param_groups):
        group["betas"], group["eps"] = scaled_betas(group["betas"], group["eps"], growth)
        for parameter in group["params"] if counted else ():
            if "step" in (state := optimizer.state.get(parameter, {})):
                state["step"] /= growth


def scaled_settings(optimizer: Any) -> list[dict[str, Any]]:
    """Of every group what a growth may change beside the rate."""
    return [{key: group[key] for key in ("betas", "eps") if key in group} for group in optimizer.param_groups]


@contextmanager
def scaled_settings_kept(optimizer: Any) -> Iterator[None]:
    """They are afterwards what they were before, as where an optimizer goes back to a state and the batch does not."""
    kept = scaled_settings(optimizer)
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def _is_adams(group: dict[str, Any]) -> bool:
    two = isinstance(betas := group.get("betas"), (tuple, list)) and len(betas) == 2
    return two and isinstance(group.get("eps"), (int, float)) and "train_mode" not in group

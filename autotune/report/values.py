"""Looks into the ``numbers`` of a decision without trusting them, and spells values for people.

A log may come from an older version, a newer one, or another controller: every key may be missing and every
value may have a type nobody expected. What cannot be read is None, never an exception.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autotune.decision import Decision


def number(source: Decision | Mapping[str, Any], key: str) -> float | None:
    """The finite number under ``key``, or None."""
    numbers = source.numbers if isinstance(source, Decision) else source
    value = numbers.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def batch_of(decision: Decision, previous: bool = False) -> float | None:
    """Examples per update that a decision speaks of; AdaptiveBatchSize calls them ``batch`` and ``batch_before``."""
    names = ("previous_batch_size", "batch_before") if previous else ("batch_size", "batch")
    return next((value for name in names if (value := number(decision, name)) is not None), None)


def mapping(source: Decision | Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under ``key``, or an empty one."""
    numbers = source.numbers if isinstance(source, Decision) else source
    value = numbers.get(key)
    return value if isinstance(value, Mapping) else {}


def records(source: Decision | Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects in the list under ``key``; anything else in it is left out."""
    numbers = source.numbers if isinstance(source, Decision) else source
    value = numbers.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [item for item in value if isinstance(item, Mapping)]


def column(source: Mapping[str, Any], key: str) -> list[float | None]:
    """The list of numbers under ``key``; what is no finite number is None."""
    value = source.get(key)
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [number({"item": item}, "item") for item in value]


def pairs(source: Mapping[str, Any], key: str) -> list[tuple[float, float | None]]:
    """The ``[[step, value], …]`` list under ``key``; a pair without a step is left out."""
    found = []
    value = source.get(key)
    for item in value if isinstance(value, Sequence) and not isinstance(value, str) else []:
        if isinstance(item, Sequence) and not isinstance(item, str) and len(item) == 2:
            step = number({"item": item[0]}, "item")
            if step is not None:
                found.append((step, number({"item": item[1]}, "item")))
    return found


def spell(value: object, digits: int = 3) -> str:
    """A value as a person would write it.

    >>> spell(0.00123456), spell(1234567.0), spell(512), spell(float("nan")), spell(None)
    ('0.00123', '1,234,567', '512', 'nan', '–')
    >>> spell(0.0000123), spell(2.5), spell(True), spell([0.1, "a"])
    ('1.23e-05', '2.5', 'yes', '0.1, a')
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if math.isfinite(value) and abs(value) >= 10**digits:
            return f"{value:,.0f}"
        return f"{value:.{digits}g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {spell(item, digits)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(spell(item, digits) for item in value)
    return str(value)


def spell_seconds(seconds: float | None) -> str:
    """A duration with two units at most.

    >>> spell_seconds(0.25), spell_seconds(42.4), spell_seconds(75), spell_seconds(7380)
    ('0.2 s', '42 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def significant(value: float | None, digits: int = 6) -> float | None:
    """Rounded for a file that a browser draws; None for what JSON cannot spell."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")

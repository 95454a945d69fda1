"""Looks into the ``numbers`` of a decision without trusting them, and spells values for people.

A log may come from an older version, a newer one, or another controller: every key may be missing and every
value may have a type nobody expected. What cannot be read is None, never an exception.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autotune.decision import Decision


def number(source: Decision | Mapping[str, Any], key: str) -> float | None:
    """The finite number under ``key``, or None."""
    numbers = source.numbers if isinstance(source, Decision) else source
    value = numbers.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(source: Decision | Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under ``key``, or an empty one."""
    numbers = source.numbers if isinstance(source, Decision) else source
    value = numbers.get(key)
    return value if isinstance(value, Mapping) else {}


def settings(decisions: Iterable[Decision]) -> dict[str, Any]:
    """What a run's controllers were configured with, from all of its setup records.

    ``controller`` names them all. Of another name that two of them have, the first one's value counts; an end that
    was planned anew takes the place of the one before.

    >>> first = Decision("setup", "begin", "", 0, numbers={"controller": "A", "seed": 1, "horizon": {"total": 8}})
    >>> second = Decision("setup", "set_batch", "", 0, numbers={"controller": "B", "batch": 32})
    >>> moved = Decision("setup", "replan", "", 5, numbers={"total": 16})
    >>> settings([first, second, moved])
    {'controller': 'A, B', 'seed': 1, 'horizon': {'total': 16}, 'batch': 32}
    """
    found: dict[str, Any] = {}
    for decision in decisions:
        numbers = decision.numbers
        if decision.kind != "setup":
            continue
        if decision.action == "replan":
            moved = {key: value for key, value in numbers.items() if key != "shape"}
            found["horizon"] = {**mapping(found, "horizon"), **moved}
            if mapping(numbers, "shape"):
                found["shape"] = mapping(numbers, "shape")
            continue
        names = [name for name in (found.get("controller"), numbers.get("controller")) if isinstance(name, str)]
        found |= {key: value for key, value in numbers.items() if key not in found}
        if names:
            found["controller"] = ", ".join(dict.fromkeys(names))
    return found


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

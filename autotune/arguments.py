"""Whether an argument is of a plain type that it can have; who asks says what is wrong, and what would be right."""

from __future__ import annotations

import math
from typing import Any


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; True and False are none.

    >>> is_number(1), is_number(2.5), is_number(True), is_number("1"), is_number(float("nan")), is_number(10**400)
    (True, True, False, False, False, False)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_count(value: Any, least: int = 1) -> bool:
    """Whether it is a whole number of at least ``least``.

    >>> is_count(1), is_count(0), is_count(0, least=0), is_count(2.0), is_count(True)
    (True, False, True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

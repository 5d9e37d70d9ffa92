"""Bracketed root search for monotone functions; returns both ends so that callers can keep the safe one."""

from __future__ import annotations

import math
from collections.abc import Callable


def bisect(
    below: Callable[[float], bool], low: float, high: float, relative: float = 1e-13
) -> tuple[float, float]:
    """Shrinks [low, high] around the point where `below` turns from True to False.

    Args:
        below: a predicate that is True at `low` and False at `high` and changes once.
        low: an end where the predicate holds.
        high: an end where it does not.
        relative: stop once the bracket is this small relative to its ends.

    Returns:
        The final bracket; the predicate held at its first end and failed at its second.
    """
    for _ in range(400):
        if high - low <= relative * max(abs(low), abs(high)):
            break
        middle = math.sqrt(low * high) if low > 0 and high > 4 * low else 0.5 * (low + high)
        if not low < middle < high:
            break
        if below(middle):
            low = middle
        else:
            high = middle
    return low, high

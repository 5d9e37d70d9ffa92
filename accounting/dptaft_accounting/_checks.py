"""Validation helpers and rounding against ourselves."""

from __future__ import annotations

import math
from collections.abc import Collection
from decimal import ROUND_CEILING, Context, Decimal
from numbers import Integral, Real

from dptaft_accounting.errors import AccountingError

_DIGITS = Context(prec=9, rounding=ROUND_CEILING)
_LARGEST_WHOLE = 2**63 - 1


def real(name: str, value: object, error: type[AccountingError] = AccountingError) -> float:
    """Returns `value` as a finite float, or raises `error` that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise error(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise error(f"{name} must be finite, got {number}")
    return number


def positive(name: str, value: object, error: type[AccountingError] = AccountingError) -> float:
    """Returns a finite float above zero."""
    number = real(name, value, error)
    if number <= 0:
        raise error(f"{name} must be greater than 0, got {number:g}")
    return number


def non_negative(name: str, value: object, error: type[AccountingError] = AccountingError) -> float:
    """Returns a finite float that is at least zero."""
    number = real(name, value, error)
    if number < 0:
        raise error(f"{name} must be at least 0, got {number:g}")
    return number


def whole(name: str, value: object, error: type[AccountingError] = AccountingError) -> int:
    """Returns an integer that is at least one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise error(f"{name} must be a whole number, got {value!r}; pass an int")
    number = int(value)
    if number < 1:
        raise error(f"{name} must be at least 1, got {value}")
    if number > _LARGEST_WHOLE:
        raise error(f"{name} must be at most 2^63 - 1, got a number of {number.bit_length()} bits")
    return number


def probability(name: str, value: object, error: type[AccountingError] = AccountingError) -> float:
    """Returns a float strictly between 0 and 1 (a delta, a false-positive rate, a prior)."""
    number = real(name, value, error)
    if not 0 < number < 1:
        raise error(f"{name} must lie strictly between 0 and 1, got {number:g}")
    return number


def rate(name: str, value: object, error: type[AccountingError] = AccountingError) -> float:
    """Returns a float in (0, 1] (a sampling rate)."""
    number = real(name, value, error)
    if not 0 < number <= 1:
        raise error(f"{name} must lie in (0, 1], got {number:g}")
    return number


def choice(
    name: str, value: object, allowed: Collection[str], error: type[AccountingError] = AccountingError
) -> str:
    """Returns `value` if it is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise error(f"{name} must be one of {', '.join(sorted(allowed))}; got {value!r}")
    return value


def round_up(value: float) -> float:
    """Rounds a privacy loss up to nine significant digits; infinity stays infinity.

    >>> round_up(1.23456789012)
    1.2345679
    """
    if math.isnan(value):
        raise AccountingError("a privacy loss came out as NaN; no claim is made")
    if math.isinf(value) or value == 0:
        return value
    rounded = float(_DIGITS.create_decimal(Decimal(value)))
    return rounded if rounded >= value else math.nextafter(rounded, math.inf)

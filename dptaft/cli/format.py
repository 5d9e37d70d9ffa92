"""Numbers as text, rounded against ourselves."""

from __future__ import annotations

from decimal import ROUND_CEILING, Context, Decimal


def up(value: float | None, digits: int) -> str:
    """Format with `digits` significant digits, rounded up: a shown bound never flatters.

    >>> up(2.9999664, 6), up(1e-5, 3), up(None, 3)
    ('2.99997', '1e-05', 'infinite')
    """
    if value is None:
        return "infinite"
    exact = Decimal(repr(float(value)))
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(exact)):.{digits}g}"

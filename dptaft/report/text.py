"""Text of other people made safe for terminal, Markdown and HTML; numbers rounded against ourselves.

Everything in a statement is untrusted: a forged run must not be able to put a script into a page, a table row
into a card, or an escape sequence into a terminal.
"""

from __future__ import annotations

import html
import re
import unicodedata
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

_STEERING = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|~&!$^])")


def printable(value: Any) -> str:
    r"""Text for a terminal: line breaks and tabs stay, everything else that could steer it is replaced.

    Control characters (escape sequences), formatting characters (bidirectional overrides), unpaired
    surrogates, private and unassigned code points become U+FFFD.

    >>> printable("a" + chr(27) + "[31mb" + chr(0x202E) + chr(10) + "c")
    'a\ufffd[31mb\ufffd\nc'
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _STEERING else "\ufffd" for c in str(value)
    )


def plain(value: Any, *, spaces: bool = False) -> str:
    r"""One line of printable text; control and formatting characters become a replacement sign.

    Args:
        value: anything.
        spaces: keep runs of spaces, for aligned columns.

    >>> plain("a" + chr(27) + "[31mb" + chr(10) + "c")
    'a\ufffd[31mb c'
    """
    blank = r"[\t\n\r\f\v\u2028\u2029]+" if spaces else r"[ \t\n\r\f\v\u2028\u2029]+"
    return printable(re.sub(blank, " ", str(value)).strip())


def markdown(value: Any) -> str:
    r"""Text in which no character means anything to Markdown or HTML.

    >>> markdown("a|b <i>")
    'a\\|b \\<i\\>'
    """
    text = _MARKDOWN.sub(r"\\\1", plain(value))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", re.sub(r"^([-+=])", r"\\\1", text))


def escaped(value: Any) -> str:
    """Text for HTML, inside elements and quoted attributes.

    >>> escaped('<a href="x">')
    '&lt;a href=&quot;x&quot;&gt;'
    """
    return html.escape(plain(value), quote=True)


def up(value: float | None, digits: int = 4) -> str:
    """A privacy loss with `digits` significant digits, rounded up; `infinite` for None.

    >>> up(2.99996641), up(1e-5), up(None)
    ('3', '1e-05', 'infinite')
    """
    if value is None:
        return "infinite"
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(value))))
    return f"{float(rounded):.{digits}g}"


def down(value: float | None, digits: int = 4) -> str:
    """What is left of a budget, or a smallest error, rounded down.

    >>> down(0.35959), down(0.0)
    ('0.3595', '0')
    """
    if value is None:
        return "infinite"
    rounded = Context(prec=digits, rounding=ROUND_FLOOR).create_decimal(Decimal(repr(float(value))))
    return f"{float(rounded):.{digits}g}"


def percent_up(value: float, digits: int = 3) -> str:
    r"""A probability in percent, rounded up.

    >>> percent_up(0.64040984), percent_up(1.0)
    ('64.1\xa0%', '100\xa0%')
    """
    return f"{up(100 * value, digits)}\u00a0%"

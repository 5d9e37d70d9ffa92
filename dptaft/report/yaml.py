"""Enough YAML to write exports: block mappings and lists, text always double-quoted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def dumps(document: Mapping[str, Any]) -> str:
    """Write a mapping of text, numbers, lists and mappings.

    >>> print(dumps({"tags": ["a: b"], "deployment": {"epsilon": 3.0}}), end="")
    tags:
      - "a: b"
    deployment:
      epsilon: 3.0
    """
    return "".join(f"{line}\n" for line in _lines(document, ""))


def _lines(value: Mapping[str, Any] | list[Any], indent: str) -> Iterator[str]:
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for key, item in pairs:
        start = f"{indent}- " if key is None else f"{indent}{key}:"
        if isinstance(item, (Mapping, list)):
            inner = list(_lines(item, indent + "  "))
            if key is None:
                yield start + inner[0].lstrip()
                yield from inner[1:]
            else:
                yield start
                yield from inner
        else:
            yield f"{start}{'' if key is None else ' '}{_scalar(item)}"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        # a JSON string is a double-quoted YAML scalar, except for characters that YAML does not print
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(
            c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else "\ufffd" for c in quoted
        )
    if isinstance(value, float):
        text = repr(value)
        mantissa, mark, exponent = text.partition("e")
        # YAML 1.1 reads 1e-05 as text; a point in the mantissa makes it a number
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{exponent}" if mark else text
    return json.dumps(value)

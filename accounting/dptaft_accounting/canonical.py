"""One text for one document: canonical JSON, and the hash that names its content.

A document is named by the SHA-256 of its canonical JSON without the field `admin.id`: UTF-8, keys sorted, no
white space, numbers as Python's `repr` writes them. Files hold the same document indented by two spaces.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from dptaft_accounting.errors import StatementError

_LARGEST_INTEGER = 2**53  # beyond it JSON readers disagree about the value
_MOST_LEVELS = 150


def canonical(value: Any, path: str = "statement", depth: int = 0) -> Any:
    """Copies a JSON value: tuples become lists; what JSON cannot carry exactly is refused.

    Raises:
        StatementError: a number that is not finite, an integer beyond 2^53, text that is no Unicode, a key
            that is no text, a foreign type, or more levels than a reader can be asked to follow; the message
            names the field.

    >>> canonical({"steps": (1, 2)})
    {'steps': [1, 2]}
    """
    if depth > _MOST_LEVELS:
        raise StatementError(f"the statement is nested deeper than {_MOST_LEVELS} levels: {_short(path)}")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise StatementError(f"{path} has a key that is not text: {key!r}")
            _check_text(key, path)
        return {key: canonical(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _check_text(value, path)
    if isinstance(value, int) and abs(value) <= _LARGEST_INTEGER:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise StatementError(
        f"{path} holds {_short(value)}, which JSON cannot carry exactly; use a finite number or text"
    )


def parse(text: str) -> dict[str, Any]:
    """Reads a JSON object strictly: no NaN, no field twice, no number that cannot be written again.

    Raises:
        StatementError: the text is truncated, is no JSON, or is no object.

    >>> parse('{"admin": {}}')
    {'admin': {}}
    """
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except StatementError:
        raise
    except (ValueError, RecursionError) as error:
        raise StatementError(f"the statement is not JSON: {_short(error)}") from None
    if not isinstance(data, dict):
        raise StatementError(f"the statement must be object, got {_short(data)}")
    document: dict[str, Any] = canonical(data)
    return document


def dumps(document: Mapping[str, Any]) -> str:
    """Writes the indented text of a document, with one trailing newline."""
    return json.dumps(document, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def content_id(document: Mapping[str, Any]) -> str:
    """Returns the name of a document's content: ``sha256:`` and 64 hexadecimal digits.

    >>> content_id({"admin": {"id": "any"}}) == content_id({"admin": {}})
    True
    """
    admin = {key: value for key, value in document.get("admin", {}).items() if key != "id"}
    content = {**document, "admin": admin}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()


def _check_text(text: str, path: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise StatementError(f"{path} holds text that is no Unicode: {text!r}") from None
    return text


def _short(value: Any) -> str:
    text = str(value) if isinstance(value, Exception) else ascii(value)
    return text if len(text) <= 120 else text[:120] + "..."


def _refuse_constant(name: str) -> Any:
    raise StatementError(f"the statement holds {name}, which is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise StatementError("the statement repeats a field within one object")
    return result

"""Validation against the published JSON schema of a statement, without a third-party validator.

Only the keywords that the schema uses are implemented; an unknown keyword is an error, so that the published
file and this validator cannot drift apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from dptaft_accounting.errors import StatementError

FORBIDDEN_KEYS = frozenset(
    {
        "seed",
        "seeds",
        "noise_seed",
        "sampling_seed",
        "realised_batch_sizes",
        "batch_sizes",
        "timings",
        "train_loss",
    }
)


@cache
def load_schema() -> dict[str, Any]:
    """Returns the published JSON schema of `PrivacyStatement` version 1."""
    text = (files("dptaft_accounting") / "statement_schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, Mapping),
    "array": lambda v: isinstance(v, Sequence) and not isinstance(v, (str, bytes)),
    "string": lambda v: isinstance(v, str),
    "number": lambda v: _is_number(v) and math.isfinite(v),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
}
_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda v, limit: v >= limit,
    "maximum": lambda v, limit: v <= limit,
    "exclusiveMinimum": lambda v, limit: v > limit,
    "exclusiveMaximum": lambda v, limit: v < limit,
}
_ANNOTATIONS = frozenset({"$schema", "title", "description"})
_STRUCTURE = frozenset({"type", "enum", "required", "properties", "additionalProperties", "items"})


def validate(value: Any, schema: Mapping[str, Any] | None = None, path: str = "statement") -> None:
    """Checks `value` against a schema (the statement's own by default).

    Raises:
        StatementError: the first violation, with the path of the field at fault.

    >>> validate({"mu": 1.0}, {"type": "object", "required": ["mu"]})
    """
    schema = load_schema() if schema is None else schema
    unknown = set(schema) - _ANNOTATIONS - _STRUCTURE - set(_LIMITS)
    if unknown:
        raise StatementError(f"the schema of {path} uses an unknown keyword {sorted(unknown)[0]!r}")
    _check_scalar(value, schema, path)
    if isinstance(value, Mapping):
        _check_object(value, schema, path)
    elif _TYPES["array"](value):
        for index, item in enumerate(value):
            validate(item, schema.get("items", {}), f"{path}[{index}]")


def _check_scalar(value: Any, schema: Mapping[str, Any], path: str) -> None:
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        raise StatementError(f"{path} must be {' or '.join(kinds)}, got {value!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise StatementError(f"{path} must be one of {schema['enum']}, got {value!r}")
    for name, holds in _LIMITS.items():
        if name in schema and _is_number(value) and not holds(value, schema[name]):
            raise StatementError(f"{path} is {value!r}, against {name} {schema[name]}")


def _check_object(value: Mapping[str, Any], schema: Mapping[str, Any], path: str) -> None:
    properties = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            raise StatementError(f"{path} lacks the field {name!r}")
    extra = schema.get("additionalProperties", True)
    for name, item in value.items():
        if not isinstance(name, str):
            raise StatementError(f"{path} has a key that is not text: {name!r}")
        if name.lower() in FORBIDDEN_KEYS:
            raise StatementError(f"{path}.{name} must never be published; leave it out")
        if name in properties:
            validate(item, properties[name], f"{path}.{name}")
        elif extra is False:
            raise StatementError(f"{path} has no field {name!r}; known fields: {', '.join(properties)}")
        else:
            validate(item, extra if isinstance(extra, Mapping) else {}, f"{path}.{name}")

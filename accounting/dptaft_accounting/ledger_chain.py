"""The append-only record of a ledger: rows of canonical JSON, each bound to all rows before it by SHA-256."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dptaft_accounting.ledger_filter import LedgerError

START = ""
"""What the first row of every chain names as the one before it."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")


@dataclass(frozen=True)
class Row:
    """One row; `hash` covers number, previous hash and body.

    Attributes:
        number: 1, 2, 3, ...
        previous: hash of the row before, empty for the first.
        body: canonical JSON text with the fields ``kind`` and ``time`` and those of the kind.
        hash: SHA-256, hexadecimal.
    """

    number: int
    previous: str
    body: str
    hash: str

    @classmethod
    def append(cls, number: int, previous: str, fields: Mapping[str, Any]) -> Row:
        """The next row of a chain.

        >>> first = Row.append(1, START, {"kind": "ledger", "time": "2026-01-01T00:00:00.000000+00:00"})
        >>> first.problem(1, START) is None, Row.append(2, first.hash, {}).previous == first.hash
        (True, True)
        """
        body = canonical(fields)
        return cls(number, previous, body, row_hash(number, previous, body))

    def problem(self, number: int, previous: str) -> str | None:
        """What is wrong with this row at that place of the chain; None for an intact one."""
        if any(type(value) is not kind for value, kind in zip(self._values(), _TYPES, strict=True)):
            return f"row {number} holds values of other types"
        if self.number != number:
            return f"row {number} is missing: the next one has number {self.number}"
        if self.previous != previous:
            return f"row {number} does not follow the row before it"
        if self.hash != row_hash(number, previous, self.body):
            return f"row {number} was changed: its hash does not match"
        return None

    def fields(self) -> dict[str, Any]:
        """The body as a mapping.

        Raises:
            LedgerError: no canonical JSON object.
        """
        try:
            found = json.loads(self.body)
        except ValueError:
            found = None
        if not isinstance(found, dict) or canonical(found) != self.body:
            raise LedgerError(f"row {self.number} is no canonical JSON object; restore the ledger")
        return found

    def _values(self) -> tuple[object, ...]:
        return self.number, self.previous, self.body, self.hash


_TYPES = (int, str, str, str)


def row_hash(number: int, previous: str, body: str) -> str:
    """SHA-256 over number, previous hash and body, each on its own line."""
    return hashlib.sha256(f"{number}\n{previous}\n{body}".encode(errors="surrogateescape")).hexdigest()


def canonical(fields: Mapping[str, Any]) -> str:
    """Sorted keys, no spaces, no NaN, ASCII: one text for one value.

    >>> canonical({"b": 1, "a": "x"})
    '{"a":"x","b":1}'
    """
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)


def now() -> str:
    """The clock, UTC, with microseconds; such texts sort by time."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def stamp(last: str) -> dict[str, str]:
    """Time fields of the next row, never before the `last` one.

    The order of rows is the order of the chain, not of the clock, and a clock that was set back by a second
    must not stop a run that has a reservation. So the time is held at the last one, and what the clock said
    is recorded beside it for an auditor.

    >>> sorted(stamp("9999-01-01T00:00:00.000000+00:00"))
    ['clock', 'time']
    """
    read = now()
    return {"time": read} if read >= last else {"time": last, "clock": read}


def check_time(number: int, value: object, last: str) -> str:
    """Returns a row's time if it is one and does not run backwards.

    Raises:
        LedgerError: another form, or an earlier time than the row before.
    """
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise LedgerError(f"row {number} has the time {value!r}; restore the ledger")
    if value < last:
        raise LedgerError(f"row {number} is earlier than the row before it; restore the ledger")
    return value

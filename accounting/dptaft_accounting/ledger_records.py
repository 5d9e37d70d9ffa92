"""Which records a content holds, as keyed marks: data sets that share records are found under any name.

A mark is the first eight bytes of HMAC-SHA256 of a record's digest under the ledger's key. The marks of a
content lie beside the chain, sorted and without repetition; a row of the chain names their SHA-256. Without
the key they tell nothing of the records. Two different records have one mark with probability 2^-64: among
10^6 records of one set and 10^6 of another some pair does with probability at most 5.5e-8, and then too much
is charged, never too little.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from dptaft_accounting.ledger_filter import LedgerError

MARK_BYTES = 8
_TABLE = (
    "CREATE TABLE IF NOT EXISTS marks (digest TEXT PRIMARY KEY, content BLOB NOT NULL)",
    "CREATE TRIGGER IF NOT EXISTS marks_stay BEFORE UPDATE ON marks "
    "BEGIN SELECT RAISE(ABORT, 'marks are never changed'); END",
    "CREATE TRIGGER IF NOT EXISTS marks_last BEFORE DELETE ON marks "
    "BEGIN SELECT RAISE(ABORT, 'marks are never deleted'); END",
)


def marks_of(records: Iterable[bytes], key: str) -> bytes:
    """The marks of records with these digests: sorted, each once, 8 bytes each.

    >>> one, two = (marks_of(records, "00" * 32) for records in ([b"a", b"b", b"a"], [b"b", b"a"]))
    >>> one == two, len(one)
    (True, 16)
    """
    secret = bytes.fromhex(key)
    found = b"".join(hmac.digest(secret, b"record\n" + record, "sha256")[:MARK_BYTES] for record in records)
    return np.unique(np.frombuffer(found, dtype=">u8")).astype(">u8").tobytes()


def are_within(marks: bytes, others: Iterable[bytes]) -> bool:
    """Whether every mark is among those of the others."""
    left = _numbers(marks)
    for other in others:
        left = left[~np.isin(left, _numbers(other), kind="sort")]
    return len(left) == 0


def do_meet(marks: bytes, other: bytes) -> bool:
    """Whether two sets share a mark."""
    return bool(np.isin(_numbers(marks), _numbers(other), kind="sort").any())


def _numbers(marks: bytes) -> npt.NDArray[np.uint64]:
    """In the byte order of the machine: numpy compares others in some cases only."""
    return np.frombuffer(marks, dtype=">u8").astype(np.uint64)


def digest_of(marks: bytes) -> str:
    """SHA-256, hexadecimal, by which the chain names marks."""
    return hashlib.sha256(marks).hexdigest()


def keep_marks(connection: sqlite3.Connection, marks: bytes) -> str:
    """Store marks in the open transaction and return their digest; equal sets are stored once."""
    for statement in _TABLE:
        connection.execute(statement)
    digest = digest_of(marks)
    connection.execute("INSERT OR IGNORE INTO marks VALUES (?, ?)", (digest, marks))
    return digest


def read_marks(connection: sqlite3.Connection, digest: str) -> bytes:
    """The marks that a row of the chain names.

    Raises:
        LedgerError: they are missing or were changed.
    """
    try:
        row = connection.execute("SELECT content FROM marks WHERE digest = ?", (digest,)).fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        row = None
    found = row[0] if row is not None else None
    if not isinstance(found, bytes) or digest_of(found) != digest:
        raise LedgerError(
            "the record marks of a data set are missing or changed; restore the ledger from a copy"
        )
    return found

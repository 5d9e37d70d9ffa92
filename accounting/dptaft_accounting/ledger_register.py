"""How a content becomes known to a ledger: its data set, its records, and who else has some of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptaft_accounting.ledger_filter import LedgerError
from dptaft_accounting.ledger_records import are_within, do_meet, keep_marks, read_marks
from dptaft_accounting.ledger_rules import known_dataset, require_room
from dptaft_accounting.ledger_state import State


@dataclass(frozen=True)
class Registration:
    """A content that is to be known.

    Attributes:
        path: of the ledger, for messages.
        fingerprint: of the content.
        marks: of its records; empty where they are not given.
        name: for a new data set.
        version_of: the content holds the records of the data set `name` in another form.
    """

    path: Path
    fingerprint: str
    marks: bytes
    name: str
    version_of: bool

    def rows(self, state: State, connection: sqlite3.Connection) -> Iterator[Mapping[str, Any]]:
        """Rows to append, one after the other; `state` has taken those before.

        Raises:
            LedgerError: the name belongs to other content with a budget, or is unknown, or a version would
                exceed the budget of its data set.
        """
        if self.version_of:
            known_dataset(state, self.name)
        known, new_marks = state.names.get(self.fingerprint), self.fingerprint not in state.marks
        marks = self.marks if new_marks else b""
        stored = {f: read_marks(connection, digest) for f, digest in state.marks.items()} if marks else {}
        if known is None:
            own = self.name if self.version_of else _holder(state, stored, marks)
            if own is None:
                own = self.name
                self._require_free(state, own)
            yield {"kind": "data-set", "dataset": own, "fingerprint": self.fingerprint}
        if marks:
            meets = sorted(other for other, found in stored.items() if do_meet(marks, found))
            kept = keep_marks(connection, marks)
            yield {"kind": "records", "fingerprint": self.fingerprint, "marks": kept, "meets": meets}
        if self.version_of:
            if self.name not in state.near(self.fingerprint):
                yield {"kind": "share", "fingerprint": self.fingerprint, "dataset": self.name}
            budget = state.datasets[self.name].budget
            if budget is not None:
                require_room(state, self.name, budget)

    def _require_free(self, state: State, name: str) -> None:
        holder = state.datasets.get(name)
        if holder is not None and holder.budget is not None:
            raise LedgerError(
                f"the data set {name!r} has a budget and other content; where records persist, declare a "
                f"new version that shares it (`dptaft ledger init --ledger {self.path} "
                f"--version-of {name} --data ...`), else give it another name (--name)"
            )


def _holder(state: State, stored: Mapping[str, bytes], marks: bytes) -> str | None:
    """The data set that has all these records already, whatever they are called."""
    for dataset in state.datasets.values() if marks else ():
        if are_within(marks, (stored[version] for version in dataset.versions if version in stored)):
            return dataset.name
    return None

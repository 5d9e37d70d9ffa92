"""Whether a statement and a budget ledger say the same about a run. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from dptaft_accounting import PrivacyStatement, mechanism_from_dict
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.ledger import Cost, Entry, Ledger, LedgerError

LEDGER_NAME = "ledger.sqlite"


def ledger_problems(statement: PrivacyStatement, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Contradictions between a statement and a ledger, one line each: identity, chain, head, entry, amount.

    Raises:
        LedgerError: the file is missing or is no ledger.
    """
    composition = statement.composition
    name, head = composition.get("ledger_entry"), composition.get("ledger_head")
    if not isinstance(name, str) or not isinstance(head, str):
        return ("the run was not charged to a ledger",)
    if not Path(path).is_file():
        raise LedgerError(f"no ledger at {path}; give the file that the run was charged to")
    ledger = Ledger(path)
    problems = tuple(ledger.verify(heads=[head]))
    if problems:
        return problems
    if ledger.id != composition.get("ledger"):
        return (f"the run was charged to the ledger {composition.get('ledger')}, this is {ledger.id}",)
    try:
        return tuple(_entry_problems(statement, ledger.entry(name)))
    except AccountingError as error:
        return (str(error),)


def _entry_problems(statement: PrivacyStatement, entry: Entry) -> Iterator[str]:
    composition, record = statement.composition, statement.mechanism["record"]
    certificate = statement.accounting.get("certificate")
    if entry.state != "committed":
        yield f"the entry {entry.id} is {entry.state}, not committed"
    for label, stated, found in (
        ("hash", composition.get("ledger_entry_hash"), entry.hash),
        ("data set", composition.get("data_set"), entry.dataset),
        ("unit", statement.claim["unit"], entry.unit),
        ("mechanism record", record, dict(entry.mechanism)),
        ("certificate", certificate, None if entry.certificate is None else dict(entry.certificate)),
    ):
        if stated != found:
            yield f"the {label} of entry {entry.id} is not that of the statement"
    if entry.statements and statement.admin.get("id") not in entry.statements:
        yield f"the entry {entry.id} was bound to another statement, of other files or another claim"
    proof = None if certificate is None else ConvexityCertificate.from_dict(certificate)
    cost = Cost.of(mechanism_from_dict(record), proof, delta=statement.claim["delta"])
    if not cost.within(_with_slack(entry.authorised)):
        yield f"the entry {entry.id} was charged less than the run cost"


def _with_slack(cost: Cost) -> Cost:
    """One part in a million more, for other versions of numpy or scipy."""
    return Cost(*(amount + amount / 1_000_000 for amount in cost.amounts()))

"""What a parent pays before executions begin elsewhere: charged once, spent at most once, remembered.

The parent alone opens the ledger. An execution gets what was paid, is held to it, and leaves a durable trace
of having touched the records, so that no second execution starts afresh on the same payment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dptaft.backends.attempts import refuse_withdrawn
from dptaft.budgeting import UNIT, composition_fields, enrol, learn_records, open_ledger, release_abandoned
from dptaft.training.account import Spending
from dptaft.training.checkpoint import write_atomically
from dptaft.training.marks import PROGRESS, RESULT
from dptaft_accounting import Mechanism
from dptaft_accounting.ledger import Cost
from dptaft_accounting.ledger_filter import Part

_OPEN = "open"
_BEGUN, _FINISHED = b"begun", b"finished"


class PaymentError(ValueError):
    """Something was paid for otherwise, or is spent; the message names the remedy."""


@dataclass(frozen=True)
class Bill:
    """What a parent pays in one entry of a ledger.

    Attributes:
        spending: all that will be done to the records, and the delta of the claim.
        content: digest of the data (`dptaft.identity.content_digest`).
        data: name under which data that the ledger does not know yet is registered.
        run: name for people.
        part: (partition, part) where only one part of a partition is read; parts are charged in parallel.
        records: reads the digests of the records (`dptaft.identity.record_marks`).
    """

    spending: Spending
    content: str
    data: str
    run: str
    part: Part | None = None
    records: Callable[[], Iterable[bytes]] | None = None

    @property
    def mechanism(self) -> Mechanism:
        """The mechanism that is paid for.

        Raises:
            PaymentError: one without noise.
        """
        if self.spending.mechanism is None:
            raise PaymentError("what has no noise cannot be charged to a budget; give a finite epsilon")
        return self.spending.mechanism


def charge(bill: Bill, ledger: Path, pointer: Path) -> dict[str, Any]:
    """Charge everything to the ledger once and for all, before anything of it is trained.

    Args:
        bill: what is paid.
        ledger: file of the ledger, made where there is none.
        pointer: file that remembers the entry; an entry that it names is never charged again.

    Returns:
        Fields of the composition group of a statement about the whole.

    Raises:
        LedgerError: the budget does not permit it, or the ledger cannot be used.
        PaymentError: the entry of an interrupted call is for another mechanism or other records.

    Formal guarantees:
        When this returns, the whole amount is durably charged. The pointer is durable before the amount is
        authorised, so that a crash at any moment leads to one charge, never to two and never to none.
    """
    book, mechanism, certificate = open_ledger(ledger), bill.mechanism, bill.spending.certificate
    cost = Cost.of(mechanism, certificate, delta=bill.spending.delta)
    known = _read_pointer(pointer)
    if known is not None and known["ledger"] != book.id:
        raise PaymentError(f"{pointer.parent} was charged to the ledger {known['path']}; give that one")
    entry = None if known is None else book.entry(known["entry"])
    if entry is None:
        for name in enrol(book, bill.content, bill.data, bill.records):
            release_abandoned(book, name)
        entry = book.reserve(
            bill.content, cost, mechanism, certificate, run=bill.run, unit=UNIT, part=bill.part
        )
        content_of_pointer = {"ledger": book.id, "path": str(ledger.absolute()), "entry": entry.id}
        write_atomically(pointer, json.dumps(content_of_pointer).encode())
    else:
        learn_records(book, bill.content, bill.records)
    if known is not None and entry.state == _OPEN:
        entry = book.resume(entry.id, bill.content, cost, mechanism)
    if entry.state == _OPEN:
        book.authorise(entry.id, entry.token, cost)
        entry = book.commit(entry.id, entry.token, cost, mechanism, certificate)
    if book.fingerprint(bill.content) != entry.fingerprint:
        raise PaymentError(
            f"{pointer.parent} was charged to {entry.dataset!r} and {bill.data!r} holds other records now; "
            "restore them, or choose another --output"
        )
    if dict(entry.mechanism) != json.loads(json.dumps(mechanism.to_dict())) or entry.part != bill.part:
        raise PaymentError(
            f"{pointer} names a ledger entry of something else; restore the options, or choose another "
            "--output"
        )
    return composition_fields(book, entry, bill.spending.delta)


def _read_pointer(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return {name: str(content[name]) for name in ("ledger", "path", "entry")}
    except (ValueError, KeyError, TypeError):
        raise PaymentError(
            f"{path} is damaged, so the ledger entry is unknown; choose another --output"
        ) from None


@dataclass(frozen=True)
class Payment:
    """What was settled before executions start.

    Attributes:
        fields: what their statements say about it.
        allowed: what was paid, by name; names that are missing are not checked.
        finished: folder of the traces of executions; None where each may run again.
        content: digest of the records that were charged, which other processes compare with what they read;
            None where nothing is charged.
        lease: file that exists while the execution may go on (`dptaft.backends.attempts`); None in the
            process of the parent.
    """

    fields: Mapping[str, Any]
    allowed: Mapping[str, Spending]
    finished: Path | None = None
    content: str | None = field(default=None, repr=False)
    lease: Path | None = None

    def account(self, name: str, partial: Path) -> PrepaidAccount:
        """The account of one run, whose unfinished state is in `partial`."""
        trace = None if self.finished is None else self.finished / name
        return PrepaidAccount(self.fields, self.allowed.get(name), trace, partial, self.lease)


class PrepaidAccount:
    """Account of one run that was paid for before (`dptaft.training.account.Account`).

    Args:
        fields: what the statement says about the payment.
        allowed: what was paid; None where nothing is charged.
        trace: file that says that the records were touched; None where the run may be made again.
        partial: folder of the unfinished run.
        lease: file without which nothing may be done; None where there is no other execution.

    Formal guarantees:
        A run never authorises more than was paid for it. Before its first step a trace is durable; a run
        whose trace is there is refused unless its unfinished state is there as well, which lists every step
        that may have been taken. So neither a result that was taken away nor a lost state leads to a second
        run on one payment. An execution that was withdrawn is refused before its next steps and before its
        result is written.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        allowed: Spending | None = None,
        trace: Path | None = None,
        partial: Path | None = None,
        lease: Path | None = None,
    ) -> None:
        self._fields, self._allowed = dict(fields), allowed
        self._trace, self._partial, self._lease = trace, partial, lease

    def reserve(self, plan: Spending) -> None:
        """Compare the plan with what was paid.

        Raises:
            PaymentError: more, or it was paid for once and spent.
        """
        self._require(plan)
        if self._trace is None or not self._trace.exists():
            return
        finished = self._trace.read_bytes() != _BEGUN
        if not self._continues(finished):
            what = (
                "was trained, and its run folder is gone" if finished else "was begun, and its state is lost"
            )
            raise PaymentError(
                f"it {what}: a second result costs again; bring the folder back, or start anew (another "
                "--output)"
            )

    def _continues(self, finished: bool) -> bool:
        """Whether the state of the run is there; one killed right after its trace has a lock and no steps."""
        if self._partial is None or not self._partial.is_dir():
            return False
        names = {path.name for path in self._partial.iterdir()}
        return bool(names & {PROGRESS, RESULT} if finished else names)

    def authorise(self, spent: Spending) -> None:
        """Compare all steps so far, and the ones about to run, with what was paid."""
        self._require(spent)
        if self._trace is not None and not self._trace.exists():
            self._leave(_BEGUN)

    def commit(self, spent: Spending) -> Mapping[str, Any]:
        """Fields for the statement's composition group."""
        self._require(spent)
        if self._trace is not None:
            self._leave(_FINISHED)
        return self._fields

    def close(self) -> None:
        """Nothing to give back: the whole was charged before the start."""

    def _leave(self, content: bytes) -> None:
        if self._trace is not None:
            self._trace.parent.mkdir(exist_ok=True)
            write_atomically(self._trace, content)

    def _require(self, spent: Spending) -> None:
        refuse_withdrawn(self._lease)
        if self._allowed is None or spent.mechanism is None:
            return
        paid = self._allowed
        if spent.mechanism == paid.mechanism and spent.delta >= paid.delta:
            return
        if paid.mechanism is None or not _cost(spent, paid.delta).within(_cost(paid, paid.delta)):
            raise PaymentError("it would spend more than was charged for it; start anew (another --output)")


def _cost(spending: Spending, delta: float) -> Cost:
    if spending.mechanism is None:
        return Cost.zero()
    return Cost.of(spending.mechanism, delta=delta)

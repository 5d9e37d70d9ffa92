"""What the rows of a ledger mean: data sets, budgets and entries, as a fold over the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dptaft_accounting.ledger_chain import START, Row, check_time
from dptaft_accounting.ledger_filter import Budget, Cost, LedgerError, Part

FORMAT = 1
OPEN, COMMITTED, CLOSED, RELEASED = "open", "committed", "closed", "released"


@dataclass(frozen=True)
class Entry:
    """One run.

    Attributes:
        id: random, hexadecimal.
        dataset: whose budget it uses.
        run: the name of the run, for people.
        state: ``open``, ``committed``, ``closed`` (ended without a result) or ``released`` (never began).
        reserved: the worst case that an open run may reach.
        authorised: what it may have spent so far; never shrinks.
        exclusive: the budget was given to this run whole.
        part: (partition, part) where the run uses one part of a public partition.
        adjacency: for which the cost was accounted.
        unit: the protected unit.
        mechanism: record of what is planned, after a commit of what happened.
        certificate: record of the convexity certificate, or None.
        token: hash of the row that permitted the run to go on last; older permissions are void.
        owner: identity of the process that holds it.
        time: of the last row.
        hash: of the last row.
        bookmark: random text that the run wrote into its folder before the last charge; empty without one.
        fingerprint: of the content that the run reads.
        statements: ids of the statements that the run wrote, newest last.
    """

    id: str
    dataset: str
    run: str
    state: str
    reserved: Cost
    authorised: Cost
    exclusive: bool
    part: Part | None
    adjacency: str
    unit: str
    mechanism: Mapping[str, Any]
    certificate: Mapping[str, Any] | None
    token: str
    owner: Mapping[str, str]
    time: str
    hash: str
    bookmark: str = ""
    fingerprint: str = ""
    statements: tuple[str, ...] = ()

    @property
    def charge(self) -> Cost:
        """What counts against the budget: the reservation of an open run, then what it may have spent."""
        return self.reserved if self.state == OPEN else self.authorised

    @property
    def takes_all(self) -> bool:
        """Whether nothing else fits, whatever this run spends."""
        return self.exclusive and self.state != RELEASED

    def after_resume(self, cost: Cost) -> Cost:
        """The reservation of the run when it goes on and needs `cost` in total.

        It keeps what it holds: an open run all of it, and a run that took the budget whole what it asked for
        then, since what does not fit beside others must not look as if it did.
        """
        need = self.authorised.join(cost)
        return need.join(self.reserved) if self.state == OPEN or self.takes_all else need


@dataclass
class DataSet:
    """One data set in all its versions.

    Attributes:
        name: chosen at the first use.
        versions: keyed fingerprints of its contents.
        budget: None where none was declared.
        declared: how many times a budget was declared.
        unit: the protected unit of all entries; empty before the first.
    """

    name: str
    versions: list[str] = field(default_factory=list)
    budget: Budget | None = None
    declared: int = 0
    unit: str = ""


class State:
    """The meaning of a chain; `apply` takes its rows in order.

    Attributes:
        names: fingerprint of a content -> its data set.
        marks: fingerprint -> digest of the marks of its records, where they are known.
        meets: fingerprint -> contents that share a record with it.
    """

    def __init__(self) -> None:
        self.ledger_id = ""
        self.key_digest = ""
        self.number, self.head, self.time = 0, START, ""
        self.datasets: dict[str, DataSet] = {}
        self.names: dict[str, str] = {}
        self.marks: dict[str, str] = {}
        self.meets: dict[str, set[str]] = {}
        self.entries: dict[str, Entry] = {}

    def apply(self, row: Row) -> None:
        """Take the next row.

        Raises:
            LedgerError: the row is damaged, out of place, or does not follow from the rows before it.
        """
        problem = row.problem(self.number + 1, self.head)
        if problem is not None:
            raise LedgerError(f"{problem}; restore the ledger from a copy")
        body = row.fields()
        time = check_time(row.number, body.get("time"), self.time)
        kind = body.get("kind")
        if (kind == "ledger") != (self.number == 0) or kind not in self._RULES:
            raise LedgerError(
                f"row {row.number} has the kind {kind!r}, which this version does not expect there"
            )
        try:
            self._RULES[kind](self, body, row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, LedgerError):
                raise LedgerError(f"row {row.number}: {error}") from None
            raise LedgerError(f"row {row.number} ({kind}) is malformed; restore the ledger") from error
        self.number, self.head, self.time = row.number, row.hash, time

    def of(self, dataset: str) -> list[Entry]:
        """Entries that a record of a data set may bear, in order, released ones left out.

        Those of the data set, and those of others whose content shares records with a version of it.
        """
        versions = self.datasets[dataset].versions
        near = set().union(versions, *(self.meets.get(version, ()) for version in versions))
        return [
            e
            for e in self.entries.values()
            if (e.dataset == dataset or e.fingerprint in near) and e.state != RELEASED
        ]

    def near(self, fingerprint: str) -> list[str]:
        """Names of the data sets that a run on this content is charged to, its own one first."""
        own = self.names[fingerprint]
        others = {self.names[other] for other in self.meets.get(fingerprint, ())}
        return [own, *(name for name in self.datasets if name in others and name != own)]

    def entry(self, name: str) -> Entry:
        """The entry of that id.

        Raises:
            LedgerError: there is none.
        """
        if name not in self.entries:
            raise LedgerError(
                f"the ledger knows no entry {name!r}: an older copy of the ledger was restored, or it is "
                "another ledger; bring the right one back"
            )
        return self.entries[name]

    def _ledger(self, body: Mapping[str, Any], row: Row) -> None:
        if body["format"] != FORMAT:
            raise LedgerError(f"the ledger has format {body['format']!r}; this version reads {FORMAT}")
        self.ledger_id, self.key_digest = _string(body, "ledger"), _string(body, "key_sha256")

    def _dataset(self, body: Mapping[str, Any], row: Row) -> None:
        name, fingerprint = _string(body, "dataset"), _string(body, "fingerprint")
        if fingerprint in self.names:
            raise LedgerError("the same content is registered twice")
        self.names[fingerprint] = name
        self.datasets.setdefault(name, DataSet(name)).versions.append(fingerprint)

    def _records(self, body: Mapping[str, Any], row: Row) -> None:
        fingerprint, meets = _string(body, "fingerprint"), list(body["meets"])
        if fingerprint not in self.names or fingerprint in self.marks:
            raise LedgerError("records of an unknown content, or named twice")
        self.marks[fingerprint] = _string(body, "marks")
        self._join(fingerprint, meets)

    def _share(self, body: Mapping[str, Any], row: Row) -> None:
        self._join(_string(body, "fingerprint"), self.datasets[body["dataset"]].versions)

    def _join(self, fingerprint: str, others: Iterable[str]) -> None:
        """Note that two contents share records: what is spent on one is spent on records of the other."""
        for other in others:
            if other not in self.names:
                raise LedgerError("shared records with an unknown content")
            self.meets.setdefault(fingerprint, set()).add(other)
            self.meets.setdefault(other, set()).add(fingerprint)

    def _budget(self, body: Mapping[str, Any], row: Row) -> None:
        dataset = self.datasets[body["dataset"]]
        dataset.budget = Budget.from_dict(body["budget"])
        dataset.declared += 1
        dataset.unit = dataset.budget.unit

    def _reserve(self, body: Mapping[str, Any], row: Row) -> None:
        name, part = _string(body, "entry"), body["part"]
        dataset = self.datasets[body["dataset"]]
        if name in self.entries or self.names[_string(body, "fingerprint")] != dataset.name:
            raise LedgerError(f"entry {name} exists, or is of other content")
        dataset.unit = dataset.unit or _string(body, "unit")
        self.entries[name] = Entry(
            id=name,
            dataset=dataset.name,
            run=_string(body, "run"),
            state=OPEN,
            reserved=Cost.from_dict(body["cost"]),
            authorised=Cost.zero(),
            exclusive=bool(body["exclusive"]),
            part=None if part is None else (str(part[0]), str(part[1])),
            adjacency=_string(body, "adjacency"),
            unit=_string(body, "unit"),
            mechanism=dict(body["mechanism"]),
            certificate=body["certificate"],
            token=row.hash,
            owner=dict(body["owner"]),
            time=body["time"],
            hash=row.hash,
            fingerprint=_string(body, "fingerprint"),
        )

    def _authorise(self, body: Mapping[str, Any], row: Row) -> None:
        entry = self._open(body)
        mark = entry.authorised.join(Cost.from_dict(body["cost"]))
        self._update(entry, body, row, authorised=_within(mark, entry), bookmark=_bookmark(body))

    def _commit(self, body: Mapping[str, Any], row: Row) -> None:
        entry = self._open(body)
        mark = entry.authorised.join(Cost.from_dict(body["cost"]))
        self._update(
            entry,
            body,
            row,
            state=COMMITTED,
            authorised=_within(mark, entry),
            bookmark=_bookmark(body),
            mechanism=dict(body["mechanism"]),
            certificate=body["certificate"],
        )

    def _close(self, body: Mapping[str, Any], row: Row) -> None:
        entry = self._open(body)
        state = RELEASED if entry.authorised == Cost.zero() else CLOSED
        self._update(entry, body, row, state=state)

    def _resume(self, body: Mapping[str, Any], row: Row) -> None:
        entry = self.entry(body["entry"])
        reserved = entry.after_resume(Cost.from_dict(body["cost"]))
        self._update(
            entry,
            body,
            row,
            state=OPEN,
            reserved=reserved,
            exclusive=bool(body["exclusive"]),
            token=row.hash,
            owner=dict(body["owner"]),
        )

    def _bind(self, body: Mapping[str, Any], row: Row) -> None:
        entry = self.entry(body["entry"])
        if entry.state != COMMITTED:
            raise LedgerError(f"entry {entry.id} is {entry.state}")
        self.entries[entry.id] = replace(entry, statements=(*entry.statements, _string(body, "statement")))

    def _open(self, body: Mapping[str, Any]) -> Entry:
        entry = self.entry(body["entry"])
        if entry.state != OPEN:
            raise LedgerError(f"entry {entry.id} is {entry.state}")
        return entry

    def _update(self, entry: Entry, body: Mapping[str, Any], row: Row, **changes: Any) -> None:
        self.entries[entry.id] = replace(entry, time=body["time"], hash=row.hash, **changes)

    _RULES: ClassVar[dict[str, Callable[[State, Mapping[str, Any], Row], None]]] = {
        "ledger": _ledger,
        "data-set": _dataset,
        "records": _records,
        "share": _share,
        "budget": _budget,
        "reserve": _reserve,
        "authorise": _authorise,
        "commit": _commit,
        "close": _close,
        "resume": _resume,
        "bind": _bind,
    }


def _string(body: Mapping[str, Any], name: str) -> str:
    value = body[name]
    if not isinstance(value, str) or not value:
        raise LedgerError(f"{name} must be text, got {value!r}")
    return value


def _bookmark(body: Mapping[str, Any]) -> str:
    return _string(body, "bookmark") if "bookmark" in body else ""


def _within(mark: Cost, entry: Entry) -> Cost:
    if not mark.within(entry.reserved):
        raise LedgerError(f"entry {entry.id} would exceed its reservation")
    return mark

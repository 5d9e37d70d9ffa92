"""The privacy budget ledger: what may be spent on a data set, what is reserved, and what has been spent.

One SQLite file, many processes. A run reserves its worst case before it reads the data, records what it
may have spent before every block of steps, and commits what it did. Whatever stops it, the ledger shows at
least what was spent.

Formal guarantees:
    1. At every moment the charges of all entries of a data set (open ones with their reservation) satisfy the
       filter of its budget (`ledger_filter`). Reservations are decided one after the other, in transactions
       that exclude each other.
    2. `authorise` returns only when the amount is durable; a run that calls it before the steps it covers is
       never charged less than it spent.
    3. An entry that was closed or taken over grants nothing more to the process that held it before, and
       nothing to a copy of its folder that fell behind (`bookmark`).
    4. Changing, removing or reordering rows is detected by `Ledger.verify` given the heads that statements
       recorded; without a later head, removing the last rows cannot be detected by the file alone.
    5. The account of a data set holds every run on a content that shares a record with it, if the records of
       both were registered: for each record, all runs that read it are in its account.
    Assumed: nobody who holds the file rewrites it together with all statements; records whose pixels changed
    (another size, another crop) are declared as a version of the data set; the number of steps of an
    interrupted run was not chosen from its own intermediate results unless its mechanism is exactly Gaussian
    (nothing of an unfinished run is released).
    Without a declared budget the ledger adds up what was spent: valid for runs whose settings did not depend
    on each other's results; only a limit that is fixed in advance covers adaptive choices.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dptaft_accounting.ledger_chain import START, Row, now, stamp
from dptaft_accounting.ledger_file import LedgerFile, insert, read_key, rows_after
from dptaft_accounting.ledger_filter import Budget, BudgetExceededError, Cost, LedgerError, Part
from dptaft_accounting.ledger_owner import is_gone, this_process
from dptaft_accounting.ledger_records import do_meet, marks_of, read_marks
from dptaft_accounting.ledger_register import Registration
from dptaft_accounting.ledger_rules import (
    Account,
    account,
    admit_all,
    held,
    known_dataset,
    require_covered,
    require_room,
    require_same_neighbours,
)
from dptaft_accounting.ledger_state import COMMITTED, FORMAT, OPEN, Entry, State

__all__ = ["Account", "Budget", "BudgetExceededError", "Cost", "Entry", "Ledger", "LedgerError"]

_TIMEOUT = 300.0


class Ledger:
    """One ledger file.

    Args:
        path: the file, made by `Ledger.create`.
        timeout: seconds to wait for other processes.

    Raises:
        LedgerError: a missing, foreign, damaged or newer file, or one on a network file system.

    >>> import tempfile
    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> ledger = Ledger.create(Path(tempfile.mkdtemp()) / "ledger.sqlite")
    >>> name = ledger.register("digest of the content", "scans")
    >>> ledger.declare(name, Budget.from_epsilon(3.0, 1e-5))
    >>> mechanism = FullBatchGaussian(20.0, steps=50)
    >>> cost = Cost.of(mechanism, delta=1e-5)
    >>> entry = ledger.reserve("digest of the content", cost, mechanism, run="first")
    >>> ledger.authorise(entry.id, entry.token, cost)
    >>> ledger.commit(entry.id, entry.token, cost, mechanism).state
    'committed'
    >>> ledger.verify(heads=[ledger.head])
    []
    """

    def __init__(self, path: Path | str, *, timeout: float = _TIMEOUT) -> None:
        self.path = Path(path)
        self._file = LedgerFile(self.path, timeout)
        self._state: State | None = None
        self._key = ""

    @classmethod
    def create(cls, path: Path | str, *, timeout: float = _TIMEOUT) -> Ledger:
        """Make a new ledger with a random key.

        Raises:
            LedgerError: the file exists or cannot be written.
        """
        key = secrets.token_hex(32)
        fields = {
            "kind": "ledger",
            "time": now(),
            "format": FORMAT,
            "ledger": secrets.token_hex(8),
            "key_sha256": _sha256(key),
        }
        LedgerFile.create(Path(path), key, Row.append(1, START, fields), timeout)
        return cls(path, timeout=timeout)

    @property
    def id(self) -> str:
        """Random name of this ledger."""
        return self._read().ledger_id

    @property
    def head(self) -> str:
        """Hash of the last row: it stands for the whole content."""
        return self._read().head

    def fingerprint(self, content: str) -> str:
        """HMAC-SHA256 of a content digest under the ledger's key; tells nothing to who lacks the key.

        Raises:
            LedgerError: the key is missing or damaged.
        """
        if not self._key:
            with self._file.reading() as connection:
                key, state = read_key(connection), self._catch_up(connection)
            if _sha256(key) != state.key_digest:
                raise LedgerError(
                    f"the key in {self.path} is missing or damaged; restore the ledger from a copy"
                )
            self._key = key
        return hmac.new(bytes.fromhex(self._key), content.encode(), hashlib.sha256).hexdigest()

    def find(self, content: str) -> str | None:
        """Name of the data set with this content, under whatever name it was registered."""
        return self._read().names.get(self.fingerprint(content))

    def knows_records(self, content: str) -> bool:
        """Whether the records of this content were registered."""
        return self.fingerprint(content) in self._read().marks

    def near(self, content: str, records: Iterable[bytes] = ()) -> list[str]:
        """Names of all data sets that hold this content or share a record with it, the own one first.

        Args:
            content: digest of labels and pixels; it need not be registered.
            records: digests of its records.
        """
        fingerprint = self.fingerprint(content)
        marks = marks_of(records, self._key)
        with self._file.reading() as connection:
            state = self._catch_up(connection)
            found = [] if fingerprint not in state.names else state.near(fingerprint)
            others = {
                state.names[other]
                for other, digest in (state.marks if marks else {}).items()
                if do_meet(marks, read_marks(connection, digest))
            }
        return found + [name for name in state.datasets if name in others and name not in found]

    def unmarked(self) -> list[str]:
        """Names of data sets a version of which was registered without its records, by an older program."""
        state = self._read()
        return [
            name
            for name, known in state.datasets.items()
            if not all(v in state.marks for v in known.versions)
        ]

    def register(
        self, content: str, name: str, *, records: Iterable[bytes] = (), version_of: bool = False
    ) -> str:
        """Make a content and its records known and return the name of its data set.

        A known content keeps its name, and so does one whose records all belong to one known data set:
        labels, class names, order and files do not matter. Content with some records of other data sets is
        charged to all of them. Another content under a known name becomes a version of the same data set,
        which shares its budget: at once while no budget is declared, else only with `version_of`.

        Args:
            content: digest of labels and pixels.
            name: of the data set.
            records: digests of its records, which know nothing of labels and files; may be left out where
                they were given before.
            version_of: `name` must exist, and this content holds the same records in another form; a content
                that belongs to another data set is charged to both from now on.

        Raises:
            LedgerError: another content under the name of a data set with a budget, or a version whose runs
                exceed it.
        """
        if not name or not name.isprintable():
            raise LedgerError(f"a data set needs a printable name, got {name!r}")
        fingerprint = self.fingerprint(content)
        made = Registration(self.path, fingerprint, marks_of(records, self._key), name, version_of)
        return self._append(made.rows).names[fingerprint]

    def declare(self, dataset: str, budget: Budget, *, replace: bool = False) -> None:
        """Set the budget of a data set; what was spent before counts.

        Raises:
            LedgerError: a budget was declared before (a new one is a new promise, made after looking: say
                `replace`), it is exceeded already, or earlier runs cannot be counted under its adjacency and
                unit.
        """

        def fields(state: State) -> dict[str, Any]:
            known = known_dataset(state, dataset)
            if known.budget is not None and not replace:
                raise LedgerError(
                    f"{dataset!r} has a budget; a new one is a promise made after looking at results: "
                    "say --replace"
                )
            for entry in state.of(dataset):
                require_same_neighbours(entry.adjacency, entry.unit, budget, f"the run {entry.run!r}")
            require_room(state, dataset, budget)
            return {"kind": "budget", "dataset": dataset, "budget": budget.to_dict()}

        self._write(fields)

    def reserve(
        self,
        content: str,
        cost: Cost,
        mechanism: Any,
        certificate: Any = None,
        *,
        run: str,
        unit: str = "one training record",
        part: Part | None = None,
        entry: str | None = None,
    ) -> Entry:
        """Claim the worst case of a run before it reads the data.

        Args:
            content: digest of a registered content.
            cost: of the whole plan.
            mechanism: record of the plan.
            certificate: its convexity certificate, or None.
            run: name for people.
            unit: the protected unit.
            part: (partition, part) where only one part of a public partition is read. Parts of one partition
                must be disjoint, and the part of a record must not depend on other records.
            entry: id to use; None draws one.

        Raises:
            BudgetExceededError: it does not fit; says by how much, what remains and what would fit.
            LedgerError: unknown content, or neighbours that the budget does not know.
        """
        fingerprint, name = self.fingerprint(content), entry or secrets.token_hex(8)
        if part is not None and mechanism.adjacency == "replace-one":
            raise LedgerError("a replaced record may touch two parts; use zero-out or add-remove with parts")

        def fields(state: State) -> dict[str, Any]:
            if fingerprint not in state.names:
                raise LedgerError("the ledger does not know this content; register it first")
            near = [known_dataset(state, name) for name in state.near(fingerprint)]
            for dataset in near:
                if dataset.unit not in ("", unit):
                    raise LedgerError(
                        f"{dataset.name!r} protects {dataset.unit!r}, the run {unit!r}; use one unit"
                    )
            return {
                "kind": "reserve",
                "entry": name,
                "dataset": near[0].name,
                "fingerprint": fingerprint,
                "run": run,
                "part": None if part is None else list(part),
                "cost": cost.to_dict(),
                "exclusive": admit_all(state, near, cost, mechanism.adjacency, unit, part, None),
                "adjacency": mechanism.adjacency,
                "unit": unit,
                "mechanism": mechanism.to_dict(),
                "certificate": None if certificate is None else certificate.to_dict(),
                "owner": this_process(),
            }

        return self._write(fields).entry(name)

    def authorise(self, entry: str, token: str, cost: Cost, *, bookmark: str = "") -> None:
        """Record durably that the run may spend up to `cost` in total from now on.

        Args:
            entry: its id.
            token: permission of the run.
            cost: of all it did and is about to do.
            bookmark: new random text that the folder of the run holds already (see `resume`).

        Raises:
            LedgerError: the entry was closed or taken over, or the reservation does not cover the cost.
        """

        def fields(state: State) -> dict[str, Any] | None:
            found = held(state, entry, token)
            require_covered(found, cost)
            if cost.within(found.authorised) and bookmark == found.bookmark:
                return None
            return {"kind": "authorise", "entry": entry, "cost": cost.to_dict(), **_marked(bookmark)}

        self._write(fields)

    def commit(
        self,
        entry: str,
        token: str,
        cost: Cost,
        mechanism: Any,
        certificate: Any = None,
        *,
        bookmark: str = "",
    ) -> Entry:
        """Charge for good what was executed: `cost`, but never less than was authorised.

        Raises:
            LedgerError: as for `authorise`.
        """

        def fields(state: State) -> dict[str, Any]:
            require_covered(held(state, entry, token), cost)
            return {
                "kind": "commit",
                "entry": entry,
                "cost": cost.to_dict(),
                "mechanism": mechanism.to_dict(),
                "certificate": None if certificate is None else certificate.to_dict(),
                **_marked(bookmark),
            }

        return self._write(fields).entry(entry)

    def bind(self, entry: str, token: str, statement: str) -> None:
        """Name the statement that a committed run wrote; its id stands for weights, configuration and claim.

        Raises:
            LedgerError: the entry is not committed, or another process has taken it over.
        """

        def fields(state: State) -> dict[str, Any] | None:
            found = state.entry(entry)
            if found.state != COMMITTED or found.token != token:
                raise LedgerError(f"entry {entry} is not a committed one of this run")
            return None if statement in found.statements else _bound(entry, statement)

        self._write(fields)

    def release(self, entry: str, token: str) -> Entry:
        """Give a reservation back of which nothing was authorised.

        Raises:
            LedgerError: something was; `close` charges it.
        """

        def fields(state: State) -> dict[str, Any]:
            if held(state, entry, token).authorised != Cost.zero():
                raise LedgerError(
                    f"steps of entry {entry} were authorised, so it cannot be released; close it"
                )
            return {"kind": "close", "entry": entry, "reason": "released by its run"}

        return self._write(fields).entry(entry)

    def close(self, entry: str, token: str | None = None, *, insist: bool = False) -> Entry:
        """End a run without a result: what was authorised stays charged, the rest is given back.

        The run cannot go on: it holds no permission any more.

        Args:
            entry: its id.
            token: permission of the run that ends itself. None closes the entry of another process.
            insist: also where that process is alive, or may be.

        Raises:
            LedgerError: the process is not certainly gone and `insist` is not said.
        """

        def fields(state: State) -> dict[str, Any]:
            if token is not None:
                held(state, entry, token)
                return {"kind": "close", "entry": entry, "reason": "ended by its run"}
            found = state.entry(entry)
            if found.state != OPEN:
                raise LedgerError(f"entry {entry} is {found.state}, not open")
            gone = is_gone(found.owner)
            if gone is not True and not insist:
                state_of = "still runs" if gone is False else "may still run"
                raise LedgerError(
                    f"the process {found.owner.get('pid')} of entry {entry} {state_of}; "
                    "end it first, or say --force"
                )
            reason = "its process is gone" if gone else "closed on request"
            return {"kind": "close", "entry": entry, "reason": reason}

        return self._write(fields).entry(entry)

    def resume(
        self,
        entry: str,
        content: str,
        cost: Cost,
        mechanism: Any,
        *,
        bookmarks: Collection[str] | None = None,
    ) -> Entry:
        """Continue a run: `cost` is the worst case of all it has done and will do, repeated steps included.

        Permissions given before are void. More than what the entry holds is granted only where the filter
        permits.

        Args:
            entry: its id.
            content: digest of the data, the one that was reserved: another version of its data set may share
                records with others.
            cost: in total.
            mechanism: record of the plan.
            bookmarks: those that the folder of the run holds. A folder without the last one that was charged
                is behind (a copy, or a backup), and what it knows of the run is too little. None: the caller
                is the run itself.

        Raises:
            BudgetExceededError: it does not.
            LedgerError: an unknown entry, one of other data or adjacency, or a folder that is behind.
        """
        fingerprint = self.fingerprint(content)

        def fields(state: State) -> dict[str, Any]:
            found = state.entry(entry)
            if found.fingerprint != fingerprint or mechanism.adjacency != found.adjacency:
                raise LedgerError(
                    f"entry {entry} belongs to other data or another adjacency; start a new run"
                )
            if bookmarks is not None and found.bookmark and found.bookmark not in bookmarks:
                raise LedgerError(
                    f"the run of entry {entry} went on elsewhere: this folder is an older copy that does not "
                    "know all steps that were charged; remove it, and start a new run"
                )
            want, exclusive = found.after_resume(cost), found.takes_all
            if not want.within(found.charge):
                near = [known_dataset(state, name) for name in state.near(found.fingerprint)]
                exclusive = admit_all(state, near, want, found.adjacency, found.unit, found.part, found)
            return {
                "kind": "resume",
                "entry": entry,
                "cost": cost.to_dict(),
                "exclusive": exclusive,
                "owner": this_process(),
            }

        return self._write(fields).entry(entry)

    def entry(self, name: str) -> Entry:
        """One entry.

        Raises:
            LedgerError: the ledger does not know it, as after an older copy was restored.
        """
        return self._read().entry(name)

    def charged(self, entry: str) -> list[str]:
        """Names of the data sets that an entry is charged to, its own one first."""
        state = self._read()
        return state.near(state.entry(entry).fingerprint)

    def account(self, dataset: str) -> Account:
        """The standing of a data set at one moment.

        Raises:
            LedgerError: an unknown data set.
        """
        return account(self._read(), dataset)

    def datasets(self) -> list[str]:
        """Names of all data sets, in order of registration."""
        return list(self._read().datasets)

    def verify(self, heads: Iterable[str] = ()) -> list[str]:
        """Check every row and every head that a statement recorded; returns one line per problem.

        Args:
            heads: hashes that must occur in the chain.
        """
        try:
            with self._file.reading() as connection:
                found = [" ".join(str(r[0]).split()) for r in connection.execute("PRAGMA quick_check")]
                rows, key = list(rows_after(connection, -(2**62))), read_key(connection)
        except LedgerError as error:
            return [str(error)]
        problems = [] if found == ["ok"] else [f"SQLite: {line}" for line in found]
        state = State()
        try:
            for row in rows:
                state.apply(row)
            with self._file.reading() as connection:
                for digest in set(state.marks.values()):
                    read_marks(connection, digest)
        except LedgerError as error:
            problems.append(str(error))
        if not rows:
            problems.append("the ledger holds no row; restore it from a copy")
        elif _sha256(key) != state.key_digest:
            problems.append(
                "the key of the fingerprints is missing or damaged; restore the ledger from a copy"
            )
        intact = {row.hash for row in rows[: state.number]}
        problems += [
            f"no row has the hash {head}: an older copy was restored, rows were rewritten, or it is "
            "another ledger"
            for head in heads
            if head not in intact
        ]
        return problems

    def export(self) -> dict[str, Any]:
        """Everything except the key, as JSON values.

        Raises:
            LedgerError: a damaged chain.
        """
        with self._file.reading() as connection:
            state, rows = self._catch_up(connection), list(rows_after(connection, 0))
        listed = [
            {"number": r.number, "previous": r.previous, "body": r.fields(), "hash": r.hash} for r in rows
        ]
        return {"ledger": state.ledger_id, "head": state.head, "rows": listed}

    def _read(self) -> State:
        with self._file.reading() as connection:
            return self._catch_up(connection)

    def _write(self, fields: Callable[[State], Mapping[str, Any] | None]) -> State:
        """Append the row that `fields` makes from the current state, if any; returns the state after."""

        def rows(state: State, _: Any) -> Iterator[Mapping[str, Any]]:
            body = fields(state)
            if body is not None:
                yield body

        return self._append(rows)

    def _append(self, rows: Callable[[State, Any], Iterator[Mapping[str, Any]]]) -> State:
        """Append what `rows` yields in one transaction; it sees every row that it yielded in the state."""
        with self._file.writing() as connection:
            state = self._catch_up(connection)
            for body in rows(state, connection):
                row = Row.append(state.number + 1, state.head, {**body, **stamp(state.time)})
                insert(connection, row)
                self._state = None  # until the row is durable
                state.apply(row)
        self._state = state
        return state

    def _catch_up(self, connection: Any) -> State:
        state = self._state or State()
        self._state = None
        if state.number:
            query = "SELECT hash FROM rows WHERE number = ?"
            last = connection.execute(query, (state.number,)).fetchone()
            if last is None or last[0] != state.head:
                raise LedgerError(f"the ledger {self.path} was replaced while it was in use; bring it back")
        try:
            for row in rows_after(connection, state.number):
                state.apply(row)
        except LedgerError as error:
            raise LedgerError(f"the ledger {self.path} is damaged: {error}") from None
        if not state.number:
            raise LedgerError(f"the ledger {self.path} holds no row; restore it from a copy")
        self._state = state
        return state


def _bound(entry: str, statement: str) -> dict[str, str]:
    return {"kind": "bind", "entry": entry, "statement": statement}


def _marked(bookmark: str) -> dict[str, str]:
    return {"bookmark": bookmark} if bookmark else {}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()

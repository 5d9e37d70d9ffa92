"""Training runs on the budget ledger: which ledger, data set and entry, and what the statement says."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from dptaft.data import ImageData
from dptaft.identity import Identity, identify, record_marks
from dptaft.learner import Progress
from dptaft.runs import STATEMENT, RunError, read_privacy
from dptaft.training.account import Account, NoAccount, Spending
from dptaft.training.checkpoint import write_atomically
from dptaft.training.plan import Request
from dptaft.training.trainer import partial_folder
from dptaft_accounting import Mechanism
from dptaft_accounting.errors import CertificateError
from dptaft_accounting.ledger import Budget, Cost, Entry, Ledger, LedgerError
from dptaft_accounting.ledger_filter import Load, Part, decimal_up, stated, total_load
from dptaft_accounting.ledger_owner import is_gone
from dptaft_accounting.ledger_rules import Account as Standing

LEDGER_NAME = "ledger.sqlite"
UNIT = "one training record"
Content = str | Callable[[], Identity] | None
_POINTER = "ledger.json"
_NO_BUDGET = (
    "no budget was declared for this data set: the total covers runs whose settings did not depend on each "
    "other's results"
)


def default_ledger(output: Path) -> Path:
    """The project's ledger: beside the run folders.

    >>> print(default_ledger(Path("runs/first")))
    runs/ledger.sqlite
    """
    return output.parent / LEDGER_NAME


def open_account(
    data: ImageData,
    request: Request,
    output: Path,
    *,
    ledger: str | Path | None = "auto",
    part: Part | None = None,
    content: Content = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Account:
    """Where a run is charged.

    Args:
        data: its records.
        request: what is asked; a run without a privacy claim charges nothing.
        output: folder of the run.
        ledger: ``auto`` for the project's ledger, a path, or None for none.
        part: (partition, part) where the run reads one part of a partition of the data.
        content: digest of the whole data, or what identifies it; None reads `data`.
        resume: continue the entry of the interrupted run.
        progress: called with (stage, done, total).

    Raises:
        LedgerError: the interrupted run is charged to a ledger and none is given, or the data have a budget
            and the run makes no claim that could be charged to it.
    """
    path = None if ledger is None else default_ledger(output) if str(ledger) == "auto" else Path(ledger)
    if not request.privacy.is_private:
        _refuse_budgeted(path, data, content, progress)
        return NoAccount("a run without a privacy claim is not charged")
    if path is None:
        if resume and (partial_folder(output) / _POINTER).exists():
            raise LedgerError("the interrupted run is charged to a ledger; leave --no-ledger out")
        return NoAccount("declined by the user")
    return LedgerAccount(path, data, output, part=part, content=content, resume=resume, progress=progress)


def _refuse_budgeted(path: Path | None, data: ImageData, content: Content, progress: Progress | None) -> None:
    if path is None or not path.exists():
        return
    ledger = Ledger(path)
    if not ledger.datasets():
        return
    digest, records = _found(content, data, progress)
    for name in ledger.near(digest, records()):
        if ledger.account(name).budget is not None:
            raise LedgerError(
                f"{name!r} has a budget in {path}, and a run without a privacy claim would break it; say "
                "--no-ledger where that is meant"
            )


def _found(
    content: Content, data: ImageData, progress: Progress | None
) -> tuple[str, Callable[[], Iterable[bytes]]]:
    """Digest of the whole data, and what finds the digests of its records."""
    if isinstance(content, str):
        return content, lambda: record_marks(data)
    found = identify(data, progress) if content is None else content()
    return found.content, lambda: found.records


def open_ledger(path: Path) -> Ledger:
    """The ledger at `path`, made where there is none; safe with many processes at once.

    Raises:
        LedgerError: it cannot be used or made, or runs beside it were charged to one that is not there.
    """
    if not path.exists():
        lost = charged_elsewhere(path.parent)
        if lost is not None:
            raise LedgerError(
                f"there is no ledger {path}, and the run {lost[0]} beside it is charged to the ledger "
                f"{lost[1]}: restore that one, name it with --ledger, or start a new account that knows "
                f"nothing of the earlier runs with `dptaft ledger init --ledger {path}`"
            )
        try:
            return Ledger.create(path)
        except LedgerError:
            if not path.exists():
                raise
    return Ledger(path)


def charged_elsewhere(folder: Path) -> tuple[str, str] | None:
    """A run in a folder (finished or not) that names a ledger, and the id of that ledger; None for none."""
    for path in sorted([*folder.glob(f"*/{STATEMENT}"), *folder.glob(f"*/{_POINTER}")]):
        try:
            found = json.loads(path.read_text())
            fields = found["composition"] if path.name == STATEMENT else found
            named, entry = fields["ledger"], fields.get("ledger_entry", fields.get("entry"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if isinstance(named, str) and entry is not None:
            return path.parent.name, named
    return None


def enrol(
    ledger: Ledger, content: str, name: str, records: Callable[[], Iterable[bytes]] | None = None
) -> list[str]:
    """Make the records of a run known and return the data sets that it is charged to, the own one first.

    Warns of records that others share, and of data that no budget limits where there are budgets.

    Args:
        ledger: the ledger.
        content: digest of the data.
        name: for a new data set.
        records: reads `dptaft.identity.Identity.records`; asked only where the ledger lacks them.
    """
    is_new = ledger.find(content) is None
    limited = [known for known in ledger.datasets() if ledger.account(known).budget is not None]
    marks = () if records is None or ledger.knows_records(content) else records()
    found = ledger.register(content, name, records=marks)
    near = ledger.near(content)
    if set(near[1:]) & set(limited):
        others = ", ".join(repr(other) for other in near[1:])
        warnings.warn(
            f"{found!r} shares records with {others}: the run is charged to all of them", stacklevel=2
        )
    elif is_new and limited and found not in limited:
        old = [known for known in limited if known in ledger.unmarked()]
        reason = (
            f"the records of {old[0]!r} are not known yet, so that shared ones cannot be told: run `dptaft "
            f"ledger init --ledger {ledger.path} --data ...` with its data once"
            if old
            else f"it shares no record with {', '.join(map(repr, limited))}; where it holds the same "
            f"people's records in another form, stop and run `dptaft ledger init --ledger "
            f"{ledger.path} --version-of {limited[0]} --data ...`"
        )
        warnings.warn(
            f"{ledger.path} has budgets and does not know this data: {found!r} is charged without a limit; "
            f"{reason}",
            stacklevel=2,
        )
    return near


def learn_records(ledger: Ledger, content: str, records: Callable[[], Iterable[bytes]] | None) -> None:
    """Make the records of a known content known, for an entry that an older program reserved without them."""
    name = ledger.find(content)
    if name is not None and records is not None and not ledger.knows_records(content):
        ledger.register(content, name, records=records())


class LedgerAccount:
    """Charges one run to a ledger (see `dptaft.training.account.Account`).

    Args:
        path: of the ledger; made where there is none.
        data: records of the run; the first use of a content registers it under the name of the data.
        output: folder of the run; its partial folder remembers the entry.
        part: (partition, part) where the run reads one part of a partition; parts are charged in parallel.
        content: digest of the whole data, or what identifies it; None reads `data`.
        resume: continue the entry of the interrupted run.
        progress: called with (stage, done, total).

    Formal guarantees:
        The entry in the ledger covers, at every moment, all step ranges that the checkpoint lists and whose
        steps began: both are written before the steps, each with all steps so far.
    """

    def __init__(
        self,
        path: Path,
        data: ImageData,
        output: Path,
        *,
        part: Part | None = None,
        content: Content = None,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._path, self._data, self._output = path, data, output
        self._part, self._given, self._content = part, content, ""
        self._resume, self._progress = resume, progress
        self._ledger: Ledger | None = None
        self._entry: Entry | None = None
        self._planned, self._bookmark = "", ""
        self._done = False

    def reserve(self, plan: Spending) -> None:
        """Claim the whole plan, or what an interrupted run still needs.

        Raises:
            BudgetExceededError: it does not fit.
            LedgerError: the ledger cannot be used, or does not know the interrupted run.
        """
        mechanism, partial = _mechanism(plan), partial_folder(self._output)
        pointer = _read_pointer(partial) if self._resume else None
        if self._resume:
            _require_idle(partial)
        self._ledger = ledger = (
            open_ledger(self._path) if pointer is None else _charged_ledger(self._path, pointer)
        )
        self._content, records = _found(self._given, self._data, self._progress)
        cost = Cost.of(mechanism, plan.certificate, delta=plan.delta)
        if pointer is not None:
            if ledger.entry(pointer["entry"]).part != self._part:
                raise LedgerError(f"{partial} belongs to another part of the data; start a new run")
            learn_records(ledger, self._content, records)
            self._entry = ledger.resume(
                pointer["entry"], self._content, cost, mechanism, bookmarks=pointer["bookmarks"].split()
            )
            self._bookmark = self._entry.bookmark
            return
        for name in enrol(ledger, self._content, self._data.name, records):
            release_abandoned(ledger, name)
        self._planned = secrets.token_hex(8)
        self._entry = ledger.reserve(
            self._content,
            cost,
            mechanism,
            plan.certificate,
            run=self._output.name,
            unit=UNIT,
            part=self._part,
            entry=self._planned,
        )

    def authorise(self, spent: Spending) -> None:
        """Charge all steps so far and the ones that are about to run; returns when that is durable.

        A certificate bounds what the last iterate discloses. Where it says more of a part of the run than of
        the whole (or nothing), the whole reservation is charged: no part of an unfinished run is released.

        Raises:
            LedgerError: the entry was closed or taken over, or the budget does not permit the steps.
        """
        ledger, entry = self._held()
        mechanism = _mechanism(spent)
        try:
            cost = Cost.of(mechanism, spent.certificate, delta=spent.delta)
        except CertificateError:
            cost = entry.reserved
        if not cost.within(entry.reserved):
            if spent.certificate is None:
                entry = self._extend(cost, mechanism)
            else:
                cost = entry.reserved
        ledger.authorise(entry.id, entry.token, cost, bookmark=self._next_bookmark())

    def commit(self, spent: Spending) -> Mapping[str, Any]:
        """Charge what was executed for good; returns the fields of the statement's composition group.

        Raises:
            LedgerError: as for `authorise`.
        """
        ledger, entry = self._held()
        mechanism = _mechanism(spent)
        cost = Cost.of(mechanism, spent.certificate, delta=spent.delta)
        if not cost.within(entry.reserved):
            entry = self._extend(cost, mechanism)
        self._entry = ledger.commit(
            entry.id, entry.token, cost, mechanism, spent.certificate, bookmark=self._next_bookmark()
        )
        self._done = True
        return composition_fields(ledger, self._entry, spent.delta)

    def close(self) -> None:
        """End: a committed run names its statement in the ledger.

        Without a commit, what was authorised stays charged and the rest is given back.
        """
        if self._ledger is None:
            return
        if self._done:
            self._bind()
            return
        self._done = True
        # a ledger that fails now keeps the whole reservation, which `dptaft ledger close` ends
        with contextlib.suppress(LedgerError):
            if self._entry is not None:
                self._ledger.close(self._entry.id, self._entry.token)
            elif self._planned:  # stopped between the reservation and its answer
                self._ledger.close(self._planned, insist=True)

    def _bind(self) -> None:
        """Name the statement in the chain, so that no other weights can take its place.

        Where the ledger cannot take it, the charge stands as it is and nothing is bound.
        """
        ledger, entry = self._held()
        with contextlib.suppress(LedgerError, RunError):
            path = self._output / STATEMENT
            if path.is_file():
                ledger.bind(entry.id, entry.token, read_privacy(path).id)

    def _next_bookmark(self) -> str:
        """A new one, in the folder before the ledger has it: the folder always holds that of the ledger."""
        ledger, entry = self._held()
        before, self._bookmark = self._bookmark, secrets.token_hex(8)
        marks = f"{before} {self._bookmark}".strip()
        _write_pointer(partial_folder(self._output), ledger, entry, marks)
        return self._bookmark

    def _held(self) -> tuple[Ledger, Entry]:
        if self._ledger is None or self._entry is None:
            raise LedgerError("nothing was reserved; reserve the plan first")
        return self._ledger, self._entry

    def _extend(self, cost: Cost, mechanism: Mechanism) -> Entry:
        ledger, entry = self._held()
        self._entry = ledger.resume(entry.id, self._content, cost, mechanism)
        return self._entry


def composition_fields(ledger: Ledger, entry: Entry, delta: float) -> dict[str, Any]:
    """What a statement says about the ledger: entry, head, budget, before, this run, total, remaining.

    Amounts are rounded up, what remains is rounded down. `total` holds for the neighbours that the budget
    names (zero-out without a budget).
    """
    after = ledger.account(entry.dataset)
    others = tuple(other for other in after.entries if other.id != entry.id)
    spent_before = total_load((other.authorised, other.part) for other in others)
    before, budget = replace(after, entries=others, spent=spent_before), after.budget
    fields: dict[str, Any] = {
        "ledger": ledger.id,
        "ledger_entry": entry.id,
        "ledger_entry_hash": entry.hash,
        "ledger_head": entry.hash,
        "data_set": entry.dataset,
        "data_sets_with_shared_records": [name for name in ledger.charged(entry.id) if name != entry.dataset],
        "filter": "none" if budget is None else budget.filter,
        "runs_before": len(before.entries),
        "spent_before": _reading(before, before.spent, delta),
        "this_run": _cost(entry.authorised),
        "total": {
            **_reading(after, after.spent, delta),
            "adjacency": "zero-out" if budget is None else budget.adjacency,
            "unit": entry.unit,
        },
    }
    if after.claimed != after.spent:
        fields["total_with_unfinished_runs"] = _reading(after, after.claimed, delta)
    if budget is None:
        return fields | ({"budget_note": _NO_BUDGET} if before.entries else {})
    fields["budget"] = _budget(budget)
    fields["remaining"] = _remaining(after, budget, delta)
    if after.declared > 1:
        fields["budget_note"] = f"the budget was declared {after.declared} times, the last one holds"
    return fields


def standing_fields(standing: Standing) -> dict[str, Any]:
    """The standing of a data set as plain numbers; epsilons at the budget's delta (1e-5 without one)."""
    budget = standing.budget
    delta = 1e-5 if budget is None else float(budget.delta)
    fields: dict[str, Any] = {
        "filter": "none" if budget is None else budget.filter,
        "budget": None if budget is None else _budget(budget),
        "declared": standing.declared,
        "spent": _reading(standing, standing.spent, delta),
        "claimed": _reading(standing, standing.claimed, delta),
        "taken_by": standing.taken_by,
    }
    return fields if budget is None else fields | {"remaining": _remaining(standing, budget, delta)}


def _reading(standing: Standing, load: Load, delta: float) -> dict[str, Any]:
    """A sum of costs in the terms of its filter; a single run by its own epsilon where that is smaller."""
    budget, alone = standing.budget, standing.entries[0] if len(standing.entries) == 1 else None
    if budget is not None and budget.filter == "sum":
        return {"epsilon": _number(load.epsilon), "delta": _number(load.delta)}
    at = delta if budget is None else float(budget.delta)
    epsilon = 0.0 if load == Load() else load.epsilon_at(at)
    if alone is not None and stated(at) >= alone.charge.delta:
        own = alone.authorised if load == standing.spent else alone.charge
        epsilon = min(epsilon, float(own.epsilon))
    return {
        "mu": _number(load.mu),
        "residual_delta": _number(load.residual_delta),
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": at,
    }


def _cost(cost: Cost) -> dict[str, Any]:
    names = ("mu", "residual_delta", "epsilon", "delta")
    return {name: _number(amount) for name, amount in zip(names, cost.amounts(), strict=True)}


def _budget(budget: Budget) -> dict[str, Any]:
    amounts = {"epsilon": float(budget.epsilon), "delta": float(budget.delta)}
    if budget.filter == "gdp":
        amounts |= {"mu": float(budget.mu), "residual_delta": float(budget.residual_delta)}
    return {**amounts, "adjacency": budget.adjacency, "unit": budget.unit}


def _remaining(standing: Standing, budget: Budget, delta: float) -> dict[str, Any]:
    left: dict[str, Any] = {"epsilon": standing.remaining_epsilon(delta), "delta": delta}
    if budget.filter == "gdp":
        taken = standing.taken_by is not None
        left["mu"] = 0.0 if taken else float(budget.remaining_mu(standing.claimed))
    return left


def _number(amount: Decimal) -> float | None:
    """Nine significant digits, rounded up; None for infinity."""
    return float(decimal_up(amount)) if amount.is_finite() else None


def _mechanism(spending: Spending) -> Mechanism:
    if spending.mechanism is None:
        raise LedgerError("a run without noise cannot be charged to a budget; give a finite epsilon")
    return spending.mechanism


def release_abandoned(ledger: Ledger, dataset: str) -> None:
    """End entries whose process is certainly gone and that never authorised a step: they spent nothing."""
    for entry in ledger.account(dataset).entries:
        idle = entry.state == "open" and entry.authorised == Cost.zero()
        if idle and is_gone(entry.owner):
            with contextlib.suppress(LedgerError):  # another process was quicker
                ledger.close(entry.id)


def _write_pointer(partial: Path, ledger: Ledger, entry: Entry, bookmarks: str) -> None:
    """Remember durably which entry an interrupted run must continue, before its next steps are authorised."""
    content = {
        "ledger": ledger.id,
        "path": str(ledger.path.absolute()),
        "entry": entry.id,
        "bookmarks": bookmarks,
    }
    partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(partial / _POINTER, json.dumps(content).encode())


def _read_pointer(partial: Path) -> dict[str, str] | None:
    path = partial / _POINTER
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return {name: str(content[name]) for name in ("ledger", "path", "entry", "bookmarks")}
    except (ValueError, KeyError, TypeError):
        raise LedgerError(
            f"{path} is damaged, so the run's ledger entry is unknown; start a new run"
        ) from None


def _charged_ledger(path: Path, pointer: Mapping[str, str]) -> Ledger:
    """The ledger of an interrupted run; a new one would know nothing of it."""
    found = None if not path.exists() else Ledger(path)
    if found is not None and found.id == pointer["ledger"]:
        return found
    where = "there is none" if found is None else "it is another ledger"
    remedy = f"give --ledger {pointer['path']}" if Path(pointer["path"]).exists() else "bring it back"
    raise LedgerError(f"the interrupted run is not charged to {path} ({where}): {remedy}")


def _require_idle(partial: Path) -> None:
    """Refuse to take the entry of a run that still trains: its checkpoint folder is locked."""
    try:
        descriptor = os.open(partial / "lock", os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LedgerError(f"another process is training in {partial}; wait for it") from None
    finally:
        os.close(descriptor)

"""What a sweep as a whole costs, who is charged, and what every point's statement says about it.

``public-benchmark``: the data are public; every point states the claim that private data would get, and no
claim is made for the sweep. ``publish-all``: all points are released, so they compose
(`SequenceComposition`); the whole is charged to the ledger once, before the first image is read for
training, and a resumed sweep finds that entry again. ``select-best``: see `dptaft.sweep.select`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptaft.budgeting import UNIT, composition_fields, content_digest, open_ledger, release_abandoned
from dptaft.data import ImageData
from dptaft.sweep.recipe import RecipeError
from dptaft.training.account import Spending
from dptaft.training.checkpoint import write_atomically
from dptaft_accounting import Mechanism, SequenceComposition, best_bound
from dptaft_accounting.ledger import Cost

_OPEN = "open"


@dataclass(frozen=True)
class Whole:
    """What one data set pays for a sweep.

    Attributes:
        mechanism: everything that is released.
        delta: of the claim.
        epsilon: by the smallest valid bound.
        points: number of released runs.
    """

    mechanism: Mechanism
    delta: float
    epsilon: float
    points: int


def compose(spendings: Sequence[Spending], most_epsilon: float | None = None) -> Whole:
    """The cost of publishing all points of one data set: their composition.

    The delta is the smallest that a point claims. Last-iterate bounds of single points do not enter: the
    composition of what each point may spend at most is valid whatever is released of it.

    Raises:
        RecipeError: a point without noise, or more than `most_epsilon` in total.
    """
    mechanisms = [s.mechanism for s in spendings]
    parts = tuple(m for m in mechanisms if m is not None)
    if len(parts) < len(mechanisms) or not parts:
        raise RecipeError("publish-all cannot hold a point without noise; remove infinite epsilons")
    delta = min(s.delta for s in spendings)
    mechanism = parts[0] if len(parts) == 1 else SequenceComposition(parts)
    epsilon = best_bound(mechanism, delta=delta).epsilon
    if most_epsilon is not None and epsilon > most_epsilon:
        raise RecipeError(
            f"publishing all {len(parts)} points costs epsilon {epsilon} at delta {delta:g}, more than "
            f"most_epsilon {most_epsilon:g}; take fewer points or smaller epsilons"
        )
    return Whole(mechanism, delta, epsilon, len(parts))


def charge(whole: Whole, data: ImageData, ledger: Path, pointer: Path, run: str) -> dict[str, Any]:
    """Charge the whole to the ledger once and for all, before anything of it is trained.

    Args:
        whole: what will be released.
        data: its records.
        ledger: file of the ledger, made where there is none.
        pointer: file of the sweep that remembers the entry; an entry that it names is never charged again.
        run: name of the sweep in the ledger.

    Returns:
        Fields of the composition group of a statement about the whole.

    Raises:
        LedgerError: the budget does not permit it, or the ledger cannot be used.
        RecipeError: the entry of an interrupted sweep is for another mechanism.

    Formal guarantees:
        When this returns, the whole amount is durably charged. The pointer is durable before the amount is
        authorised, so that a crash at any moment leads to one charge, never to two and never to none.
    """
    book = open_ledger(ledger)
    content = content_digest(data.train)
    cost = Cost.of(whole.mechanism, delta=whole.delta)
    known = _read_pointer(pointer)
    if known is not None and known["ledger"] != book.id:
        raise RecipeError(f"the sweep was charged to the ledger {known['path']}; name it in [budget] ledger")
    entry = None if known is None else book.entry(known["entry"])
    if entry is None:
        release_abandoned(book, book.register(content, data.name))
        entry = book.reserve(content, cost, whole.mechanism, run=run, unit=UNIT)
        content_of_pointer = {"ledger": book.id, "path": str(ledger.absolute()), "entry": entry.id}
        write_atomically(pointer, json.dumps(content_of_pointer).encode())
    elif entry.state == _OPEN:
        entry = book.resume(entry.id, content, cost, whole.mechanism)
    if entry.state == _OPEN:
        book.authorise(entry.id, entry.token, cost)
        entry = book.commit(entry.id, entry.token, cost, whole.mechanism)
    if book.find(content) != entry.dataset:
        raise RecipeError(
            f"the sweep was charged to {entry.dataset!r} and {data.name!r} holds other records now; restore "
            "them, or start a new sweep (another --output)"
        )
    if dict(entry.mechanism) != json.loads(json.dumps(whole.mechanism.to_dict())):
        raise RecipeError(
            f"{pointer} names a ledger entry of another sweep; restore the recipe, or choose another --output"
        )
    return composition_fields(book, entry, whole.delta)


def _read_pointer(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        return {name: str(content[name]) for name in ("ledger", "path", "entry")}
    except (ValueError, KeyError, TypeError):
        raise RecipeError(
            f"{path} is damaged, so the ledger entry of the sweep is unknown; choose another --output"
        ) from None


class SweepAccount:
    """Account of one point of a sweep whose whole was settled before (`dptaft.training.account.Account`).

    Args:
        fields: what the statement of the point says about its sweep.
        allowed: what was paid for the point; None where nothing is charged.
        trace: file that says that the point was trained; None where it may be trained again.
        partial: folder of the unfinished point.

    Formal guarantees:
        A point never authorises more than was paid for it: steps beyond its own plan are refused, and so is a
        second result in place of a finished one that was taken away.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        allowed: Spending | None = None,
        trace: Path | None = None,
        partial: Path | None = None,
    ) -> None:
        self._fields, self._allowed = dict(fields), allowed
        self._trace, self._partial = trace, partial

    def reserve(self, plan: Spending) -> None:
        """Compare the plan with what was paid.

        Raises:
            RecipeError: more, or the point was paid for once and trained.
        """
        self._require(plan)
        continues = self._partial is not None and self._partial.is_dir()
        if self._trace is not None and self._trace.exists() and not continues:
            raise RecipeError(
                "the point was trained, and its run folder is gone: a second result costs again; bring the "
                "folder back, or start a new sweep (another --output)"
            )

    def authorise(self, spent: Spending) -> None:
        """Compare all steps so far, and the ones about to run, with what was paid."""
        self._require(spent)

    def commit(self, spent: Spending) -> Mapping[str, Any]:
        """Fields for the statement's composition group."""
        self._require(spent)
        if self._trace is not None:
            self._trace.parent.mkdir(exist_ok=True)
            write_atomically(self._trace, b"")
        return self._fields

    def close(self) -> None:
        """Nothing to give back: the whole was charged before the start."""

    def _require(self, spent: Spending) -> None:
        if self._allowed is None or spent.mechanism is None:
            return
        paid = self._allowed
        if spent.mechanism == paid.mechanism and spent.delta >= paid.delta:
            return
        if paid.mechanism is None or not _cost(spent, paid.delta).within(_cost(paid, paid.delta)):
            raise RecipeError("the point would spend more than was charged for it; start the sweep afresh")


def _cost(spending: Spending, delta: float) -> Cost:
    if spending.mechanism is None:
        return Cost.zero()
    return Cost.of(spending.mechanism, delta=delta)


def public_fields(points: int) -> dict[str, Any]:
    """What a point of a public benchmark says about its sweep."""
    return {
        "ledger": "none: a public benchmark keeps no budget",
        "hyperparameter_choice": f"one of {points} points of a sweep over public data",
        "hyperparameter_cost": "not accounted: no claim is made for the sweep as a whole",
    }


def published_fields(whole: Whole, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a point of a published sweep says about its sweep."""
    entry, ledger = fields["ledger_entry"], fields["ledger"]
    return {
        "ledger": f"charged as a whole before the start: entry {entry} of {ledger}",
        "hyperparameter_choice": f"one of {whole.points} points that are all published",
        "hyperparameter_cost": f"all points together: epsilon {whole.epsilon} at delta {whole.delta}",
        "sweep": {
            "points": whole.points,
            "epsilon": whole.epsilon,
            "delta": whole.delta,
            "ledger_entry": fields["ledger_entry"],
        },
    }

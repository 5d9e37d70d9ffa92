"""Decisions of the ledger: may this run begin, does this process still hold it, what is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from dptaft_accounting.ledger_filter import (
    Budget,
    BudgetExceededError,
    Cost,
    LedgerError,
    Load,
    Part,
    counts_under,
    float_down,
    float_up,
    total_load,
)
from dptaft_accounting.ledger_state import OPEN, DataSet, Entry, State


@dataclass(frozen=True)
class Account:
    """The standing of one data set at one moment.

    Attributes:
        dataset: its name.
        versions: number of its registered contents.
        budget: None where none was declared: spending is summed without limit, for zero-out neighbours.
        declared: how many times a budget was declared; more than once means that it was replaced.
        spent: what the runs may have spent so far.
        claimed: the same with the whole reservation of open runs.
        taken_by: the run that was given the whole budget, if any.
        entries: all of them, released ones left out.
    """

    dataset: str
    versions: int
    budget: Budget | None
    declared: int
    spent: Load
    claimed: Load
    taken_by: str | None
    entries: tuple[Entry, ...]

    def remaining_epsilon(self, delta: float) -> float:
        """Largest epsilon at `delta` of one more full-batch run, rounded down; inf without a budget."""
        if self.budget is None:
            return math.inf
        if self.taken_by is not None:
            return 0.0
        found = self.budget.largest_epsilon(self.claimed, delta)
        whole = not self.entries and delta <= float_up(self.budget.delta)
        return max(found, float_down(self.budget.epsilon)) if whole else found


def account(state: State, name: str) -> Account:
    """The standing of a data set."""
    dataset = known_dataset(state, name)
    entries = tuple(state.of(name))
    taken = _taken(entries, dataset.budget)
    return Account(
        dataset=name,
        versions=len(dataset.versions),
        budget=dataset.budget,
        declared=dataset.declared,
        spent=total_load((entry.authorised, entry.part) for entry in entries),
        claimed=total_load((entry.charge, entry.part) for entry in entries),
        taken_by=None if taken is None else taken.run,
        entries=entries,
    )


def admit(
    state: State,
    dataset: DataSet,
    cost: Cost,
    adjacency: str,
    unit: str,
    part: Part | None,
    run: Entry | None,
) -> bool:
    """Whether a run that costs `cost` in total may go on; True means that it takes the budget whole.

    A run that the filter refuses may still have the whole budget if it is the first that touches the data and
    its own (epsilon, delta) is within the budget's: then the claim follows from this run alone. That choice
    is made before anything is known from the data, and nothing is admitted afterwards, however the run ends.

    Args:
        state: the ledger.
        dataset: whose budget.
        cost: worst case of the run, all it has done included.
        adjacency: for which the cost was accounted.
        unit: the protected unit.
        part: of a partition.
        run: the entry, where it exists already.

    Raises:
        BudgetExceededError: it may not; one line for the user.
    """
    budget = dataset.budget
    if budget is None:
        return False
    require_same_neighbours(adjacency, unit, budget, "the run")
    others = [entry for entry in state.of(dataset.name) if run is None or entry.id != run.id]
    taken = _taken(others, budget)
    if taken is not None:
        raise BudgetExceededError(
            f"the budget of {dataset.name!r} was given whole to the run {taken.run!r} (entry {taken.id}); "
            "nothing remains"
        )
    before = total_load((entry.charge, entry.part) for entry in others)
    after = total_load([*((entry.charge, entry.part) for entry in others), (cost, part)])
    if budget.permits(after):
        return run is not None and run.takes_all
    fresh = run is None or run.takes_all or run.authorised == Cost.zero()
    if not others and part is None and fresh and budget.covers_alone(cost):
        return True
    whole = budget.epsilon if not others and part is None and cost.delta <= budget.delta else Decimal(0)
    raise BudgetExceededError(_refusal(dataset.name, budget, before, after, cost, others, whole))


def admit_all(
    state: State,
    datasets: Sequence[DataSet],
    cost: Cost,
    adjacency: str,
    unit: str,
    part: Part | None,
    run: Entry | None,
) -> bool:
    """`admit` for every data set that shares records with the content of the run; all must permit it."""
    whole = False
    for dataset in datasets:
        whole = admit(state, dataset, cost, adjacency, unit, part, run) or whole
    return whole


def _refusal(
    name: str, budget: Budget, before: Load, after: Load, cost: Cost, others: list[Entry], whole: Decimal
) -> str:
    total, limit, delta = budget.epsilon_of(after), float(budget.epsilon), float(cost.delta)
    if math.isinf(total):
        over = f"leave the total of {name!r} without a finite epsilon at delta {float(budget.delta):g}"
    elif total > limit:
        over = (
            f"bring the total of {name!r} to epsilon {total:.6g} at delta {float(budget.delta):g}, "
            f"{total - limit:.6g} above its budget of {limit:g}"
        )
    else:
        over = f"exceed what the budget of {name!r} sets aside for failure probabilities"
    fits = max(budget.largest_epsilon(before, delta, cost), float_down(whole))
    spent = budget.epsilon_of(before) if others else 0.0
    rest = f"spent and reserved so far: epsilon {spent:.6g}; " + (
        f"the largest epsilon at delta {delta:g} that fits is {fits:g}"
        if fits > 0
        else f"no run at delta {delta:g} fits any more"
    )
    waiting = [entry.id for entry in others if entry.state == OPEN]
    if waiting:
        named = ", ".join(waiting[:3])
        rest += f"; unfinished runs hold a part (entries {named}): `dptaft ledger close` ends them"
    return f"the run would {over}; {rest}"


def _taken(entries: Iterable[Entry], budget: Budget | None) -> Entry | None:
    """The entry that has the whole budget; a larger budget declared later may hold it as an ordinary one."""
    if budget is None:
        return None
    found = (e for e in entries if e.takes_all and not budget.permits(Load.of(e.reserved)))
    return next(found, None)


def known_dataset(state: State, name: str) -> DataSet:
    """The data set of that name.

    Raises:
        LedgerError: there is none.
    """
    if name not in state.datasets:
        known = ", ".join(sorted(state.datasets)) or "none"
        raise LedgerError(f"the ledger knows no data set {name!r}; known: {known}")
    return state.datasets[name]


def require_same_neighbours(adjacency: str, unit: str, budget: Budget, who: str) -> None:
    """Refuse to add a cost to a budget that speaks of other neighbours or units.

    Raises:
        LedgerError: it would not be a bound for that budget's claim.
    """
    if not counts_under(adjacency, budget.adjacency):
        raise LedgerError(
            f"the budget holds for {budget.adjacency} neighbours and {who} is accounted for {adjacency}, "
            f"which does not bound it; use --adjacency {budget.adjacency}"
        )
    if unit != budget.unit:
        raise LedgerError(f"the budget protects {budget.unit!r} and {who} {unit!r}; use one unit for both")


def require_room(state: State, dataset: str, budget: Budget) -> None:
    """Refuse a budget that earlier runs exceed: nobody could keep it.

    Raises:
        LedgerError: with what they claim.
    """
    entries = state.of(dataset)
    load = total_load((entry.charge, entry.part) for entry in entries)
    alone = len(entries) == 1 and budget.covers_alone(entries[0].charge)
    if not alone and not budget.permits(load):
        raise LedgerError(
            f"the runs on {dataset!r} claim epsilon {budget.epsilon_of(load):.6g} at delta "
            f"{float(budget.delta):g} already, more than this budget of {float(budget.epsilon):g}; declare a "
            "larger one"
        )


def held(state: State, entry: str, token: str) -> Entry:
    """The open entry that `token` permits to go on.

    Raises:
        LedgerError: it was closed, or another process has taken it over.
    """
    found = state.entry(entry)
    if found.state != OPEN:
        raise LedgerError(f"entry {entry} is {found.state}: its run may not go on; continue it with --resume")
    if found.token != token:
        raise LedgerError(f"entry {entry} was taken over by another process; this one may not go on")
    return found


def require_covered(entry: Entry, cost: Cost) -> None:
    """Refuse what a reservation does not cover.

    Raises:
        LedgerError: with both amounts.
    """
    if not cost.within(entry.reserved):
        want, has = (f"epsilon {float(c.epsilon):.6g} (mu {float(c.mu):.6g})" for c in (cost, entry.reserved))
        raise LedgerError(f"entry {entry.id} would spend {want}, more than the {has} it reserved")

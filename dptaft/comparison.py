"""Runs side by side, and what they cost together if all of them are released. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dptaft.runs import Run
from dptaft_accounting import PrivacyStatement, best_bound, mechanism_from_dict
from dptaft_accounting import _checks as check
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.dominating_gaussian import gaussian_view
from dptaft_accounting.mechanisms import Mechanism, SequenceComposition
from dptaft_accounting.tradeoff import GaussianProfile


@dataclass(frozen=True)
class Line:
    """One run of a comparison; None where it claims nothing or was not evaluated."""

    run: str
    epsilon: float | None
    delta: float | None
    adjacency: str | None
    bound: str | None
    accuracy: float | None
    dataset: str
    no_claim: str | None


@dataclass(frozen=True)
class Total:
    """What several runs on one data set cost together.

    Attributes:
        dataset: name of the data set in its ledger, or `assumed the same`.
        runs: how many.
        epsilon: of all of them together; None where no total can be claimed.
        delta: at which it holds.
        method: how it was composed, or why there is none.
        plain_epsilon: the sum of the single epsilons, for comparison.
        plain_delta: the sum of the single deltas.
    """

    dataset: str
    runs: int
    epsilon: float | None
    delta: float | None
    method: str
    plain_epsilon: float | None
    plain_delta: float | None


@dataclass(frozen=True)
class Comparison:
    """All runs, and a total for every data set that several of them used."""

    lines: tuple[Line, ...]
    totals: tuple[Total, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


UNKNOWN = "assumed the same"
_SHARED = "data_sets_with_shared_records"


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs side by side.

    Data sets are told apart by the ledger, which knows their records; those that share records are one. Where
    a run was not charged to a ledger, the runs were charged to different ones, or a statement of an older
    version does not say what its data shares with others, all are assumed to have used the same data.
    """
    lines = tuple(_line(run) for run in runs)
    known = {line.dataset for line in lines}
    told = len(known) == 1 or all(
        run.statement is not None and isinstance(run.statement.composition.get(_SHARED), list) for run in runs
    )
    ledgers = {run.statement.composition.get("ledger") for run in runs if run.statement is not None}
    groups = [(UNKNOWN, list(runs))]
    if UNKNOWN not in known and len(ledgers) == 1 and told:
        groups = _groups(runs)
    return Comparison(lines, tuple(_total(name, members) for name, members in groups))


def _groups(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one ledger by data set; data sets that share records, directly or through others, are one."""
    groups: list[tuple[set[str], list[Run]]] = []
    ledger = ""
    for run in runs:
        composition = {} if run.statement is None else run.statement.composition
        ledger = str(composition.get("ledger"))
        names, members = {str(composition.get("data_set")), *composition.get(_SHARED, ())}, [run]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, members = names | group[0], group[1] + members
        groups.append((names, members))
    used = [
        sorted({str(r.statement.composition["data_set"]) for r in members if r.statement is not None})
        for _, members in groups
    ]
    shared = (" (they share records)" if len(names) > 1 else "" for names in used)
    found = [
        (f"{', '.join(names)} of ledger {ledger}{note}", members)
        for names, note, (_, members) in zip(used, shared, groups, strict=True)
    ]
    return sorted(found, key=lambda group: group[0])


def _line(run: Run) -> Line:
    statement = run.statement
    claim = {} if statement is None else statement.claim
    return Line(
        run=str(run.path),
        epsilon=claim.get("epsilon"),
        delta=claim.get("delta"),
        adjacency=claim.get("adjacency"),
        bound=None if statement is None else statement.accounting["bound"],
        accuracy=run.accuracy,
        dataset=UNKNOWN if statement is None else _dataset(statement),
        no_claim=run.no_claim,
    )


def _dataset(statement: PrivacyStatement) -> str:
    """Name of the data set in its ledger, which knows a data set by the keyed fingerprint of its content."""
    ledger, name = statement.composition.get("ledger"), statement.composition.get("data_set")
    charged = statement.composition.get("ledger_entry") is not None
    return f"{name} of ledger {ledger}" if charged and name and ledger else UNKNOWN


def _total(name: str, runs: Sequence[Run]) -> Total:
    statements = [run.statement for run in runs if run.statement is not None]

    def none(why: str) -> Total:
        return Total(name, len(runs), None, None, f"none: {why}", None, None)

    if len(statements) < len(runs):
        return none("a run claims nothing, so releasing all of them claims nothing")
    claims = [statement.claim for statement in statements]
    for field in ("adjacency", "unit", "records_per_unit"):
        values = sorted({str(claim[field]) for claim in claims})
        if len(values) > 1:
            return none(f"the runs differ in {field} ({', '.join(values)})")
    delta = max(claim["delta"] for claim in claims)
    epsilon, method = _composed(statements, delta, claims[0]["records_per_unit"])
    return Total(
        name,
        len(runs),
        None if math.isinf(epsilon) else epsilon,
        delta,
        method,
        math.fsum(claim["epsilon"] for claim in claims),
        math.fsum(claim["delta"] for claim in claims),
    )


def _composed(statements: Sequence[PrivacyStatement], delta: float, size: int) -> tuple[float, str]:
    """The smaller of two valid totals: of the records by composition, of the claims as Gaussian curves."""
    parts: list[Mechanism] = [mechanism_from_dict(item.mechanism["record"]) for item in statements]
    if len(parts) == 1:
        return statements[0].epsilon_at(delta), "a single run"
    whole = best_bound(SequenceComposition(tuple(parts)), delta=delta, records_per_unit=size).epsilon
    options = [(whole, f"sequence of {len(parts)} mechanism records, all iterates released")]
    curve = _as_gaussian(statements, parts, delta, size)
    if curve is not None:
        options.append((check.round_up(curve.epsilon(delta)), "squared mu of the single claims added"))
    return min(options)


def _as_gaussian(
    statements: Sequence[PrivacyStatement], parts: Sequence[Mechanism], delta: float, size: int
) -> GaussianProfile | None:
    """mu^2 adds up (Dong, Roth, Su 2022, Corollary 3.3); failure probabilities add up."""
    squares, failures = [], []
    for statement, part in zip(statements, parts, strict=True):
        raw = statement.accounting.get("certificate")
        proof = None if raw is None else ConvexityCertificate.from_dict(raw)
        report = best_bound(part, proof, delta=statement.claim["delta"], records_per_unit=size)
        view = gaussian_view(report.profile, residual_delta=delta * 1e-3 / len(parts))
        if view is None:
            return None
        squares.append(view.mu**2)
        failures.append(view.residual_delta)
    return GaussianProfile(math.sqrt(math.fsum(squares)) * (1 + 1e-14), math.fsum(failures) * (1 + 1e-14))

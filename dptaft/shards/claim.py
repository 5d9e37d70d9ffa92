"""What a composed run spends: the largest part over disjoint shards, the sequence of all parts otherwise.

Parallel composition (McSherry 2009, Theorem 4, for trade-off curves): neighbouring data sets differ in one
record, which lies in one shard whatever the other records are; the outputs of all other shards have the same
distribution on both, also when they were trained later and saw the outputs of earlier shards. So the curve of
the record's own shard holds for all outputs together. A replaced record may leave one shard and enter
another, so replace-one composes in sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptaft.shards.assignment import RANDOM
from dptaft.shards.parts import ComposeError, Part
from dptaft_accounting import (
    CertifiedLastIterate,
    Mechanism,
    ParallelComposition,
    PrivacyStatement,
    SequenceComposition,
    best_bound,
    mechanism_from_dict,
)

CHECKED, DECLARED, SEQUENCE = "checked", "declared by the user", "not used"
_WORST_FIRST = ("not covered", "covered", "public, declared by the user", "public", "none")


@dataclass(frozen=True)
class Released:
    """The record of one run, and whose records it read.

    Attributes:
        origin: its partition, or its own id where it belongs to none.
        shard: within the partition.
        mechanism: what happened.
    """

    origin: str
    shard: str
    mechanism: Mechanism


def composed_mechanism(parts: Sequence[Part], *, disjoint: bool) -> Mechanism:
    """The record of all parts together.

    Args:
        parts: runs with a statement each.
        disjoint: whether the user declares that runs of different partitions share no record.

    Raises:
        ComposeError: parts with different adjacencies or units, or evidence against `disjoint`.
    """
    _check_same_units(parts)
    if disjoint:
        _check_declaration(parts)
    return together([_released(part) for part in parts], disjoint=disjoint)


def together(released: Sequence[Released], *, disjoint: bool) -> Mechanism:
    """The record of several releases.

    Formal guarantees:
        Shards of one partition compose in parallel, because training them checked that they share no record.
        Several runs of one shard compose in sequence. Everything else composes in sequence, unless declared
        disjoint.
    """
    groups: dict[str, dict[str, list[Mechanism]]] = {}
    for item in released:
        groups.setdefault(item.origin, {}).setdefault(item.shard, []).append(item.mechanism)
    within = [_parallel([_sequence(runs) for runs in shards.values()]) for shards in groups.values()]
    return _parallel(within) if disjoint else _sequence(within)


def _released(part: Part) -> Released:
    return Released(part.partition or part.run.id, part.shard or "", mechanism_of(_statement(part)))


def mechanism_of(statement: PrivacyStatement) -> Mechanism:
    """The record of a statement, with its certificate where it has one."""
    record = mechanism_from_dict(statement.mechanism["record"])
    certificate = statement.accounting.get("certificate")
    if certificate is None:
        return record
    return CertifiedLastIterate(record, certificate, delta=statement.claim["delta"])


def _statement(part: Part) -> PrivacyStatement:
    if part.run.statement is None:
        raise ComposeError(f"{part.label} makes no privacy claim, so nothing can be composed from it")
    return part.run.statement


def _sequence(items: Sequence[Mechanism]) -> Mechanism:
    flat: list[Mechanism] = []
    for item in items:
        flat += item.parts if isinstance(item, SequenceComposition) else [item]
    return flat[0] if len(flat) == 1 else SequenceComposition(tuple(flat))


def _parallel(items: Sequence[Mechanism]) -> Mechanism:
    """Parallel composition of mechanisms; equal ones are written once, for the maximum does not change."""
    if len(items) == 1:
        return items[0]
    if items[0].adjacency == "replace-one":
        return _sequence(items)
    flat: list[Mechanism] = []
    for item in items:
        flat += item.parts if isinstance(item, ParallelComposition) else [item]
    return ParallelComposition(tuple(dict.fromkeys(flat)))


def _check_same_units(parts: Sequence[Part]) -> None:
    first = parts[0]
    for part in parts:
        for name in ("adjacency", "unit", "records_per_unit"):
            one, two = (_statement(p).claim[name] for p in (first, part))
            if one != two:
                raise ComposeError(
                    f"{first.label} and {part.label} claim privacy for different {name}: {one!r} against "
                    f"{two!r}; only claims about the same change of the data compose"
                )


def _check_declaration(parts: Sequence[Part]) -> None:
    """Refuse a declaration of disjointness that the runs themselves contradict."""
    for i, part in enumerate(parts):
        for other in parts[:i]:
            if (part.partition or part.run.id) == (other.partition or other.run.id):
                continue
            if _share_records(other, part):
                name = str(part.run.config["data"].get("name"))
                raise ComposeError(
                    f"{other.label} and {part.label} were both trained on data called {name!r}, or share "
                    "records, so they cannot be declared disjoint; leave --disjoint out, or train them as "
                    "shards of one partition"
                )


def _share_records(one: Part, other: Part) -> bool:
    """By the word of a ledger that knows the records of both, else by the name of the data."""
    known = [
        (str(c.get("ledger")), str(c["data_set"]), {str(name) for name in c["data_sets_with_shared_records"]})
        for c in (_statement(part).composition for part in (one, other))
        if "data_set" in c and isinstance(c.get("data_sets_with_shared_records"), list)
    ]
    if len(known) == 2 and known[0][0] == known[1][0]:
        (_, name, shared), (_, again, more) = known
        return again in {name, *shared} or name in more
    return one.run.config["data"].get("name") == other.run.config["data"].get("name")


def disjointness(parts: Sequence[Part], *, disjoint: bool) -> str:
    """Who vouches for disjoint parts: training as one partition, the user, or nobody where none is needed."""
    origins = {part.partition or part.run.id for part in parts}
    if len(origins) > 1 and disjoint:
        return DECLARED
    shards = {(part.partition, part.shard) for part in parts}
    return CHECKED if len(shards) > 1 and any(part.partition for part in parts) else SEQUENCE


def composed_statement(
    parts: Sequence[Part],
    *,
    how: str,
    disjoint: bool,
    removed: Sequence[Mapping[str, Any]],
    utility: Mapping[str, Any],
    admin: Mapping[str, Any],
) -> PrivacyStatement:
    """Account all parts together, at the smallest of their deltas, and merge what they cover and assume."""
    statements = [_statement(part) for part in parts]
    claims = [statement.claim for statement in statements]
    mechanism = composed_mechanism(parts, disjoint=disjoint)
    vouched = disjointness(parts, disjoint=disjoint)
    delta = min(claim["delta"] for claim in claims)
    return PrivacyStatement.build(
        mechanism,
        delta,
        unit=claims[0]["unit"],
        records_per_unit=claims[0]["records_per_unit"],
        claim={
            "not_protected": _not_protected(claims, utility),
            "public": _union([*(claim.get("public", []) for claim in claims), _public(parts)]),
            "data_accesses": _accesses(parts, claims, how, utility),
            "assumptions": _union(
                [*(claim.get("assumptions", []) for claim in claims), _assumptions(parts, vouched)]
            ),
        },
        details={"composed_of": len(parts), "how": how},
        composition=_composition(parts, how, vouched, removed)
        | _with_removed(parts, removed, disjoint=disjoint, delta=delta),
        implementation=_implementation(statements),
        utility=utility,
        admin={**admin, "caveats": _caveats(statements, vouched, removed)},
    )


def _union(lists: Iterable[Iterable[Any]]) -> list[Any]:
    found: list[Any] = []
    for items in lists:
        found += [item for item in items if item not in found]
    return found


def _not_protected(claims: Sequence[Mapping[str, Any]], utility: Mapping[str, Any]) -> list[str]:
    own = ["the evaluation images: their accuracy is published as it is"] if utility else []
    return _union([own, *(claim.get("not_protected", []) for claim in claims)])


def _public(parts: Sequence[Part]) -> list[str]:
    if not any(part.partition for part in parts):
        return []
    return ["names of the shards, and the number of records of each"]


def _accesses(
    parts: Sequence[Part], claims: Sequence[Mapping[str, Any]], how: str, utility: Mapping[str, Any]
) -> dict[str, str]:
    """For every use of the data, the answer of the part that is worst off."""
    found: dict[str, str] = {}
    for claim in claims:
        for name, answer in claim.get("data_accesses", {}).items():
            found[name] = min(found.get(name, answer), answer, key=_WORST_FIRST.index)
    if utility:
        found["evaluation"] = "not covered"
    if any(part.partition for part in parts):
        found["sizes_of_shards"] = "public" if _is_random(parts) else "public, declared by the user"
    return found | {"composition_weights": "not covered" if how == "weighted" else "public"}


def _is_random(parts: Sequence[Part]) -> bool:
    """Whether the shards of all parts were drawn at random, not named by the user."""
    sections = [part.run.config["shard"] for part in parts if part.partition]
    return all(str(section["assignment"]).startswith(RANDOM) for section in sections)


def _assumptions(parts: Sequence[Part], vouched: str) -> list[dict[str, str]]:
    where, found = "dptaft/shards/training.py", []
    if len({part.shard for part in parts if part.partition}) > 1:
        by, rule = (
            ("enforced by the code", where) if _is_random(parts) else ("declared by the user", "--shards")
        )
        found = [
            ("no record is in two shards of one partition", "enforced by the code", where),
            ("the shard of a record does not depend on other records", by, rule),
        ]
    if vouched == DECLARED:
        found.append(("no record is in two of the composed parts", "declared by the user", "--disjoint"))
    return [{"assumption": text, "vouched_by": by, "where": place} for text, by, place in found]


def _composition(
    parts: Sequence[Part], how: str, vouched: str, removed: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    choice = "given by the user" if how == "weighted" else "public defaults"
    return {
        "how": how,
        "disjointness": vouched,
        "parts": [
            {
                "statement": part.run.id,
                "run": str(_statement(part).admin.get("run", "")),
                "factor": part.factor,
                "epsilon": _statement(part).claim["epsilon"],
                "delta": _statement(part).claim["delta"],
                **({} if part.shard is None else {"partition": part.partition, "shard": part.shard}),
            }
            for part in parts
        ],
        "removed": [_public_removal(item) for item in removed],
        "ledger": "none: adding weights spends nothing; every part was charged when it was trained",
        "weights_choice": choice,
    }


def _public_removal(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "record"}


def _with_removed(
    parts: Sequence[Part], removed: Sequence[Mapping[str, Any]], *, disjoint: bool, delta: float
) -> dict[str, Any]:
    """Epsilon of this run and all that was taken out of it; nothing where that has no bound."""
    if not removed or not all("record" in item for item in removed):
        return {}
    before = [
        Released(
            item.get("partition", item["statement"]),
            item.get("shard", ""),
            mechanism_from_dict(item["record"]),
        )
        for item in removed
    ]
    now = [_released(part) for part in parts]
    if len({item.mechanism.adjacency for item in (*now, *before)}) > 1:
        return {}
    bound = best_bound(together([*now, *before], disjoint=disjoint), delta=delta)
    return {"with_removed": {"epsilon": bound.epsilon, "delta": delta}}


def _implementation(statements: Sequence[PrivacyStatement]) -> dict[str, Any]:
    """Facts that all parts share; the statements of the parts hold the others."""
    first = dict(statements[0].implementation)
    return {
        name: value
        for name, value in first.items()
        if all(statement.implementation.get(name) == value for statement in statements)
    }


def _caveats(
    statements: Sequence[PrivacyStatement], vouched: str, removed: Sequence[Mapping[str, Any]]
) -> list[str]:
    found = _union(statement.admin.get("caveats", []) for statement in statements)
    if vouched == DECLARED:
        found.append(
            "that the composed parts share no record was declared by the user and could not be checked"
        )
    return found + [str(item["reveals"]) for item in removed]

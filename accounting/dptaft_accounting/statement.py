"""PrivacyStatement: what one run claims about privacy, with the record that lets anyone recompute the claim.

Groups: *claim*, *mechanism*, *accounting*, *risk*, *admin* (always) and *composition*, *audit*,
*implementation*, *utility* (filled by the training program). All groups are plain JSON values that satisfy
`statement_schema.json`. Never present: seeds, realised batch sizes, un-noised losses or norms, timings.

`admin.id` names the content (`canonical.content_id`): a statement whose content was changed is found out by
`recompute`. `admin.files` holds the SHA-256 of every other file of the run, so that no file can be exchanged.
The hash is no signature: who rewrites everything also gets a new id, which is why the id is worth publishing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dptaft_accounting import _checks as check
from dptaft_accounting.accountants.crosscheck import cross_checks
from dptaft_accounting.bounds import BoundReport, best_bound
from dptaft_accounting.canonical import canonical, content_id, dumps, parse
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.dominating_gaussian import gaussian_view
from dptaft_accounting.errors import StatementError
from dptaft_accounting.mechanisms import Mechanism, PoissonGaussian, mechanism_from_dict
from dptaft_accounting.schema import validate
from dptaft_accounting.tradeoff import Profile, advantage, bayes_error, tpr_at_fpr

SCHEMA_VERSION = 1
# other versions of numpy and scipy move tails and transforms in their last digits, which sums of 10^6 terms
# raise to about 1e-10; what is stated was rounded up to nine digits, of which the last may turn for that
_TOLERANCE = 1e-9
_LAST_DIGIT = 1.1e-8
# upper bounds: a somewhat larger value than the recomputed one is valid, a smaller one is not
_UPPER = frozenset({"epsilon_composition", "epsilon_without_amplification", "advantage", "tpr"})
_VIEW = ("mu", "residual_delta", "regret")
_LOOSER = 0.05  # how much weaker than the recomputed one a valid bound may be
_READING = 1e-6  # of the readings of a curve, which are searched for on a grid
_FPRS = (1e-4, 1e-3, 1e-2, 1e-1)
_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
# the version may differ; a claimed epsilon may exceed the recomputed one, but not be below it
_NOT_DERIVED = {("accounting", "version"), ("claim", "epsilon")}
# a cyclic partition into a single part is the full batch
_KINDS_OF = {
    "full-batch": ("full-batch-gaussian",),
    "poisson": ("poisson-gaussian",),
    "cyclic-partition": ("cyclic-gaussian", "full-batch-gaussian"),
}
_CHANGED = "admin.id is not the hash of the content: the statement was changed after it was written"
_GROUPS = (
    "claim",
    "mechanism",
    "accounting",
    "risk",
    "composition",
    "audit",
    "implementation",
    "utility",
    "admin",
)


@dataclass(frozen=True)
class Recomputation:
    """Result of `PrivacyStatement.recompute`.

    Attributes:
        epsilon: derived again from the mechanism record, the certificate and delta alone.
        claimed: what the statement says.
        holds: the claim is not below the recomputed epsilon, and every derived field agrees.
        problems: one line for each field that does not follow from the record.
    """

    epsilon: float
    claimed: float
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """True where no field contradicts the record."""
        return not self.problems


@dataclass(frozen=True)
class PrivacyStatement:
    """One privacy claim with everything needed to check it; see `statement_schema.json` for the fields.

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> statement = PrivacyStatement.build(FullBatchGaussian(14.0, steps=100), delta=1e-5)
    >>> PrivacyStatement.from_json(statement.to_json()) == statement
    True
    >>> statement.recompute().holds
    True
    """

    claim: Mapping[str, Any]
    mechanism: Mapping[str, Any]
    accounting: Mapping[str, Any]
    risk: Mapping[str, Any]
    admin: Mapping[str, Any]
    composition: Mapping[str, Any] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)
    implementation: Mapping[str, Any] = field(default_factory=dict)
    utility: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _GROUPS:
            object.__setattr__(self, name, canonical(getattr(self, name), name))
        validate(self.to_dict())

    @classmethod
    def build(
        cls,
        mechanism: Mechanism,
        delta: float,
        *,
        certificate: ConvexityCertificate | None = None,
        unit: str = "one training record",
        records_per_unit: int = 1,
        cross_check: bool = True,
        claim: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        composition: Mapping[str, Any] | None = None,
        audit: Mapping[str, Any] | None = None,
        implementation: Mapping[str, Any] | None = None,
        utility: Mapping[str, Any] | None = None,
        admin: Mapping[str, Any] | None = None,
    ) -> PrivacyStatement:
        """Accounts the mechanism and writes down claim, accounting and risk.

        Args:
            mechanism: what happened (for a crashed or resumed run: everything that was executed).
            delta: failure probability of the claim.
            certificate: proof of convexity, for last-iterate bounds.
            unit: what one protected unit is, in words.
            records_per_unit: largest number of records that one unit owns.
            cross_check: compare composition with independent accountants (a second or two) and record the
                result.
            claim: further fields of the claim: `not_protected`, `public`, `data_accesses`, `assumptions`.
            details: further fields of the mechanism group: `l2_clip_norm`, `noise_std`, `steps_executed`, ...
            composition: ledger entry, budget before and after, hyperparameter choice and cost.
            audit: result of an empirical audit.
            implementation: versions, random sources, float mitigation, NaN policy.
            utility: metric, split, whether it was computed privately.
            admin: run, time, files, caveats; `schema_version` and `id` are filled in.

        Raises:
            StatementError: a field violates the schema or would overwrite a derived field.
            AccountingError: the mechanism cannot be accounted.
        """
        report = best_bound(mechanism, certificate, delta=delta, records_per_unit=records_per_unit)
        if math.isinf(report.epsilon):
            raise StatementError(f"no finite epsilon at delta {delta:g}; raise delta or the noise")
        statement = cls(
            claim=_merge("claim", _claim(mechanism, report, unit, records_per_unit), claim),
            mechanism=_merge("mechanism", {"record": mechanism.to_dict()}, details),
            accounting={
                **_accounting(mechanism, report, certificate, records_per_unit),
                "cross_checks": _cross_checks(mechanism, delta) if cross_check else [],
            },
            risk=_risk(report.profile),
            composition=dict(composition or {}),
            audit=dict(audit or {}),
            implementation=dict(implementation or {}),
            utility=dict(utility or {}),
            admin=_merge("admin", {"schema_version": SCHEMA_VERSION, "id": ""}, admin),
        )
        return statement._sealed()

    @property
    def id(self) -> str:
        """Name of the content as it is now; equals ``admin["id"]`` unless something was changed."""
        return content_id(self.to_dict())

    def _sealed(self) -> PrivacyStatement:
        return dataclasses.replace(self, admin={**self.admin, "id": self.id})

    def to_dict(self) -> dict[str, Any]:
        """Returns the groups as plain JSON values; empty optional groups are left out."""
        return {name: getattr(self, name) for name in _GROUPS if getattr(self, name)}

    def to_json(self) -> str:
        """Returns canonical JSON: sorted keys, no NaN, shortest exact numbers, one trailing newline."""
        return dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> PrivacyStatement:
        """Parses what `to_json` wrote.

        Raises:
            StatementError: not JSON, a violation of the schema, or a newer schema.
        """
        data = parse(text)
        _check_version(data)
        validate(data)
        return cls(**data)

    def epsilon_at(self, delta: float) -> float:
        """Returns epsilon at any delta, from the record; at the claim's delta never less than the claim.

        Raises:
            AccountingError: the record cannot be accounted, or delta is no probability.
        """
        mechanism, certificate = self._parts()
        size = int(self.claim["records_per_unit"])
        epsilon = best_bound(mechanism, certificate, delta=delta, records_per_unit=size).epsilon
        return max(epsilon, float(self.claim["epsilon"])) if delta <= self.claim["delta"] else epsilon

    def _parts(self) -> tuple[Mechanism, ConvexityCertificate | None]:
        raw = self.accounting.get("certificate")
        certificate = None if raw is None else ConvexityCertificate.from_dict(raw)
        return mechanism_from_dict(self.mechanism["record"]), certificate

    def recompute(self) -> Recomputation:
        """Derives epsilon and every derived field again from mechanism record, certificate and delta."""
        mechanism, certificate = self._parts()
        problems = [] if self.admin["id"] == self.id else [_CHANGED]
        problems += _contradictions(self.mechanism, mechanism, certificate)
        size = int(self.claim["records_per_unit"])
        report = best_bound(mechanism, certificate, delta=self.claim["delta"], records_per_unit=size)
        best, claimed = report.epsilon, float(self.claim["epsilon"])
        if claimed < best and claimed < check.round_up(
            report.profile.epsilon(report.delta) * (1 - _TOLERANCE)
        ):
            problems.append(f"claim.epsilon {claimed:g} is below the recomputed {report.epsilon:g}")
        if math.isinf(report.epsilon):
            return Recomputation(
                report.epsilon, claimed, (*problems, "no finite epsilon follows from the record")
            )
        stated = report.named(self.accounting["bound"])
        if stated is not None:  # a curve that was the smallest when the statement was written
            report = dataclasses.replace(report, bounds=(stated, *report.bounds))
        expected = {
            "claim": _claim(mechanism, report, self.claim["unit"], size),
            "accounting": _accounting(mechanism, report, certificate, size),
            "risk": _risk(report.profile),
        }
        for group, fields in expected.items():
            for name, value in fields.items():
                if (group, name) in _NOT_DERIVED:
                    continue
                if not _follows(name, getattr(self, group).get(name), value):
                    problems.append(f"{group}.{name} does not follow from the mechanism record")
        return Recomputation(best, claimed, tuple(problems))


def _check_version(data: Mapping[str, Any]) -> None:
    admin = data.get("admin")
    found = admin.get("schema_version") if isinstance(admin, Mapping) else None
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise StatementError(
            f"the statement has schema version {found}, this version of dptaft reads {SCHEMA_VERSION}; "
            "update dptaft"
        )


def _least_noise(mechanism: Mechanism) -> float | None:
    """Smallest noise multiplier of all steps; None for mechanisms without one."""
    noise = getattr(mechanism, "noise_multiplier", None)
    return min(noise) if isinstance(noise, tuple) else noise


def _contradictions(
    group: Mapping[str, Any], mechanism: Mechanism, certificate: ConvexityCertificate | None
) -> list[str]:
    """Details of the mechanism group that contradict the record or the certificate."""
    problems = []
    clip, std = group.get("l2_clip_norm"), group.get("noise_std")
    noise = _least_noise(mechanism)
    if noise is not None and clip is not None and std is not None and std < noise * clip * (1 - 1e-6):
        problems.append(
            f"mechanism.noise_std {std:g} is below noise_multiplier x l2_clip_norm {noise * clip:g}"
        )
    moved = group.get("sensitivity")
    if clip is not None and moved is not None and moved < mechanism.sensitivity * clip * (1 - 1e-9):
        problems.append(
            f"mechanism.sensitivity {moved:g} is below the {mechanism.sensitivity * clip:g} of the clip norm "
            f"under {mechanism.adjacency}"
        )
    sampler, kinds = group.get("sampler"), _KINDS_OF.get(group.get("sampler", ""))
    if kinds is not None and mechanism.kind not in kinds:
        problems.append(f"mechanism.sampler {sampler} is not that of the record, {mechanism.kind}")
    executed, steps = group.get("steps_executed"), getattr(mechanism, "steps", None)
    if executed is not None and steps is not None and executed > steps:
        problems.append(f"mechanism.steps_executed {executed} exceeds the {steps} steps of the record")
    if certificate is not None:
        for name, value in (("l2_clip_norm", clip), ("normaliser", group.get("normaliser"))):
            if value is not None and not math.isclose(value, getattr(certificate, name), rel_tol=1e-9):
                problems.append(
                    f"mechanism.{name} {value:g} is not the certificate's {getattr(certificate, name):g}"
                )
    return problems


def _claim(mechanism: Mechanism, report: BoundReport, unit: str, records_per_unit: int) -> dict[str, Any]:
    return {
        "notion": "approximate differential privacy",
        "epsilon": report.epsilon,
        "delta": report.delta,
        "adjacency": mechanism.adjacency,
        "unit": unit,
        "records_per_unit": records_per_unit,
        "released": getattr(mechanism, "released", "the result alone"),
    }


def _accounting(
    mechanism: Mechanism,
    report: BoundReport,
    certificate: ConvexityCertificate | None,
    records_per_unit: int,
) -> dict[str, Any]:
    composition = report.named("composition")
    view = gaussian_view(report.profile, residual_delta=min(1e-9, report.delta * 1e-3))
    return {
        "bound": report.name,
        "accountant": "dptaft_accounting",
        "version": _version(),
        "error_direction": "upper bound",
        "bounds": [{"name": bound.name, "epsilon": _finite(bound.epsilon)} for bound in report.bounds],
        "delta_to_epsilon": _delta_to_epsilon(report),
        "mu": None
        if view is None
        else {
            "mu": check.round_up(view.mu),
            "residual_delta": view.residual_delta,
            "regret": check.round_up(view.regret),
        },
        "epsilon_composition": None if composition is None else _finite(composition.epsilon),
        "epsilon_without_amplification": _without_amplification(mechanism, report.delta, records_per_unit),
        "certificate": None if certificate is None else certificate.to_dict(),
    }


def _without_amplification(mechanism: Mechanism, delta: float, records_per_unit: int) -> float | None:
    """Epsilon by composition if every step had used every record; None where sampling plays no part."""
    if not isinstance(mechanism, PoissonGaussian):
        return None
    everything = dataclasses.replace(mechanism, sampling_rate=1.0)
    return _finite(best_bound(everything, delta=delta, records_per_unit=records_per_unit).epsilon)


def _cross_checks(mechanism: Mechanism, delta: float) -> list[dict[str, Any]]:
    epsilon = best_bound(mechanism, delta=delta).epsilon
    return [
        {
            "accountant": result.accountant,
            "version": result.version,
            "bound": "composition",
            "epsilon": result.epsilon,
            "note": result.note,
        }
        for result in cross_checks(mechanism, delta, epsilon)
    ]


def _delta_to_epsilon(report: BoundReport) -> list[dict[str, Any]]:
    deltas = sorted({*_DELTAS, report.delta}, reverse=True)
    return [{"delta": d, "epsilon": _finite(check.round_up(report.profile.epsilon(d)))} for d in deltas]


def _risk(profile: Profile) -> dict[str, Any]:
    return {
        "advantage": min(1.0, check.round_up(advantage(profile))),
        "bayes_error": max(0.0, 0.5 - check.round_up(0.5 - bayes_error(profile))),
        "tpr_at_fpr": [{"fpr": f, "tpr": min(1.0, check.round_up(tpr_at_fpr(profile, f)))} for f in _FPRS],
    }


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _version() -> str:
    try:
        return version("dptaft")
    except PackageNotFoundError:
        return "unknown"


def _merge(group: str, derived: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    clash = sorted(set(derived) & set(given or {}))
    if clash:
        raise StatementError(f"{group}.{clash[0]} is derived and cannot be given; leave it out")
    return {**derived, **(given or {})}


def _follows(name: str, given: Any, derived: Any) -> bool:
    """True where a stated value is the derived one, or a bound that is a little weaker.

    Every bound of a statement has to be among the recomputed ones, and not below it: tighter accounting must
    not refuse what was right when it was written.
    """
    if name in _UPPER:
        return _at_least(given, derived, _LAST_DIGIT if name.startswith("epsilon") else _READING)
    if name == "bayes_error":
        # half of the advantage is rounded up to nine digits before it is taken from 1/2
        return _is_number(given) and bool(
            derived * (1 - _LOOSER) - 1e-9 <= given <= derived * (1 + _READING) + 1e-9
        )
    if name == "mu":
        return _follows_view(given, derived)
    if name == "delta_to_epsilon":
        return _follows_rows(given, derived)
    if name == "bounds":
        return _follows_bounds(given, derived)
    if isinstance(given, Mapping) and isinstance(derived, Mapping):
        return set(given) == set(derived) and all(_follows(k, given[k], derived[k]) for k in given)
    if isinstance(given, list) and isinstance(derived, list):
        pairs = zip(given, derived, strict=False)
        return len(given) == len(derived) and all(_follows("", a, b) for a, b in pairs)
    if _is_number(given) and _is_number(derived):
        return math.isclose(given, derived, rel_tol=_TOLERANCE)
    return bool(given == derived)


def _follows_view(given: Any, derived: Any) -> bool:
    if given is None or derived is None:
        return given is None
    return (
        isinstance(given, Mapping)
        and set(given) == set(_VIEW)
        and all(_at_least(given[k], derived[k], _READING) for k in _VIEW)
    )


def _follows_rows(given: Any, derived: list[dict[str, Any]]) -> bool:
    if not isinstance(given, list) or not all(isinstance(row, Mapping) for row in given):
        return False
    return [row.get("delta") for row in given] == [row["delta"] for row in derived] and all(
        _at_least(a.get("epsilon"), b["epsilon"], _READING) for a, b in zip(given, derived, strict=True)
    )


def _follows_bounds(given: Any, derived: list[dict[str, Any]]) -> bool:
    if not isinstance(given, list) or not given or not all(isinstance(bound, Mapping) for bound in given):
        return False
    known = {bound["name"]: bound["epsilon"] for bound in derived}
    return all(
        bound.get("name") in known and _at_least(bound.get("epsilon"), known[bound["name"]], _LAST_DIGIT)
        for bound in given
    )


def _at_least(given: Any, derived: Any, tolerance: float) -> bool:
    """True where an upper bound, None for infinity, is not below another, nor far above it."""
    if derived is None or given is None:
        return given is None
    least, most = derived * (1 - tolerance) - tolerance * 1e-3, derived * (1 + _LOOSER) + 2 * _READING
    return _is_number(given) and bool(least <= given <= most)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

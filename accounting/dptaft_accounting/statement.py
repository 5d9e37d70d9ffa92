"""PrivacyStatement: what one run claims about privacy, with the record that lets anyone recompute the claim.

Groups: *claim*, *mechanism*, *accounting*, *risk*, *admin* (always) and *composition*, *audit*,
*implementation*, *utility* (filled by the training program). All groups are plain JSON values that satisfy
`statement_schema.json`. Never present: seeds, realised batch sizes, un-noised losses or norms, timings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from dptaft_accounting import _checks as check
from dptaft_accounting.bounds import BoundReport, best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import StatementError
from dptaft_accounting.mechanisms import Mechanism, mechanism_from_dict
from dptaft_accounting.schema import validate
from dptaft_accounting.tradeoff import Profile, advantage, bayes_error, tpr_at_fpr

SCHEMA_VERSION = 1
_FPRS = (1e-4, 1e-3, 1e-2, 1e-1)
_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
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
            object.__setattr__(self, name, _canonical(getattr(self, name), name))
        validate(self.to_dict())

    @classmethod
    def build(
        cls,
        mechanism: Mechanism,
        delta: float,
        *,
        certificate: ConvexityCertificate | None = None,
        unit: str = "one training record",
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
            claim: further fields of the claim: `not_protected`, `public`, `data_accesses`.
            details: further fields of the mechanism group: `l2_clip_norm`, `noise_std`, `steps_executed`, ...
            composition: ledger entry, budget before and after, hyperparameter choice and cost.
            audit: result of an empirical audit.
            implementation: versions, random sources, float mitigation, NaN policy.
            utility: metric, split, whether it was computed privately.
            admin: id, time, caveats; `schema_version` is filled in.

        Raises:
            StatementError: a field violates the schema or would overwrite a derived field.
            AccountingError: the mechanism cannot be accounted.
        """
        report = best_bound(mechanism, certificate, delta=delta)
        if math.isinf(report.epsilon) or report.profile is None:
            raise StatementError(f"no finite epsilon at delta {delta:g}; raise delta or the noise")
        return cls(
            claim=_merge("claim", _claim(mechanism, report, unit), claim),
            mechanism=_merge("mechanism", {"record": mechanism.to_dict()}, details),
            accounting=_accounting(mechanism, report, certificate),
            risk=_risk(report.profile),
            composition=dict(composition or {}),
            audit=dict(audit or {}),
            implementation=dict(implementation or {}),
            utility=dict(utility or {}),
            admin=_merge("admin", {"schema_version": SCHEMA_VERSION}, admin),
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the groups as plain JSON values; empty optional groups are left out."""
        return {name: getattr(self, name) for name in _GROUPS if getattr(self, name)}

    def to_json(self) -> str:
        """Returns canonical JSON: sorted keys, no NaN, shortest exact numbers, one trailing newline."""
        return (
            json.dumps(self.to_dict(), sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        )

    @classmethod
    def from_json(cls, text: str) -> PrivacyStatement:
        """Parses what `to_json` wrote.

        Raises:
            StatementError: not JSON, or a violation of the schema.
        """
        try:
            data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise StatementError(f"the statement is not JSON: {error}") from None
        validate(data)
        return cls(**data)

    def recompute(self) -> Recomputation:
        """Derives epsilon and every derived field again from mechanism record, certificate and delta."""
        mechanism = mechanism_from_dict(self.mechanism["record"])
        raw = self.accounting.get("certificate")
        certificate = None if raw is None else ConvexityCertificate.from_dict(raw)
        report = best_bound(mechanism, certificate, delta=self.claim["delta"])
        claimed = float(self.claim["epsilon"])
        problems = []
        if claimed < report.epsilon:
            problems.append(f"claim.epsilon {claimed:g} is below the recomputed {report.epsilon:g}")
        if math.isinf(report.epsilon) or report.profile is None:
            return Recomputation(
                report.epsilon, claimed, (*problems, "no finite epsilon follows from the record")
            )
        expected = {
            "claim": _claim(mechanism, report, self.claim["unit"]),
            "accounting": _accounting(mechanism, report, certificate),
            "risk": _risk(report.profile),
        }
        for group, fields in expected.items():
            for name, value in fields.items():
                if name in ("version", "cross_checks") or (group, name) == ("claim", "epsilon"):
                    continue
                if not _agree(getattr(self, group).get(name), value):
                    problems.append(f"{group}.{name} does not follow from the mechanism record")
        return Recomputation(report.epsilon, claimed, tuple(problems))


def _claim(mechanism: Mechanism, report: BoundReport, unit: str) -> dict[str, Any]:
    return {
        "notion": "approximate differential privacy",
        "epsilon": report.epsilon,
        "delta": report.delta,
        "adjacency": mechanism.adjacency,
        "unit": unit,
        "records_per_unit": 1,
        "released": getattr(mechanism, "released", "the result alone"),
    }


def _accounting(
    mechanism: Mechanism, report: BoundReport, certificate: ConvexityCertificate | None
) -> dict[str, Any]:
    composition = report.named("composition")
    return {
        "bound": report.name,
        "accountant": "dptaft_accounting",
        "version": _version(),
        "error_direction": "upper bound",
        "bounds": [{"name": bound.name, "epsilon": _finite(bound.epsilon)} for bound in report.bounds],
        "delta_to_epsilon": _delta_to_epsilon(report),
        "epsilon_composition": None if composition is None else _finite(composition.epsilon),
        "certificate": None if certificate is None else certificate.to_dict(),
    }


def _delta_to_epsilon(report: BoundReport) -> list[dict[str, Any]]:
    deltas = sorted({*_DELTAS, report.delta}, reverse=True)
    profile = report.profile
    if profile is None:
        return []
    return [{"delta": d, "epsilon": _finite(check.round_up(profile.epsilon(d)))} for d in deltas]


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


def _canonical(value: Any, path: str) -> Any:
    """Copies a JSON value: tuples become lists, non-finite numbers and foreign types are refused."""
    if isinstance(value, Mapping):
        return {key: _canonical(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise StatementError(
        f"{path} holds {value!r}, which JSON cannot carry exactly; use a finite number or text"
    )


def _agree(given: Any, derived: Any) -> bool:
    """Equality with a relative tolerance of 1e-6, for numbers from other versions of numpy or scipy."""
    if isinstance(given, Mapping) and isinstance(derived, Mapping):
        return set(given) == set(derived) and all(_agree(given[k], derived[k]) for k in given)
    if isinstance(given, (list, tuple)) and isinstance(derived, (list, tuple)):
        return len(given) == len(derived) and all(_agree(a, b) for a, b in zip(given, derived, strict=True))
    if isinstance(given, float) or isinstance(derived, float):
        both = isinstance(given, (int, float)) and isinstance(derived, (int, float))
        return both and math.isclose(given, derived, rel_tol=1e-6, abs_tol=1e-12)
    return bool(given == derived)


def _refuse_constant(name: str) -> Any:
    raise StatementError(f"the statement holds {name}, which is not a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise StatementError("the statement repeats a field within one object")
    return result

"""Policy: what an organisation accepts, and the list of ways in which a statement falls short of it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dptaft_accounting import _checks as check
from dptaft_accounting.errors import AccountingError, PolicyError
from dptaft_accounting.mechanisms import ADJACENCIES
from dptaft_accounting.statement import PrivacyStatement

SECURE_SOURCES = frozenset({"AES-256-CTR, key from operating-system entropy"})
_NO_SAMPLING = "none: every record in every step"
_DECLARED = "public, declared by the user"


@dataclass(frozen=True)
class Violation:
    """One way in which a statement falls short.

    Attributes:
        rule: field of the policy, or `statement` where the statement contradicts itself.
        message: one line that names the value at fault.
    """

    rule: str
    message: str


@dataclass(frozen=True)
class Policy:
    """What is accepted; a rule that is None asks for nothing.

    Attributes:
        max_epsilon: largest epsilon at `delta`, read from the whole curve of the statement.
        delta: failure probability at which epsilon is read; None takes the statement's own.
        max_delta: largest delta that the statement may claim.
        max_advantage: largest gain of a membership test over guessing (TPR minus FPR), in [0, 1].
        allowed_adjacency: adjacencies that are accepted.
        min_records_per_unit: how many records of one owner the claim must cover together.
        allowed_not_covered: uses of the data that may be *not covered*; an empty tuple allows none.
        allowed_declared: uses of the data for which the user's word suffices; an empty tuple accepts none.
        require_secure_noise: noise and sampling come from a known cryptographic generator.
        require_ledger: the run was charged to a budget ledger.
        require_audit: an empirical audit was made and found the claim consistent.

    Raises:
        PolicyError: a value out of range, an unknown adjacency, or `delta` without `max_epsilon`.

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> statement = PrivacyStatement.build(FullBatchGaussian(14.0, steps=100), delta=1e-5)
    >>> [v.rule for v in Policy(max_epsilon=1.0, delta=1e-6, require_ledger=True).violations(statement)]
    ['max_epsilon', 'require_ledger']
    """

    max_epsilon: float | None = None
    delta: float | None = None
    max_delta: float | None = None
    max_advantage: float | None = None
    allowed_adjacency: tuple[str, ...] | None = None
    min_records_per_unit: int = 1
    allowed_not_covered: tuple[str, ...] | None = None
    allowed_declared: tuple[str, ...] | None = None
    require_secure_noise: bool = False
    require_ledger: bool = False
    require_audit: bool = False

    def __post_init__(self) -> None:
        for name, rule in (
            ("max_epsilon", check.non_negative),
            ("max_advantage", check.non_negative),
            ("delta", check.probability),
            ("max_delta", check.probability),
        ):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, rule(name, value, PolicyError))
        if self.delta is not None and self.max_epsilon is None:
            raise PolicyError(
                f"delta {self.delta:g} says where max_epsilon is read; give max_epsilon as well"
            )
        check.whole("min_records_per_unit", self.min_records_per_unit, PolicyError)
        for name in ("allowed_adjacency", "allowed_not_covered", "allowed_declared"):
            self._check_names(name)
        for name in self.allowed_adjacency or ():
            check.choice("allowed_adjacency", name, ADJACENCIES, PolicyError)
        for name in ("require_secure_noise", "require_ledger", "require_audit"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be true or false, got {getattr(self, name)!r}")

    def _check_names(self, field: str) -> None:
        names = getattr(self, field)
        if names is None:
            return
        if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
            raise PolicyError(f"{field} must be a list of names, got {names!r}")
        object.__setattr__(self, field, tuple(names))

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Policy:
        """Reads the fields from a TOML file; an unknown field is an error.

        Raises:
            PolicyError: the file cannot be read, is not TOML, or holds a wrong field.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"cannot read the policy {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise PolicyError(f"the policy {path} is not TOML: {error}") from None
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise PolicyError(f"a policy has no rule {unknown[0]!r}; rules are {', '.join(known)}")
        return cls(**values)

    def violations(
        self, statement: PrivacyStatement, audit: Mapping[str, Any] | None = None
    ) -> tuple[Violation, ...]:
        """Returns every way in which `statement` falls short; an empty tuple where it is accepted.

        A statement that does not follow from its own record violates every policy. Epsilon is taken from the
        recomputed curve, never from the printed claim alone.

        Args:
            statement: what is judged.
            audit: content of the run's ``audit.json``; None takes the statement's own audit group. An audit
                of another statement (`statement_id`) does not count.
        """
        try:
            result = statement.recompute()
        except AccountingError as error:
            return (Violation("statement", str(error)),)
        found = [Violation("statement", problem) for problem in result.problems]
        found += self._loss(statement)
        found += self._access(statement)
        found += self._making(statement)
        found += self._audited(statement, statement.audit if audit is None else audit)
        return tuple(found)

    def _loss(self, statement: PrivacyStatement) -> Iterator[Violation]:
        claim = statement.claim
        if self.max_epsilon is not None:
            delta = float(claim["delta"]) if self.delta is None else self.delta
            epsilon = statement.epsilon_at(delta)
            if epsilon > self.max_epsilon:
                yield Violation(
                    "max_epsilon", f"epsilon is {epsilon:.9g} at delta {delta:g}, above {self.max_epsilon:g}"
                )
        if self.max_delta is not None and claim["delta"] > self.max_delta:
            yield Violation("max_delta", f"delta is {claim['delta']:g}, above {self.max_delta:g}")
        advantage = statement.risk["advantage"]
        if self.max_advantage is not None and advantage > self.max_advantage:
            yield Violation(
                "max_advantage", f"membership advantage is {advantage:g}, above {self.max_advantage:g}"
            )
        if self.allowed_adjacency is not None and claim["adjacency"] not in self.allowed_adjacency:
            allowed = ", ".join(self.allowed_adjacency) or "none"
            yield Violation("allowed_adjacency", f"adjacency is {claim['adjacency']}; accepted: {allowed}")
        if claim["records_per_unit"] < self.min_records_per_unit:
            yield Violation(
                "min_records_per_unit",
                f"the claim covers {claim['records_per_unit']} records of one owner together, "
                f"not {self.min_records_per_unit}",
            )

    def _access(self, statement: PrivacyStatement) -> Iterator[Violation]:
        accesses = statement.claim.get("data_accesses")
        for rule, status, words in (
            ("allowed_not_covered", "not covered", "is not covered by the claim"),
            ("allowed_declared", _DECLARED, "is public by the user's word alone"),
        ):
            allowed = getattr(self, rule)
            if allowed is None:
                continue
            if not accesses:
                yield Violation(rule, "the statement does not say which uses of the data it covers")
                continue
            for name, value in sorted(accesses.items()):
                if value == status and name not in allowed:
                    yield Violation(rule, f"{name} {words}")

    def _making(self, statement: PrivacyStatement) -> Iterator[Violation]:
        if self.require_secure_noise:
            for name in ("noise_source", "sampling_source"):
                source = statement.implementation.get(name, "not stated")
                if source not in SECURE_SOURCES and not (
                    name == "sampling_source" and source == _NO_SAMPLING
                ):
                    yield Violation(
                        "require_secure_noise", f"{name} is {source!r}, no known secure generator"
                    )
        if self.require_ledger and not _charged(statement.composition):
            yield Violation("require_ledger", "the run was not charged to a budget ledger")

    def _audited(self, statement: PrivacyStatement, audit: Mapping[str, Any]) -> Iterator[Violation]:
        own = audit.get("statement_id", statement.id) == statement.id
        verdict = audit.get("verdict") if own else "of another statement"
        if verdict == "violation":
            yield Violation("statement", "the audit found more leakage than the claim allows")
        elif self.require_audit and verdict != "consistent":
            yield Violation("require_audit", f"the audit's verdict is {verdict or 'missing'}")


def _charged(composition: Mapping[str, Any]) -> bool:
    return bool(composition.get("ledger_entry")) and bool(composition.get("ledger_head"))

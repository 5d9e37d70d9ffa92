"""Everything about a run that can be checked without its data: what `dptaft verify` does. Needs no torch.

Checks are *passed*, *failed*, or a *note* for what is worth knowing and is no failure. They show that the
claim follows from the record, and that all files belong together; that the record is true of what happened is
the work of the training code (docs/guarantees.md).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dptaft.assumptions import assumed_too_much, is_of_older_version
from dptaft.ledger_check import LEDGER_NAME, ledger_problems
from dptaft.revision import source_revision
from dptaft.runs import (
    AUDIT,
    CONFIG,
    HASHED,
    METRICS,
    STATEMENT,
    RunError,
    file_problems,
    read_audit,
    read_config,
    read_privacy,
)
from dptaft_accounting import PrivacyStatement
from dptaft_accounting.convexity import ConvexityCertificate, trained_constants
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.policy import Policy
from dptaft_accounting.second_opinion import SecondOpinion, linear_instance, second_opinion

PASSED, FAILED, NOTE = "passed", "failed", "note"
_SAME = 1e-6  # a second opinion may exceed the claim by no more than this
_NEAR = 0.02  # and the recomputed bound is expected within this above it


@dataclass(frozen=True)
class Check:
    """One question about a run and its answer.

    Attributes:
        name: what was checked.
        status: `passed`, `failed` or `note`.
        message: the answer in one line.
    """

    name: str
    status: str
    message: str


@dataclass(frozen=True)
class Verification:
    """All answers about one run or statement.

    Attributes:
        path: what was checked.
        id: name of the statement's content as the file gives it.
        statement: None where nothing is claimed.
        epsilon: recomputed from the record; None where there is nothing to recompute.
        second: the independent value of epsilon by composition.
        checks: all answers in the order in which they were asked.
    """

    path: Path
    id: str
    statement: PrivacyStatement | None
    epsilon: float | None
    second: SecondOpinion | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True where no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == FAILED)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        claim = {} if self.statement is None else self.statement.claim
        return {
            "path": str(self.path),
            "verified": self.passed,
            "id": self.id,
            "claimed": {name: claim.get(name) for name in ("epsilon", "delta", "adjacency", "unit")},
            "recomputed_epsilon": self.epsilon,
            "second_opinion": None if self.second is None else asdict(self.second),
            "checks": [asdict(check) for check in self.checks],
        }


def verify(
    path: str | os.PathLike[str],
    *,
    policy: Policy | None = None,
    ledger: str | os.PathLike[str] | None = None,
) -> Verification:
    """Check a run directory, or a statement alone.

    Args:
        path: folder of a run, or a statement file.
        policy: what is accepted beyond consistency.
        ledger: budget ledger to look the run up in; None takes the one beside the run folder, if any.

    Raises:
        LedgerError: `ledger` is missing or is no ledger.
        RunError: the input cannot be read: not a run, truncated, foreign, of a newer version, a file missing.
    """
    place = Path(path)
    whole = place.is_dir()
    privacy = read_privacy(place / STATEMENT if whole else place)
    checks = [_result("statement", privacy.problems, f"its content has the id {privacy.id}")]
    checks += (
        _files(place, privacy.files)
        if whole
        else [Check("files", NOTE, "a statement alone: the files of its run were not looked at")]
    )
    statement = privacy.statement
    if statement is None:
        checks.append(Check("claim", FAILED, f"no privacy is claimed: {privacy.no_claim}"))
        return Verification(place, privacy.id, None, None, None, tuple(checks))
    epsilon, answers = _claim(statement)
    checks += answers
    second, answer = _second(statement)
    checks.append(answer)
    checks += _certificate(statement, _settings(place) if whole else {})
    if whole:
        checks += _agreement(place, statement)
    checks += _ledger(place, statement, ledger)
    checks += _versions(statement)
    audit = read_audit(place) if whole else {}
    checks += _audit(audit, privacy.id)
    if policy is not None:
        found = tuple(item.message for item in policy.violations(statement, audit or None))
        checks.append(_result("policy", found, "the statement meets it"))
    return Verification(place, privacy.id, statement, epsilon, second, tuple(checks))


def _result(name: str, problems: tuple[str, ...] | list[str], fine: str) -> Check:
    return Check(name, FAILED, "; ".join(problems)) if problems else Check(name, PASSED, fine)


def _files(folder: Path, files: Mapping[str, str]) -> list[Check]:
    problems = file_problems(folder, files)
    known = {STATEMENT, AUDIT, *HASHED}
    others = sorted(item.name for item in folder.iterdir() if item.name not in known)
    checks = [_result("files", problems, f"{', '.join(HASHED)} are the ones this run wrote")]
    if others:
        checks.append(Check("files", NOTE, f"not part of the run, not checked: {', '.join(others)}"))
    return checks


def _claim(statement: PrivacyStatement) -> tuple[float | None, list[Check]]:
    claimed, delta = statement.claim["epsilon"], statement.claim["delta"]
    try:
        result = statement.recompute()
    except AccountingError as error:
        return None, [Check("claim", FAILED, f"the record cannot be accounted: {error}")]
    epsilon = None if math.isinf(result.epsilon) else result.epsilon
    fine = f"epsilon {result.epsilon:.9g} at delta {delta:g} follows from the record; claimed {claimed:.9g}"
    return epsilon, [_result("claim", result.problems, fine)]


def _second(statement: PrivacyStatement) -> tuple[SecondOpinion, Check]:
    """Composition on the second path; a smaller number in the statement would prove an error."""
    claim, stated = statement.claim, statement.accounting.get("epsilon_composition")
    second = second_opinion(
        statement.mechanism["record"], claim["delta"], records_per_unit=claim["records_per_unit"]
    )
    if second.epsilon is None or stated is None:
        return second, Check("second accountant", NOTE, second.method)
    words = f"epsilon {second.epsilon:.9g} by composition ({second.method}); stated {stated:.9g}"
    if stated < second.epsilon * (1 - _SAME):
        return second, Check("second accountant", FAILED, f"{words}, which is too small")
    if statement.accounting["bound"] != "composition":
        exact = linear_instance(
            statement.mechanism["record"],
            statement.accounting.get("certificate") or {},
            claim["delta"],
            records_per_unit=claim["records_per_unit"],
        )
        if exact.epsilon is None:
            words += "; the smaller bound of the claim has one implementation and was recomputed with it"
        else:
            words += f"; an exactly solvable training under this certificate has {exact.epsilon:.9g}"
            if claim["epsilon"] < exact.epsilon * (1 - _SAME):
                return second, Check("second accountant", FAILED, f"{words}, above the claim")
    elif stated > second.epsilon * (1 + _NEAR) + 1e-6:
        return second, Check("second accountant", NOTE, f"{words}, which is valid and loose")
    return second, Check("second accountant", PASSED, words)


def _settings(folder: Path) -> Mapping[str, Any]:
    """Configuration of a run; empty where it cannot be read, which another check reports."""
    with contextlib.suppress(RunError):
        return read_config(folder)
    return {}


def _certificate(statement: PrivacyStatement, config: Mapping[str, Any]) -> Iterator[Check]:
    """Issues every certificate again, those of the parts of a composition too."""
    found = list(_certificates(statement))
    if not found:
        return
    classes = _value(config, "data", "classes")
    count = len(classes) if isinstance(classes, list) else None
    problems = [problem for raw in found for problem in _unfounded(raw, count)]
    fine = "issued again from loss, feature bound and step size: the same numbers"
    yield _result("certificate", problems, fine)


def _certificates(statement: PrivacyStatement) -> Iterator[Any]:
    """Certificate of the accounting group, then those inside the mechanism record."""
    own = statement.accounting.get("certificate")
    if own is not None:
        yield own
    records = [statement.mechanism["record"]]
    while records:
        record = records.pop()
        if isinstance(record, Mapping):
            if record.get("kind") == "certified-last-iterate":
                yield record.get("certificate")
            records += [record.get("base"), *(record.get("parts") or ())]


def _unfounded(raw: Any, classes: int | None) -> list[str]:
    """What of a certificate does not follow from loss, feature bound and step size."""
    try:
        own = ConvexityCertificate.from_dict(raw)
        again = _reissue(own, classes).to_dict()
    except (AccountingError, KeyError, TypeError, ValueError) as error:
        return [f"it cannot be issued again from its parts: {error}"]
    names = [name for name, value in again.items() if name != "origin" and raw.get(name) != value]
    return [f"{name} does not follow from its parts" for name in names]


def _reissue(own: ConvexityCertificate, classes: int | None) -> ConvexityCertificate:
    origin = own.origin
    return ConvexityCertificate.issue(
        loss=origin["loss"],
        constants=trained_constants(origin["loss"], classes),
        feature_bound=float(origin["feature_bound"]),
        l2_clip_norm=own.l2_clip_norm,
        regularization=own.strong_convexity,
        step_size=own.step_size,
        normaliser=own.normaliser,
        sampling=own.sampling,
        steps=own.steps,
        records=own.records,
        max_batch_size=own.max_batch_size if own.sampling == "poisson" else None,
        sampling_rate=own.sampling_rate,
        batches_per_epoch=own.batches_per_epoch,
        diameter=own.diameter,
        adjacency=own.adjacency,
        gradient_clipping=origin.get("gradient_bound") == "clipping of a scalar output",
        origin=origin,
    )


def _agreement(folder: Path, statement: PrivacyStatement) -> Iterator[Check]:
    """Every assumption of the statement against configuration and metrics (`dptaft.assumptions`)."""
    try:
        config = read_config(folder)
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        metrics = [_object(json.loads(line)) for line in lines if line]
    except (RunError, ValueError, RecursionError) as error:
        yield Check("agreement", FAILED, str(error))
        return
    try:
        problems = list(assumed_too_much(statement.to_dict(), config, metrics))
        older = is_of_older_version(config)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problems = [f"{CONFIG} or the statement cannot be compared: {error!r}"]
        older = False
    yield _result("agreement", problems, f"the statement assumes no more than {CONFIG} and {METRICS} say")
    if older:
        yield Check("agreement", NOTE, f"{CONFIG} of an older version lacks facts that statements assume")


def _object(line: Any) -> Mapping[str, Any]:
    return line if isinstance(line, dict) else {}


def _audit(audit: Mapping[str, Any], statement_id: str) -> Iterator[Check]:
    """An audit that found a violation fails the run; one of another statement says nothing about it."""
    if not audit:
        return
    verdict = str(audit.get("verdict"))
    if audit.get("statement_id") != statement_id:
        yield Check("audit", NOTE, f"{AUDIT} belongs to another statement")
    elif verdict == "violation":
        yield Check("audit", FAILED, "the audit found more leakage than the claim allows")
    else:
        status = PASSED if verdict == "consistent" else NOTE
        yield Check("audit", status, f"the verdict of {AUDIT} is {verdict}")


def _value(config: Mapping[str, Any], section: str, name: str) -> Any:
    found = config.get(section)
    return found.get(name) if isinstance(found, dict) else None


def _ledger(place: Path, statement: PrivacyStatement, path: str | os.PathLike[str] | None) -> Iterator[Check]:
    """Looks the run up in the ledger that was named, or in the one beside the run folder."""
    composition = statement.composition
    entry, beside = composition.get("ledger_entry"), place.resolve().parent / LEDGER_NAME
    if path is None and entry is None:
        yield Check("ledger", NOTE, str(composition.get("ledger", "none: the statement names no entry")))
        return
    if path is None and not beside.is_file():
        yield Check("ledger", NOTE, f"entry {entry} was not looked up; give --ledger")
        return
    problems = ledger_problems(statement, beside if path is None else path)
    yield _result(
        "ledger", problems, f"entry {entry} is charged at least what the run cost; the chain is whole"
    )


def _versions(statement: PrivacyStatement) -> Iterator[Check]:
    """Differences of versions, which are no failures: the numbers were recomputed."""
    stated = statement.implementation.get("versions", {})
    found = []
    for name in ("dptaft", "numpy", "scipy", "dp-accounting"):
        here = _installed(name)
        if name in stated and here is not None and here != stated[name]:
            found.append(f"{name} {stated[name]} there, {here} here")
    revision = statement.implementation.get("source_revision")
    if revision is not None and revision != source_revision():
        found.append("the code differs")
    if found:
        yield Check("versions", NOTE, "; ".join(found))


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

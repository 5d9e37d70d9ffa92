"""From scores of canaries to a lower bound on epsilon and a verdict on a claim; statistics only.

An auditor inserts each of m canaries with a fair coin, runs the mechanism, gives every canary a score (large
means "looks included") and guesses. How often the guesses are right bounds the privacy loss from below. Three
things keep such a bound honest, and none can be switched off here: the confidence level, the choice of the
operating point (threshold, number of guesses), and the family of mechanisms that the bound is stated for.

A claim is *violated* only where a level-s test of the claimed curve itself rejects it. A lower bound belongs
to a `Family`: mechanisms ordered by a leakage factor, of which the claim is the one with factor 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dptaft_accounting import _checks as check
from dptaft_accounting._search import bisect
from dptaft_accounting.audit_bounds import (
    f_one_run_mu,
    f_one_run_rejects,
    one_run_epsilon,
    one_run_p_value,
    trials_epsilon,
    trials_reject,
)
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import AuditError
from dptaft_accounting.mechanisms import Mechanism
from dptaft_accounting.tradeoff import GaussianProfile, Profile

Verdict = Literal["consistent", "violation", "inconclusive"]
Correction = Literal["planned", "bonferroni", "split"]
Array = NDArray[np.float64]

_DOWN = 1 - 1e-9
_FACTORS = (1e-3, 1e3)
_LEAST_NOISE = 0.1


@dataclass(frozen=True)
class Choice:
    """How the operating point of the attack is chosen; a choice by the result must be paid for.

    Attributes:
        candidates: thresholds on the score, or numbers of guesses.
        correction: ``planned`` (one candidate, fixed before the run), ``bonferroni`` (every candidate is
            tested at its share of the significance) or ``split`` (a random half of the canaries chooses, the
            other half is tested).

    Raises:
        AuditError: no candidate, or several without a correction.

    >>> Choice((10, 20, 50), "bonferroni").correction
    'bonferroni'
    """

    candidates: tuple[float, ...]
    correction: Correction = "planned"

    def __post_init__(self) -> None:
        check.choice("correction", self.correction, ("planned", "bonferroni", "split"), AuditError)
        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates:
            raise AuditError("candidates is empty; give at least one threshold or number of guesses")
        if self.correction == "planned" and len(self.candidates) > 1:
            raise AuditError(
                f"{len(self.candidates)} candidates cannot all be planned; use bonferroni or split, or the "
                "choice of the best one would make false violations likely"
            )


@dataclass(frozen=True)
class Family:
    """Mechanisms ordered by leakage; the lower bound is stated within it.

    Attributes:
        name: for reports.
        curve: leakage factor -> trade-off curve; the claim at 1, more leakage at larger factors.
        delta: at which epsilon is reported.
        precision: relative precision of the search.
    """

    name: str
    curve: Callable[[float], Profile]
    delta: float
    precision: float = 1e-7

    def epsilon(self, factor: float) -> float:
        """Epsilon at `delta` of the member with this factor, rounded down; 0 for factor 0."""
        return 0.0 if factor <= 0 else self.curve(factor).epsilon(self.delta) * _DOWN

    @property
    def claimed_epsilon(self) -> float:
        """Epsilon of the claim."""
        return self.curve(1.0).epsilon(self.delta)

    def largest_rejected(self, rejects: Callable[[Profile], bool]) -> float:
        """Largest factor whose curve is rejected (0 where none is)."""
        low, high = _FACTORS
        if not rejects(self.curve(low)):
            return 0.0
        if rejects(self.curve(high)):
            return high
        return bisect(lambda k: rejects(self.curve(k)), low, high, relative=self.precision)[0]


def gaussian_family(mu: float, delta: float) -> Family:
    """All mu'-GDP mechanisms; the claim is mu-GDP.

    >>> round(gaussian_family(0.719, 1e-5).claimed_epsilon, 2)
    3.0
    """
    mu = check.positive("mu", mu, AuditError)
    return Family(
        "Gaussian trade-off curves", lambda k: GaussianProfile(mu * k), check.probability("delta", delta)
    )


def mechanism_family(
    mechanism: Mechanism,
    delta: float,
    certificate: ConvexityCertificate | None = None,
    bound: str | None = None,
) -> Family:
    """The claimed mechanism with its noise divided by the leakage factor; Gaussian where it is exactly that.

    Args:
        mechanism: of the claim.
        delta: of the claim.
        certificate: for last-iterate claims.
        bound: name of the bound whose curve is the claim; the smallest by default.

    Raises:
        AuditError: a mechanism without a noise multiplier, or without that bound.
    """
    if not hasattr(mechanism, "noise_multiplier"):
        raise AuditError(f"{mechanism.kind} has no noise multiplier; it cannot be audited")
    report = best_bound(mechanism, certificate, delta=delta)
    chosen = report.best if bound is None else report.named(bound)
    if chosen is None:
        raise AuditError(
            f"the claim has no bound {bound!r}; it has {', '.join(b.name for b in report.bounds)}"
        )
    if chosen.mu is not None:
        return gaussian_family(chosen.mu, delta)

    @cache
    def curve(factor: float) -> Profile:
        scaled = _with_noise(mechanism, factor)
        found = best_bound(scaled, certificate, delta=delta).named(chosen.name)
        if found is None:
            raise AuditError(f"bound {chosen.name!r} is not defined at {factor:g} times the leakage")
        return found.profile

    return Family(f"{mechanism.kind} with other noise ({chosen.name})", curve, delta, precision=1e-3)


def _with_noise(mechanism: Mechanism, factor: float) -> Mechanism:
    noise: Any = mechanism.noise_multiplier  # type: ignore[attr-defined]
    changed = (
        tuple(max(z / factor, _LEAST_NOISE) for z in noise)
        if isinstance(noise, tuple)
        else max(noise / factor, _LEAST_NOISE)
    )
    return dataclasses.replace(mechanism, noise_multiplier=changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class Evidence:
    """Result of one test on one set of scores.

    Attributes:
        method: statistical test, and what it assumes.
        family: what the lower bound is stated for.
        epsilon: lower bound at the delta of the claim, at confidence 1 - `significance`.
        attainable: the bound that this test would have given had every guess been right.
        claimed: claimed epsilon.
        rejected: whether the claim itself is rejected at `significance`.
        significance: chance of rejecting a claim that holds.
        choice: how the operating point was chosen.
        canaries: number of canaries (or independent trials).
        guesses: how many were guessed at.
        correct: how many guesses were right.
    """

    method: str
    family: str
    epsilon: float
    attainable: float
    claimed: float
    rejected: bool
    significance: float
    choice: str
    canaries: int
    guesses: int
    correct: int

    @property
    def verdict(self) -> Verdict:
        """``violation``; ``inconclusive`` where the test could not have found one or found nothing."""
        if self.rejected:
            return "violation"
        if self.epsilon <= 0 or self.attainable <= self.claimed:
            return "inconclusive"
        return "consistent"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"verdict": self.verdict}


@dataclass(frozen=True)
class _Point:
    """Test of one set of scores at one operating point: lower bound (epsilon), rejection, counts."""

    epsilon: float
    rejected: bool
    guesses: int
    correct: int


_Test = Callable[[Array, NDArray[np.bool_], float, float], _Point]


def audit_trials(
    scores: ArrayLike,
    included: ArrayLike,
    family: Family,
    *,
    choice: Choice,
    significance: float = 0.05,
    rng: np.random.Generator | None = None,
) -> Evidence:
    """Bound from *independent* trials, by Clopper-Pearson bounds of both error rates.

    Every score must depend on its own coin and on randomness that no other score sees: repeated runs with one
    canary each, or canaries in coordinates of their own under a noise that is independent per coordinate.

    Args:
        scores: (m,), large where the trial looks included.
        included: (m,) coins.
        family: with the claim.
        choice: of the threshold; "included" is guessed where the score is above it.
        significance: of bound and verdict.
        rng: of the split; fresh by default.

    >>> coins = np.arange(2000) % 2 == 0
    >>> noise = np.random.default_rng(0).normal(size=2000)
    >>> found = audit_trials(noise + 2.0 * coins, coins, gaussian_family(2.0, 1e-5), choice=Choice((1.0,)))
    >>> found.verdict, 1.6 < found.epsilon / found.claimed * 2.0 < 2.0
    ('consistent', True)
    """

    def test(s: Array, coins: NDArray[np.bool_], threshold: float, level: float) -> _Point:
        said = s > threshold
        counts = {
            "false_positives": int((said & ~coins).sum()),
            "negatives": int((~coins).sum()),
            "false_negatives": int((~said & coins).sum()),
            "positives": int(coins.sum()),
            "significance": level,
        }
        factor = family.largest_rejected(lambda curve: trials_reject(curve, **counts))  # type: ignore[arg-type]
        rejected = trials_reject(family.curve(1.0), **counts)  # type: ignore[arg-type]
        free = trials_epsilon(family.delta, **counts)  # type: ignore[arg-type]
        return _Point(
            max(family.epsilon(factor), free), rejected, len(s), len(s) - int((said != coins).sum())
        )

    return _audit(
        "Clopper-Pearson on independent trials",
        family.name,
        scores,
        included,
        family.claimed_epsilon,
        test,
        choice,
        significance,
        rng,
    )


def audit_f_one_run(
    scores: ArrayLike,
    included: ArrayLike,
    family: Family,
    *,
    choice: Choice,
    significance: float = 0.05,
) -> Evidence:
    """Bound from one run, or several, with many canaries, whatever their scores have in common.

    The largest scores are guessed "included", the smallest "not included", half of the guesses each.
    Scores of several independent runs are pooled: a canary's coin acts on its own run alone.

    Args:
        scores: (m,).
        included: (m,) independent fair coins.
        family: with the claim.
        choice: of the number of guesses. ``split`` is refused: once the result has been looked at, the curve
            holds no more for the other half.
        significance: of bound and verdict.
    """
    if choice.correction == "split":
        raise AuditError("the f-DP test allows no split of one run; use bonferroni, or audit_one_run")

    def test(s: Array, coins: NDArray[np.bool_], guesses: float, level: float) -> _Point:
        count, correct = _guess(s, coins, guesses)
        counts = {"canaries": len(s), "guesses": count, "correct": correct}

        def rejects(curve: Profile) -> bool:
            return f_one_run_rejects(curve, significance=level, **counts)

        return _Point(
            family.epsilon(family.largest_rejected(rejects)), rejects(family.curve(1.0)), count, correct
        )

    return _audit(
        "f-DP in one run",
        family.name,
        scores,
        included,
        family.claimed_epsilon,
        test,
        choice,
        significance,
        None,
    )


def audit_one_run(
    scores: ArrayLike,
    included: ArrayLike,
    epsilon: float,
    delta: float,
    *,
    choice: Choice,
    significance: float = 0.05,
    rng: np.random.Generator | None = None,
) -> Evidence:
    """Bound from one run with many canaries that holds for every (epsilon, delta)-DP mechanism.

    Args:
        scores: (m,).
        included: (m,) independent fair coins.
        epsilon: of the claim.
        delta: of the claim.
        choice: of the number of guesses; with ``split`` it counts for the tested half.
        significance: of bound and verdict.
        rng: of the split; fresh by default.
    """
    split = choice.correction == "split"

    def test(s: Array, coins: NDArray[np.bool_], guesses: float, level: float) -> _Point:
        count, correct = _guess(s, coins, guesses)
        counts: dict[str, Any] = {
            "canaries": len(s),
            "guesses": count,
            "correct": correct,
            "chosen_guesses": split,
        }
        bound = one_run_epsilon(delta, significance=level, **counts)
        return _Point(bound, one_run_p_value(epsilon, delta, **counts) <= level, count, correct)

    return _audit(
        "(epsilon, delta) in one run",
        "every mechanism",
        scores,
        included,
        epsilon,
        test,
        choice,
        significance,
        rng,
    )


def _guess(scores: Array, coins: NDArray[np.bool_], guesses: float) -> tuple[int, int]:
    """Guess at both ends of the ranking; returns how many guesses were made and how many are right."""
    count = min(int(guesses), len(scores))
    order = np.argsort(scores, kind="stable")
    top, bottom = (count + 1) // 2, count // 2
    right = int(coins[order[len(order) - top :]].sum()) + int((~coins[order[:bottom]]).sum())
    return count, right


def _audit(
    method: str,
    family: str,
    scores: ArrayLike,
    included: ArrayLike,
    claimed: float,
    test: _Test,
    choice: Choice,
    significance: float,
    rng: np.random.Generator | None,
) -> Evidence:
    s, coins = _validated(scores, included)
    level = check.probability("significance", significance, AuditError)
    used, candidates = np.ones(len(s), dtype=bool), choice.candidates
    if choice.correction == "split":
        used = (rng or np.random.default_rng()).random(len(s)) < 0.5
        chooser = [test(s[~used], coins[~used], c, level).epsilon for c in candidates]
        candidates = (candidates[int(np.argmax(chooser))],)
    level /= len(candidates)
    points = [test(s[used], coins[used], c, level) for c in candidates]
    perfect = [_attainable(test, coins[used], c, level) for c in candidates]
    best = max(points, key=lambda point: point.epsilon)
    return Evidence(
        method=method,
        family=family,
        epsilon=best.epsilon,
        attainable=max(perfect),
        claimed=claimed,
        rejected=any(point.rejected for point in points),
        significance=significance,
        choice=_describe(choice),
        canaries=int(used.sum()),
        guesses=best.guesses,
        correct=best.correct,
    )


def _attainable(test: _Test, coins: NDArray[np.bool_], candidate: float, level: float) -> float:
    """The bound with every guess right: included canaries far above any threshold, others far below."""
    scores = np.where(coins, math.inf, -math.inf)
    return test(scores, coins, candidate, level).epsilon


def _validated(scores: ArrayLike, included: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    s = np.asarray(scores, dtype=np.float64)
    coins = np.asarray(included)
    if s.ndim != 1 or coins.shape != s.shape or coins.dtype != np.bool_:
        raise AuditError(
            f"scores {s.shape} and included {coins.shape} ({coins.dtype}) must be one number and one bool "
            "per canary"
        )
    if len(s) < 2:
        raise AuditError(f"{len(s)} canaries are too few; use at least 2")
    if bool(np.isnan(s).any()):
        raise AuditError("scores hold NaN; give such canaries a score of their own, or the audit is blind")
    return s, coins


def _describe(choice: Choice) -> str:
    count = len(choice.candidates)
    return {
        "planned": f"fixed before the run: {choice.candidates[0]:g}",
        "bonferroni": f"Bonferroni over {count}",
        "split": f"best of {count} on a random half, tested on the other",
    }[choice.correction]


def planned_guesses(mu: float, canaries: int, *, significance: float = 0.05) -> int:
    """Number of guesses to fix before one run: the best one if the scores were mu-GDP Gaussians.

    The expected number of right guesses less one standard deviation is put through `f_one_run_mu` for a
    grid of thresholds; no result of any run is used, so no correction is due.

    >>> planned_guesses(0.719, 1000)
    290
    """
    from scipy.special import ndtr

    mu = check.positive("mu", mu, AuditError)
    m = check.whole("canaries", canaries, AuditError)
    best, found = 0.0, m
    for t in np.linspace(0.0, 3.5, 29):
        right, wrong = float(ndtr(mu / 2 - t)), float(ndtr(-mu / 2 - t))
        guesses = int(m * (right + wrong))
        share = right / (right + wrong)
        correct = int(guesses * share - math.sqrt(guesses * share * (1 - share)))
        if guesses < 2 or correct < 1:
            continue
        value = f_one_run_mu(canaries=m, guesses=guesses, correct=correct, significance=significance)
        if value > best:
            best, found = value, guesses
    return found


def combined_verdict(evidence: Sequence[Evidence]) -> Verdict:
    """Verdict of several tests: any violation; else consistent if one test had the power to tell.

    The chance of a false violation is at most the sum of the significances.
    """
    verdicts = [found.verdict for found in evidence]
    if "violation" in verdicts:
        return "violation"
    return "consistent" if "consistent" in verdicts else "inconclusive"

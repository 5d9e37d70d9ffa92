"""Counts of right and wrong membership guesses -> p-values and lower bounds on the privacy loss.

Three families of tests, each valid for every mechanism that satisfies the hypothesis it tests:

one run, (epsilon, delta)   Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1) training run",
                            Theorem 5.2: many canaries in one run, each included by a fair coin of its own.
one run, trade-off curve    Mahloujifar, Melis, Chaudhuri 2024, "Auditing f-differential privacy in one run",
                            Theorem 3.1 and its recursion.
independent trials          Clopper, Pearson 1934 on false-positive and false-negative rates; the trials must
                            be independent (repeated runs, or canaries whose scores share no randomness).

Lower bounds are rounded down: an audit must not blame a mechanism for a rounding error.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dptaft_accounting import _checks as check
from dptaft_accounting._search import bisect
from dptaft_accounting.errors import AuditError
from dptaft_accounting.tradeoff import GaussianProfile, Profile

_DOWN = 1 - 1e-9
_EPSILON_MAX = 100.0
_MU_MAX = 50.0
_LINES = 400
DELTA_SHARE = 0.1
"""Part of the significance set aside for delta where the number of guesses was chosen on other canaries."""


def check_counts(canaries: int, guesses: int, correct: int) -> None:
    """Raises AuditError unless 0 <= correct <= guesses <= canaries."""
    check.whole("canaries", canaries, AuditError)
    if not 0 <= correct <= guesses <= canaries:
        raise AuditError(
            f"counts must satisfy 0 <= correct <= guesses <= canaries, got {correct}, {guesses}, {canaries}"
        )


def _delta(delta: float) -> float:
    delta = check.real("delta", delta, AuditError)
    if not 0 <= delta < 1:
        raise AuditError(f"delta must lie in [0, 1), got {delta:g}")
    return delta


def _one_run_parts(
    epsilon: float, delta: float, *, canaries: int, guesses: int, correct: int
) -> tuple[float, float]:
    """P[B >= v], and 2 m delta max_i P[v > B >= v-i]/i, for B ~ Bin(r, e^eps/(1+e^eps))."""
    import numpy as np
    from scipy.stats import binom

    q = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, q))
    if delta == 0 or correct == 0:
        return tail, 0.0
    mass = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
    return tail, 2.0 * canaries * delta * float(np.max(mass / np.arange(1, correct + 1)))


def one_run_p_value(
    epsilon: float, delta: float, *, canaries: int, guesses: int, correct: int, chosen_guesses: bool = False
) -> float:
    """p-value of "the mechanism is (epsilon, delta)-DP" after one run with many canaries.

    With q = e^eps/(1+e^eps) and B ~ Bin(r, q), for m canaries, r guesses of which v are right:

        p = min(1, P[B >= v] + 2 m delta max_{1<=i<=v} P[v > B >= v-i]/i)

    (Steinke, Nasr, Jagielski 2023, Theorem 5.2). The guesses may depend on the result of the run in any
    way, but r must have been fixed before it.

    Args:
        epsilon: of the hypothesis.
        delta: of the hypothesis; 0 gives the pure case.
        canaries: m, all canaries that were included or not by a fair coin.
        guesses: r, how many of them were guessed at.
        correct: v, how many guesses were right.
        chosen_guesses: r was chosen by looking at *other* canaries of the same run. Then the two terms are
            tested against fixed parts of the significance, because the failures that delta stands for may
            favour the chosen r: ``max(P/(1-k), D/k)`` with k = `DELTA_SHARE`. For r from any set, the
            chance of a value below s is at most sum_r P[r] (1-k) s + k s.

    >>> round(one_run_p_value(0.67298, 1e-4, canaries=1000, guesses=100, correct=75), 4)
    0.05
    """
    check_counts(canaries, guesses, correct)
    epsilon = check.non_negative("epsilon", epsilon, AuditError)
    tail, failure = _one_run_parts(
        epsilon, _delta(delta), canaries=canaries, guesses=guesses, correct=correct
    )
    if chosen_guesses:
        return min(1.0, max(tail / (1 - DELTA_SHARE), failure / DELTA_SHARE))
    return min(1.0, tail + failure)


def one_run_epsilon(
    delta: float,
    *,
    canaries: int,
    guesses: int,
    correct: int,
    significance: float = 0.05,
    chosen_guesses: bool = False,
) -> float:
    """Largest epsilon that `one_run_p_value` rejects, rounded down; 0 where it rejects none.

    >>> round(one_run_epsilon(1e-5, canaries=100_000, guesses=1510, correct=1439), 4)
    2.6759
    """
    significance = check.probability("significance", significance, AuditError)

    def rejected(epsilon: float) -> bool:
        p = one_run_p_value(
            epsilon,
            delta,
            canaries=canaries,
            guesses=guesses,
            correct=correct,
            chosen_guesses=chosen_guesses,
        )
        return p <= significance

    check_counts(canaries, guesses, correct)
    return _largest(rejected, _EPSILON_MAX)


def _largest(rejected: Callable[[float], bool], top: float) -> float:
    if not rejected(0.0):
        return 0.0
    if rejected(top):
        return top
    return bisect(rejected, 0.0, top, relative=1e-12)[0] * _DOWN


Inverse = Callable[[float], float]


def error_inverse(curve: Profile) -> Inverse:
    """``x -> f(1-x)``, the least false-positive rate at which a true-positive rate of x is possible.

    Never above the true value. A curve without a closed form is replaced by the largest of the lines
    ``1 - delta - e^eps (1-x)`` and ``e^-eps (x - delta)`` at `_LINES` values of epsilon.
    """
    from scipy.special import ndtr, ndtri

    if isinstance(curve, GaussianProfile) and curve.residual_delta == 0:
        mu = curve.mu
        return lambda x: 1.0 if x >= 1 else float(ndtr(ndtri(x) - mu)) * (1 - 1e-11)
    return _largest_line(curve)


def _largest_line(curve: Profile) -> Inverse:
    import numpy as np

    finite = [e for e in (curve.epsilon(delta) for delta in (1e-9, 1e-6, 1e-3)) if math.isfinite(e)]
    if not finite:
        return lambda x: 0.0
    epsilons = np.linspace(0.0, min(max(finite[0], 1e-3), 500.0), _LINES)
    deltas = np.array([curve.delta(float(epsilon)) for epsilon in epsilons])
    slopes = np.concatenate([np.exp(epsilons), np.exp(-epsilons)])
    starts = np.concatenate([1 - deltas - np.exp(epsilons), -deltas * np.exp(-epsilons)])
    return lambda x: max(0.0, float(np.max(starts + slopes * x)) - 1e-13)


def f_one_run_rejects(
    curve: Profile, *, canaries: int, guesses: int, correct: int, significance: float = 0.05
) -> bool:
    """Whether one run rejects "no test of any one canary beats this trade-off curve".

    Let p_i be the chance of i right ones among the c' guesses and suppose sum_{i >= c} p_i is as large as the
    significance s. With m canaries, start at r = s c/m (mass of right guesses) and h = s (c'-c)/m, and for
    i = c-1, ..., 0 let h' = max(h, f^-1(r)), r' = r + i/(c'-i) (h' - h). The hypothesis is impossible, and so
    rejected at level s, if in the end r + h > c'/m (Mahloujifar, Melis, Chaudhuri 2024, Theorem 3.1 and
    Algorithm 3, for bits).

    Args:
        curve: a symmetric trade-off curve (both directions of the mechanism).
        canaries: m, each included or not by a fair coin.
        guesses: c', fixed before the run.
        correct: c.
        significance: s.

    >>> f_one_run_rejects(GaussianProfile(0.2), canaries=1000, guesses=100, correct=75)
    True
    """
    check_counts(canaries, guesses, correct)
    significance = check.probability("significance", significance, AuditError)
    return _recursion(error_inverse(curve), canaries, guesses, correct, significance)


def _recursion(inverse: Inverse, m: int, guesses: int, correct: int, s: float) -> bool:
    if guesses == 0:
        return False
    full = guesses / m * (1 + 1e-12)
    r, h = s * correct / m, s * (guesses - correct) / m
    for i in range(correct - 1, -1, -1):
        next_h = inverse(r)
        if next_h <= h:  # nothing moves any more
            return False
        r += i / (guesses - i) * (next_h - h)
        h = next_h
        if r + h > full:
            return True
    return False


def f_one_run_mu(*, canaries: int, guesses: int, correct: int, significance: float = 0.05) -> float:
    """Largest mu for which `f_one_run_rejects` rejects mu-GDP, rounded down; 0 where it rejects none.

    A bound within the Gaussian family: it says nothing of (epsilon, delta)-DP without that family.

    >>> from dptaft_accounting import mu_to_epsilon
    >>> round(mu_to_epsilon(f_one_run_mu(canaries=1000, guesses=100, correct=75), 1e-4), 4)
    0.8417
    """
    check_counts(canaries, guesses, correct)
    significance = check.probability("significance", significance, AuditError)

    def rejected(mu: float) -> bool:
        return _recursion(error_inverse(GaussianProfile(mu)), canaries, guesses, correct, significance)

    return _largest(rejected, _MU_MAX)


def clopper_pearson(errors: int, trials: int, significance: float) -> float:
    """Upper confidence bound of an error probability from independent trials (Clopper, Pearson 1934).

    >>> round(clopper_pearson(0, 100, 0.05), 4)
    0.0295
    """
    significance = check.probability("significance", significance, AuditError)
    if not 0 <= errors <= trials:
        raise AuditError(f"errors must be from 0 to the {trials} trials, got {errors}")
    if errors == trials:
        return 1.0
    from scipy.special import betaincinv

    return min(1.0, float(betaincinv(errors + 1, trials - errors, 1 - significance)) * (1 + 1e-12))


def _error_rates(
    false_positives: int, negatives: int, false_negatives: int, positives: int, significance: float
) -> tuple[float, float]:
    half = check.probability("significance", significance, AuditError) / 2
    return (
        clopper_pearson(false_positives, negatives, half),
        clopper_pearson(false_negatives, positives, half),
    )


def trials_epsilon(
    delta: float,
    *,
    false_positives: int,
    negatives: int,
    false_negatives: int,
    positives: int,
    significance: float = 0.05,
) -> float:
    """Lower bound on epsilon at `delta` from independent trials, for any mechanism.

    ``max over the two directions of log((1 - FNR - delta)/FPR)`` with Clopper-Pearson upper bounds of both
    rates, each at half the significance (Nasr et al. 2021, "Adversary instantiation", section IV).

    Args:
        delta: of the claim.
        false_positives: trials without the canary that were called "included".
        negatives: trials without the canary.
        false_negatives: trials with the canary that were called "not included".
        positives: trials with the canary.
        significance: chance that the bound is too large.

    >>> [round(trials_epsilon(1e-5, false_positives=0, negatives=n, false_negatives=0, positives=n), 2)
    ...  for n in (100, 1000)]
    [3.28, 5.6]
    """
    delta = _delta(delta)
    fpr, fnr = _error_rates(false_positives, negatives, false_negatives, positives, significance)
    ratios = [(1 - fnr - delta) / fpr, (1 - fpr - delta) / fnr]
    return max(0.0, math.log(max(1.0, *ratios)) * _DOWN)


def trials_mu(
    *,
    false_positives: int,
    negatives: int,
    false_negatives: int,
    positives: int,
    significance: float = 0.05,
) -> float:
    """Lower bound on mu from independent trials, within the Gaussian family: Phi^-1(1-FPR) - Phi^-1(FNR)."""
    from scipy.special import ndtri

    fpr, fnr = _error_rates(false_positives, negatives, false_negatives, positives, significance)
    if fpr + fnr >= 1:
        return 0.0
    return max(0.0, float(-ndtri(fpr) - ndtri(fnr)) * _DOWN)


def trials_reject(
    curve: Profile,
    *,
    false_positives: int,
    negatives: int,
    false_negatives: int,
    positives: int,
    significance: float = 0.05,
) -> bool:
    """Whether independent trials reject "no test beats this trade-off curve": FNR < f(FPR), upper bounds.

    >>> counts = {"false_positives": 10, "negatives": 1000, "false_negatives": 10, "positives": 1000}
    >>> trials_reject(GaussianProfile(1.0), **counts), trials_reject(GaussianProfile(5.0), **counts)
    (True, False)
    """
    fpr, fnr = _error_rates(false_positives, negatives, false_negatives, positives, significance)
    return 0 < fpr < 1 and fnr < curve.beta(fpr)

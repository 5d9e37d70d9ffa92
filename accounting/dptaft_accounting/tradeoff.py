"""Ways to read one guarantee: (epsilon, delta), mu-GDP, trade-off curve, attack advantage, Bayes error.

For mu-GDP (Dong, Roth, Su 2022, "Gaussian differential privacy", Corollary 2.13)

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu),    beta(alpha) = Phi(-Phi^-1(alpha) - mu).

All results are rounded against the data owner: epsilon, delta, advantage and TPR up; mu from a target, beta
and Bayes error down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dptaft_accounting import _checks as check
from dptaft_accounting._search import bisect
from dptaft_accounting.errors import AccountingError

_MU_MAX = 1e6
_NO_CURVE = 1e100  # mu beyond which epsilon is no number of any use
_UP = 1.0 + 1e-11  # absorbs the rounding errors of the normal tail functions


def _log_ndtr(x: float) -> float:
    from scipy.special import log_ndtr

    return float(log_ndtr(x))


def _ndtri(p: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(p))


def mu_to_delta(mu: float, epsilon: float) -> float:
    """Returns delta(epsilon) of mu-GDP, rounded up.

    Args:
        mu: parameter of the Gaussian trade-off curve, at least 0.
        epsilon: any finite number (the hockey-stick divergence is defined for negative ones too).

    >>> round(mu_to_delta(1.0, 1.0), 6)
    0.126937
    """
    mu = check.non_negative("mu", mu)
    epsilon = check.real("epsilon", epsilon)
    if mu == 0:
        return -math.expm1(epsilon) if epsilon < 0 else 0.0
    first = _log_ndtr(mu / 2 - epsilon / mu)
    second = epsilon + _log_ndtr(-mu / 2 - epsilon / mu)
    if second >= first:  # equal up to rounding: both terms are far in the tail
        return 0.0 if first < -700 else math.exp(first) * 1e-10
    # the difference of the logarithms carries their absolute errors, which weigh the more the closer they are
    error = 1e-11 + 2e-15 * (1 - first - second + abs(epsilon)) / (first - second)
    return min(1.0, -math.exp(first) * math.expm1(second - first) * (1 + error))


def mu_to_epsilon(mu: float, delta: float) -> float:
    """Returns the smallest epsilon >= 0 with delta(epsilon) <= delta under mu-GDP, rounded up.

    >>> round(mu_to_epsilon(0.719, 1e-5), 2)
    3.0
    """
    mu = check.non_negative("mu", mu)
    delta = check.probability("delta", delta)
    if mu_to_delta(mu, 0.0) <= delta:
        return 0.0
    if mu > _NO_CURVE:
        return math.inf
    # Phi(mu/2 - eps/mu) <= delta there, and the second term only helps
    high = mu * (mu / 2 - _ndtri(delta)) * 1.001 + 1e-9
    if mu_to_delta(mu, high) > delta:
        return math.inf
    return bisect(lambda eps: mu_to_delta(mu, eps) > delta, 0.0, high)[1]


def epsilon_to_mu(epsilon: float, delta: float) -> float:
    """Returns the largest mu for which mu-GDP implies (epsilon, delta), rounded down.

    >>> round(epsilon_to_mu(3.0, 1e-5), 3)
    0.719
    """
    epsilon = check.non_negative("epsilon", epsilon)
    delta = check.probability("delta", delta)
    if mu_to_delta(_MU_MAX, epsilon) <= delta:
        raise AccountingError(f"epsilon {epsilon:g} is too large to mean anything at delta {delta:g}")
    return bisect(lambda mu: mu_to_delta(mu, epsilon) <= delta, 1e-12, _MU_MAX)[0]


class Profile(Protocol):
    """A guarantee as a curve; every view below is computed from `delta`."""

    def delta(self, epsilon: float) -> float:
        """Smallest known delta at this epsilon, rounded up."""
        ...

    def epsilon(self, delta: float) -> float:
        """Smallest known epsilon >= 0 at this delta, rounded up; infinity where none is known."""
        ...

    def beta(self, alpha: float) -> float:
        """False-negative rate that no test of false-positive rate alpha can beat, rounded down."""
        ...


@dataclass(frozen=True)
class GaussianProfile:
    """The curve of mu-GDP, optionally mixed with a failure of probability `residual_delta`.

    >>> GaussianProfile(1.0).beta(0.1) < 0.6109
    True
    """

    mu: float
    residual_delta: float = 0.0

    def __post_init__(self) -> None:
        check.non_negative("mu", self.mu)
        if not 0 <= self.residual_delta < 1:
            raise AccountingError(f"residual_delta must lie in [0, 1), got {self.residual_delta}")

    def delta(self, epsilon: float) -> float:
        """Mixes failure and Gaussian curve: r + (1 - r) H(eps, mu)."""
        return min(1.0, self.residual_delta + (1 - self.residual_delta) * mu_to_delta(self.mu, epsilon))

    def epsilon(self, delta: float) -> float:
        """Inverse of `delta`; infinity where the failure alone exceeds it."""
        delta = check.probability("delta", delta)
        if delta <= self.residual_delta:
            return math.inf
        return mu_to_epsilon(self.mu, (delta - self.residual_delta) / (1 - self.residual_delta))

    def beta(self, alpha: float) -> float:
        """The mixed trade-off curve: (1 - r) Phi(-Phi^-1(alpha/(1-r)) - mu), zero beyond alpha = 1 - r."""
        check.probability("alpha", alpha)
        keep = 1 - self.residual_delta
        if alpha >= keep:
            return 0.0
        return keep * math.exp(_log_ndtr(-_ndtri(alpha / keep) - self.mu)) / _UP


def tpr_at_fpr(profile: Profile, fpr: float) -> float:
    """Largest true-positive rate of a membership test with false-positive rate `fpr`: 1 - beta(fpr)."""
    return min(1.0, 1.0 - profile.beta(check.probability("fpr", fpr)))


def advantage(profile: Profile) -> float:
    """Largest TPR - FPR of any membership test; equals delta(0)."""
    return profile.delta(0.0)


def bayes_error(profile: Profile, prior: float = 0.5) -> float:
    """Smallest error of a membership guess at prior `prior`: (1-prior)(1 - delta(log(prior/(1-prior)))).

    The smaller of the two orientations of the prior is returned, so that a profile known only for epsilon >=
    0 suffices.

    >>> round(bayes_error(GaussianProfile(1.0)), 4)
    0.3085
    """
    prior = check.probability("prior", prior)
    smaller = min(prior, 1 - prior)
    # with the rarer hypothesis in front of the hockey stick the threshold log((1-s)/s) is not negative
    return smaller * (1.0 - profile.delta(math.log((1 - smaller) / smaller)))


@dataclass(frozen=True)
class Risk:
    """What the strongest adversary gains: the *risk* part of a statement."""

    advantage: float
    bayes_error: float
    tpr_at_fpr: dict[float, float]


def risk(profile: Profile, fprs: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1)) -> Risk:
    """Collects advantage, Bayes error at an even prior, and TPR at the given FPRs."""
    return Risk(advantage(profile), bayes_error(profile), {fpr: tpr_at_fpr(profile, fpr) for fpr in fprs})

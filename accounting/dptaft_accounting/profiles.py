"""Curves made from other curves: maximum (parallel), mean (hidden choice), a residual failure, a group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dptaft_accounting import _checks as check
from dptaft_accounting._search import bisect
from dptaft_accounting.tradeoff import Profile

_EPSILON_MAX = 1e5
# epsilons at which a curve is read to bound beta; any set of them gives a valid bound
_GRID = [0.0] + [10 ** (k / 60) for k in range(-240, 121)]


class DeltaCurve:
    """Base of curves that know `delta` alone; epsilon by bisection, beta by duality."""

    def delta(self, epsilon: float) -> float:
        """Smallest known delta at this epsilon."""
        raise NotImplementedError

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon >= 0 with delta(epsilon) <= delta, rounded up; infinity where there is none."""
        delta = check.probability("delta", delta)
        if self.delta(0.0) <= delta:
            return 0.0
        high = 1.0
        while self.delta(high) > delta:
            high *= 2
            if high > _EPSILON_MAX:
                return math.inf
        return bisect(lambda eps: self.delta(eps) > delta, 0.0, high, relative=1e-10)[1]

    def beta(self, alpha: float) -> float:
        """Largest of 1 - delta - e^eps alpha and e^-eps (1 - delta - alpha) over a grid of epsilon."""
        alpha = check.probability("alpha", alpha)
        best = 0.0
        for eps in _GRID:
            delta = self.delta(eps)
            steep = 1 - delta - alpha * math.exp(eps) if eps < 700 else 0.0
            best = max(best, steep, math.exp(-eps) * (1 - delta - alpha))
        return best


@dataclass(frozen=True)
class MeanProfile(DeltaCurve):
    """Average of the curves: which one applies was drawn uniformly and stayed secret (joint convexity)."""

    parts: tuple[Profile, ...]

    def delta(self, epsilon: float) -> float:
        """Mean of the deltas."""
        return math.fsum(part.delta(epsilon) for part in self.parts) / len(self.parts) * (1 + 1e-12)


@dataclass(frozen=True)
class MaxProfile(DeltaCurve):
    """Largest of the curves: a record is in one of several disjoint shards."""

    parts: tuple[Profile, ...]

    def delta(self, epsilon: float) -> float:
        """Largest delta."""
        return max(part.delta(epsilon) for part in self.parts)

    def epsilon(self, delta: float) -> float:
        """Largest epsilon."""
        return max(part.epsilon(delta) for part in self.parts)

    def beta(self, alpha: float) -> float:
        """Smallest false-negative rate."""
        return min(part.beta(alpha) for part in self.parts)


@dataclass(frozen=True)
class ResidualProfile(DeltaCurve):
    """A curve that holds except with probability `residual_delta`, which is added to every delta."""

    base: Profile
    residual_delta: float

    def delta(self, epsilon: float) -> float:
        """Delta of the base plus the residual."""
        return min(1.0, self.base.delta(epsilon) + self.residual_delta)

    def epsilon(self, delta: float) -> float:
        """Epsilon of the base at what is left of delta."""
        left = check.probability("delta", delta) - self.residual_delta
        return self.base.epsilon(left) if left > 0 else math.inf

    def beta(self, alpha: float) -> float:
        """Beta of the base less the residual."""
        return max(0.0, self.base.beta(alpha) - self.residual_delta)


@dataclass(frozen=True)
class GroupProfile(DeltaCurve):
    """What a curve for one record says about units that own k records.

    delta_k(k eps) <= delta(eps) (e^(k eps) - 1)/(e^eps - 1) (Vadhan 2017, "The complexity of differential
    privacy", Lemma 2.2), read at every epsilon.
    """

    base: Profile
    size: int

    def delta(self, epsilon: float) -> float:
        """Group delta at this (group) epsilon."""
        single = max(epsilon / self.size, 0.0)
        log_factor = _log_ratio(single, self.size)
        # beyond it a delta that a float cannot hold could still count
        return min(1.0, self.base.delta(single) * math.exp(log_factor)) if log_factor < 600 else 1.0


def _log_ratio(epsilon: float, size: int) -> float:
    """Log of (e^(k eps) - 1)/(e^eps - 1), rounded up."""
    if size * epsilon < 1e-9:
        return math.log(size) + size * epsilon + 1e-12
    return (
        (size - 1) * epsilon * (1 + 1e-15)
        + math.log(math.expm1(-size * epsilon) / math.expm1(-epsilon))
        + 1e-12
    )


def mean_of(parts: Sequence[Profile]) -> Profile:
    """Averages curves, or returns the only one."""
    return parts[0] if len(parts) == 1 else MeanProfile(tuple(parts))

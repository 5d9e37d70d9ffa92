"""Distributions of the privacy loss on a lattice, and the one that stands for a known curve."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting.tradeoff import Profile

Array = NDArray[np.float64]

_EXP_RANGE = 600.0  # losses whose exponential a float holds
_SUM_ERROR = 1 + 1e-10  # covers the rounding of long cumulative sums
_CURVE_TAIL = 1e-13
_CURVE_RANGE = 60.0
_CURVE_POINTS = 20_000
_COARSEST = 10.0


@dataclass(frozen=True)
class LossPmf:
    """Distribution of the privacy loss under P on the lattice (start + k) * interval, and at infinity.

    Attributes:
        interval: distance of lattice points.
        start: index of the first one.
        mass: P-mass of the points.
        infinite: P-mass at infinity.
        floor: below this epsilon the distribution says nothing (its smaller losses are left out).
        tilt: order of the exponential tilt with which it was composed.
        log_error: logarithm of the allowance for rounding in the mass of a loss of 0; it falls with the tilt.
    """

    interval: float
    start: int
    mass: Array
    infinite: float
    floor: float = -math.inf
    tilt: float = 0.0
    log_error: float = -math.inf

    @cached_property
    def losses(self) -> Array:
        """The lattice points that carry `mass`."""
        return np.asarray(self.interval * (self.start + np.arange(len(self.mass))), dtype=np.float64)

    @cached_property
    def _above(self) -> tuple[Array, Array]:
        """P-mass and Q-mass at or above every lattice point (the latter for losses beyond -600 only)."""
        upper = np.cumsum(self.mass[::-1])[::-1] * _SUM_ERROR
        lower = np.cumsum((self.mass * np.exp(-np.maximum(self.losses, -_EXP_RANGE)))[::-1])[::-1]
        return np.append(upper, 0.0), np.append(lower / _SUM_ERROR, 0.0)

    def allowance(self, epsilon: float) -> float:
        """What `delta(epsilon)` holds for rounding, about."""
        if self.tilt == 0:
            return len(self.mass) * math.exp(self.log_error)
        log = self.log_error - self.tilt * epsilon
        return math.exp(min(log, _EXP_RANGE)) / -math.expm1(-self.tilt * self.interval)

    def delta(self, epsilon: float) -> float:
        """Hockey-stick divergence: infinite mass plus (1 - e^(epsilon - l)) mass over losses l above."""
        if epsilon < self.floor:
            return 1.0
        index = int(np.searchsorted(self.losses, epsilon, side="right"))
        if abs(epsilon) < _EXP_RANGE:
            upper, lower = self._above
            finite = float(upper[index] - math.exp(epsilon) * lower[index])
        else:
            finite = float(np.sum(-np.expm1(epsilon - self.losses[index:]) * self.mass[index:]))
        return min(1.0, self.infinite + max(0.0, finite))

    def delta_on_lattice(self) -> tuple[Array, Array]:
        """Returns 0 and the lattice losses up to 600 above it, with delta there."""
        upper, lower = self._above
        index = np.flatnonzero((self.losses > max(0.0, self.floor)) & (self.losses < _EXP_RANGE))
        epsilons = np.append(0.0, self.losses[index])
        deltas = upper[index + 1] - np.exp(self.losses[index]) * lower[index + 1]
        return epsilons, np.minimum(np.append(self.delta(0.0), np.maximum(deltas, 0.0) + self.infinite), 1.0)

    def epsilon(self, delta: float) -> float:
        """Smallest epsilon >= 0 with `delta(epsilon) <= delta`."""
        if self.infinite > delta:
            return math.inf
        if self.delta(0.0) <= delta:
            return 0.0
        losses = self.losses
        low, high = int(np.searchsorted(losses, 0.0, side="right")), len(losses) - 1
        if low > high:
            return 0.0 if self.floor <= 0 else math.inf
        while low < high:  # first lattice point whose delta is small enough
            middle = (low + high) // 2
            if self.delta(float(losses[middle])) <= delta:
                high = middle
            else:
                low = middle + 1
        top = float(losses[low])
        # between lattice points delta is linear in e^eps
        p_mass = self.infinite + float(np.sum(self.mass[low:])) * _SUM_ERROR - delta
        q_mass = float(np.sum(self.mass[low:] * np.exp(top - losses[low:]))) / _SUM_ERROR
        if p_mass <= 0 or q_mass <= 0:
            return top
        return min(top, max(0.0, self.floor, top + math.log(p_mass / q_mass)))


def pmf_of_curve(curve: Profile, interval: float, tail: float = _CURVE_TAIL) -> LossPmf:
    """Returns a loss distribution, for both directions at once, whose curve is never below `curve`.

    The points (e^eps, delta) of the lattice, continued to negative epsilon by delta(-eps) = 1 - e^-eps (1 -
    delta(eps)), are replaced by their lower convex hull: a true curve is convex in e^eps, so it lies below
    its upper bounds' hull.

    Args:
        curve: the known curve.
        interval: distance of lattice points.
        tail: the lattice goes on until delta falls below this, or to epsilon 600 at most.
    """
    if interval > _COARSEST:
        return LossPmf(interval, 0, np.zeros(1), 1.0)
    count = math.ceil(curve_range(curve, tail) / interval)
    stride = max(1, count // _CURVE_POINTS)
    positive = interval * np.arange(0, count + stride, stride)
    deltas = np.minimum.accumulate([curve.delta(float(eps)) for eps in positive])
    losses = np.append(-positive[:0:-1], positive)
    values = np.append(-np.expm1(-positive[:0:-1]) + np.exp(-positive[:0:-1]) * deltas[:0:-1], deltas)
    keep = _lower_hull(np.exp(losses), values)
    x, y, index = np.exp(losses[keep]), values[keep], np.rint(losses[keep] / interval).astype(np.int64)
    slopes = np.append(np.diff(y) / np.diff(x), 0.0)
    before = np.append((y[0] - 1.0) / x[0], slopes[:-1])
    weights = np.clip((slopes - before) * x, 0.0, None)
    mass: Array = np.bincount(index - index[0], weights=weights).astype(np.float64)
    return LossPmf(interval, int(index[0]), mass, float(y[-1]))


def curve_range(curve: Profile, tail: float = _CURVE_TAIL) -> float:
    """Epsilon where the curve falls below `tail`, or the largest that is looked at."""
    top, most = 1.0, _CURVE_RANGE if tail >= _CURVE_TAIL else _EXP_RANGE / 1.25
    while curve.delta(top) > tail and top < most:
        top *= 1.25
    return top


def _lower_hull(x: Array, y: Array) -> list[int]:
    """Indices of the lower convex hull of points with increasing x, after the point (0, 1)."""
    xs, ys = [0.0, *x.tolist()], [1.0, *y.tolist()]
    hull = [0]
    for i in range(1, len(xs)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (ys[b] - ys[a]) * (xs[i] - xs[b]) < (ys[i] - ys[b]) * (xs[b] - xs[a]):
                break
            hull.pop()
        hull.append(i)
    return [i - 1 for i in hull[1:]]

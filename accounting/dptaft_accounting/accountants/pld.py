"""Privacy loss distributions on a lattice, always pessimistic, composed by one FFT.

Implements Doroshenko, Ghazi, Kamath, Kumar, Manurangsi (2022), "Connect the dots: tighter discrete
approximations of privacy loss distributions", for pairs (mixture of Gaussians, standard Gaussian) in both
orders. Mass in a cell of losses [u, v] moves to its ends so that the masses under P and under Q are both
kept; the hockey-stick curve of the result is the chord of the true convex curve, hence never below it. Mass
above the lattice counts as infinite loss, mass below it moves up. Composition wraps around in a window
outside of which Chernoff's bound leaves at most 1e-16, which is added to the infinite mass together with an
allowance for FFT rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting import _checks as check
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.tradeoff import Profile

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

_TAIL = 1e-16
_X_RANGE = 10.5  # a standard normal exceeds it with probability 4e-26
_MAX_CELLS = 1 << 20
_EXP_RANGE = 600.0  # losses whose exponential a float holds
_SUM_ERROR = 1 + 1e-10  # covers the rounding of long cumulative sums
_FINENESS = 0.02  # lattice interval over the standard deviation of the loss of one step
_MAX_INTERVAL = 1e-3
_CURVE_RANGE = 60.0
_CURVE_POINTS = 20_000


@dataclass(frozen=True)
class LossPmf:
    """Distribution of the privacy loss under P on the lattice (start + k) * interval, and at infinity."""

    interval: float
    start: int
    mass: Array
    infinite: float

    @cached_property
    def losses(self) -> Array:
        """The lattice points that carry `mass`."""
        return np.asarray(self.interval * (self.start + np.arange(len(self.mass))), dtype=np.float64)

    @cached_property
    def _above(self) -> tuple[Array, Array]:
        """P-mass and Q-mass at or above every lattice point (the latter for losses beyond -600 only)."""
        upper = np.cumsum(self.mass[::-1])[::-1] * _SUM_ERROR
        lower = np.cumsum((self.mass * np.exp(-np.maximum(self.losses, -_EXP_RANGE)))[::-1])[::-1]
        return np.append(upper, 0.0), np.append(lower, 0.0)

    def delta(self, epsilon: float) -> float:
        """Hockey-stick divergence: infinite mass plus (1 - e^(epsilon - l)) mass over losses l above."""
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
        index = np.flatnonzero((self.losses > 0) & (self.losses < _EXP_RANGE))
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
        while low < high:  # first lattice point whose delta is small enough
            middle = (low + high) // 2
            if self.delta(float(losses[middle])) <= delta:
                high = middle
            else:
                low = middle + 1
        top = float(losses[low])
        # between lattice points delta is linear in e^eps
        p_mass = self.infinite + float(np.sum(self.mass[low:])) * _SUM_ERROR - delta
        q_mass = float(np.sum(self.mass[low:] * np.exp(top - losses[low:])))
        if p_mass <= 0 or q_mass <= 0:
            return top
        return min(top, max(0.0, top + math.log(p_mass / q_mass)))


@dataclass(frozen=True)
class Mixture:
    """The pair (sum_k weight_k N(shift_k, 1), N(0, 1)) with shifts >= 0; one step of a Gaussian mechanism."""

    shifts: tuple[float, ...]
    weights: tuple[float, ...]

    @classmethod
    def gaussian(cls, mu: float) -> Mixture:
        """The pair (N(mu, 1), N(0, 1))."""
        return cls((mu,), (1.0,))

    @classmethod
    def poisson(
        cls, noise_multiplier: float, sampling_rate: float, offset: float = 0.0, group: int = 1
    ) -> Mixture:
        """Poisson-sampled Gaussian, shifted by `offset`, for `group` records that are sampled independently.

        The number of sampled records is Binomial(group, p), each of which shifts by 1/z (Ganesh 2024, "Tight
        group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians mechanisms").
        """
        p, step = sampling_rate, 1 / noise_multiplier
        weights = [math.comb(group, k) * p**k * (1 - p) ** (group - k) for k in range(group + 1)]
        pairs = [(offset + k * step, w) for k, w in enumerate(weights) if w > 0]
        return cls(tuple(s for s, _ in pairs), tuple(w for _, w in pairs))

    def loss(self, x: Array) -> Array:
        """Log of the density ratio, increasing in x."""
        terms = [math.log(w) + s * x - s * s / 2 for s, w in zip(self.shifts, self.weights, strict=True)]
        total = terms[0]
        for term in terms[1:]:
            total = np.logaddexp(total, term)
        return total

    def _mass(self, knots: Array) -> tuple[Array, Array]:
        """Masses of the cells between consecutive knots under the mixture and under N(0, 1)."""
        mixture = np.zeros(len(knots) - 1)
        for s, w in zip(self.shifts, self.weights, strict=True):
            mixture += w * _normal_cells(knots - s)
        return mixture, _normal_cells(knots)

    def inverse_loss(self, losses: Array, low: float, high: float) -> Array:
        """Points x with `loss(x) = losses`, clipped to [low, high]."""
        if len(self.shifts) == 1:
            x = losses / self.shifts[0] + self.shifts[0] / 2
        elif len(self.shifts) == 2 and self.shifts[0] == 0:
            s, w = self.shifts[1], self.weights[1]
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = np.log((np.expm1(np.minimum(losses, _EXP_RANGE)) + w) / w)
            ratio = np.where(losses < _EXP_RANGE, ratio, losses - math.log(w))
            x = np.where(np.isnan(ratio), low, ratio / s + s / 2)
        else:
            x = self._newton(losses, low, high)
        return np.asarray(np.clip(x, low, high), dtype=np.float64)

    def _newton(self, losses: Array, low: float, high: float) -> Array:
        """Newton's method inside the cells of a grid."""
        grid = np.linspace(low, high, 4001)
        known = self.loss(grid)
        cell = np.clip(np.searchsorted(known, losses) - 1, 0, len(grid) - 2)
        x = np.interp(losses, known, grid)
        for _ in range(4):
            value = self.loss(x)
            slope = sum(
                s * w * np.exp(np.minimum(s * x - s * s / 2 - value, 1.0 - math.log(w)))
                for s, w in zip(self.shifts, self.weights, strict=True)
            )
            x = np.clip(x - (value - losses) / np.maximum(slope, 1e-30), grid[cell], grid[cell + 1])
        return np.asarray(x, dtype=np.float64)

    def pmfs(self, interval: float) -> tuple[LossPmf, LossPmf]:
        """Discretises both directions: (mixture against N(0, 1), N(0, 1) against mixture)."""
        low, high = -_X_RANGE, max(self.shifts) + _X_RANGE
        ends = self.loss(np.array([low, high]))
        j_low, j_high = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
        lattice = interval * np.arange(j_low, j_high + 1)
        knots = self.inverse_loss(lattice, low, high)
        knots = np.maximum.accumulate(knots)
        p_cell, q_cell = self._mass(knots)
        outside_p, outside_q = self._mass(np.array([-np.inf, knots[0]]))
        above_p, above_q = self._mass(np.array([knots[-1], np.inf]))
        share = -math.expm1(-interval)
        up = np.clip((p_cell - _exp(lattice[:-1]) * q_cell) / share, 0, p_cell)
        forward = np.append(p_cell - up, 0.0) + np.append(0.0, up)
        forward[0] += outside_p[0]
        down = np.clip((q_cell - _exp(-lattice[1:]) * p_cell) / share, 0, q_cell)
        backward = np.append(0.0, q_cell - down) + np.append(down, 0.0)
        backward[-1] += above_q[0]
        return (
            LossPmf(interval, j_low, forward, float(above_p[0])),
            LossPmf(interval, -j_high, backward[::-1].copy(), float(outside_q[0])),
        )


def discretise_wide(
    shifts: Array, weights: Array, lost: float, interval: float, knots: int
) -> tuple[LossPmf, LossPmf]:
    """Discretises (sum_k weight_k N(shift_k, 1), N(0, 1)) for many shifts, on evenly spaced knots.

    The mass of a cell of x goes to the lattice points around all losses in the cell, P- and Q-mass kept, so
    the result is pessimistic whatever the number of knots; meant for pairs that occur once. `lost` is mass
    of the mixture that was left out; it counts as infinite loss in both directions.
    """
    x = np.linspace(-_X_RANGE, float(np.max(shifts)) + _X_RANGE, knots)
    exponents = np.log(weights)[:, None] + shifts[:, None] * x - shifts[:, None] ** 2 / 2
    top = np.max(exponents, axis=0)
    loss = top + np.log(np.sum(np.exp(exponents - top), axis=0))
    q_cell = _normal_cells(x)
    p_cell = np.zeros(knots - 1)
    for s, w in zip(shifts, weights, strict=True):
        p_cell += w * _normal_cells(x - s)
    low = np.floor(loss[:-1] / interval).astype(np.int64)
    high = np.maximum(np.ceil(loss[1:] / interval).astype(np.int64), low + 1)
    outside = lost + 1e-24
    return (
        _spread(p_cell, q_cell, low, high, interval, outside),
        _spread(q_cell, p_cell, -high, -low, interval, outside),
    )


def _spread(p: Array, q: Array, low: Integers, high: Integers, interval: float, infinite: float) -> LossPmf:
    """Moves the mass of every cell to its two lattice ends, keeping P- and Q-mass."""
    bottom = np.asarray(low * interval, dtype=np.float64)
    share = np.asarray(-np.expm1((low - high) * interval), dtype=np.float64)
    up = np.clip((p - _exp(bottom) * q) / share, 0, p)
    start = int(np.min(low))
    size = int(np.max(high)) - start + 1
    mass: Array = np.bincount(low - start, weights=p - up, minlength=size).astype(np.float64)
    mass += np.bincount(high - start, weights=up, minlength=size)
    return LossPmf(interval, start, mass, infinite)


def _exp(x: Array) -> Array:
    """exp, cut off where it would overflow; a smaller value only moves more mass up."""
    return np.asarray(np.exp(np.minimum(x, _EXP_RANGE)), dtype=np.float64)


def _normal_cells(knots: Array) -> Array:
    """Standard normal mass between consecutive knots, accurate in both tails."""
    from scipy.special import ndtr

    left, right = knots[:-1], knots[1:]
    flip = left > 0
    a, b = np.where(flip, -right, left), np.where(flip, -left, right)
    return np.asarray(ndtr(b) - ndtr(a), dtype=np.float64)


def _log_moments(pmf: LossPmf, orders: Array) -> Array:
    """Log E[exp(order * loss)] over the finite losses."""
    with np.errstate(divide="ignore"):
        logs = np.log(pmf.mass)
    result = np.empty(len(orders))
    for i, order in enumerate(orders):
        exponents = logs + order * pmf.losses
        top = float(np.max(exponents))
        result[i] = top + math.log(float(np.sum(np.exp(exponents - top))))
    return result


def _window(parts: Sequence[tuple[LossPmf, int]]) -> tuple[float, float]:
    """Interval outside of which the composed loss falls with probability at most `_TAIL` per side."""
    variance = sum(count * _variance(pmf) for pmf, count in parts)
    scale = math.sqrt(variance) + 1e-300
    orders = np.geomspace(0.3, 40, 16) / scale
    upper, lower = np.zeros(len(orders)), np.zeros(len(orders))
    for pmf, count in parts:
        upper += count * _log_moments(pmf, orders)
        lower += count * _log_moments(pmf, -orders)
    slack = -math.log(_TAIL)
    return -float(np.min((lower + slack) / orders)), float(np.min((upper + slack) / orders))


def _variance(pmf: LossPmf) -> float:
    mean = float(np.sum(pmf.mass * pmf.losses))
    return float(np.sum(pmf.mass * (pmf.losses - mean) ** 2))


def compose(parts: Sequence[tuple[LossPmf, int]]) -> LossPmf:
    """Convolves each distribution `count` times with itself and all of them together.

    Raises:
        AccountingError: the distributions live on different lattices.
    """
    parts = [(pmf, count) for pmf, count in parts if count > 0]
    interval = parts[0][0].interval
    if any(pmf.interval != interval for pmf, _ in parts):
        raise AccountingError("privacy loss distributions on different lattices cannot be composed")
    survive = sum(count * math.log1p(-min(pmf.infinite, 1 - 1e-16)) for pmf, count in parts)
    infinite = -math.expm1(survive)
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    low, high = _window(parts)
    first = math.floor(low / interval)
    size = _fast_length(math.ceil(high / interval) - first + 2)
    spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
    for pmf, count in parts:
        folded = np.bincount((pmf.start + np.arange(len(pmf.mass))) % size, weights=pmf.mass, minlength=size)
        spectrum *= np.fft.rfft(folded) ** count
    mass = np.fft.irfft(spectrum, size)
    mass = np.clip(np.roll(mass, -(first % size)), 0.0, None)
    total = sum(count for _, count in parts)
    allowance = 2 * _TAIL + 2.3e-16 * (total + 64)
    return LossPmf(interval, first, mass, min(1.0, infinite + allowance))


def _fast_length(n: int) -> int:
    """Smallest even 2^a 3^b 5^c that is at least n."""
    best = 1 << max(1, (n - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            two = max(2, 1 << max(1, (-(-n // three) - 1).bit_length()))
            if n <= three * two < best:
                best = three * two
            three *= 3
        five *= 5
    return best


@dataclass(frozen=True)
class PldProfile:
    """Curve of a composed pair in both directions; `delta` is the larger of the two."""

    forward: LossPmf
    backward: LossPmf

    def delta(self, epsilon: float) -> float:
        """Larger hockey-stick divergence of the two directions."""
        epsilon = check.real("epsilon", epsilon)
        return max(self.forward.delta(epsilon), self.backward.delta(epsilon))

    def epsilon(self, delta: float) -> float:
        """Larger epsilon of the two directions; infinity below the resolution of the computation."""
        delta = check.probability("delta", delta)
        return max(self.forward.epsilon(delta), self.backward.epsilon(delta))

    @cached_property
    def lattice(self) -> tuple[Array, Array]:
        """Nonnegative epsilons with delta there, both directions together."""
        grid = max(
            self.forward.delta_on_lattice(), self.backward.delta_on_lattice(), key=lambda g: len(g[0])
        )[0]
        values = [_interpolate_up(grid, *pmf.delta_on_lattice()) for pmf in (self.forward, self.backward)]
        return grid, np.maximum(values[0], values[1])

    def beta(self, alpha: float) -> float:
        """Trade-off curve: max over epsilon of 1 - delta - e^eps alpha and e^-eps (1 - delta - alpha)."""
        alpha = check.probability("alpha", alpha)
        epsilons, deltas = self.lattice
        with np.errstate(over="ignore"):
            steep = float(np.max(1 - deltas - np.exp(epsilons) * alpha))
        return max(0.0, steep, float(np.max(np.exp(-epsilons) * (1 - deltas - alpha))))


def _interpolate_up(grid: Array, epsilons: Array, deltas: Array) -> Array:
    """Delta at or above `grid`, by the next lower known epsilon (delta decreases)."""
    index = np.clip(np.searchsorted(epsilons, grid + 1e-12, side="right") - 1, 0, len(epsilons) - 1)
    return deltas[index]


def compose_mixtures(parts: Sequence[tuple[Mixture, int]], fineness: float = _FINENESS) -> PldProfile:
    """Returns the curve of the composition of `count` copies of every pair, on a lattice fit to it.

    Args:
        parts: pairs and how often each occurs.
        fineness: lattice interval relative to the standard deviation of the smallest loss; halving it
            shrinks the (always pessimistic) discretisation error about fourfold.
    """
    interval = _interval(parts, fineness)
    pairs = [(mixture.pmfs(interval), count) for mixture, count in parts]
    cells = _cells(pairs) / _MAX_CELLS
    if cells > 1:  # heavy tails: a window much wider than the standard deviation suggests
        interval *= 1.1 * cells
        pairs = [(mixture.pmfs(interval), count) for mixture, count in parts]
    return _compose_pairs(pairs)


def _cells(pairs: Sequence[tuple[tuple[LossPmf, LossPmf], int]]) -> float:
    """Number of lattice cells that the wider composed window needs."""
    widths = []
    for side in (0, 1):
        low, high = _window([(pair[side], count) for pair, count in pairs])
        widths.append((high - low) / pairs[0][0][0].interval)
    return max(widths)


def compose_all(mixtures: Sequence[tuple[Mixture, int]], curves: Sequence[tuple[Profile, int]]) -> PldProfile:
    """Composes pairs of Gaussian mixtures together with mechanisms that are known by a curve alone."""
    if not curves:
        return compose_mixtures(mixtures)
    interval = _interval(mixtures, _FINENESS) if mixtures else _MAX_INTERVAL
    pairs = [(mixture.pmfs(interval), count) for mixture, count in mixtures]
    for curve, count in curves:
        pmf = pmf_of_curve(curve, interval)
        pairs.append(((pmf, pmf), count))
    return _compose_pairs(pairs)


def _compose_pairs(pairs: Sequence[tuple[tuple[LossPmf, LossPmf], int]]) -> PldProfile:
    forward = compose([(pair[0], count) for pair, count in pairs])
    return PldProfile(forward, compose([(pair[1], count) for pair, count in pairs]))


def pmf_of_curve(curve: Profile, interval: float) -> LossPmf:
    """Returns a loss distribution, for both directions at once, whose curve is never below `curve`.

    The points (e^eps, delta) of the lattice, continued to negative epsilon by delta(-eps) = 1 - e^-eps (1 -
    delta(eps)), are replaced by their lower convex hull: a true curve is convex in e^eps, so it lies below
    its upper bounds' hull.
    """
    top = 1.0
    while curve.delta(top) > 1e-13 and top < _CURVE_RANGE:
        top *= 1.25
    count = math.ceil(top / interval)
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


def _interval(parts: Sequence[tuple[Mixture, int]], fineness: float) -> float:
    """Lattice interval: fine against the loss of one step, coarse enough for the composed window to fit."""
    total = sum(count for _, count in parts)
    smallest, variance, widest = math.inf, 0.0, 0.0
    for mixture, count in parts:
        narrow, wide = _loss_stds(mixture)
        smallest = min(smallest, narrow * max(1.0, math.sqrt(total / count) / 10))
        variance += count * wide**2
        ends = mixture.loss(np.array([-_X_RANGE, max(mixture.shifts) + _X_RANGE]))
        widest = max(widest, float(ends[1] - ends[0]))
    room = max(widest, 20 * math.sqrt(variance)) / _MAX_CELLS
    return max(min(fineness * smallest, _MAX_INTERVAL), room)


def _loss_stds(mixture: Mixture) -> tuple[float, float]:
    """Standard deviations of the loss of one step under N(0, 1) and under the mixture."""
    x = np.linspace(-8.0, 8.0 + max(mixture.shifts), 4001)
    loss = mixture.loss(x)
    base = np.exp(-(x**2) / 2)
    mixed = sum(w * np.exp(-((x - s) ** 2) / 2) for s, w in zip(mixture.shifts, mixture.weights, strict=True))
    stds = []
    for density in (base / np.sum(base), mixed / np.sum(mixed)):
        mean = float(np.sum(loss * density))
        stds.append(math.sqrt(max(float(np.sum((loss - mean) ** 2 * density)), 1e-300)))
    return stds[0], max(stds)

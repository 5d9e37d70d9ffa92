"""Composition of loss distributions by one FFT, exponentially tilted, with a computed bound on its error.

With K(a) = sum_i n_i log E[exp(a l_i)] over the finite losses of n_i copies of distribution i and any tilt t,

    P(l) = w(l) exp(K(t) - t l),    w the n_i-fold convolutions of w_i(l) = P_i(l) exp(t l) / E[exp(t l_i)],

so an error of w, which is a probability distribution, counts little for losses around and above the one where
t is the saddle point: delta is accurate *relative to itself* there, however small it is (for t = 0 it is
accurate in absolute terms alone).

**Rounding.** Every output of a Cooley-Tukey transform of N = 2^a 3^b 5^c nonnegative inputs is a sum in which
each input passes through at most log2 N levels of additions and multiplications by roots of unity, so its
error is at most e = 8 u log2(N) sum |x| (u: unit roundoff; Higham 2002, "Accuracy and stability of numerical
algorithms", section 24.1). With f_i the computed transforms, |prod (f_i + e_i)^n_i - prod f_i^n_i| is at most
prod (|f_i| + |e_i|)^n_i - prod |f_i|^n_i at every frequency, repeated squaring adds a relative error of at
most 5 u n_i, and an entry of w is the mean of these over the frequencies plus e for the transform back. This
number is added to every entry. Every w_i is first multiplied by what rounding its exponent may have taken.
Any K serves in the identity above, so that its own rounding does no harm.

**Window.** N lattice points carry w except for at most 1e-16 on either side, by Chernoff's bound P(l > h) <=
exp(K(t + a) - K(t) - a h). What wraps around adds to the masses. What lies above the window counts as
infinite loss with the mass exp(K(t) - t h) 1e-16; what lies below is lost, and so `floor` is the first loss
of the window. For t = 0 the lower 1e-16 is counted as infinite and there is no floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting.accountants.loss_pmf import LossPmf
from dptaft_accounting.errors import AccountingError

Array = NDArray[np.float64]
Complex = NDArray[np.complexfloating[Any, Any]]

_SLACK = -math.log(1e-16)
_ROUNDING = 2.0**-53
_LEVEL = 8.0  # roundings per level of a transform
_LOG_LIMIT = 700.0
_LAST = 1e-12  # covers the rounding of the last exponents
_LEAST_MASS = 1e-295  # of a point; exp(700) times it is still above 1
_NO_MASS = 1e-300  # sums of masses that a float cannot hold
_MOST_TURNS = 400
_MANY = 10_000  # steps from which on transforms without tilt use the longest floats of the machine
_LEAST_ORDER = 1e-40  # over the largest
_LARGEST_ORDER = 100.0  # over the interval: of two neighbours on the lattice only the larger counts there


class Parts:
    """Distributions on one lattice with how often each occurs; knows K of the module.

    Raises:
        AccountingError: the distributions live on different lattices.
    """

    def __init__(self, parts: Sequence[tuple[LossPmf, int]]) -> None:
        self.parts = [(pmf, count) for pmf, count in parts if count > 0]
        self.interval = self.parts[0][0].interval
        if any(pmf.interval != self.interval for pmf, _ in self.parts):
            raise AccountingError("privacy loss distributions on different lattices cannot be composed")
        # (indices on the lattice, losses, masses, count) of the points that carry mass
        self.points = []
        for pmf, count in self.parts:
            held = np.flatnonzero(pmf.mass > _LEAST_MASS)
            masses = pmf.mass[held]
            if len(held) == 0:  # all losses are infinite: any point will do
                held, masses = np.zeros(1, dtype=np.int64), np.array([_NO_MASS])
            index = pmf.start + held
            self.points.append((index, self.interval * index.astype(np.float64), masses, count))
        self._logs = [np.log(masses) for _, _, masses, _ in self.points]
        self._known: dict[float, float] = {}

    @cached_property
    def infinite(self) -> float:
        """Probability that any of the losses is infinite, or of a mass too small to scale."""
        log_finite = 0.0
        for pmf, count in self.parts:
            dropped = float(np.sum(pmf.mass, where=pmf.mass <= _LEAST_MASS))
            log_finite += count * math.log1p(-min(pmf.infinite + dropped, 1 - 1e-16))
        return -math.expm1(log_finite)

    @cached_property
    def largest(self) -> float:
        """Largest finite loss of the composition."""
        return self.interval * sum(count * int(index[-1]) for index, _, _, count in self.points)

    @property
    def count(self) -> int:
        """Number of distributions, each counted as often as it occurs."""
        return sum(count for _, count in self.parts)

    def log_moment(self, order: float) -> float:
        """K(order)."""
        if order not in self._known:
            self._known[order] = math.fsum(
                count * _log_sum(logs + order * losses)
                for (_, losses, _, count), logs in zip(self.points, self._logs, strict=True)
            )
        return self._known[order]

    def log_moments(self, tilt: float) -> list[float]:
        """K of one copy of every distribution; 0 without tilt, where nothing needs scaling."""
        if tilt == 0:
            return [0.0] * len(self.points)
        return [
            _log_sum(logs + tilt * losses)
            for (_, losses, _, _), logs in zip(self.points, self._logs, strict=True)
        ]

    def scale(self, tilt: float) -> float:
        """Standard deviation of the tilted sum of losses."""
        variance = 0.0
        for (_, losses, _, count), logs in zip(self.points, self._logs, strict=True):
            exponents = logs + tilt * losses
            weights = np.exp(exponents - np.max(exponents))
            weights /= np.sum(weights)
            mean = float(np.sum(weights * losses))
            variance += count * float(np.sum(weights * (losses - mean) ** 2))
        return max(math.sqrt(variance), 1e-3 * self.interval)

    def window(self, tilt: float) -> tuple[float, float]:
        """Losses outside of which the tilted sum falls with probability at most 1e-16 per side."""
        start = 8.0 / self.scale(tilt)
        wrong, ends = self.rounding(tilt), []
        for sign in (-1, 1):
            found = self._least(partial(self._excess, tilt, sign), start)
            ends.append(found[1] + (wrong + self.rounding(tilt + sign * found[0])) / found[0])
        return -ends[0], min(ends[1], self.largest)

    def _excess(self, tilt: float, sign: int, order: float) -> float:
        return self.log_moment(tilt + sign * order) - self.log_moment(tilt) + _SLACK

    def saddle(self, log_delta: float) -> float:
        """The tilt whose Chernoff bound exp(K(t) - t eps) reaches this delta at the smallest epsilon."""
        start = math.sqrt(-2 * log_delta) / self.scale(0.0)
        return self._least(lambda a: self.log_moment(a) - log_delta, start)[0]

    def tilt_at(self, epsilon: float, start: float) -> float:
        """The tilt with the smallest allowance for rounding in delta(epsilon), which any tilt keeps valid."""

        def log_allowance(a: float) -> float:
            return self.log_moment(a) - a * epsilon - math.log(-math.expm1(-a * self.interval))

        return _descend(log_allowance, start, _LARGEST_ORDER / self.interval)[0]

    def chernoff_epsilon(self, delta: float) -> float:
        """Epsilon from the moments alone: delta(eps) <= infinite + exp(K(a) - a eps) a^a / (1+a)^(1+a).

        The last factor is the maximum of (1 - e^-x) e^(-a x) (Canonne, Kamath, Steinke 2020, Proposition 12);
        the sum of rounding errors of K is allowed for.
        """
        left = delta - self.infinite
        if left <= 0:
            return math.inf

        def log_bound(a: float) -> float:
            factor = a * math.log(a) - (1 + a) * math.log1p(a)
            return self.log_moment(a) + self.rounding(a) + factor - math.log(left)

        start = math.sqrt(-2 * math.log(left)) / self.scale(0.0)
        return max(0.0, self._least(log_bound, start)[1])

    def _least(self, value: Callable[[float], float], start: float) -> tuple[float, float]:
        return _least_ratio(value, start, _LARGEST_ORDER / self.interval)

    def rounding(self, tilt: float) -> float:
        """Bound on the logarithm of what rounding the exponents of a tilt does to the masses."""
        total = 0.0
        for (_, losses, _, count), logs in zip(self.points, self._logs, strict=True):
            exponents = logs + tilt * losses
            kept = exponents > np.max(exponents) - 80
            size = np.max(np.abs(tilt * losses[kept]) + np.abs(logs[kept]))
            total += count * 4 * _ROUNDING * (float(size) + 64)
        return total


def _log_sum(exponents: Array) -> float:
    top = float(np.max(exponents))
    return top + math.log(float(np.sum(np.exp(exponents - top))))


def _least_ratio(value: Callable[[float], float], start: float, most: float) -> tuple[float, float]:
    """Order a in (0, most] with a small value(a)/a, and that ratio; the ratio falls, then rises.

    Every order gives a valid bound: the ratio was evaluated at the order that is returned.
    """
    return _descend(lambda a: value(a) / a, start, most)


def _descend(value: Callable[[float], float], start: float, most: float) -> tuple[float, float]:
    """Point in (0, most] where a function that falls and then rises is small, with its value there."""
    at = min(max(start, 2 * most * _LEAST_ORDER), most)
    best = value(at)
    for factor in (0.5, 2.0, 0.8, 1.25):
        for _ in range(_MOST_TURNS):
            if not most * _LEAST_ORDER < at * factor <= most or not (found := value(at * factor)) < best:
                break
            best, at = found, at * factor
    return at, best


def compose(parts: Sequence[tuple[LossPmf, int]], tilt: float = 0.0) -> LossPmf:
    """Convolves each distribution `count` times with itself and all of them together.

    Args:
        parts: distributions on one lattice and how often each occurs.
        tilt: t >= 0 of the module; delta is accurate around the epsilon where it is the saddle point.

    Raises:
        AccountingError: the distributions live on different lattices.
    """
    return compose_parts(Parts(parts), tilt)


def compose_parts(parts: Parts, tilt: float) -> LossPmf:
    """As `compose`."""
    if len(parts.parts) == 1 and parts.parts[0][1] == 1:
        return parts.parts[0][0]
    low, high = parts.window(tilt)
    first = math.floor(low / parts.interval)
    size = _fast_length(math.ceil(high / parts.interval) - first + 2)
    kind = np.longdouble if tilt == 0 and parts.count > _MANY else np.float64
    product = np.fft.rfft(np.append(np.ones(1, dtype=kind), np.zeros(size - 1, dtype=kind)))
    unit = float(np.finfo(product.real.dtype).eps) / 2
    error = _LEVEL * unit * math.log2(size)
    log_most, log_grown = np.zeros(len(product)), np.zeros(len(product))
    for (index, losses, masses, count), top in zip(parts.points, parts.log_moments(tilt), strict=True):
        exponents = tilt * losses
        rounding = 2 * _ROUNDING * (np.abs(exponents) + abs(top) + 8) if tilt else 0.0
        weights = masses * np.exp(exponents - top + rounding)
        folded = np.bincount(index % size, weights=weights, minlength=size).astype(kind)
        transform = np.fft.rfft(folded)
        length = np.abs(transform).astype(np.float64)
        log_most += count * np.log(length + error)
        with np.errstate(divide="ignore"):
            log_grown += count * np.log1p(error / length)
        product = product * _power(transform, count)
    wrong = -np.exp(np.minimum(log_most, _LOG_LIMIT)) * np.expm1(-log_grown)
    wrong += np.abs(product).astype(np.float64) * (error + 5 * unit * parts.count)
    entry = min(1.0, 2 * float(np.sum(wrong)) / size)
    back = np.fft.irfft(product, size).astype(np.float64)
    weights = np.maximum(np.roll(back, -(first % size)), 0.0) + entry
    losses = parts.interval * (first + np.arange(size, dtype=np.float64))
    top = (
        math.fsum(n * k for (_, _, _, n), k in zip(parts.points, parts.log_moments(tilt), strict=True))
        + _LAST
    )
    mass = weights * np.exp(np.minimum(top - tilt * losses, _LOG_LIMIT))
    infinite = _NO_MASS + (math.exp(-_SLACK) if tilt == 0 else 0.0)
    if high < parts.largest:
        infinite += math.exp(min(top - tilt * high - _SLACK, 0.0))
    floor = -math.inf if tilt == 0 else float(losses[0])
    return LossPmf(
        parts.interval,
        first,
        np.minimum(mass, 1.0),
        min(1.0, parts.infinite + infinite),
        floor,
        tilt,
        top + math.log(max(entry, _NO_MASS)),
    )


def window_cells(parts: Parts, tilt: float) -> float:
    """Number of lattice points that the composed window needs."""
    low, high = parts.window(tilt)
    return (high - low) / parts.interval


def _power(base: Complex, exponent: int) -> Complex:
    """Repeated squaring; the relative error is below 5 u times the exponent."""
    result = np.ones_like(base)
    while exponent:
        if exponent & 1:
            result = result * base
        exponent >>= 1
        if exponent:
            base = base * base
    return result


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

"""Privacy loss distributions of compositions: pairs on a lattice, tilted FFTs, always pessimistic.

Curves are never below the truth: single steps are discretised pessimistically (`mixture`, `loss_pmf`), and
compositions count every error of the transform (`convolution`). Two compositions in each direction serve
nearly every question: without tilt for large delta, with one tilt for delta between 1e-3 and 1e-17. Smaller
ones take a tilt, a lattice of wider reach and, for curves, a longer tail of their own, down to 1e-290.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeAlias

import numpy as np

from dptaft_accounting import _checks as check
from dptaft_accounting.accountants.convolution import Array, Parts, compose, compose_parts, window_cells
from dptaft_accounting.accountants.loss_pmf import LossPmf, curve_range, pmf_of_curve
from dptaft_accounting.accountants.mixture import REACH, Mixture, discretise_wide
from dptaft_accounting.tradeoff import Profile

__all__ = [
    "LossPmf",
    "Mixture",
    "PldProfile",
    "compose",
    "compose_all",
    "compose_mixtures",
    "compose_pairs",
    "discretise_wide",
    "pmf_of_curve",
]

Pair: TypeAlias = tuple[LossPmf, LossPmf]
# makes the pairs for an interval, a reach in standard deviations and a tail of curves
Builder: TypeAlias = Callable[[float, float, float], list[tuple[Pair, int]]]

_MAX_CELLS = 1 << 20
_FINENESS = 0.02  # lattice interval over the standard deviation of the loss of one step
_MAX_INTERVAL = 1e-3
_LEAST_DELTA = 1e-290
_LARGE_DELTA = 1e-3  # no tilt above it
_FINE = 1e-3  # share of delta that the allowance for rounding may take without another tilt
_REFINEMENTS = 3
_LATTICES = 6
_MANY = 100_000  # steps beyond which rounding shows without tilt
_FARTHEST_REACH = 37.5  # a standard normal exceeds it with probability 5e-308
_FINEST_TAIL = 1e-13
# log10 of the delta at which a tilt is the saddle point, and of the smallest delta that it serves: the number
# of standard deviations grows by about 5 from one to the next
_TILTS = ((-9, -17), (-28, -41), (-57, -76), (-97, -121), (-147, -176), (-208, -243), (-280, -308))


@dataclass(frozen=True)
class PldProfile:
    """Curve of a composed pair in both directions; `delta` is the larger of the two.

    Attributes:
        builder: makes the pairs and how often each occurs.
        interval: lattice interval of the composition.
    """

    builder: Builder
    interval: float
    _composed: dict[tuple[int, int | None], LossPmf] = field(default_factory=dict, compare=False, repr=False)
    _pairs: dict[tuple[float, float, float], tuple[Parts, Parts]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def forward(self) -> LossPmf:
        """Composition of the first direction without tilt."""
        return self._at(0, None)

    @property
    def backward(self) -> LossPmf:
        """Composition of the second direction without tilt."""
        return self._at(1, None)

    def delta(self, epsilon: float) -> float:
        """Larger hockey-stick divergence of the two directions."""
        epsilon = check.real("epsilon", epsilon)
        return max(self._delta(side, epsilon) for side in (0, 1))

    def epsilon(self, delta: float) -> float:
        """Larger epsilon of the two directions; infinity below 1e-290, which masses cannot resolve."""
        delta = check.probability("delta", delta)
        if delta < _LEAST_DELTA:
            return math.inf
        return max(self._epsilon(side, delta) for side in (0, 1))

    def _delta(self, side: int, epsilon: float) -> float:
        best = self._at(side, None).delta(epsilon)
        for tilt, (_, least) in enumerate(_TILTS):
            if best > _LARGE_DELTA:
                break
            best = min(best, self._at(side, tilt).delta(epsilon))
            if best > 10.0**least:
                break
        return best

    def _epsilon(self, side: int, delta: float) -> float:
        if delta >= _LARGE_DELTA and self._steps <= _MANY:
            return self._at(side, None).epsilon(delta)
        tilt = next((k for k, (_, least) in enumerate(_TILTS) if delta >= 10.0**least), len(_TILTS) - 1)
        pmf = self._at(side, tilt)
        found = pmf.epsilon(delta)
        while found <= pmf.floor or (math.isinf(found) and pmf.floor > 0):  # a smaller tilt reaches lower
            pmf = self._at(side, tilt := tilt - 1) if tilt else self._at(side, None)
            found = min(found, pmf.epsilon(delta))
        if math.isinf(found):
            return self._parts(tilt, self.interval)[side].chernoff_epsilon(delta)
        for _ in range(_REFINEMENTS):
            if pmf.allowance(found) <= _FINE * delta:
                break
            order = self._parts(tilt, pmf.interval)[side].tilt_at(found, pmf.tilt or 1.0)
            before, pmf = found, self._compose(side, tilt, partial(_same, order))
            found = min(found, max(pmf.epsilon(delta), pmf.floor))
            if found > before * (1 - _FINE):
                break
        return found

    @cached_property
    def _steps(self) -> int:
        return self._parts(None, self.interval)[0].count

    def _parts(self, tilt: int | None, interval: float) -> tuple[Parts, Parts]:
        """The distributions to compose, far enough into the tails for this tilt."""
        key = (interval, REACH, _FINEST_TAIL)
        if tilt:
            least = 10.0 ** max(_TILTS[tilt][1], -300)
            reach = min(_FARTHEST_REACH, math.sqrt(2 * (8 - math.log(least / self._steps))))
            key = (interval, reach, least * 1e-4)
        if key not in self._pairs:
            pairs = self.builder(*key)
            self._pairs[key] = (
                Parts([(pair[0], count) for pair, count in pairs]),
                Parts([(pair[1], count) for pair, count in pairs]),
            )
        return self._pairs[key]

    def _at(self, side: int, tilt: int | None) -> LossPmf:
        """One direction composed with the tilt of that number."""
        if (side, tilt) not in self._composed:
            log_delta = 0.0 if tilt is None else math.log(10) * _TILTS[tilt][0]
            self._composed[side, tilt] = self._compose(
                side, tilt, lambda parts: parts.saddle(log_delta) if log_delta else 0.0
            )
        return self._composed[side, tilt]

    def _compose(self, side: int, tilt: int | None, order: Callable[[Parts], float]) -> LossPmf:
        """One direction composed with the tilt `order` gives, on the first lattice that has room."""
        interval = self.interval
        for _ in range(_LATTICES):
            parts = self._parts(tilt, interval)[side]
            at = order(parts)
            cells = window_cells(parts, at)
            if cells <= _MAX_CELLS:
                return compose_parts(parts, at)
            interval *= 1.1 * cells / _MAX_CELLS
        return LossPmf(interval, 0, np.zeros(1), 1.0)  # no lattice holds so many steps: only moments are left

    @cached_property
    def lattice(self) -> tuple[Array, Array]:
        """Nonnegative epsilons with delta there, both directions together."""
        curves = [[self._at(side, tilt).delta_on_lattice() for side in (0, 1)] for tilt in (None, 0)]
        grid = np.unique(np.concatenate([curve[0] for pair in curves for curve in pair]))
        values = [[_interpolate_up(grid, *curve) for curve in pair] for pair in curves]
        return grid, np.maximum(*(np.minimum(a, b) for a, b in zip(*values, strict=True)))

    def beta(self, alpha: float) -> float:
        """Trade-off curve: max over epsilon of 1 - delta - e^eps alpha and e^-eps (1 - delta - alpha)."""
        alpha = check.probability("alpha", alpha)
        epsilons, deltas = self.lattice
        with np.errstate(over="ignore"):
            steep = float(np.max(1 - deltas - np.exp(epsilons) * alpha))
        return max(0.0, steep, float(np.max(np.exp(-epsilons) * (1 - deltas - alpha))))


def _same(order: float, parts: Parts) -> float:
    return order


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
    return compose_all(parts, (), fineness)


def compose_all(
    mixtures: Sequence[tuple[Mixture, int]],
    curves: Sequence[tuple[Profile, int]],
    fineness: float = _FINENESS,
) -> PldProfile:
    """Composes pairs of Gaussian mixtures together with mechanisms that are known by a curve alone."""

    def build(interval: float, reach: float, tail: float) -> list[tuple[Pair, int]]:
        interval = max([interval, *(_room(pair, reach) for pair, _ in mixtures)])
        interval = max([interval, *(2 * curve_range(curve, tail) / _MAX_CELLS for curve, _ in curves)])
        pairs = [(mixture.pmfs(interval, reach), count) for mixture, count in mixtures]
        for curve, count in curves:
            pmf = pmf_of_curve(curve, interval, tail)
            pairs.append(((pmf, pmf), count))
        return pairs

    return PldProfile(build, _interval(mixtures, fineness) if mixtures else _MAX_INTERVAL)


def compose_pairs(pairs: Sequence[tuple[Pair, int]]) -> PldProfile:
    """Returns the curve of the composition of pairs that are given on one lattice.

    Raises:
        AccountingError: the distributions live on different lattices.
    """
    held = list(pairs)
    return PldProfile(lambda interval, reach, tail: held, held[0][0][0].interval)


def _room(mixture: Mixture, reach: float) -> float:
    """Smallest lattice interval on which the losses of one step within this reach fit."""
    ends = mixture.loss(np.array([-reach, max(mixture.shifts) + reach]))
    return float(ends[1] - ends[0]) / _MAX_CELLS


def _interval(parts: Sequence[tuple[Mixture, int]], fineness: float) -> float:
    """Lattice interval: fine against the loss of one step, coarse enough for the composed window to fit."""
    total = sum(count for _, count in parts)
    smallest, variance = math.inf, 0.0
    for mixture, count in parts:
        narrow, wide = _loss_stds(mixture)
        smallest = min(smallest, narrow * max(1.0, math.sqrt(total / count) / 10))
        variance += count * wide**2
    room = max(20 * math.sqrt(variance) / _MAX_CELLS, *(_room(mixture, REACH) for mixture, _ in parts))
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

"""Pairs of a mixture of Gaussians and a standard Gaussian, put on a lattice of losses, always pessimistic.

Mass in a cell of losses [u, v] moves to its ends so that the masses under P and under Q are both kept; the
hockey-stick curve of the result is the chord of the true convex curve, hence never below it (Doroshenko,
Ghazi, Kamath, Kumar, Manurangsi 2022, "Connect the dots: tighter discrete approximations of privacy loss
distributions"). Mass above the lattice counts as infinite loss, mass below it moves up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting.accountants.loss_pmf import LossPmf

Array = NDArray[np.float64]
Integers = NDArray[np.int64]

REACH = 10.5  # a standard normal exceeds it with probability 4e-26
_EXP_RANGE = 600.0


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
        x = np.asarray(x, dtype=np.float64)
        total, excess = np.full(x.shape, -np.inf), np.zeros(x.shape)
        for s, w in zip(self.shifts, self.weights, strict=True):
            exponent = s * x - s * s / 2
            total = np.logaddexp(total, math.log(w) + exponent)
            excess += w * np.expm1(np.clip(exponent, -1.0, 1.0))
        # small losses keep their relative accuracy: the weights sum to 1
        near = max(self.shifts) * (np.abs(x) + max(self.shifts)) < 1
        return np.asarray(np.where(near, np.log1p(np.where(near, excess, 0.0)), total), dtype=np.float64)

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
                ratio = np.log1p(np.expm1(np.minimum(losses, _EXP_RANGE)) / w)
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

    def pmfs(self, interval: float, reach: float = REACH) -> tuple[LossPmf, LossPmf]:
        """Discretises both directions: (mixture against N(0, 1), N(0, 1) against mixture).

        What lies beyond `reach` standard deviations is left to the ends.
        """
        low, high = -reach, max(self.shifts) + reach
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
    x = np.linspace(-REACH, float(np.max(shifts)) + REACH, knots)
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

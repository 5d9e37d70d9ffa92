"""mu with regret: the smallest Gaussian curve that a guarantee implies, and how much is lost by quoting it.

After Gomez, Kaissis, et al. 2025, "(epsilon, delta) considered harmful: best practices for reporting
differential privacy guarantees". A residual failure probability keeps mu finite where the far tail of a
curve is not Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting import _checks as check
from dptaft_accounting._search import bisect
from dptaft_accounting.tradeoff import GaussianProfile, Profile

Array = NDArray[np.float64]

_POINTS = 2000
_MU_MAX = 1e3


@dataclass(frozen=True)
class GaussianView:
    """A valid Gaussian reading of a guarantee.

    Attributes:
        mu: the mechanism is mu-GDP except with probability `residual_delta`.
        residual_delta: that probability.
        regret: smallest k with f(alpha + k) - k <= g(alpha) for all alpha, f the known curve and g the
            quoted one.
    """

    mu: float
    residual_delta: float
    regret: float


def gaussian_view(profile: Profile, residual_delta: float = 1e-9) -> GaussianView | None:
    """Returns the smallest mu with delta(eps) <= r + (1-r) H(eps, mu) for eps >= 0, None if none has it.

    Checked on a grid with the curve's value at one point against the Gaussian's at the next, so it holds
    between points as well. That inequality in both directions says f >= G(mu) mixed with failure r, which
    composes.

    >>> gaussian_view(GaussianProfile(0.7)).mu
    0.7
    """
    if isinstance(profile, GaussianProfile):
        return GaussianView(profile.mu, profile.residual_delta, 0.0)
    check.probability("residual_delta", residual_delta)
    top = profile.epsilon(residual_delta)
    if math.isinf(top):
        return None
    grid = np.linspace(0.0, max(top, 1e-6), _POINTS)
    deltas = np.array([profile.delta(float(eps)) for eps in grid[:-1]])
    need = (deltas - residual_delta) / (1 - residual_delta)

    def too_small(mu: float) -> bool:
        return bool(np.any(_gaussian_delta(mu, grid[1:]) < need))

    if too_small(_MU_MAX):
        return None
    mu = bisect(too_small, 1e-9, _MU_MAX, relative=1e-7)[1]
    return GaussianView(mu, residual_delta, _regret(profile, GaussianProfile(mu, residual_delta)))


def _gaussian_delta(mu: float, epsilons: Array) -> Array:
    """The Gaussian curve, rounded down: by the errors that `tradeoff.mu_to_delta` rounds up by."""
    from scipy.special import log_ndtr

    first = log_ndtr(mu / 2 - epsilons / mu)
    second = epsilons + log_ndtr(-mu / 2 - epsilons / mu)
    gap = np.maximum(first - second, 1e-300)
    error = 1e-11 + 2e-15 * (1 - first - second + epsilons) / gap
    return np.asarray(-np.exp(first) * np.expm1(-gap) * np.maximum(1 - error, 0.0), dtype=np.float64)


def _regret(known: Profile, quoted: Profile) -> float:
    alphas = np.concatenate([np.geomspace(1e-6, 0.02, 12), np.linspace(0.03, 0.97, 40)])
    betas = np.array([known.beta(float(a)) for a in alphas])
    goals = np.array([quoted.beta(float(a)) for a in alphas])

    def too_small(k: float) -> bool:
        shifted = np.interp(alphas + k, alphas, betas, right=0.0) - k  # f is convex: interpolation is above f
        return bool(np.any(shifted > goals))

    if not too_small(0.0):
        return 0.0
    return bisect(too_small, 0.0, 1.0, relative=1e-6)[1]

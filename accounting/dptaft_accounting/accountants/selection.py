"""What choosing hyperparameters costs: run a secret random number of candidates, release the best one only.

Papernot, Steinke 2022, "Hyperparameter tuning with Renyi differential privacy". Publishing a whole sweep is
not this: it composes all runs (`SequenceComposition`).
"""

from __future__ import annotations

import math

from dptaft_accounting._search import bisect
from dptaft_accounting.accountants.composition import composition_profile
from dptaft_accounting.accountants.rdp import ORDERS, RdpProfile, rdp
from dptaft_accounting.mechanisms import RepeatAndSelect
from dptaft_accounting.tradeoff import Profile

_LOGARITHMIC = 1e-12  # shapes that no float tells from 0; the mean moves by less than 1e-9


def negative_binomial_mean(shape: float, gamma: float) -> float:
    """E[K] of the truncated negative binomial: eta (1-g)/(g (1-g^eta)); (1/g - 1)/log(1/g) for eta = 0.

    >>> round(negative_binomial_mean(1.0, 0.1), 9)
    10.0
    """
    if shape < _LOGARITHMIC:
        return (1 / gamma - 1) / -math.log(gamma)
    return shape * (1 - gamma) / (gamma * -math.expm1(shape * math.log(gamma)))


def selection_profile(mechanism: RepeatAndSelect) -> RdpProfile:
    """Returns the curve of releasing the best of K candidates."""
    base = rdp(mechanism.base)
    if mechanism.candidate_count == "poisson":
        curve = composition_profile(mechanism.base)
        return RdpProfile(ORDERS, _poisson(mechanism.mean_candidates, base, curve))
    return RdpProfile(ORDERS, _negative_binomial(mechanism.mean_candidates, mechanism.shape, base))


def _negative_binomial(mean: float, shape: float, base: tuple[float, ...]) -> tuple[float, ...]:
    """Theorem 2: r'(a) = r(a) + (1+eta) min_h[(1-1/h) r(h) + log(1/gamma)/h] + log E[K]/(a-1)."""
    # the smaller gamma of the bracket charges more
    gamma = bisect(lambda g: negative_binomial_mean(shape, g) > mean, 1e-300, 1 - 1e-12)[0] * (1 - 1e-9)
    charge = -math.log(gamma)
    extra = (1 + shape) * min((1 - 1 / h) * r + charge / h for h, r in zip(ORDERS, base, strict=True))
    return tuple(r + extra + math.log(mean) / (a - 1) for a, r in zip(ORDERS, base, strict=True))


def _poisson(mean: float, base: tuple[float, ...], curve: Profile) -> tuple[float, ...]:
    """Theorem 6: r'(a) = r(a) + E[K] delta^ + log E[K]/(a-1), base (log(1 + 1/(a-1)), delta^)-DP."""
    return tuple(
        r + mean * curve.delta(math.log1p(1 / (a - 1))) + math.log(mean) / (a - 1)
        for a, r in zip(ORDERS, base, strict=True)
    )

"""Search: the noise multiplier, number of steps or sampling rate with which a claim holds.

The result never gives less privacy than asked: the returned value was itself evaluated and meets the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptaft_accounting import _checks as check
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.errors import CalibrationError
from dptaft_accounting.mechanisms import Mechanism
from dptaft_accounting.tradeoff import Profile, advantage, tpr_at_fpr

if TYPE_CHECKING:
    from dptaft_accounting.convexity import ConvexityCertificate

    Certifier = ConvexityCertificate | Callable[[Mechanism], ConvexityCertificate] | None

_DELTA_FOR_CURVES = 1e-5


@dataclass(frozen=True)
class Target:
    """What a plan must achieve: exactly one of epsilon (at delta), mu, advantage, or TPR (at FPR).

    >>> Target(epsilon=3.0, delta=1e-5).quantity
    'epsilon'
    """

    epsilon: float | None = None
    delta: float | None = None
    mu: float | None = None
    advantage: float | None = None
    tpr: float | None = None
    fpr: float | None = None

    def __post_init__(self) -> None:
        given = [n for n in ("epsilon", "mu", "advantage", "tpr") if getattr(self, n) is not None]
        if len(given) != 1:
            raise CalibrationError(f"give exactly one of epsilon, mu, advantage, tpr; got {given or 'none'}")
        if (self.epsilon is None) != (self.delta is None):
            raise CalibrationError("epsilon and delta go together; give both or neither")
        if (self.tpr is None) != (self.fpr is None):
            raise CalibrationError("tpr and fpr go together; give both or neither")
        if self.epsilon is not None:
            check.positive("epsilon", self.epsilon, CalibrationError)
            check.probability("delta", self.delta, CalibrationError)
        if self.mu is not None:
            check.positive("mu", self.mu, CalibrationError)
        if self.advantage is not None:
            check.probability("advantage", self.advantage, CalibrationError)
        if self.tpr is not None and self.fpr is not None:
            check.probability("fpr", self.fpr, CalibrationError)
            if check.probability("tpr", self.tpr, CalibrationError) <= self.fpr:
                raise CalibrationError(
                    f"tpr {self.tpr:g} is not above fpr {self.fpr:g}; guessing reaches it already"
                )

    @property
    def quantity(self) -> str:
        """Name of the quantity that is bounded."""
        return next(n for n in ("epsilon", "mu", "advantage", "tpr") if getattr(self, n) is not None)

    @property
    def value(self) -> float:
        """The bound on that quantity."""
        return float(getattr(self, self.quantity))

    def measure(self, mechanism: Mechanism, certificate: ConvexityCertificate | None = None) -> float:
        """Evaluates the quantity for a mechanism with the best bound."""
        report = best_bound(mechanism, certificate, delta=self.delta or _DELTA_FOR_CURVES)
        if self.quantity == "epsilon":
            return report.epsilon
        return min((self._read(bound.profile) for bound in report.bounds if bound.profile), default=math.inf)

    def _read(self, profile: Profile) -> float:
        if self.quantity == "advantage":
            return advantage(profile)
        if self.quantity == "tpr":
            return tpr_at_fpr(profile, self.fpr or 0.0)
        mu = getattr(profile, "mu", None)
        return math.inf if mu is None else float(mu)


def calibrate_noise_multiplier(
    build: Callable[[float], Mechanism], target: Target, *, certificate: Certifier = None
) -> float:
    """Returns the smallest noise multiplier (within 1e-4 relative, above) whose mechanism meets the target.

    Args:
        build: turns a noise multiplier into the mechanism; more noise must mean more privacy.
        target: what to reach.
        certificate: a certificate, or a function from mechanism to certificate, for last-iterate bounds.

    Raises:
        CalibrationError: no noise multiplier up to 1e6 reaches the target.

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> target = Target(epsilon=3.0, delta=1e-5)
    >>> z = calibrate_noise_multiplier(lambda z: FullBatchGaussian(z, steps=100), target)
    >>> 13.9 < z < 13.91
    True
    """
    return _calibrate(build, target, certificate, low=1e-3, high=1e6)


def _calibrate(
    build: Callable[[float], Mechanism], target: Target, certificate: Certifier, low: float, high: float
) -> float:
    def excess(value: float) -> float:
        mechanism = build(value)
        proof = certificate(mechanism) if callable(certificate) else certificate
        return target.measure(mechanism, proof) - target.value

    lower, upper = low, 1.0
    while excess(upper) > 0:
        lower, upper = upper, upper * 4
        if upper > high:
            raise CalibrationError(
                f"no noise multiplier up to {high:g} reaches {target}; ask for less or train less"
            )
    while lower == low and excess(upper / 4) <= 0:
        upper /= 4
        if upper < low:
            return upper
    lower = max(lower, upper / 4)
    while upper > lower * (1 + 1e-7):
        middle = math.sqrt(lower * upper)
        if excess(middle) > 0:
            lower = middle
        else:
            upper = middle
    return upper

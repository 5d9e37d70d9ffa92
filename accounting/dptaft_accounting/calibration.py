"""Search: the noise multiplier, number of steps or sampling rate with which a target holds.

The result never gives less privacy than asked: the returned value was itself evaluated and meets the target.
What epsilon a given plan costs is `best_bound(plan, delta=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from dptaft_accounting import _checks as check
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.dominating_gaussian import gaussian_view
from dptaft_accounting.errors import CalibrationError
from dptaft_accounting.mechanisms import Mechanism
from dptaft_accounting.tradeoff import Profile, advantage, tpr_at_fpr

if TYPE_CHECKING:
    from dptaft_accounting.convexity import ConvexityCertificate

    Certifier: TypeAlias = ConvexityCertificate | Callable[[Mechanism], ConvexityCertificate] | None

_DELTA_FOR_CURVES = 1e-5
_TOLERANCE = 2e-5
_NOISE_RANGE = (1e-3, 1e6)
_MAX_STEPS = 10**8
_MIN_RATE = 1e-9


@dataclass(frozen=True)
class Target:
    """What a plan must achieve: exactly one of epsilon (at delta), mu, advantage, or TPR (at FPR).

    A target on mu for sampled mechanisms is met except with probability 1e-9 (see `gaussian_view`).

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
        error = CalibrationError
        given = [n for n in ("epsilon", "mu", "advantage", "tpr") if getattr(self, n) is not None]
        if len(given) != 1:
            raise error(f"give exactly one of epsilon, mu, advantage, tpr; got {', '.join(given) or 'none'}")
        if (self.epsilon is None) != (self.delta is None):
            raise error("epsilon and delta go together; give both or neither")
        if (self.tpr is None) != (self.fpr is None):
            raise error("tpr and fpr go together; give both or neither")
        if self.epsilon is not None:
            check.positive("epsilon", self.epsilon, error)
            check.probability("delta", self.delta, error)
        if self.mu is not None:
            check.positive("mu", self.mu, error)
        if self.advantage is not None:
            check.probability("advantage", self.advantage, error)
        if self.tpr is not None:
            fpr = check.probability("fpr", self.fpr, error)
            if check.probability("tpr", self.tpr, error) <= fpr:
                raise error(
                    f"tpr {self.tpr:g} is not above fpr {fpr:g}, which guessing reaches; ask for more"
                )

    @property
    def quantity(self) -> str:
        """Name of the quantity that is bounded."""
        return next(n for n in ("epsilon", "mu", "advantage", "tpr") if getattr(self, n) is not None)

    @property
    def value(self) -> float:
        """The bound on that quantity."""
        return float(getattr(self, self.quantity))

    def measure(
        self, mechanism: Mechanism, certificate: ConvexityCertificate | None = None, records_per_unit: int = 1
    ) -> float:
        """Evaluates the quantity for a mechanism with the best bound."""
        delta = self.delta or _DELTA_FOR_CURVES
        report = best_bound(mechanism, certificate, delta=delta, records_per_unit=records_per_unit)
        if self.quantity == "epsilon":
            return report.epsilon
        return min(self._read(bound.profile) for bound in report.bounds)

    def _read(self, profile: Profile) -> float:
        if self.quantity == "advantage":
            return advantage(profile)
        if self.quantity == "tpr":
            return tpr_at_fpr(profile, self.fpr or 0.0)
        view = gaussian_view(profile)
        return math.inf if view is None else view.mu


def calibrate_noise_multiplier(
    build: Callable[[float], Mechanism],
    target: Target,
    *,
    certificate: Certifier = None,
    records_per_unit: int = 1,
) -> float:
    """Returns a noise multiplier that meets the target, at most 2e-5 (relative) above the smallest.

    Args:
        build: turns a noise multiplier into the mechanism.
        target: what to reach.
        certificate: a certificate, or a function from mechanism to certificate, for last-iterate bounds.
        records_per_unit: largest number of records that one protected unit owns.

    Raises:
        CalibrationError: no noise multiplier between 1e-3 and 1e6 reaches the target.

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> target = Target(epsilon=3.0, delta=1e-5)
    >>> z = calibrate_noise_multiplier(lambda z: FullBatchGaussian(z, steps=100), target)
    >>> 13.9 < z < 13.91
    True
    """

    def excess(log_z: float) -> float:
        return _excess(build(math.exp(log_z)), target, certificate, records_per_unit)

    low, high = (math.log(end) for end in _NOISE_RANGE)
    points = [(0.0, excess(0.0))]
    while True:
        at, value = points[-1]
        if at <= low and value <= 0:
            return math.exp(low)
        if at >= high and value > 0:
            raise CalibrationError(
                f"no noise multiplier up to {_NOISE_RANGE[1]:g} reaches {target.quantity} {target.value:g}; "
                "relax the target or train less"
            )
        at = min(high, max(low, at + _move(points)))
        points.append((at, excess(at)))
        (last, value), (before, other) = points[-1], points[-2]
        if (value <= 0) != (other <= 0):
            pair = ((last, value), (before, other))
            good, bad = pair if value <= 0 else pair[::-1]
            return math.exp(_close_in(excess, good, bad))


def _move(points: list[tuple[float, float]]) -> float:
    """How far to go towards the root: a little beyond the secant, at most a factor of 50."""
    at, value = points[-1]
    slope = 1.0
    if len(points) > 1 and math.isfinite(points[-2][1]) and math.isfinite(value) and value != points[-2][1]:
        slope = max(abs((value - points[-2][1]) / (at - points[-2][0])), 0.1)
    length = abs(value) / slope * 1.02 + 1e-3 if math.isfinite(value) else 1.0
    return math.copysign(min(length, 4.0), value)


def _excess(mechanism: Mechanism, target: Target, certificate: Certifier, records_per_unit: int) -> float:
    """log(measured/target): at most 0 where the target holds."""
    proof = certificate(mechanism) if callable(certificate) else certificate
    measured = target.measure(mechanism, proof, records_per_unit)
    return math.log(measured / target.value) if measured > 0 else -50.0


def _close_in(excess: Callable[[float], float], good: tuple[float, float], bad: tuple[float, float]) -> float:
    """Illinois method between a point that meets the target and one that does not; returns one that does."""
    weight_good, weight_bad, side = good[1], bad[1], 0
    for count in range(200):
        width = abs(good[0] - bad[0])
        if width <= _TOLERANCE or good[1] > -_TOLERANCE:
            break
        if math.isfinite(weight_bad) and weight_bad != weight_good and count % 8 != 7:
            middle = good[0] - weight_good * (bad[0] - good[0]) / (weight_bad - weight_good)
            # a little towards the good side, so that the last step closes the bracket from both ends
            inside = 0.45 * _TOLERANCE
            middle += math.copysign(inside, good[0] - bad[0])
            ends = sorted((good[0], bad[0]))
            middle = min(max(middle, ends[0] + inside), ends[1] - inside)
        else:
            middle = 0.5 * (good[0] + bad[0])
        value = excess(middle)
        if value <= 0:
            good, weight_good = (middle, value), value
            weight_bad /= 2 if side == -1 else 1
            side = -1
        else:
            bad, weight_bad = (middle, value), value
            weight_good /= 2 if side == 1 else 1
            side = 1
    return good[0]


def calibrate_steps(
    build: Callable[[int], Mechanism],
    target: Target,
    *,
    certificate: Certifier = None,
    records_per_unit: int = 1,
) -> int:
    """Returns the largest number of steps that meets the target.

    Raises:
        CalibrationError: not even one step meets it, or 10^8 steps still do (the target does not bind).

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> calibrate_steps(lambda t: FullBatchGaussian(20.0, steps=t), Target(mu=1.0))
    400
    """

    def holds(steps: int) -> bool:
        return _excess(build(steps), target, certificate, records_per_unit) <= 1e-12

    if not holds(1):
        raise CalibrationError(f"one step already exceeds {target.quantity} {target.value:g}; add noise")
    low, high = 1, 2
    while holds(high):
        low, high = high, high * 2
        if high > _MAX_STEPS:
            raise CalibrationError(
                f"{target.quantity} {target.value:g} never binds; any number of steps meets it"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def calibrate_sampling_rate(
    build: Callable[[float], Mechanism],
    target: Target,
    *,
    certificate: Certifier = None,
    records_per_unit: int = 1,
) -> float:
    """Returns a sampling rate that meets the target, at most 2e-5 (relative) below the largest one.

    Raises:
        CalibrationError: no sampling rate above 1e-9 meets it.

    >>> from dptaft_accounting.mechanisms import PoissonGaussian
    >>> target = Target(epsilon=1.8, delta=1e-5)
    >>> p = calibrate_sampling_rate(lambda p: PoissonGaussian(1.0, p, steps=1000), target)
    >>> 0.0095 < p < 0.01
    True
    """

    def excess(log_p: float) -> float:
        return _excess(build(min(1.0, math.exp(log_p))), target, certificate, records_per_unit)

    top = excess(0.0)
    if top <= 0:
        return 1.0
    low = math.log(_MIN_RATE)
    bottom = excess(low)
    if bottom > 0:
        raise CalibrationError(f"no sampling rate reaches {target.quantity} {target.value:g}; add noise")
    return math.exp(_close_in(excess, (low, bottom), (0.0, top)))

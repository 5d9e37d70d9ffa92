"""Renyi differential privacy: a check on composition, and the route to hyperparameter selection."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dptaft_accounting.accountants.gaussian import gaussian_mu, within_range
from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import Mechanism, PoissonGaussian, SequenceComposition
from dptaft_accounting.profiles import DeltaCurve

ORDERS: tuple[float, ...] = (
    *(1 + k / 20 for k in range(1, 60)),
    *(4 + k / 4 for k in range(60)),
    *(float(k) for k in range(19, 64)),
    *(float(64 * 2 ** (k / 4)) for k in range(13)),
)
_ROUNDING = 2e-13  # of the logarithm of a moment: the peer cuts its series at 1e-13 and sums over the order


@dataclass(frozen=True)
class RdpProfile(DeltaCurve):
    """Curve implied by Renyi divergences (Canonne, Kamath, Steinke 2020, Proposition 12).

    delta(eps) = exp((a-1)(rdp(a) - eps)) (1 - 1/a)^a / (a - 1), for the best order a.
    """

    orders: tuple[float, ...]
    values: tuple[float, ...]

    def delta(self, epsilon: float) -> float:
        """Smallest delta over the orders."""
        best = 0.0
        for a, r in zip(self.orders, self.values, strict=True):
            log_delta = (a - 1) * (r - epsilon) + a * math.log1p(-1 / a) - math.log(a - 1)
            best = min(best, log_delta)
        return min(1.0, math.exp(best))


def rdp(mechanism: Mechanism, orders: Sequence[float] = ORDERS) -> tuple[float, ...]:
    """Returns an upper bound of the Renyi divergence of every order.

    Gaussian: a mu^2/2. Poisson: dp-accounting (Mironov, Talwar, Zhang 2019, "Renyi differential privacy of
    the sampled Gaussian mechanism", section 3) and what it may lose to rounding. Sequences add.

    Raises:
        MechanismError: no Renyi bound is implemented for this mechanism.
    """
    mu = gaussian_mu(mechanism)
    if mu is not None:
        return tuple(a * mu * mu / 2 for a in orders)
    if isinstance(mechanism, PoissonGaussian):
        return _poisson(mechanism, orders)
    if isinstance(mechanism, SequenceComposition):
        return tuple(
            math.fsum(column) for column in zip(*(rdp(p, orders) for p in mechanism.parts), strict=True)
        )
    raise MechanismError(f"no Renyi bound is implemented for {mechanism.kind}; account it alone")


def _poisson(mechanism: PoissonGaussian, orders: Sequence[float]) -> tuple[float, ...]:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    noise, rate = within_range(mechanism)
    if noise is None:
        mu = math.sqrt(mechanism.steps) / mechanism.noise_multiplier
        return tuple(a * mu * mu / 2 for a in orders)
    accountant = RdpAccountant(list(orders))
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), mechanism.steps)
    return tuple(
        max(0.0, float(value)) + mechanism.steps * _ROUNDING * (1 + a / 50) / (a - 1)
        for a, value in zip(orders, accountant.rdp, strict=True)
    )


def rdp_profile(mechanism: Mechanism) -> RdpProfile:
    """Returns the curve of the Renyi accountant."""
    return RdpProfile(ORDERS, rdp(mechanism))

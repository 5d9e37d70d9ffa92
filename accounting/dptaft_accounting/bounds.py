"""The smallest valid epsilon of a mechanism, with the name of the bound and all others beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptaft_accounting import _checks as check
from dptaft_accounting.accountants.composition import composition_profile
from dptaft_accounting.mechanisms import Mechanism, PoissonGaussian
from dptaft_accounting.profiles import GroupProfile
from dptaft_accounting.tradeoff import GaussianProfile, Profile

if TYPE_CHECKING:
    from dptaft_accounting.convexity import ConvexityCertificate


@dataclass(frozen=True)
class Bound:
    """One valid upper bound on the privacy loss.

    Attributes:
        name: which bound.
        epsilon: valid at the delta of the report, rounded up; infinity where the bound says nothing.
        profile: the whole curve.
    """

    name: str
    epsilon: float
    profile: Profile

    @property
    def mu(self) -> float | None:
        """GDP parameter where the bound is exactly mu-GDP."""
        if isinstance(self.profile, GaussianProfile) and self.profile.residual_delta == 0:
            return self.profile.mu
        return None


@dataclass(frozen=True)
class BoundReport:
    """All bounds that hold for one mechanism at one delta, smallest first."""

    delta: float
    bounds: tuple[Bound, ...]

    @property
    def best(self) -> Bound:
        """The smallest bound."""
        return self.bounds[0]

    @property
    def epsilon(self) -> float:
        """Epsilon of the smallest bound."""
        return self.best.epsilon

    @property
    def name(self) -> str:
        """Name of the smallest bound."""
        return self.best.name

    @property
    def profile(self) -> Profile:
        """Curve of the smallest bound."""
        return self.best.profile

    def named(self, name: str) -> Bound | None:
        """Returns the bound of that name, or None."""
        return next((bound for bound in self.bounds if bound.name == name), None)


def best_bound(
    mechanism: Mechanism,
    certificate: ConvexityCertificate | None = None,
    *,
    delta: float,
    records_per_unit: int = 1,
) -> BoundReport:
    """Returns every bound that holds for `mechanism`, smallest epsilon first.

    Args:
        mechanism: what happened.
        certificate: proof of convexity; without it only composition bounds are given.
        delta: failure probability, strictly between 0 and 1.
        records_per_unit: largest number of records that one protected unit owns.

    Raises:
        MechanismError: the mechanism is unknown or a combination is unsound.
        CertificateError: the certificate belongs to another mechanism.

    >>> from dptaft_accounting.mechanisms import FullBatchGaussian
    >>> best_bound(FullBatchGaussian(noise_multiplier=10.0, steps=100), delta=1e-5).epsilon
    4.3771781
    """
    delta = check.probability("delta", delta)
    size = check.whole("records_per_unit", records_per_unit)
    curves = [("composition", _composition(mechanism, size))]
    if certificate is not None:
        from dptaft_accounting.accountants.last_iterate import last_iterate_bounds

        found = last_iterate_bounds(mechanism, certificate, delta)
        curves += [(name, group_profile(profile, size)) for name, profile in found]
    bounds = [_bound(name, profile, delta) for name, profile in curves]
    return BoundReport(delta, tuple(sorted(bounds, key=lambda bound: bound.epsilon)))


def group_profile(profile: Profile, records_per_unit: int) -> Profile:
    """Returns what a curve for one record says about units that own k records.

    mu-GDP becomes k mu-GDP (Dong, Roth, Su 2022, Theorem 2.14); other curves use the generic conversion.
    """
    if records_per_unit == 1:
        return profile
    if isinstance(profile, GaussianProfile) and profile.residual_delta == 0:
        return GaussianProfile(profile.mu * records_per_unit)
    return GroupProfile(profile, records_per_unit)


def _composition(mechanism: Mechanism, size: int) -> Profile:
    if size > 1 and isinstance(mechanism, PoissonGaussian) and mechanism.sampling_rate < 1:
        from dptaft_accounting.accountants.composition import group_composition

        return group_composition(mechanism, size)
    return group_profile(composition_profile(mechanism), size)


def _bound(name: str, profile: Profile, delta: float) -> Bound:
    epsilon = profile.epsilon(delta)
    return Bound(name, math.inf if math.isinf(epsilon) else check.round_up(epsilon), profile)

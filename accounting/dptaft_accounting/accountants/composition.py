"""Composition bounds: valid for any loss and optimiser, with every iterate released.

Closed form where the mechanism is exactly Gaussian; otherwise privacy loss distributions in both directions.
"""

from __future__ import annotations

from typing import TypeGuard

from dptaft_accounting.accountants.gaussian import gaussian_mu
from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import (
    CertifiedLastIterate,
    Mechanism,
    ObjectivePerturbation,
    ParallelComposition,
    PoissonGaussian,
    RepeatAndSelect,
    SequenceComposition,
    SoftmaxObjectivePerturbation,
)
from dptaft_accounting.profiles import MaxProfile
from dptaft_accounting.tradeoff import GaussianProfile, Profile


def composition_profile(mechanism: Mechanism) -> Profile:
    """Returns the curve of plain composition.

    Raises:
        MechanismError: the mechanism is not one of the known records.
    """
    mu = gaussian_mu(mechanism)
    if mu is not None:
        return GaussianProfile(mu)
    if isinstance(mechanism, ParallelComposition):
        return _largest([composition_profile(part) for part in mechanism.parts])
    if isinstance(mechanism, CertifiedLastIterate):
        from dptaft_accounting.bounds import best_bound

        return best_bound(mechanism.base, mechanism.certificate, delta=mechanism.delta).profile
    if isinstance(mechanism, RepeatAndSelect):
        from dptaft_accounting.accountants.selection import selection_profile

        return selection_profile(mechanism)
    if isinstance(mechanism, SoftmaxObjectivePerturbation):
        from dptaft_accounting.accountants.one_shot import SoftmaxObjectiveProfile

        return SoftmaxObjectiveProfile.of(mechanism)
    if isinstance(mechanism, (PoissonGaussian, SequenceComposition, ObjectivePerturbation)):
        return _numerical(mechanism)
    raise MechanismError(f"unknown mechanism {type(mechanism).__name__!r}; it cannot be accounted")


def _largest(curves: list[Profile]) -> Profile:
    """Curve of a record in one of several disjoint shards: of Gaussian curves, that with the largest mu."""
    if len(curves) == 1:
        return curves[0]
    mus = [curve.mu for curve in curves if _is_gaussian(curve)]
    return GaussianProfile(max(mus)) if len(mus) == len(curves) else MaxProfile(tuple(curves))


def _is_gaussian(curve: Profile) -> TypeGuard[GaussianProfile]:
    return isinstance(curve, GaussianProfile) and curve.residual_delta == 0


def _numerical(mechanism: Mechanism) -> Profile:
    from dptaft_accounting.accountants.one_shot import ObjectivePerturbationProfile
    from dptaft_accounting.accountants.pld import Mixture, compose_all

    mixtures: dict[Mixture, int] = {}
    curves: list[tuple[Profile, int]] = []
    for part in _flatten(mechanism):
        mu = gaussian_mu(part)
        if mu is not None:
            pair = Mixture.gaussian(mu)
            mixtures[pair] = mixtures.get(pair, 0) + 1
        elif isinstance(part, PoissonGaussian):
            pair = Mixture.poisson(part.noise_multiplier, part.sampling_rate)
            mixtures[pair] = mixtures.get(pair, 0) + part.steps
        elif isinstance(part, ObjectivePerturbation):
            curve: Profile = ObjectivePerturbationProfile.of(part)
            curves.append((curve, part.problems))
            if part.gradient_tolerance > 0:
                # 2t/lambda between the two returned points, hidden by the output noise, in every problem
                moved = 2 * part.gradient_tolerance / (part.regularization * part.output_noise_std)
                pair = Mixture.gaussian(moved)
                mixtures[pair] = mixtures.get(pair, 0) + part.problems
        else:
            curve = composition_profile(part)
            if _is_gaussian(curve):
                pair = Mixture.gaussian(curve.mu)
                mixtures[pair] = mixtures.get(pair, 0) + 1
            else:
                curves.append((curve, 1))
    if not mixtures and [count for _, count in curves] == [1]:
        return curves[0][0]
    return compose_all(list(mixtures.items()), curves)


def _flatten(mechanism: Mechanism) -> list[Mechanism]:
    if isinstance(mechanism, SequenceComposition):
        return [leaf for part in mechanism.parts for leaf in _flatten(part)]
    return [mechanism]

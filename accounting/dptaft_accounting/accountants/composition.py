"""Composition bounds: valid for any loss and optimiser, with every iterate released.

Closed form where the mechanism is exactly Gaussian; otherwise privacy loss distributions in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeGuard

from dptaft_accounting.accountants.gaussian import gaussian_mu, within_range
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

_UP = 1 + 1e-14
_LEAST_MU, _MOST_MU = 1e-6, 1e4
_LARGEST_GROUP = 64
_MOST_PAIRS = 24
_MOST_PIECES = 1000
_MOST_CURVES = 64


def composition_profile(mechanism: Mechanism) -> Profile:
    """Returns the curve of plain composition.

    Raises:
        MechanismError: the mechanism is not one of the known records.
    """
    mu = gaussian_mu(mechanism)
    if mu is not None:
        return GaussianProfile(mu)
    if isinstance(mechanism, ParallelComposition):
        return _largest([composition_profile(part) for part in _distinct(mechanism.parts)])
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


def _distinct(parts: tuple[Mechanism, ...]) -> list[Mechanism]:
    """One part of each kind and of the Gaussian ones the worst, which are all that a maximum needs."""
    kept = list(dict.fromkeys(part for part in parts if gaussian_mu(part) is None))
    gaussian = [part for part in parts if gaussian_mu(part) is not None]
    if len(kept) > _MOST_CURVES:
        raise MechanismError(f"{len(kept)} different sampled parts are too many; at most {_MOST_CURVES}")
    return kept + sorted(gaussian, key=lambda part: gaussian_mu(part) or 0.0)[-1:]


def group_composition(mechanism: PoissonGaussian, size: int) -> Profile:
    """Returns the curve for units of `size` records that are sampled independently of each other.

    A mixture of Gaussians for small units; large ones are accounted as if every record took part in every
    step.
    """
    noise, rate = within_range(mechanism)
    if noise is None or size > _LARGEST_GROUP:
        mu = _UP * size * math.sqrt(mechanism.steps) / mechanism.noise_multiplier
        return GaussianProfile(mu)
    from dptaft_accounting.accountants.pld import Mixture, compose_mixtures

    return compose_mixtures([(Mixture.poisson(noise, rate, group=size), mechanism.steps)])


def _pieces(part: Mechanism) -> Iterator[tuple[float | tuple[float, float] | Profile, int]]:
    """What a part is made of, with counts: mu of a Gaussian, noise and rate of a sampled one, or a curve."""
    from dptaft_accounting.accountants.one_shot import ObjectivePerturbationProfile

    mu = gaussian_mu(part)
    if mu is not None:
        yield mu, 1
    elif isinstance(part, PoissonGaussian):
        noise, rate = within_range(part)
        plain = noise is None or rate == 1
        yield 1 / (noise or part.noise_multiplier) if plain else (noise or 0.0, rate), part.steps
    elif isinstance(part, ObjectivePerturbation):
        yield ObjectivePerturbationProfile.of(part), part.problems
        if part.gradient_tolerance > 0:
            # 2t/lambda between the two returned points, hidden by the output noise, in every problem
            hidden = part.regularization * part.output_noise_std
            yield 2 * part.gradient_tolerance / hidden if hidden > 0 else math.inf, part.problems
    else:
        curve = composition_profile(part)
        yield curve.mu if _is_gaussian(curve) else curve, 1


def _numerical(mechanism: Mechanism) -> Profile:
    from dptaft_accounting.accountants.pld import Mixture, compose_all

    sampled: dict[tuple[float, float], int] = {}
    curves: dict[Profile, int] = {}
    mus: list[tuple[float, int]] = []
    for part in _flatten(mechanism):
        for piece, count in _pieces(part):
            if isinstance(piece, float):
                mus.append((piece, count))
            elif isinstance(piece, tuple):
                sampled[piece] = sampled.get(piece, 0) + count
            else:
                curves[piece] = curves.get(piece, 0) + count
    mu = _UP * math.sqrt(math.fsum(count * each * each for each, count in mus))
    if not sampled and not curves:
        return GaussianProfile(mu)
    if mu == 0 and not sampled and list(curves.values()) == [1]:
        return next(iter(curves))
    if mu > _MOST_MU:
        raise MechanismError(f"the parts are {mu:g}-GDP at best, which no curve can show; add noise")
    if len(curves) > _MOST_CURVES:
        raise MechanismError(f"{len(curves)} different parts are too many; at most {_MOST_CURVES}")
    mixtures = [(Mixture.poisson(*pair), count) for pair, count in _few(sampled).items()]
    if mu > 0:  # in as many pieces as there were, for the lattice to be as fine
        pieces = min(sum(count for _, count in mus), _MOST_PIECES)
        mixtures.append((Mixture.gaussian(max(mu / math.sqrt(pieces), _LEAST_MU)), pieces))
    return compose_all(mixtures, list(curves.items()))


def _few(sampled: dict[tuple[float, float], int]) -> dict[tuple[float, float], int]:
    """At most `_MOST_PAIRS` pairs of noise and rate: noise rounded down and rates up, on coarser grids."""
    grid = 1e-3
    found = sampled
    while len(found) > _MOST_PAIRS:
        found = {}
        for (noise, rate), count in sampled.items():
            low = min(noise, math.exp(math.floor(math.log(noise) / grid) * grid))
            high = min(1.0, max(rate, math.exp(math.ceil(math.log(rate) / grid) * grid)))
            found[low, high] = found.get((low, high), 0) + count
        grid *= 2
    return found


def _flatten(mechanism: Mechanism) -> list[Mechanism]:
    if isinstance(mechanism, SequenceComposition):
        return [leaf for part in mechanism.parts for leaf in _flatten(part)]
    return [mechanism]

"""Mechanisms whose composition is exactly mu-GDP, in closed form."""

from __future__ import annotations

import math

from dptaft_accounting.mechanisms import (
    CyclicGaussian,
    FullBatchGaussian,
    Mechanism,
    OutputPerturbation,
    ParallelComposition,
    PoissonGaussian,
    SequenceComposition,
)

_UP = 1 + 1e-14
_LEAST_NOISE, _MOST_NOISE = 1e-4, 1e6
_LEAST_LOSS = 1e-11  # rate over noise; smaller losses drown in rounding


def gaussian_mu(mechanism: Mechanism) -> float | None:
    """Returns mu where composition is exactly mu-GDP, else None.

    Full batch: mu^2 = sum_t (s/z_t)^2 with s the sensitivity over the clip norm (Dong, Roth, Su 2022,
    Corollary 3.3).
    Cyclic: a record takes part once per epoch, whichever batch holds it, so E terms count; hiding the
    partition cannot hurt. Output perturbation: the minimiser of a lambda-strongly convex mean moves by at
    most s L/(n lambda) (Chaudhuri, Monteleoni, Sarwate 2011, Corollary 8), plus t/lambda on either side for
    a gradient of norm t.
    Poisson: only for p = 1. Sequences add mu^2. Disjoint shards: the largest mu, whose curve is the lowest.

    >>> round(gaussian_mu(FullBatchGaussian(noise_multiplier=2.0, steps=4)), 9)
    1.0
    """
    if isinstance(mechanism, FullBatchGaussian):
        if isinstance(mechanism.noise_multiplier, float):
            return _UP * mechanism.sensitivity * math.sqrt(mechanism.steps) / mechanism.noise_multiplier
        return (
            _UP
            * mechanism.sensitivity
            * math.sqrt(math.fsum((1 / z) * (1 / z) for z in mechanism.noise_multiplier))
        )
    if isinstance(mechanism, CyclicGaussian):
        return _UP * mechanism.sensitivity * math.sqrt(mechanism.epochs) / mechanism.noise_multiplier
    if isinstance(mechanism, PoissonGaussian) and mechanism.sampling_rate == 1:
        return _UP * math.sqrt(mechanism.steps) / mechanism.noise_multiplier
    if isinstance(mechanism, OutputPerturbation):
        moved = mechanism.sensitivity * mechanism.gradient_bound / mechanism.records
        moved += 2 * mechanism.gradient_tolerance
        hidden = mechanism.regularization * mechanism.noise_std
        return _UP * moved / hidden if hidden > 0 else math.inf
    if isinstance(mechanism, SequenceComposition | ParallelComposition):
        mus = [mu for mu in map(gaussian_mu, mechanism.parts) if mu is not None]
        if len(mus) == len(mechanism.parts):
            parallel = isinstance(mechanism, ParallelComposition)
            return max(mus) if parallel else _UP * math.sqrt(math.fsum(mu * mu for mu in mus))
    return None


def within_range(part: PoissonGaussian) -> tuple[float | None, float]:
    """Noise and rate that are not better than the record's and small enough for the lattice; None: no noise.

    Less noise and a larger rate never give less privacy loss: more noise is post-processing, and a mixture of
    fewer shifted outcomes is the mixture of more of them with the unshifted distribution.
    """
    if part.noise_multiplier < _LEAST_NOISE:
        return None, 1.0
    noise = min(part.noise_multiplier, _MOST_NOISE)
    return noise, min(1.0, max(part.sampling_rate, _LEAST_LOSS * noise))

"""Composition bounds: valid for any loss and optimiser, with every iterate released."""

from __future__ import annotations

import math

from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian, Mechanism
from dptaft_accounting.tradeoff import GaussianProfile, Profile

_UP = 1 + 1e-14


def gaussian_mu(mechanism: Mechanism) -> float | None:
    """Returns mu where composition is exactly mu-GDP, else None.

    Full batch: mu^2 = sum_t (s/z_t)^2 with s the sensitivity over the clip norm (Dong, Roth, Su 2022,
    Corollary 3.3). Cyclic: a record takes part once per epoch, so E terms count, whichever batch holds it;
    hiding the partition cannot hurt.

    >>> gaussian_mu(FullBatchGaussian(noise_multiplier=2.0, steps=4))
    1.00000000000001
    """
    if isinstance(mechanism, FullBatchGaussian):
        return _UP * mechanism.sensitivity * math.sqrt(math.fsum(z**-2 for z in mechanism.noise_schedule))
    if isinstance(mechanism, CyclicGaussian):
        return _UP * mechanism.sensitivity * math.sqrt(mechanism.epochs) / mechanism.noise_multiplier
    return None


def composition_profile(mechanism: Mechanism) -> Profile:
    """Returns the curve of plain composition.

    Raises:
        MechanismError: no composition bound is implemented for this mechanism.
    """
    mu = gaussian_mu(mechanism)
    if mu is not None:
        return GaussianProfile(mu)
    raise MechanismError(f"unknown mechanism {type(mechanism).__name__!r}; it cannot be accounted")

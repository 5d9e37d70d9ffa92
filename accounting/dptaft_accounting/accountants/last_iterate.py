"""Last-iterate bounds for convex losses: noisy gradient descent, cyclic batches, Poisson sampling.

What a certificate proves about each record, by shifted interpolation (`shift_allocation.py`) or with hidden
participation (`hidden_participation.py`).
"""

from __future__ import annotations

import math

import numpy as np

from dptaft_accounting.accountants.hidden_participation import Problem, hidden_participation_profile
from dptaft_accounting.accountants.shift_allocation import (
    cyclic_mu,
    noisy_gd_mu,
    projected_gd_mu,
    projected_mu,
    shifted_mu,
)
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import CertificateError, MechanismError
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian, Mechanism, PoissonGaussian
from dptaft_accounting.profiles import MeanProfile, ResidualProfile
from dptaft_accounting.tradeoff import GaussianProfile, Profile

_EXACT = 20  # factorials below it are not approximated


def last_iterate_bounds(
    mechanism: Mechanism, certificate: ConvexityCertificate, delta: float
) -> list[tuple[str, Profile]]:
    """Returns the last-iterate bounds that the certificate proves for this mechanism, by name.

    `delta` says where bounds with a free layout are optimised; every curve is valid everywhere.

    Raises:
        CertificateError: the certificate belongs to another mechanism.
        MechanismError: no last-iterate bound is known for this mechanism.
    """
    certificate.check(mechanism)
    if isinstance(mechanism, FullBatchGaussian):
        return _full_batch(mechanism, certificate)
    if isinstance(mechanism, CyclicGaussian):
        return _cyclic(mechanism, certificate)
    if isinstance(mechanism, PoissonGaussian):
        return _poisson(mechanism, certificate, delta)
    raise MechanismError(f"no last-iterate bound is known for {mechanism.kind}")


def _full_batch(mechanism: FullBatchGaussian, certificate: ConvexityCertificate) -> list[tuple[str, Profile]]:
    plain, projected = (
        _constant_steps(mechanism.noise_multiplier, mechanism, certificate)
        if isinstance(mechanism.noise_multiplier, float) and len(certificate.contractions) == 1
        else _scheduled_steps(mechanism, certificate)
    )
    bounds = {
        "last-iterate noisy gradient descent": plain,
        "last-iterate projected noisy gradient descent": projected,
    }
    return [(name, GaussianProfile(mu)) for name, mu in bounds.items() if math.isfinite(mu)]


def _constant_steps(
    noise: float, mechanism: FullBatchGaussian, certificate: ConvexityCertificate
) -> tuple[float, float]:
    """Gaussian parameter without and with the projection (infinite where there is none)."""
    c, steps, moved = certificate.contractions[0], mechanism.steps, mechanism.sensitivity
    plain = noisy_gd_mu(noise, c, steps, moved)
    if certificate.diameter is None:
        return plain, math.inf
    return plain, projected_gd_mu(noise, c, steps, _in_contributions(certificate), moved)


def _scheduled_steps(mechanism: FullBatchGaussian, certificate: ConvexityCertificate) -> tuple[float, float]:
    """The same where noise or step size differ from step to step, in the unit of the weights."""
    unit, etas, factors = _unit(certificate), certificate.step_sizes, certificate.contractions
    contractions = factors if len(factors) > 1 else factors * mechanism.steps
    shifts = [eta * unit * mechanism.sensitivity for eta in etas]
    noises = [eta * unit * z for eta, z in zip(etas, mechanism.noise_schedule, strict=True)]
    plain = shifted_mu(shifts, noises, contractions)
    if certificate.diameter is None:
        return plain, math.inf
    return plain, projected_mu(shifts, noises, contractions, certificate.diameter)


def _unit(certificate: ConvexityCertificate) -> float:
    """C/b, what one record may contribute to the mean gradient."""
    return certificate.l2_clip_norm / certificate.normaliser


def _in_contributions(certificate: ConvexityCertificate) -> float:
    """The diameter over the largest contribution of one record to one step, D b / (eta C)."""
    if certificate.diameter is None:
        return math.inf
    return certificate.diameter / (certificate.step_sizes[0] * _unit(certificate))


def _cyclic(mechanism: CyclicGaussian, certificate: ConvexityCertificate) -> list[tuple[str, Profile]]:
    mus = [
        cyclic_mu(
            mechanism.noise_multiplier,
            certificate.contractions[0],
            mechanism.batches_per_epoch,
            mechanism.epochs,
            after,
            mechanism.sensitivity,
        )
        for after in range(mechanism.batches_per_epoch)
    ]
    bounds: list[tuple[str, Profile]] = [("last-iterate cyclic", GaussianProfile(max(mus)))]
    if mechanism.partition == "secret-random":
        # joint convexity of the hockey-stick divergence over the record's position
        bounds.append(
            ("last-iterate secret partition", MeanProfile(tuple(GaussianProfile(mu) for mu in mus)))
        )
    return bounds


def _poisson(
    mechanism: PoissonGaussian, certificate: ConvexityCertificate, delta: float
) -> list[tuple[str, Profile]]:
    """Bounds that hold while no batch exceeds B; the chance that one does is added to delta.

    T Pr[Binomial(n, p) > B] bounds that chance in both worlds, as the other records are sampled alike.
    """
    c = certificate.contractions[0]
    z, p, steps = mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.steps
    overflow = batch_overflow(certificate.records, p, certificate.max_batch_size, steps)
    if overflow >= delta:
        raise CertificateError(
            f"batches above max_batch_size {certificate.max_batch_size} have probability "
            f"{overflow:.2g}, not below "
            f"delta {delta:g}; raise max_batch_size"
        )
    # full participation dominates hidden participation (shifts only grow)
    full: Profile = GaussianProfile(noisy_gd_mu(z, c, steps))
    bounds = [("last-iterate full participation", full)]
    if certificate.diameter is not None:
        mu = projected_gd_mu(z, c, steps, _in_contributions(certificate))
        bounds.append(("last-iterate projected full participation", GaussianProfile(mu)))
    if c < 1:
        diameter = _in_contributions(certificate) / z
        hidden = hidden_participation_profile(Problem(z, p, steps, c, diameter), delta - overflow)
        bounds.append(("last-iterate hidden participation", hidden))
    return [
        (name, ResidualProfile(profile, overflow) if overflow > 0 else profile) for name, profile in bounds
    ]


def batch_overflow(records: int, sampling_rate: float, max_batch_size: int, steps: int) -> float:
    """Bounds the chance T Pr[Binomial(n, p) > B] that any Poisson batch exceeds B, rounded up.

    The probability of B + 1 times a sum of ratios, which fall: beyond eight standard deviations they are
    bounded by a geometric series. 1 where B + 1 is not above the mean.

    >>> batch_overflow(1000, 0.01, 1000, 10)
    0.0
    >>> batch_overflow(1000, 0.5, 400, 1)
    1.0
    """
    if max_batch_size >= records:
        return 0.0
    first, mean = max_batch_size + 1, records * sampling_rate
    if sampling_rate == 1 or first <= mean + 1:
        return 1.0
    k = np.arange(first, min(records, first + 64 + math.ceil(8 * math.sqrt(mean))), dtype=np.float64)
    ratios = (records - k) / (k + 1) * (sampling_rate / (1 - sampling_rate))
    products = np.cumprod(ratios)
    rest = float(products[-1] * ratios[-1] / (1 - ratios[-1])) if len(k) else 0.0
    tail = _binomial_mass(records, first, mean) * (1 + math.fsum(products) + rest)
    return min(1.0, steps * tail * (1 + 1e-9) + 1e-300)


def _binomial_mass(n: int, k: int, mean: float) -> float:
    """Upper bound of Pr[Binomial(n, mean/n) = k] for k > mean.

    Stirling's series envelops log Gamma (Whittaker, Watson 1927, section 12.33): the error of n! is at most
    1/(12 n), those of k! and (n-k)! at least 1/(12 k) - 1/(360 k^3). Below 20 terms are exact.
    """
    if n - k < _EXACT or k < _EXACT:
        return math.exp(
            math.log(math.comb(n, k)) + k * math.log1p((mean - n) / n) + (n - k) * math.log1p(-mean / n)
        )
    divergence = k * math.log1p((k - mean) / mean) + (n - k) * math.log1p((mean - k) / (n - mean))
    error = 1 / (12 * n) - sum(1 / (12 * x) - 1 / (360 * x**3) for x in (k, n - k))
    return math.sqrt(n / (2 * math.pi * k * (n - k))) * math.exp(error - divergence)

"""Last-iterate bounds for convex losses: noisy gradient descent, cyclic batches, Poisson sampling.

Shifted interpolation (Bok, Su, Altschuler 2024, "Shifted interpolation for differential privacy", section
3): let X_k = Pi[phi_k(X_{k-1}) + N(0, v_k^2 I)], X' likewise with phi'_k, same start, phi_k c_k-Lipschitz
and sup |phi_k - phi'_k| <= s_k. For every b >= 0 with b_0 = b_T = 0 the pair (X_T, X'_T) is mu-GDP with

    mu^2 = sum_k max(0, c_k b_{k-1} + s_k - b_k)^2 / v_k^2.

The best b. With R_k = prod_{i>k} c_i, S_k = sum_{j<=k} s_j R_j and time t_k = sum_{j<=k} (v_j R_j)^2, the
shift absorbed up to step k (weighted by R) is a function U with U_0 = 0, U_k <= S_k (that is b_k >= 0), U_T
= S_T, and mu^2 is the energy sum (dU)^2/dt. Its minimiser is the greatest convex minorant of the points (0,
0), (t_k, S_k), found exactly in linear time. Every U below S is valid, so a rounding error costs tightness,
not soundness.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting.accountants.hidden_participation import Problem, hidden_participation_profile
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import CertificateError, MechanismError
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian, Mechanism, PoissonGaussian
from dptaft_accounting.profiles import MeanProfile, ResidualProfile
from dptaft_accounting.tradeoff import GaussianProfile, Profile

Array = NDArray[np.float64]

_UP = 1 + 1e-11


def noisy_gd_mu(noise_multiplier: float, contraction: float, steps: int, sensitivity: float = 1.0) -> float:
    """Returns mu of the last iterate of full-batch noisy gradient descent with constant step and noise.

    mu = (s/z) sqrt((1 - c^T)/(1 + c^T) (1 + c)/(1 - c)) (Bok, Su, Altschuler 2024, section 4); attained by
    quadratics. c = 1 gives composition, sqrt(T) s/z.

    >>> round(noisy_gd_mu(10.0, 0.98, 100), 6)
    0.870724
    """
    if contraction == 1:
        return _UP * sensitivity * math.sqrt(steps) / noise_multiplier
    if contraction == 0:
        return _UP * sensitivity / noise_multiplier
    log_c = math.log(contraction)
    ratio = math.tanh(-steps * log_c / 2) / math.tanh(-log_c / 2)
    return _UP * sensitivity * math.sqrt(ratio) / noise_multiplier


def shifted_mu(
    shifts: Sequence[float], noises: Sequence[float], contractions: Sequence[float], start: float = 0.0
) -> float:
    """Returns the smallest mu of the lemma above for any schedule.

    Args:
        shifts: s_k, how far one step of the two processes may differ.
        noises: v_k, noise standard deviations, in the unit of the shifts.
        contractions: c_k, Lipschitz constants in [0, 1].
        start: bound on |X_0 - X'_0| (0 for a common start).

    >>> round(shifted_mu([1.0] * 100, [10.0] * 100, [0.98] * 100), 6)
    0.870724
    """
    s, v, c = (np.asarray(x, dtype=np.float64) for x in (shifts, noises, contractions))
    tail = _tail_products(c)
    first = float(tail[0] * c[0]) * start
    supply = first + np.cumsum(s * tail)
    time = np.cumsum((v * tail) ** 2)
    # U may be anything up to S_k at t_k; at the end it must be S_T
    return _UP * math.sqrt(_minorant_energy(np.append(0.0, time), np.append(0.0, supply)))


def _tail_products(contractions: Array) -> Array:
    """R_k = prod_{i>k} c_i."""
    return np.append(np.cumprod(contractions[::-1])[::-1][1:], 1.0)


def _minorant_energy(time: Array, supply: Array) -> float:
    """Energy of the greatest convex minorant that starts at (0, 0) and ends at the last point."""
    if time[-1] <= 0:
        return math.inf if supply[-1] > 0 else 0.0
    chord = supply[-1] / time[-1]
    if bool(np.all(chord * time[1:-1] <= supply[1:-1])):
        return float(chord * supply[-1])
    hull: list[tuple[float, float]] = [(0.0, 0.0)]
    for t, u in zip(time[1:].tolist(), supply[1:].tolist(), strict=True):
        if t <= hull[0][0]:
            continue  # no noise so far: nothing can be absorbed, and nothing binds
        while len(hull) > 1 and _not_convex(hull[-2], hull[-1], (t, u)):
            hull.pop()
        hull.append((t, u))
    pairs = itertools.pairwise(hull)
    return math.fsum((b[1] - a[1]) ** 2 / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])


def _not_convex(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) >= (c[1] - b[1]) * (b[0] - a[0])


def projected_mu(
    shifts: Sequence[float], noises: Sequence[float], contractions: Sequence[float], diameter: float
) -> float:
    """Returns the smallest mu over all moments tau from which |X_tau - X'_tau| <= D is used as the start.

    For constant s, v and c = 1 and R = T - tau this is mu^2 = (R s^2 + 2 s D + D^2/R)/v^2 (Altschuler,
    Talwar 2022; Bok, Su, Altschuler 2024, section 4).
    """
    total = len(shifts)
    best = shifted_mu(shifts, noises, contractions)
    remaining = {round(r) for r in np.geomspace(1, total, 200)} if total > 200 else set(range(1, total + 1))
    for r in sorted(remaining):
        tau = total - r
        best = min(best, shifted_mu(shifts[tau:], noises[tau:], contractions[tau:], diameter))
    return best


def cyclic_mu(
    noise_multiplier: float,
    contraction: float,
    batches: int,
    epochs: int,
    steps_after: int,
    sensitivity: float = 1.0,
) -> float:
    """Returns mu for a record whose batch has `steps_after` further batches behind it in every epoch.

    The best shift allocation of the module's lemma; for `steps_after = 0` it equals the closed form of Bok,
    Su, Altschuler 2024, section 4.

    >>> round(cyclic_mu(5.0, 0.98, 10, 50, 0), 6)
    0.270004
    """
    shift = sensitivity / noise_multiplier
    total = batches * epochs
    # arrivals, counted in steps from the end; only the points just before an arrival and the end can bind
    from_end = steps_after + batches * np.arange(epochs - 1, -1, -1)
    weights = contraction ** from_end.astype(np.float64)
    supply = shift * np.cumsum(weights)
    arrival = total - from_end  # step number of each arrival, from 1
    ends = np.append(arrival[1:] - 1, total)
    time = _noise_time(contraction, total, ends)
    usable_from = _noise_time(contraction, total, arrival[:1] - 1)[0]
    return _UP * math.sqrt(_minorant_energy(np.append(0.0, time - usable_from), np.append(0.0, supply)))


def _noise_time(contraction: float, total: int, steps: NDArray[np.int64]) -> Array:
    """t_k = sum_{j<=k} c^(2(T-j)) for the given k."""
    squared = contraction**2
    back = (total - steps).astype(np.float64)
    if squared == 1:
        return np.asarray(steps, dtype=np.float64)
    return np.asarray((squared**back - squared**total) / (1 - squared), dtype=np.float64)


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
    factors = certificate.contractions
    constant = isinstance(mechanism.noise_multiplier, float) and len(factors) == 1
    bounds: list[tuple[str, Profile]] = []
    shifts, noises, contractions = _schedules(mechanism, certificate)
    if constant:
        mu = noisy_gd_mu(mechanism.noise_schedule[0], factors[0], mechanism.steps, mechanism.sensitivity)
    else:
        mu = shifted_mu(shifts, noises, contractions)
    bounds.append(("last-iterate noisy gradient descent", GaussianProfile(mu)))
    if certificate.diameter is not None:
        mu = projected_mu(shifts, noises, contractions, certificate.diameter)
        bounds.append(("last-iterate projected noisy gradient descent", GaussianProfile(mu)))
    return bounds


def _schedules(
    mechanism: FullBatchGaussian, certificate: ConvexityCertificate
) -> tuple[list[float], list[float], list[float]]:
    """Shifts, noise standard deviations and contractions in the unit of the weights."""
    unit = certificate.l2_clip_norm / certificate.normaliser
    etas = certificate.step_sizes
    factors = certificate.contractions
    contractions = list(factors) if len(factors) > 1 else list(factors) * mechanism.steps
    shifts = [eta * unit * mechanism.sensitivity for eta in etas]
    noises = [eta * unit * z for eta, z in zip(etas, mechanism.noise_schedule, strict=True)]
    return shifts, noises, contractions


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
        shifts, ones = [1 / z] * steps, [1.0] * steps
        diameter = _noise_units(certificate, z)
        mu = projected_mu(shifts, ones, [c] * steps, diameter)
        bounds.append(("last-iterate projected full participation", GaussianProfile(mu)))
    if c < 1:
        diameter = math.inf if certificate.diameter is None else _noise_units(certificate, z)
        hidden = hidden_participation_profile(Problem(z, p, steps, c, diameter), delta - overflow)
        bounds.append(("last-iterate hidden participation", hidden))
    return [
        (name, ResidualProfile(profile, overflow) if overflow > 0 else profile) for name, profile in bounds
    ]


def batch_overflow(records: int, sampling_rate: float, max_batch_size: int, steps: int) -> float:
    """Bounds the chance T Pr[Binomial(n, p) > B] that any Poisson batch exceeds B, rounded up.

    >>> batch_overflow(1000, 0.01, 1000, 10)
    0.0
    """
    if max_batch_size >= records:
        return 0.0
    from scipy.special import bdtrc

    return min(1.0, steps * float(bdtrc(max_batch_size, records, sampling_rate)) * (1 + 1e-9) + 1e-300)


def _noise_units(certificate: ConvexityCertificate, noise_multiplier: float) -> float:
    """The diameter over the noise standard deviation of one step, D b / (eta C z)."""
    noise = certificate.step_sizes[0] * certificate.l2_clip_norm * noise_multiplier / certificate.normaliser
    return (certificate.diameter or math.inf) / noise

"""Epsilon of a mechanism record on a second path, to be held against the first.

This module reads the plain dictionary of a record and shares no code with `mechanisms.py`, `bounds.py` or
`accountants/`: no lattice, no FFT, no rounding rules. What it does share with them are the theorems, numpy
and scipy; it says what the numbers should be, not that the record is true. Results are exact up to numerical
errors of about 1e-8, neither rounded up nor down.

Gaussian mechanisms: the formula of Balle, Wang 2018, Theorem 8, solved by Brent's method. Poisson sampling:
with M(s) = E_P exp(s L) for the loss L of one step, the loss of T steps has

    delta(eps) = 1/(2 pi i) int_{a - i inf}^{a + i inf} M(s)^T exp(-s eps) / (s (s + 1)) ds,   a > 0,

because 1/(s (s + 1)) is the Laplace transform of (1 - exp(-u))_+. The path runs through the saddle point of
the integrand (Alghamdi, Gomez, Asoodeh, Calmon, Kosut, Sankar 2023, "The saddle-point method in differential
privacy"), where the trapezoidal rule converges exponentially.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

Complex = NDArray[np.complex128]

_X = np.arange(-10.5, 10.5, 0.06)
_MOST_NODES = 6_000
_NEGLIGIBLE = 1e-13
_SMALLEST_WIDTH = 0.25  # of the noise: for less the grid over x would be too coarse
_LARGEST_EPSILON = 600.0


@dataclass(frozen=True)
class SecondOpinion:
    """What the second path says about epsilon by plain composition.

    Attributes:
        epsilon: its value, None where it has none.
        method: what was computed, or why nothing was.
    """

    epsilon: float | None
    method: str


class _UnavailableError(Exception):
    pass


def second_opinion(record: Mapping[str, Any], delta: float, *, records_per_unit: int = 1) -> SecondOpinion:
    """Returns epsilon at `delta` by plain composition of a mechanism record, computed independently.

    Args:
        record: the `record` of a statement's mechanism group.
        delta: of the claim.
        records_per_unit: largest number of records that one protected unit owns.

    >>> second_opinion({"kind": "full-batch-gaussian", "noise_multiplier": 10.0, "steps": 100}, 1e-5).method
    'Gaussian formula, solved by Brent'
    >>> second_opinion({"kind": "repeat-and-select"}, 1e-5).epsilon is None
    True
    """
    try:
        mu2, sampled = 0.0, []
        for part in _leaves(record):
            step = _gaussian_mu2(part)
            if step is None:
                sampled.append((float(part["noise_multiplier"]), float(part["sampling_rate"]), part["steps"]))
            else:
                mu2 += step
        if not sampled:
            epsilon = _solve(lambda eps: _log_gaussian_delta(math.sqrt(mu2) * records_per_unit, eps), delta)
            return SecondOpinion(epsilon, "Gaussian formula, solved by Brent")
        if records_per_unit > 1:
            raise _UnavailableError("groups of records under Poisson sampling are not covered")
        both = [_solve(_Integral(mu2, tuple(sampled), sign).log_delta, delta) for sign in (1, -1)]
    except _UnavailableError as reason:
        return SecondOpinion(None, f"none: {reason}")
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, FloatingPointError):
        return SecondOpinion(None, "none: the record cannot be read")
    return SecondOpinion(max(both), "contour integral through the saddle point, both directions")


def linear_instance(
    record: Mapping[str, Any], certificate: Mapping[str, Any], delta: float, *, records_per_unit: int = 1
) -> SecondOpinion:
    """Returns the exact epsilon of one training that a certificate admits; no valid bound can be below it.

    One weight, no loss but that of the differing record, whose gradient is constant: X_k = (1 - eta_k lambda)
    X_{k-1} + eta_k (s + z_k N(0, 1)) is Gaussian, with mean and variance that are plain sums. Full-batch
    noisy gradient descent attains its bound there (Bok, Su, Altschuler 2024, section 4).

    Args:
        record: the `record` of a statement's mechanism group.
        certificate: the `certificate` of its accounting group.
        delta: of the claim.
        records_per_unit: largest number of records that one protected unit owns.

    >>> record = {"kind": "full-batch-gaussian", "noise_multiplier": 10.0, "steps": 100}
    >>> proof = {"step_size": 0.2, "strong_convexity": 0.1, "diameter": None}
    >>> round(linear_instance(record, proof, 1e-5).epsilon, 4)
    3.7317
    """
    if record.get("kind") != "full-batch-gaussian" or certificate.get("diameter") is not None:
        return SecondOpinion(None, "none: only full batches without projection have an exact instance")
    try:
        steps, moved = int(record["steps"]), 2.0 if record.get("adjacency") == "replace-one" else 1.0
        eta = np.broadcast_to(np.asarray(certificate["step_size"], dtype=np.float64), (steps,))
        noise = np.broadcast_to(np.asarray(record["noise_multiplier"], dtype=np.float64), (steps,))
        mean = variance = 0.0
        for size, std in zip(eta.tolist(), noise.tolist(), strict=True):
            keep = 1 - size * float(certificate["strong_convexity"])
            mean, variance = keep * mean + size * moved, keep * keep * variance + (size * std) ** 2
        mu = records_per_unit * mean / math.sqrt(variance)
        epsilon = _solve(lambda eps: _log_gaussian_delta(mu, eps), delta)
    except _UnavailableError as reason:
        return SecondOpinion(None, f"none: {reason}")
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        return SecondOpinion(None, "none: the record cannot be read")
    return SecondOpinion(epsilon, "exact linear instance")


def _leaves(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if record["kind"] == "sequence":
        for part in record["parts"]:
            yield from _leaves(part)
    else:
        yield record


def _gaussian_mu2(part: Mapping[str, Any]) -> float | None:
    """Squared Gaussian parameter of a leaf; None for Poisson sampling."""
    kind, moved = part["kind"], 2.0 if part.get("adjacency") == "replace-one" else 1.0
    if kind == "full-batch-gaussian":
        noise = part["noise_multiplier"]
        if isinstance(noise, list):
            return float(sum((moved / z) ** 2 for z in noise))
        return float(part["steps"] * (moved / noise) ** 2)
    if kind == "cyclic-gaussian":
        return float(part["epochs"] * (moved / part["noise_multiplier"]) ** 2)
    if kind == "output-perturbation":
        shift = moved * part["gradient_bound"] / part["records"] + 2 * part.get("gradient_tolerance", 0.0)
        return float((shift / (part["regularization"] * part["noise_std"])) ** 2)
    if kind == "poisson-gaussian":
        if part["noise_multiplier"] < _SMALLEST_WIDTH:
            raise _UnavailableError(f"noise below {_SMALLEST_WIDTH} needs a finer grid")
        return float(part["steps"] / part["noise_multiplier"] ** 2) if part["sampling_rate"] == 1 else None
    raise _UnavailableError(f"{kind} is not covered")


def _log_gaussian_delta(mu: float, epsilon: float) -> float:
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = float(log_ndtr(-mu / 2 - epsilon / mu)) + epsilon
    return first + math.log(-math.expm1(min(second - first, -1e-300)))


def _solve(log_delta: Callable[[float], float], delta: float) -> float:
    """Epsilon at which the falling curve meets delta; 0 where it starts below."""
    goal = math.log(delta)
    if log_delta(1e-9) <= goal:
        return 0.0
    high = 1.0
    while log_delta(high) > goal:
        high *= 2
        if high > _LARGEST_EPSILON:
            raise _UnavailableError(f"epsilon is beyond {_LARGEST_EPSILON:g}")
    low = high / 2 if high > 1 else 1e-9
    return float(brentq(lambda eps: log_delta(eps) - goal, low, high, xtol=1e-10, rtol=1e-10))


@dataclass(frozen=True)
class _Integral:
    """One direction of a composition of Gaussian steps (mu2 in all) and Poisson-sampled ones."""

    mu2: float
    sampled: tuple[tuple[float, float, int], ...]
    direction: int

    def log_moment(self, s: NDArray[Any]) -> Complex:
        """Sum over all steps of log E_P exp(s L), for complex s of shape (m,)."""
        total = self.mu2 * s * (s + 1) / 2
        power = (1 + s) if self.direction > 0 else -s
        for noise, rate, steps in self.sampled:
            # where exp(power * loss) is not small the mass moves right by up to Re(power)/noise
            x = np.append(
                _X, np.arange(_X[-1] + 0.06, 10.5 + max(0.0, float(np.max(power.real))) / noise, 0.06)
            )
            loss = np.logaddexp(math.log1p(-rate), math.log(rate) + x / noise - 0.5 / noise**2)
            weights = -0.5 * x * x + math.log(0.06 / math.sqrt(2 * math.pi))
            exponents = np.multiply.outer(power, loss) + weights
            top = exponents.real.max(axis=1, keepdims=True)
            total = total + steps * (top[:, 0] + np.log(np.exp(exponents - top).sum(axis=1)))
        return np.asarray(total, dtype=np.complex128)

    def log_delta(self, epsilon: float) -> float:
        """Log of the hockey-stick divergence at this epsilon."""

        def height(log_a: float) -> float:
            a = math.exp(log_a)
            moment = float(self.log_moment(np.array([a], dtype=complex))[0].real)
            return moment - a * epsilon - math.log(a) - math.log1p(a)

        found = minimize_scalar(height, bounds=(-7.0, 7.0), method="bounded", options={"xatol": 1e-2})
        a, top = math.exp(found.x), float(found.fun)
        spacing = self._spacing(a, found.x, height)
        total, start = 0.5, 1
        while start < _MOST_NODES:
            nodes = a + 1j * spacing * np.arange(start, start + 64)
            values = np.exp(
                self.log_moment(nodes) - nodes * epsilon - np.log(nodes) - np.log(1 + nodes) - top
            )
            total += float(values.real.sum())
            if float(np.abs(values[-8:]).max()) < _NEGLIGIBLE * abs(total):
                return top + math.log(spacing / math.pi * total)
            start += 64
        raise _UnavailableError("the integral converges too slowly for so few steps")

    def _spacing(self, a: float, log_a: float, height: Callable[[float], float]) -> float:
        """Step of the trapezoidal rule: fine against the poles at 0 and against the width of the saddle."""
        h = 1e-2
        bend = (height(log_a + h) - 2 * height(log_a) + height(log_a - h)) / h**2 / a**2
        return min(a / 5, 0.3 / math.sqrt(max(bend, 1e-12)))

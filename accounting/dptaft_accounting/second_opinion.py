"""Epsilon of a mechanism record on a second path, to be held against the first.

This module reads the plain dictionary of a record and shares no code with `mechanisms.py`, `bounds.py` or
`accountants/`: no lattice, no FFT, no rounding rules. What it does share with them are the theorems, numpy
and scipy; it says what the numbers should be, not that the record is true. Results are exact up to numerical
errors of about 1e-8 (1e-4 from the lattice), neither rounded up nor down.

Gaussian mechanisms: the formula of Balle, Wang 2018, Theorem 8, solved by Brent's method. Poisson sampling:
with M(s) = E_P exp(s L) for the loss L of one step, the loss of T steps has

    delta(eps) = 1/(2 pi i) int_{a - i inf}^{a + i inf} M(s)^T exp(-s eps) / (s (s + 1)) ds,   a > 0,

because 1/(s (s + 1)) is the Laplace transform of (1 - exp(-u))_+. The path runs through the saddle point of
the integrand (Alghamdi, Gomez, Asoodeh, Calmon, Kosut, Sankar 2023, "The saddle-point method in differential
privacy"), where the trapezoidal rule converges exponentially. Where it converges too slowly (few steps, rare
large losses) the tilted losses are rounded to a lattice so that mass and mean stay, and summed by one FFT;
the rounding adds less than h^2 T/8 to their variance, for a lattice distance h.

`linear_instance` says what no valid last-iterate bound can be below: the privacy of one training that the
certificate admits, exact or from below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_ndtr

Complex = NDArray[np.complex128]

_X = np.arange(-10.5, 10.5, 0.06)
_MOST_NODES = 2_000
_FARTHEST = 600.0
_NEGLIGIBLE = 1e-13
_LATTICE = 1 << 19
_ORDERS = (-7.0, 17.0)  # logarithms of tilts
_SPAN = 30.0  # what lies beyond has less than exp(-30) of the tilted mass
_LARGEST_GROUP = 20
_LONGEST = 1_000_000
_NOTHING = -1e4  # logarithm of a delta of 0
_CELLS = 500
_MOST_WORK = 2_000_000_000
_MOST_TERMS = 20_000
_GRID = 4_096
_UNREADABLE = (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError, FloatingPointError)
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


_UNREAD = SecondOpinion(None, "none: the record cannot be read")


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
        return _second(record, delta, records_per_unit)
    except _UnavailableError as reason:
        return SecondOpinion(None, f"none: {reason}")
    except _UNREADABLE:
        return _UNREAD


def _second(record: Mapping[str, Any], delta: float, size: int) -> SecondOpinion:
    if record["kind"] == "objective-perturbation":
        return SecondOpinion(_solve(_objective(record, size), delta), "theorem of objective perturbation")
    mu2, sampled = 0.0, []
    for part in _leaves(record):
        step = _gaussian_mu2(part)
        if step is None:
            sampled.append(_Sampled.of(part, size))
        else:
            mu2 += step * size * size
    if not sampled:
        epsilon = _solve(lambda eps: _log_gaussian_delta(math.sqrt(mu2), eps), delta)
        return SecondOpinion(epsilon, "Gaussian formula, solved by Brent")
    if mu2 == 0 and [part.steps for part in sampled] == [1]:
        ends = [_solve(partial(sampled[0].log_delta, sign), delta) for sign in (1, -1)]
        return SecondOpinion(max(ends), "threshold of one step, both directions")
    both, lattice = [], False
    for sign in (1, -1):
        integral = _Integral(mu2, tuple(sampled), sign)
        try:
            both.append(_solve(integral.log_delta, delta))
        except (_UnavailableError, *_UNREADABLE):
            both.append(integral.lattice_epsilon(delta))
            lattice = True
    words = "tilted lattice" if lattice else "contour integral through the saddle point"
    return SecondOpinion(max(both), f"{words}, both directions")


def linear_instance(
    record: Mapping[str, Any], certificate: Mapping[str, Any], delta: float, *, records_per_unit: int = 1
) -> SecondOpinion:
    """Returns epsilon of one training that a certificate admits; no valid bound can be below it.

    One weight, no loss but that of the differing record, whose gradient is constant, of one clip norm: X_k =
    Pi[(1 - eta_k lambda) X_{k-1} + eta_k (V_k s + z_k N(0, 1))], V_k the record's participation. Without
    projection and sampling X_T is Gaussian, and noisy gradient descent attains its bound there (Bok, Su,
    Altschuler 2024, section 4). Otherwise sets of outcomes are bounded from below in one world (P) and from
    above in the other (Q), which shows delta(eps) >= P - e^eps Q. With projection on [-D/2, D/2] states are
    rounded to a grid, down or up; the steps increase in the state, so that tails err in that direction.

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
    try:
        return _linear(record, certificate, delta, records_per_unit)
    except _UnavailableError as reason:
        return SecondOpinion(None, f"none: {reason}")
    except _UNREADABLE:
        return _UNREAD


def _linear(
    record: Mapping[str, Any], certificate: Mapping[str, Any], delta: float, size: int
) -> SecondOpinion:
    if record["kind"] not in ("full-batch-gaussian", "poisson-gaussian", "cyclic-gaussian"):
        raise _UnavailableError(f"{record['kind']} has no linear instance")
    rate, every = float(record.get("sampling_rate", 1.0)), int(record.get("batches_per_epoch", 1))
    steps = every * int(record["epochs"]) if "epochs" in record else int(record["steps"])
    if steps > _LONGEST:
        raise _UnavailableError(f"more than {_LONGEST} steps are too many to follow")
    moved = (2.0 if record.get("adjacency") == "replace-one" else 1.0) * (1 if rate < 1 else size)
    eta = np.broadcast_to(np.asarray(certificate["step_size"], dtype=np.float64), (steps,))
    noise = np.broadcast_to(np.asarray(record["noise_multiplier"], dtype=np.float64), (steps,))
    keep = 1 - eta * float(certificate["strong_convexity"])
    # the record is in the last batch of every epoch; of a secret partition in a position drawn uniformly
    here = (np.arange(steps) + 1) % every == 0
    secret = record.get("partition") == "secret-random"
    if certificate.get("diameter") is not None:
        if secret or bool(np.any(keep < 0)):
            raise _UnavailableError(
                "a projected instance needs a known order and steps that do not overshoot"
            )
        unit = float(certificate["l2_clip_norm"]) / float(certificate["normaliser"])
        chain = _Chain(keep, eta * moved * unit * here, eta * noise * unit, rate)
        epsilon = chain.epsilon(float(certificate["diameter"]), delta)
        return SecondOpinion(epsilon, "projected linear instance, from below")
    later = np.append(np.cumprod(keep[::-1])[::-1][1:], 1.0)
    std = math.sqrt(float(np.sum((eta * noise * later) ** 2)))
    if secret:
        means = np.abs([float(np.sum((eta * moved * later)[j::every])) / std for j in range(every)])
        return SecondOpinion(
            _thresholds(means, np.full(every, 1 / every), delta), "linear instance, from below"
        )
    if rate < 1:
        sums = _participation(np.abs(eta * moved * later) / std, rate)
        return SecondOpinion(_thresholds(*sums, delta), "linear instance, from below")
    mu = abs(float(np.sum((eta * moved * later)[here]))) / std
    return SecondOpinion(_solve(lambda eps: _log_gaussian_delta(mu, eps), delta), "exact linear instance")


def _participation(shifts: NDArray[Any], rate: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Law of sum_k V_k shift_k with every term rounded down to a grid, the smallest terms left out."""
    kept = np.sort(shifts)[::-1][:_MOST_TERMS]
    kept = kept[kept > 1e-9 * kept[0]]
    mean, spread = rate * kept.sum(), math.sqrt(rate * float((kept**2).sum()))
    grid = min(float(kept.sum()), mean + 12 * spread + 20 * float(kept[0])) / _GRID
    law = np.zeros(_GRID + 1)
    law[0] = 1.0
    for jump in np.floor(kept / grid).astype(np.int64).tolist():
        if jump > 0:
            # beyond the grid the mass is dropped, which lowers all probabilities of being above
            law[jump:] = (1 - rate) * law[jump:] + rate * law[:-jump]
            law[:jump] *= 1 - rate
    return grid * np.arange(_GRID + 1), law


def _thresholds(means: NDArray[Any], weights: NDArray[Any], delta: float) -> float:
    """Largest epsilon that {X >= t} or {X <= t} shows for sum_i weight_i N(mean_i, 1) against N(0, 1)."""
    held = weights > 1e-18
    means, weights = means[held], weights[held]
    best = 0.0
    for t in np.linspace(-12.0, float(means.max()) + 12.0, 600).tolist():
        above = float(weights @ np.exp(log_ndtr(means - t)))
        # what was dropped of the weights counts as being below
        below = float(weights @ np.exp(log_ndtr(t - means))) + max(0.0, 1 - float(weights.sum()))
        for high, low in ((above, float(np.exp(log_ndtr(-t)))), (float(np.exp(log_ndtr(t))), below)):
            if high > delta * (1 + 1e-9) and low > 0:
                best = max(best, math.log((high - delta) / low))
    return best


@dataclass(frozen=True)
class _Chain:
    """Steps of the projected instance: what is kept, the record's shift, the noise, its participation."""

    keep: NDArray[Any]
    shift: NDArray[Any]
    noise: NDArray[Any]
    rate: float

    def epsilon(self, diameter: float, delta: float) -> float:
        """Largest epsilon that a set {t <= X_T < s} shows, the record added or removed."""
        kinds = len(set(zip(self.keep, self.shift, self.noise, strict=True)))
        work = _MOST_WORK // (1 if kinds == 1 else len(self.keep) if kinds < 5 else 50 * len(self.keep))
        cells = max(20, min(_CELLS, math.isqrt(work)))
        points = np.linspace(-diameter / 2, diameter / 2, 2 * (cells // 2) + 1)
        worlds = []  # least and largest probabilities of {X_T >= t}
        for record in (True, False):
            low, high = (self._above(points, record, up) for up in (False, True))
            least = np.maximum(low[:, None] - np.append(high[1:], 0.0) * (1 + 1e-12), 0.0)
            most = np.maximum(high[:, None] * (1 + 1e-12) - np.append(low[1:], 0.0), 0.0)
            worlds.append((least, most))
        best = 0.0
        for (least, _), (_, most) in (worlds, worlds[::-1]):
            shown = (least > delta * (1 + 1e-9)) & (most > 1e-13)
            best = max(best, float(np.log((least[shown] - delta) / most[shown]).max(initial=0.0)))
        return best

    def _above(self, points: NDArray[Any], record: bool, up: bool) -> NDArray[Any]:
        """P[X_T >= t] for the points t, the states before the last step rounded up or down to the points."""
        known: dict[tuple[Any, ...], NDArray[Any]] = {}
        law = np.zeros(len(points))
        law[len(points) // 2] = 1.0
        last, kinds = len(self.keep) - 1, list(zip(self.keep, self.shift, self.noise, strict=True))
        if len(set(kinds)) == 1:
            step = self._step(0, points, record, up)
            for bit in reversed(f"{last:b}"):
                law, step = (law @ step if bit == "1" else law), np.asarray(step @ step)
        else:
            for k in range(last):
                if kinds[k] not in known:
                    known = known if len(known) < 5 else {}
                    known[kinds[k]] = self._step(k, points, record, up)
                law = law @ known[kinds[k]]
        found = np.asarray(law @ self._tails(last, points, record), dtype=np.float64)
        found[0] = 1.0  # what is below the lower end is projected on it
        return found

    def _tails(self, k: int, points: NDArray[Any], record: bool) -> NDArray[Any]:
        """Chance of being at or above every point (columns) after step k from every point (rows)."""
        tails = np.zeros((len(points), len(points)))
        for chance, shift in ((1 - self.rate, 0.0), (self.rate, self.shift[k] if record else 0.0)):
            reached = (self.keep[k] * points[:, None] + shift - points) / self.noise[k]
            tails += chance * np.exp(log_ndtr(reached))
        return tails

    def _step(self, k: int, points: NDArray[Any], record: bool, up: bool) -> NDArray[Any]:
        """Transition matrix with the mass of a cell moved to its upper or lower end."""
        tails, ones = self._tails(k, points, record), np.ones((len(points), 1))
        tails = np.hstack([ones, tails[:, :-1] if up else tails[:, 1:]])
        return np.asarray(np.maximum(tails - np.hstack([tails[:, 1:], 0 * ones]), 0.0))


def _leaves(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    waiting = [record]
    while waiting:
        part = waiting.pop()
        if part["kind"] == "sequence":
            waiting += part["parts"]
        else:
            yield part


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


def _objective(part: Mapping[str, Any], size: int) -> Callable[[float], float]:
    """Log delta of one generalised linear problem (Redberg, Koskela, Wang 2023), above its threshold."""
    if size > 1 or part.get("problems", 1) > 1 or part.get("gradient_tolerance", 0.0) > 0:
        raise _UnavailableError("several or inexact problems are not covered")
    mu = part["gradient_bound"] / part["noise_std"]
    shift = -math.log1p(-part["hessian_bound"] / part["regularization"])

    def log_delta(epsilon: float) -> float:
        left, knee = epsilon - shift, mu * mu / 2
        if left >= knee:
            return min(0.0, math.log(2) + _log_gaussian_delta(mu, left))
        if left <= 0:
            return 0.0
        hit = math.exp(_log_gaussian_delta(mu, knee))
        return math.log(1 - math.exp(left - knee) * (1 - 2 * hit))

    return log_delta


@dataclass(frozen=True)
class _Sampled:
    """Poisson-sampled steps: the number of sampled records of the unit is binomial."""

    noise: float
    weights: tuple[float, ...]
    steps: int

    @classmethod
    def of(cls, part: Mapping[str, Any], size: int) -> _Sampled:
        if size > _LARGEST_GROUP:
            raise _UnavailableError(f"groups of more than {_LARGEST_GROUP} records are not covered")
        noise, rate = float(part["noise_multiplier"]), float(part["sampling_rate"])
        if not 0.01 <= noise <= 1e6 or rate < 1e-9 * noise:
            raise _UnavailableError("noise or rate is too extreme for plain summation")
        weights = [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]
        return cls(noise, tuple(weights), int(part["steps"]))

    def loss(self, x: NDArray[Any]) -> NDArray[Any]:
        """Loss of the mixture against N(0, 1) at x."""
        held = [(k / self.noise, w) for k, w in enumerate(self.weights) if w > 0]
        if float(np.max(np.abs(x))) * held[-1][0] < 0.5:  # small losses keep their relative accuracy
            return np.asarray(np.log1p(sum(w * np.expm1(m * x - 0.5 * m * m) for m, w in held)))
        return np.asarray(np.logaddexp.reduce([math.log(w) + m * x - 0.5 * m * m for m, w in held]))

    def log_delta(self, direction: int, epsilon: float) -> float:
        """Log of the hockey-stick divergence of one step, whose loss grows with x."""
        held = [(k / self.noise, w) for k, w in enumerate(self.weights) if w > 0]
        ends = (-60.0, 60.0 + held[-1][0])
        gap = [float(self.loss(np.array([x]))[0]) - direction * epsilon for x in ends]
        if gap[0] >= 0 or gap[1] <= 0:  # no outcome shows as much
            return _NOTHING if (gap[0] >= 0) == (direction < 0) else 0.0
        at = brentq(lambda x: float(self.loss(np.array([x]))[0]) - direction * epsilon, *ends, xtol=1e-13)
        mixed = float(np.logaddexp.reduce([math.log(w) + log_ndtr(direction * (m - at)) for m, w in held]))
        plain = float(log_ndtr(-direction * at))
        first, second = (mixed, plain) if direction > 0 else (plain, mixed)
        return first + math.log(-math.expm1(min(second + epsilon - first, -1e-300)))


@dataclass(frozen=True)
class _Sums:
    """Sums of independent losses, given as atoms: losses, logarithms of masses, how often."""

    atoms: list[tuple[NDArray[Any], NDArray[Any], int]]

    def moment(self, order: float) -> float:
        """Log E exp(order * loss) of the sum."""
        total = 0.0
        for losses, masses, count in self.atoms:
            exponents = masses + order * losses
            most = float(exponents.max())
            total += count * (most + math.log(float(np.exp(exponents - most).sum())))
        return total

    @staticmethod
    def least(value: Callable[[float], float]) -> tuple[float, float]:
        """Order with the smallest value(order)/order, and that ratio."""
        found = minimize_scalar(lambda u: value(math.exp(u)) * math.exp(-u), bounds=_ORDERS, method="bounded")
        return math.exp(found.x), float(found.fun)

    def log_delta(self, tilt: float, size: int) -> Callable[[float], float]:
        """Log of the hockey-stick divergence, from `size` lattice points of the tilted sum."""
        top = self.moment(tilt)
        low = -self.least(lambda a: self.moment(tilt - a) - top + _SPAN)[1]
        width = (self.least(lambda a: self.moment(tilt + a) - top + _SPAN)[1] - low) / (size - 2)
        spectrum = np.ones(size // 2 + 1, dtype=np.complex128)
        for losses, masses, count in self.atoms:
            weights = masses + tilt * losses
            scaled = np.exp(weights - weights.max())
            cell = np.floor(losses / width).astype(np.int64)
            share = losses / width - cell
            folded = np.bincount(cell % size, weights=scaled * (1 - share), minlength=size)
            folded += np.bincount((cell + 1) % size, weights=scaled * share, minlength=size)
            spectrum *= np.fft.rfft(folded / scaled.sum()) ** count
        first = math.floor(low / width)
        mass = np.roll(np.fft.irfft(spectrum, size), -(first % size))
        points = width * (first + np.arange(size))

        def log_delta(epsilon: float) -> float:
            above = points > epsilon
            gap = points[above] - epsilon
            total = float((mass[above] * -np.expm1(-gap) * np.exp(-tilt * gap)).sum())
            return top - tilt * epsilon + math.log(max(total, 1e-300))

        return log_delta


@dataclass(frozen=True)
class _Integral:
    """One direction of a composition of Gaussian steps (mu2 in all) and Poisson-sampled ones."""

    mu2: float
    sampled: tuple[_Sampled, ...]
    direction: int

    def log_moment(self, s: NDArray[Any]) -> Complex:
        """Sum over all steps of log E_P exp(s L), for complex s of shape (m,)."""
        total = self.mu2 * s * (s + 1) / 2
        power = (1 + s) if self.direction > 0 else -s
        for part in self.sampled:
            # where exp(power * loss) is not small the mass moves right by up to Re(power) times the shift
            shift = (len(part.weights) - 1) / part.noise
            far = 10.5 + max(0.0, float(np.max(power.real))) * shift
            x = np.append(_X, np.arange(_X[-1] + 0.06, far, 0.06))
            if shift > 4:  # the loss bends on the scale of the noise
                x = np.arange(_X[0], far, 0.24 / shift)
            weights = -0.5 * x * x + math.log((x[1] - x[0]) / math.sqrt(2 * math.pi))
            exponents = np.multiply.outer(power, part.loss(x)) + weights
            top = exponents.real.max(axis=1, keepdims=True)
            total = total + part.steps * (top[:, 0] + np.log(np.exp(exponents - top).sum(axis=1)))
        return np.asarray(total, dtype=np.complex128)

    @property
    def _shift(self) -> float:
        return max((len(part.weights) - 1) / part.noise for part in self.sampled)

    def _real(self, a: float) -> float:
        return float(self.log_moment(np.array([a], dtype=complex))[0].real)

    def lattice_epsilon(self, delta: float) -> float:
        """Epsilon at `delta` from tilted sums of losses on two lattices, less what they differ by."""
        sums = _Sums(list(self._atoms()))
        tilt = sums.least(lambda a: sums.moment(a) - math.log(delta))[0]
        fine = _solve(sums.log_delta(tilt, _LATTICE), delta)
        coarse = _solve(sums.log_delta(0.7 * tilt, _LATTICE // 2), delta)
        if abs(fine - coarse) > 0.01 * fine + 1e-6:
            raise _UnavailableError("the losses need a finer lattice")
        return max(0.0, min(fine, coarse) - abs(fine - coarse))

    def _atoms(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], int]]:
        """Losses with the logarithms of their masses under the distribution of this direction."""
        for part in self.sampled:
            shift = (len(part.weights) - 1) / part.noise
            x = np.linspace(-14.0, 14.0 + shift, 200_001)
            base = -0.5 * x * x + math.log((x[1] - x[0]) / math.sqrt(2 * math.pi))
            loss = part.loss(x)
            yield self.direction * loss, base + (loss if self.direction > 0 else 0.0), part.steps
        if self.mu2 > 0:
            mu = math.sqrt(self.mu2)
            x = np.linspace(-14.0 - mu, 14.0 + 2 * mu, 200_001)
            yield mu * x + self.mu2 / 2, -0.5 * x * x + math.log((x[1] - x[0]) / math.sqrt(2 * math.pi)), 1

    def log_delta(self, epsilon: float) -> float:
        """Log of the hockey-stick divergence at this epsilon."""

        def height(log_a: float) -> float:
            a = math.exp(log_a)
            if (1 + a) * self._shift > _FARTHEST:
                return math.inf
            return self._real(a) - a * epsilon - math.log(a) - math.log1p(a)

        found = minimize_scalar(
            height,
            bounds=(-7.0, max(-6.0, min(_ORDERS[1], math.log(_FARTHEST / self._shift)))),
            method="bounded",
            options={"xatol": 1e-2},
        )
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

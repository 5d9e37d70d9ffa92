"""The best shift allocation of shifted interpolation, and why rounding cannot make it too small.

Setting (Bok, Su, Altschuler 2024, "Shifted interpolation for differential privacy", section 3). X_k =
Pi[phi_k(X_{k-1}) + N(0, v_k^2 I)], X' likewise with phi'_k, phi_k c_k-Lipschitz and sup |phi_k - phi'_k| <=
s_k. For every b >= 0 with b_0 = |X_0 - X'_0| and b_T = 0 the pair (X_T, X'_T) is mu-GDP with

    mu^2 = sum_k a_k^2 / v_k^2,    a_k = max(0, c_k b_{k-1} + s_k - b_k).

**The program.** Let R_k = prod_{i>k} c_i, u_k = s_k R_k, t_k = (v_k R_k)^2, w_k = a_k R_k. Then b_k >= 0
says that up to step k no more is absorbed than has arrived, sum_{j<=k} w_j <= sum_{j<=k} u_j, with equality
at T, and mu^2 = sum_k w_k^2/t_k. Cut the steps into blocks of consecutive ones; a block with sums U of u and
T of t absorbs w_k = t_k U/T and has mu^2 = U^2/T. One step alone is a feasible block. If A and B after it are
feasible and U_A/T_A >= U_B/T_B, then A and B pooled are feasible: the pooled slope m is at most U_A/T_A,
which serves the prefixes inside A; at a prefix of B with time t and arrivals u >= t U_B/T_B there is left
U_A - m T_A + u - m t >= (m - U_B/T_B) (T_B - t) >= 0. Pooling neighbours until slopes increase (pool adjacent
violators; Barlow, Bartholomew, Bremner, Brunk 1972) gives the greatest convex minorant of the points (sum t,
sum u), which is the optimum, in linear time.

**Rounding.** Every partition reached by pooling feasible neighbours is feasible, optimal or not. So blocks
are pooled only where the order of their slopes is certain, beyond the rounding errors of their sums; what is
left apart costs the square of a rounding error. Sums have positive terms and are kept in the unit of the last
step of their block: pooling scales the earlier block by the product of the contractions of the later one, and
U^2/T does not depend on the unit. So nothing cancels, whatever the ratios of noise and step sizes, and the
result is that of a feasible allocation up to a relative error that `_slack` exceeds. Where numbers leave the
range of floats, shifts and contractions are rounded up and times down, all of which enlarge mu.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LEAST = 1e-290  # products below this are not trusted
_TINY = 1e-300  # what a positive shift or product of contractions is rounded up to
_UP = 1 + 1e-12  # covers closed forms: a few dozen rounded operations
_TAUS = 200


class _Block(NamedTuple):
    """Consecutive steps that share their shifts: sums in the unit of the last one.

    Attributes:
        shift: U, what arrives.
        time: T, sum of squared noise.
        carry: product of the contractions of all steps.
        steps: their number.
        mu: U over the root of T.
    """

    shift: float
    time: float
    carry: float
    steps: int
    mu: float


def _block(shift: float, time: float, carry: float, steps: int = 1) -> _Block:
    return _Block(shift, time, max(carry, _TINY), steps, _ratio(shift, math.sqrt(time)))


def _single(shift: float, noise: float, contraction: float) -> _Block:
    shift, time = _at_least_tiny(shift), noise * noise
    usable = time if time >= _LEAST else 0.0
    return _Block(shift, usable, max(contraction, _TINY), 1, _ratio(shift, noise))


def _at_least_tiny(value: float) -> float:
    return max(value, _TINY) if value > 0 else 0.0


def _ratio(shift: float, noise: float) -> float:
    if shift == 0:
        return 0.0
    return shift / noise if noise > 0 else math.inf


def _pool(early: _Block, late: _Block) -> _Block | None:
    """Both as one block, or None where the slope of the early one is not certainly the larger."""
    steps = early.steps + late.steps
    if early.time > 0:
        left, right = early.shift * late.time, late.shift * early.time * late.carry
        if not (left >= _LEAST and left >= right * (1 + 2e-15 * (steps + 2))):
            return None
    time = early.time * late.carry * late.carry + late.time
    return _block(
        _at_least_tiny(early.shift * late.carry) + late.shift if early.shift > 0 else late.shift,
        time if time >= _LEAST else 0.0,
        early.carry * late.carry,
        steps,
    )


def _slack(steps: int) -> float:
    """Exceeds the relative error of mu: at most 14 roundings of 1.2e-16 per step in mu^2."""
    return 1 + 1e-15 * (steps + 16)


class _Suffixes:
    """Optimal partition of the last steps of a schedule, which grows towards the first step."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # the latest block first
        self._mus: list[float] = [0.0]  # of the first blocks of that list

    def prepend(self, block: _Block) -> None:
        """Adds the step before all others."""
        while self._blocks:
            pooled = _pool(block, self._blocks[-1])
            if pooled is None:
                break
            self._blocks.pop()
            self._mus.pop()
            block = pooled
        self._blocks.append(block)
        self._mus.append(math.hypot(self._mus[-1], block.mu))

    def mu(self, start: float) -> float:
        """Of these steps, where the two processes are at most `start` apart before them."""
        if start == 0:
            return self._mus[-1]
        apart, left = _block(_at_least_tiny(start), 0.0, 1.0, 0), len(self._blocks)
        while left:
            pooled = _pool(apart, self._blocks[left - 1])
            if pooled is None:
                break
            apart, left = pooled, left - 1
        return math.hypot(self._mus[left], apart.mu)


def shifted_mu(
    shifts: Sequence[float], noises: Sequence[float], contractions: Sequence[float], start: float = 0.0
) -> float:
    """Returns the smallest mu of the lemma for any schedule, rounded up.

    Args:
        shifts: s_k, how far one step of the two processes may differ.
        noises: v_k, noise standard deviations, in the unit of the shifts.
        contractions: c_k, Lipschitz constants, at least 0.
        start: bound on |X_0 - X'_0| (0 for a common start).

    >>> round(shifted_mu([1.0] * 100, [10.0] * 100, [0.98] * 100), 6)
    0.870724
    """
    return _allocated(shifts, noises, contractions, {len(shifts): start})


def projected_mu(
    shifts: Sequence[float], noises: Sequence[float], contractions: Sequence[float], diameter: float
) -> float:
    """Returns the smallest mu over moments tau from which |X_tau - X'_tau| <= D is used as the start.

    For constant s, v and c = 1 and R = T - tau this is mu^2 = (R s^2 + 2 s D + D^2/R)/v^2 (Altschuler,
    Talwar 2022; Bok, Su, Altschuler 2024, section 4). The common start is one of the moments; long schedules
    try 200 of them, each of which is valid.
    """
    total = len(shifts)
    starts = dict.fromkeys(_remaining(total), diameter)
    whole = shifted_mu(shifts, noises, contractions)
    return min(whole, _allocated(shifts, noises, contractions, starts))


def _remaining(total: int) -> list[int]:
    if total <= _TAUS:
        return list(range(1, total + 1))
    return sorted({round(r) for r in np.geomspace(1, total, _TAUS)})


def _allocated(
    shifts: Sequence[float],
    noises: Sequence[float],
    contractions: Sequence[float],
    starts: dict[int, float],
) -> float:
    """Smallest mu over numbers of last steps, each with the distance at which they start."""
    longest, widest = max(shifts) or max(starts.values()), max(noises)
    if longest == 0 or widest == 0:
        return _ratio(longest, widest)
    found, suffixes = math.inf, _Suffixes()
    for taken, (s, v, c) in enumerate(
        zip(reversed(shifts), reversed(noises), reversed(contractions), strict=True), start=1
    ):
        suffixes.prepend(_single(s / longest, v / widest, c))
        if taken in starts:
            found = min(found, suffixes.mu(starts[taken] / longest))
    return max(found * (longest / widest) * _slack(len(shifts)), _TINY)


def noisy_gd_mu(noise_multiplier: float, contraction: float, steps: int, sensitivity: float = 1.0) -> float:
    """Returns mu of the last iterate of full-batch noisy gradient descent with constant step and noise.

    mu = (s/z) sqrt((1 - c^T)/(1 + c^T) (1 + c)/(1 - c)) (Bok, Su, Altschuler 2024, section 4); attained by
    quadratics. c >= 1 gives composition, sqrt(T) s/z.

    >>> round(noisy_gd_mu(10.0, 0.98, 100), 6)
    0.870724
    """
    if contraction >= 1:
        return _UP * sensitivity * math.sqrt(steps) / noise_multiplier
    if contraction == 0:
        return _UP * sensitivity / noise_multiplier
    log_c = math.log(contraction)
    ratio = math.tanh(-steps * log_c / 2) / math.tanh(-log_c / 2)
    return _UP * sensitivity * math.sqrt(ratio) / noise_multiplier


def projected_gd_mu(
    noise_multiplier: float, contraction: float, steps: int, diameter: float, sensitivity: float = 1.0
) -> float:
    """Returns `projected_mu` for constant step, noise and contraction, in closed form.

    Args:
        noise_multiplier: z, noise of one step over its largest contribution (sensitivity 1).
        contraction: c; above 1 the projection is left unused.
        steps: T.
        diameter: D, in units of that contribution.
        sensitivity: how far one step may differ, in the same unit.

    With R last steps mu^2 = (D c^R + s sum_{j<R} c^j)^2 / (z^2 sum_{j<R} c^(2j)): from a start at distance D
    slopes fall, so all steps are one block.

    >>> round(projected_gd_mu(10.0, 1.0, 1000, 20.0), 6)
    0.894427
    """
    whole = noisy_gd_mu(noise_multiplier, contraction, steps, sensitivity)
    if contraction > 1:
        return whole
    least = min(
        (diameter * contraction**r + sensitivity * _geometric(contraction, r))
        / math.sqrt(_geometric(contraction, r, 2))
        for r in _remaining(steps)
    )
    return min(whole, _UP * least / noise_multiplier)


def cyclic_mu(
    noise_multiplier: float,
    contraction: float,
    batches: int,
    epochs: int,
    steps_after: int,
    sensitivity: float = 1.0,
) -> float:
    """Returns mu for a record whose batch has `steps_after` further batches behind it in every epoch.

    The record arrives every `batches` steps, so the slope of the steps from one arrival to the next falls
    from epoch to epoch: the first E - 1 of them are one block. The steps from the last arrival on may be
    fewer, and are pooled with the others where that is feasible. For `steps_after = 0` this is the closed
    form of Bok, Su, Altschuler 2024, section 4.

    >>> round(cyclic_mu(5.0, 0.98, 10, 50, 0), 6)
    0.270004
    """
    c, scale = contraction, _UP * sensitivity / noise_multiplier
    if c > 1:
        return scale * math.sqrt(epochs)
    last = _arrival(c, steps_after + 1)
    if epochs == 1:
        return scale * last.mu
    before = epochs - 1
    shift = c ** (batches - 1) * _geometric(c, before, batches)
    early = _block(_at_least_tiny(shift), _geometric(c, batches * before, 2), c ** (batches * before))
    pooled = _pool(early, last)
    return scale * (math.hypot(early.mu, last.mu) if pooled is None else pooled.mu)


def _arrival(contraction: float, steps: int) -> _Block:
    """A unit shift and the noise of the steps from then on."""
    shift = max(contraction ** (steps - 1), _TINY)
    return _block(shift, _geometric(contraction, steps, 2), contraction**steps)


def _geometric(base: float, terms: int, power: int = 1) -> float:
    """sum_{j < terms} base^(power j) without cancellation."""
    if base == 1:
        return float(terms)
    if base == 0:
        return 1.0
    log_base = power * math.log(base)
    return math.expm1(terms * log_base) / math.expm1(log_base)

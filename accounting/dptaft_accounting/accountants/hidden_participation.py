"""Last iterate of Poisson-sampled noisy gradient descent: shifted interpolation with hidden participation.

Setting (units of the noise of one step). X_k = Pi[psi_k(X_{k-1}) + V_k w_k(X_{k-1}) + Z_k] with V_k ~
Bern(p) the participation of the differing record, |w_k| <= 1/z, X'_k = Pi[psi_k(X'_{k-1}) + Z_k], one start.
psi_k and w_k may depend on R_k, the other records sampled; every psi_k is c-Lipschitz; Pi projects on a
convex set. R, V and Z are independent, V_k and Z_k ~ N(0, I_d) over steps as well.

Theorem. For every v in {0,1}^T choose a_k(v) >= 0, depending on v_1..v_k only through any rule, such that
b_k = c b_{k-1} + v_k/z - a_k >= 0 with b_0 = b_T = 0. Then for every convex F, with L = dP_{X_T}/dP_{X'_T},

    E_{X'}[F(L)] <= E[F(sum_v Pr[V = v] exp(<a(v), g> - |a(v)|^2/2))],   g ~ N(0, I_T).

So the pair (X_T, X'_T), in both orders, is dominated by (sum_v Pr[v] N(a(v), I), N(0, I)). Where Pi projects
on a set of diameter D, every b_k, k >= 1, may be replaced by min(b_k, D) on the way.

Proof. Fix R and the start; joint convexity allows it, as both worlds share their law. It suffices to take
F smooth with bounded slope; others are limits.

1. Coupling. Let X~_0 = X'_0 and X~_k = Pi[Y_k], Y_k = psi_k(X~_{k-1}) + theta_k + Z_k, where theta_k = q_k
min(1, a_k/|q_k|), q_k = psi_k(X_{k-1}) + V_k w_k(X_{k-1}) - psi_k(X~_{k-1}), and X uses the same V and Z.
Before projection X_k and X~_k differ by q_k - theta_k, of length max(0, |q_k| - a_k), and |q_k| <= c b_{k-1}
+ V_k/z, so by induction |X_k - X~_k| <= b_k (and <= D); Pi does not expand. Hence X~_T = X_T.

2. Likelihood ratio. Given V = v, X_{k-1} and thus theta_k =: theta_k(v) is a function of Y_1..Y_{k-1}
(recover Z_1, X_1, Z_2, ... in turn), however w_k looks and whatever the dimension. Without theta the path Y
is that of X'. So under X' the ratio of the laws of the paths is L_T = sum_v y_v^T, y_v^0 = Pr[V = v], y_v^k =
y_v^{k-1} exp(<theta_k(v), Z_k> - |theta_k(v)|^2/2), and E[F(L)] <= E[F(L_T)], as X_T is a function of the
path.

3. Kahane's inequality (1986, "Une inegalite du type de Slepian et Gordon") one step at a time. Let u_k(y) =
E[F(sum_v y_v exp(sum_{i>k} (a_i(v) g_i - a_i(v)^2/2)))] for y >= 0. Claim: E[F(L_T) | Y_1..Y_k] <= u_k(y^k);
equality at k = T, and k = 0 is the theorem. Given the past, theta_k(v) is a fixed vector. Let G_v(t) =
sqrt(t) a_k(v) g + sqrt(1-t) <theta_k(v), Z> with g, Z independent, and W_v(t) = y_v^{k-1} exp(G_v(t) - Var
G_v(t)/2). Gaussian integration by parts gives

    d/dt E[u_k(W)] = 1/2 sum_{v,v'} (a_k(v) a_k(v') - <theta_k(v), theta_k(v')>) E[W_v W_v' d_v d_v' u_k],

diagonal included. Each factor is nonnegative: |theta_k(v)| <= a_k(v) (Cauchy-Schwarz), and d_v d_v' u_k =
E[F'' M_v M_v'] with M > 0 and F convex. So t = 0, the true step, is at most t = 1, which is u_{k-1}(y^{k-1}).

4. F(L) = max(0, L - e^eps) and max(0, 1 - e^eps L) are the two hockey-stick divergences.

The same inequality shows that the bound only grows when an a_k(v) grows, so shifts may be rounded up, and
participation may be assumed where it is hidden.

Choice of a. Count steps from the end, n = T - k, weight R = c^n. The condition on b says that what
participation at n contributes, c^n/z, is absorbed (weighted by R) at steps not before it. The steps are cut
into blocks: participations in the last K steps are absorbed at once, using a share w of the noise there;
those in each older block are absorbed together along the direction R in the next younger block, the block
before the last K steps in the remaining share 1-w (the noise is the sum of two independent ones; revealing
both is post-processing in reverse). All absorbing directions are orthogonal, so the dominating pair is a
product of one-dimensional mixtures against N(0, 1):

    S_p(G(1/(z sqrt(w))))^K  (x)  over blocks of the law of  sum_n V_n c^n / (z |R_absorbing block|).

Where iterates live in a set of diameter D, the oldest block contributes at most c^n D. Fixing all V = 1
instead of hiding them, and absorbing in the last step alone, gives a weaker bound that worst-case coupling
would give as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dptaft_accounting.accountants.pld import LossPmf, Mixture, PldProfile, compose_pairs, discretise_wide
from dptaft_accounting.errors import AccountingError

Array = NDArray[np.float64]

_TAIL = 1e-17
_LEAST_CONTRACTION = 1e-12  # keeps the powers of c away from underflow
_DOWN = 1 - 1e-12  # covers the rounding of powers, shares and sums: shifts are divided by its root
_NEGLIGIBLE = 1e-10  # total weight of steps so old that full participation is assumed


@dataclass(frozen=True)
class Resolution:
    """How finely a bound is evaluated; coarser is still valid, only larger."""

    interval: float
    knots: int
    shifts: int
    lattice: int
    spacing: float


_COARSE = Resolution(interval=4e-3, knots=1000, shifts=60, lattice=1 << 11, spacing=0.05)
_FINE = Resolution(interval=1e-3, knots=3000, shifts=120, lattice=1 << 12, spacing=0.02)


@dataclass(frozen=True)
class Problem:
    """Parameters of the theorem; `diameter` is D in units of the noise of one step."""

    noise_multiplier: float
    sampling_rate: float
    steps: int
    contraction: float
    diameter: float = math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.contraction < 1:
            raise AccountingError(f"contraction {self.contraction!r} is not in [0, 1); hiding needs it")
        if 0 < self.contraction < _LEAST_CONTRACTION:  # a larger factor holds as well
            object.__setattr__(self, "contraction", _LEAST_CONTRACTION)

    @property
    def horizon(self) -> int:
        """Number of final steps beyond which full participation is assumed."""
        c = self.contraction
        if c == 0:
            return min(self.steps, 1)
        return min(self.steps, 2 + math.ceil(math.log(_NEGLIGIBLE * (1 - c)) / math.log(c)))


@dataclass(frozen=True)
class Layout:
    """Cut of the steps: `immediate` last ones with noise share `share`, then blocks growing by `growth`."""

    immediate: int
    share: float
    growth: float

    def blocks(self, horizon: int) -> list[tuple[int, int]]:
        """Ranges [first, last) of steps from the end, youngest block first; the oldest takes what is left."""
        ranges: list[tuple[int, int]] = []
        first, size = self.immediate, self.immediate * self.growth
        while first < horizon:
            last = first + max(1, math.ceil(size))
            if last + size * self.growth / 2 >= horizon:
                last = horizon
            ranges.append((first, last))
            first, size = last, size * self.growth
        return ranges


@lru_cache(maxsize=32)
def hidden_participation_profile(problem: Problem, delta: float) -> PldProfile:
    """Returns the curve of the best layout found for epsilon at `delta`; every layout is a valid bound.

    Args:
        problem: contraction strictly below 1.
        delta: where the search looks; the curve is valid everywhere.
    """
    horizon = problem.horizon
    if horizon <= 2:
        return evaluate(problem, Layout(horizon, 1.0, 2.0), _FINE)
    scale = min(float(horizon), 1 / (1 - problem.contraction))
    sizes = sorted({max(1, min(horizon - 1, round(scale * f))) for f in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)})
    best = _best(problem, delta, [Layout(size, share, 2.0) for size in sizes for share in (0.62, 0.9)])
    shares = (best.share - 0.12, 0.5 + best.share / 2)
    best = _best(problem, delta, [best, *(replace(best, share=share) for share in shares)])
    best = _best(problem, delta, [best, *(replace(best, growth=growth) for growth in (1.5, 3.0))])
    return evaluate(problem, best, _FINE)


def _best(problem: Problem, delta: float, layouts: list[Layout]) -> Layout:
    return min(layouts, key=lambda layout: evaluate(problem, layout, _COARSE).epsilon(delta))


def evaluate(problem: Problem, layout: Layout, resolution: Resolution) -> PldProfile:
    """Returns the curve that one layout proves.

    Raises:
        AccountingError: the immediate steps leave no block to the steps before them.
    """
    p, z, c = problem.sampling_rate, problem.noise_multiplier, problem.contraction
    if c > 0 and problem.horizon <= layout.immediate < problem.steps:
        raise AccountingError(
            f"{layout.immediate} immediate steps leave older ones out; at most {problem.horizon - 1} fit"
        )
    count = min(layout.immediate, problem.steps)
    blocks = layout.blocks(problem.horizon)
    share = layout.share if blocks else 1.0
    interval = max(resolution.interval, 1e-4 / z)
    step = Mixture.poisson(z * math.sqrt(share), p).pmfs(interval)
    parts: list[tuple[tuple[LossPmf, LossPmf], int]] = [(step, count)]
    absorbing, free = (0, count), 1 - share
    for first, last in blocks:
        energy = _DOWN * free * math.fsum(c ** (2 * n) for n in range(*absorbing))
        shifts, weights, lost = _absorbed(problem, first, last, last == blocks[-1][1], resolution)
        pair = discretise_wide(shifts / math.sqrt(energy), weights, lost, interval, resolution.knots)
        parts.append((pair, 1))
        absorbing, free = (first, last), 1.0
    return compose_pairs(parts)


def _absorbed(
    problem: Problem, first: int, last: int, oldest: bool, resolution: Resolution
) -> tuple[Array, Array, float]:
    """Law of sum_n V_n c^n / z over a block: support rounded up, weights, and mass left out."""
    c, p = problem.contraction, problem.sampling_rate
    powers = c ** np.arange(first, last, dtype=np.float64) / problem.noise_multiplier
    group = np.floor(np.log(powers[0] / powers) / resolution.spacing)
    _, where, counts = np.unique(group, return_index=True, return_counts=True)
    jumps = powers[where]  # the largest of each group
    support, weights, lost = _binomial_sum(jumps, counts, p, resolution.lattice)
    if oldest and problem.horizon < problem.steps:
        support = support + c**problem.horizon / (1 - c) / problem.noise_multiplier
    if oldest:
        support = np.minimum(support, c**first * problem.diameter)
    merged, masses = _coarsen(np.asarray(support, dtype=np.float64), weights, resolution.shifts)
    return merged, masses, lost


def _binomial_sum(jumps: Array, counts: NDArray[np.int64], p: float, size: int) -> tuple[Array, Array, float]:
    """Law of sum_i Binomial(counts_i, p) jumps_i on a lattice, every term of the sum rounded up.

    A term is a whole binomial, so rounding lengthens the sum by less than one lattice step per term, and what
    Chernoff's bound allows still fits: nothing but `_TAIL` can wrap around to smaller sums. The weights lie
    below the true ones (the rounding of the transform is taken off), hence are valid in both orders of the
    pair; what they lack of 1 is returned as lost.
    """
    total = float(np.sum(jumps * counts))
    orders = np.geomspace(0.05, 500, 120) / float(np.max(jumps))
    growth = np.expm1(np.outer(orders, jumps))
    moments = np.log1p(p * growth) @ counts
    cap = min(total, float(np.min((moments - math.log(_TAIL)) / orders)))
    size = max(size, 1 << (4 * len(jumps)).bit_length())
    grid = cap / (size - 2 - len(jumps))
    transform = np.ones(size // 2 + 1, dtype=np.complex128)
    log_factorial = _log_factorial(int(np.max(counts)))
    for jump, count in zip(jumps, counts, strict=True):
        term = np.arange(count + 1)
        index = np.ceil(term * (jump / grid)).astype(np.int64)
        mass = _binomial(int(count), p, log_factorial)
        inside = index < size
        transform *= np.fft.rfft(np.bincount(index[inside], weights=mass[inside], minlength=size))
    error = 2.3e-16 * (len(jumps) + 64) * float(np.mean(np.abs(transform)))
    weights = np.clip(np.fft.irfft(transform, size) - error, 0.0, None)
    lost = max(0.0, 1 - math.fsum(weights)) + _TAIL + 1e-15
    return np.asarray(grid * np.arange(size), dtype=np.float64), weights, lost


def _log_factorial(largest: int) -> Array:
    from scipy.special import gammaln

    return np.asarray(gammaln(np.arange(1.0, largest + 2)), dtype=np.float64)


def _binomial(count: int, p: float, log_factorial: Array) -> Array:
    """Probabilities of Binomial(count, p); their rounding errors are relative, about 1e-11."""
    from scipy.special import xlog1py, xlogy

    k = np.arange(count + 1)
    logs = xlogy(k, p) + xlog1py(count - k, -p) - log_factorial[k] - log_factorial[count - k]
    mass = np.exp(logs + log_factorial[count])
    return np.asarray(mass / np.sum(mass), dtype=np.float64)


def _coarsen(support: Array, weights: Array, points: int) -> tuple[Array, Array]:
    """Merges support points upward into at most `points`, finer where the mass is."""
    top = min(int(np.flatnonzero(weights)[-1]) + 1, len(support) - 1)
    ends = np.unique(np.ceil(np.linspace(0, 1, points) ** 1.5 * top).astype(np.int64))
    ends = np.append(ends[ends < len(support) - 1], len(support) - 1)
    merged = np.add.reduceat(weights, np.append(0, ends[:-1] + 1))
    keep = merged > 0
    return support[ends][keep], merged[keep]

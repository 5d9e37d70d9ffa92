"""The Poisson last-iterate bound: above every instance that can be computed exactly, below older bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import bdtrc

from dptaft_accounting.accountants.hidden_participation import (
    Layout,
    Problem,
    Resolution,
    _binomial_sum,
    evaluate,
    hidden_participation_profile,
)
from dptaft_accounting.accountants.last_iterate import batch_overflow, noisy_gd_mu
from dptaft_accounting.accountants.pld import Mixture, compose_mixtures
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import AccountingError, CertificateError
from dptaft_accounting.mechanisms import PoissonGaussian
from dptaft_accounting.tradeoff import GaussianProfile

COARSE = Resolution(interval=2e-3, knots=1500, shifts=80, lattice=1 << 11, spacing=0.05)
EPSILONS = (0.0, 0.1, 0.3, 0.7, 1.2, 2.0)
GRID = np.linspace(-12, 16, 1201)
STEP = GRID[1] - GRID[0]


def normal(x):
    return np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def hockey_stick(p, q, eps):
    first = np.maximum(p - math.exp(eps) * q, 0).sum()
    return max(first, np.maximum(q - math.exp(eps) * p, 0).sum()) * STEP


def last_iterates(psi, push, p, steps):
    """Densities of X_T and X'_T on the grid for one-dimensional steps x -> psi(x) + V push(x) + N(0, 1)."""
    without = normal(GRID[:, None] - psi(GRID)[None, :]) * STEP
    taken = normal(GRID[:, None] - (psi(GRID) + push(GRID))[None, :]) * STEP
    q = normal(GRID - psi(np.zeros(1))[0])
    r = (1 - p) * q + p * normal(GRID - psi(np.zeros(1))[0] - push(np.zeros(1))[0])
    for _ in range(steps - 1):
        q, r = without @ q, (1 - p) * (without @ r) + p * (taken @ r)
    return r, q


INSTANCES = {
    "linear": (lambda x: 0.9 * x, lambda x: np.ones_like(x)),
    "forgetful": (lambda x: 0.0 * x, lambda x: np.ones_like(x)),
    "reflecting": (lambda x: -0.9 * x, lambda x: np.sign(x) + (x == 0)),
    "folding": (lambda x: 0.9 * np.abs(x), lambda x: np.ones_like(x)),
    "clipped": (lambda x: 0.9 * np.clip(x, -0.5, 2.0), lambda x: np.where(x > 0, 1.0, -1.0)),
    "dead zone": (lambda x: 0.9 * np.sign(x) * np.maximum(np.abs(x) - 1, 0), lambda x: np.ones_like(x)),
    "away": (lambda x: 0.9 * x, lambda x: np.where(x >= 0, 1.0, -1.0)),
}


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("layout", [Layout(1, 0.5, 1.0), Layout(2, 0.7, 2.0), Layout(4, 0.6, 2.0)])
def test_bound_lies_above_exact_one_dimensional_chains(name, layout):
    psi, push = INSTANCES[name]
    z, p, steps = 1.0, 0.3, 8
    r, q = last_iterates(psi, lambda x: push(x) / z, p, steps)
    bound = evaluate(Problem(z, p, steps, 0.9), layout, COARSE)
    for eps in EPSILONS:
        assert bound.delta(eps) >= hockey_stick(r, q, eps) - 1e-7


def test_absorbing_before_taking_part_would_be_false():
    # the linear instance, where all noise hides every participation, lies below what a forgetful chain
    # really leaks
    linear, forgetful = (
        last_iterates(psi, push, 0.01, 8) for psi, push in (INSTANCES["linear"], INSTANCES["forgetful"])
    )
    assert hockey_stick(*forgetful, 0.3) > 2 * hockey_stick(*linear, 0.3) > 0


def linear_instance_epsilon(z, p, steps, c, delta):
    """Epsilon (from below) of X = sum_n V_n c^n/z + N(0, sum_n c^(2n)), by convolution on a lattice."""
    powers = c ** np.arange(steps, dtype=float)
    noise = math.sqrt(np.sum(powers**2))
    jumps = powers / (z * noise)
    grid, size = 2e-4, 1 << 14
    index = np.floor(jumps / grid).astype(int)  # rounded down: a smaller shift leaks less
    angle = np.exp(-2j * math.pi * np.arange(size) / size)
    transform = np.ones(size, dtype=complex)
    for i, count in zip(*np.unique(index, return_counts=True), strict=True):
        transform *= (1 + p * (angle**i - 1)) ** count
    weights = np.maximum(np.fft.ifft(transform).real, 0)
    weights = weights.reshape(-1, 16).sum(axis=1)  # merged downward
    shifts = 16 * grid * np.arange(size // 16)
    keep = weights > 1e-13
    shifts, weights = shifts[keep], weights[keep]
    x = np.linspace(-9, 15, 4001)
    mixed = sum(w * normal(x - s) for s, w in zip(shifts, weights, strict=True))
    low, high = 0.0, 20.0
    for _ in range(40):
        eps = 0.5 * (low + high)
        divergence = np.maximum(mixed - math.exp(eps) * normal(x), 0).sum() * (x[1] - x[0])
        low, high = (eps, high) if divergence > delta else (low, eps)
    return low


def single_shift_epsilon(z, p, steps, c, delta):
    """The older bound: worst-case coupling up to tau, absorbed in the last step in a share of its noise."""
    best = math.inf
    for rest in (6 / (1 - c), 8 / (1 - c)):
        for share in (0.8, 0.9):
            gap = c**rest / (z * (1 - c) * math.sqrt(1 - share))
            parts = [
                (Mixture.poisson(z, p), int(rest) - 1),
                (Mixture.poisson(z * math.sqrt(share), p), 1),
                (Mixture.gaussian(gap), 1),
            ]
            if gap < 2:
                best = min(best, compose_mixtures([x for x in parts if x[1]], 0.2).epsilon(delta))
    return best


@pytest.mark.parametrize("c", ["0.9", "0.98"])
def test_between_the_linear_instance_and_the_older_bound(oracles, c):
    case = oracles["poisson_last_iterate"]
    z, p, steps, delta = case["noise_multiplier"], case["sampling_rate"], case["steps"], case["delta"]
    epsilon = hidden_participation_profile(Problem(z, p, steps, float(c)), delta).epsilon(delta)
    assert linear_instance_epsilon(z, p, steps, float(c), delta) < epsilon
    older = single_shift_epsilon(z, p, steps, float(c), delta)
    assert older == pytest.approx(case["single_shift_bound"][c], rel=0.05)
    assert epsilon < 0.8 * older
    assert epsilon < case["single_shift_bound"][c]


def test_linear_instance_oracle(oracles):
    found = linear_instance_epsilon(1.0, 0.01, 10_000, 0.98, 1e-5)
    assert found == pytest.approx(oracles["poisson_last_iterate"]["linear_instance_0.98"], abs=0.01)


def test_full_participation_dominates_and_is_approached():
    problem = Problem(4.0, 1 - 1e-9, 200, 0.9)
    epsilon = hidden_participation_profile(problem, 1e-5).epsilon(1e-5)
    assert epsilon >= GaussianProfile(noisy_gd_mu(4.0, 0.9, 200)).epsilon(1e-5)


@pytest.mark.parametrize(("steps", "c", "p"), [(20_000, 0.9995, 0.9), (3000, 0.999, 0.3), (50, 0.7, 0.5)])
def test_rounded_sum_of_participations_lies_above_the_true_one(steps, c, p):
    counts, jumps = np.full(steps // 50, 50), c ** np.arange(0, steps, 50)
    support, weights, lost = _binomial_sum(jumps, counts, p, 1 << 11)
    assert 1 - 1e-9 < weights.sum() <= 1
    assert math.fsum(weights) + lost >= 1
    mean, deviation = p * counts @ jumps, math.sqrt(p * (1 - p) * counts @ jumps**2)
    grid = support[1] - support[0]
    assert mean <= support @ weights <= mean + grid * len(jumps)
    draws = np.random.default_rng(0).binomial(counts, p, (4000, len(counts))) @ jumps
    for level in (-2, -1, 0, 1, 2):
        threshold = mean + level * deviation
        assert weights[support >= threshold].sum() >= np.mean(draws >= threshold) - 0.03


def test_many_participations_in_one_block_leak_at_least_their_sum():
    # with p = 1 the linear chain attains the exact value
    problem = Problem(100.0, 1.0, 20_000, 0.9995)
    exact = GaussianProfile(noisy_gd_mu(100.0, 0.9995, 20_000)).epsilon(1e-5)
    for layout in (Layout(800, 0.6, 3.0), Layout(2000, 0.6, 2.0), Layout(400, 0.9, 6.0)):
        assert evaluate(problem, layout, COARSE).epsilon(1e-5) >= exact


def test_layouts_and_factors_that_prove_nothing_are_refused():
    with pytest.raises(AccountingError, match="leave older ones out"):
        evaluate(Problem(1.0, 0.1, 1000, 0.1), Layout(500, 0.5, 2.0), COARSE)
    with pytest.raises(AccountingError, match=r"contraction 1\.0"):
        Problem(1.0, 0.1, 1000, 1.0)


def test_one_step_is_one_sampled_gaussian():
    single = compose_mixtures([(Mixture.poisson(1.0, 0.1), 1)])
    bound = hidden_participation_profile(Problem(1.0, 0.1, 1, 0.9), 1e-5)
    assert bound.epsilon(1e-5) == pytest.approx(single.epsilon(1e-5), rel=1e-2)


@pytest.mark.parametrize(
    ("p", "c"), [(0.5, 0.9), (1.0, 0.9), (0.1, 0.0), (0.1, 1e-9), (0.1, 1e-200), (0.3, 1e-3), (1e-6, 0.999)]
)
def test_edges_of_the_parameters(p, c):
    epsilon = hidden_participation_profile(Problem(2.0, p, 50, c), 1e-5).epsilon(1e-5)
    single = compose_mixtures([(Mixture.poisson(2.0, p), 1)]).epsilon(1e-5)
    everything = compose_mixtures([(Mixture.poisson(2.0, p), 50)]).epsilon(1e-5)
    assert single * (1 - 1e-6) <= epsilon
    if c < 0.5:
        assert epsilon <= 1.05 * everything


def test_finer_evaluation_is_tighter():
    problem, layout = Problem(1.0, 0.05, 300, 0.95), Layout(10, 0.8, 2.0)
    fine = Resolution(interval=5e-4, knots=4000, shifts=200, lattice=1 << 12, spacing=0.01)
    coarse, exact = (evaluate(problem, layout, r).epsilon(1e-5) for r in (COARSE, fine))
    assert exact <= coarse <= exact * 1.08


def certificate(steps, rate, largest, **changes):
    values = {
        "loss": "multinomial-logistic",
        "feature_bound": 1.0,
        "l2_clip_norm": 1.5,
        "regularization": 0.05,
        "step_size": 1.0,
        "normaliser": 100.0,
        "sampling": "poisson",
        "steps": steps,
        "records": 10_000,
        "max_batch_size": largest,
        "sampling_rate": rate,
    }
    return ConvexityCertificate.issue(**{**values, **changes})


def test_best_bound_with_certificate_charges_large_batches():
    mechanism = PoissonGaussian(1.0, 0.01, 1000, released="last-iterate")
    report = best_bound(mechanism, certificate(1000, 0.01, 190), delta=1e-5)
    assert report.name == "last-iterate hidden participation"
    assert report.epsilon < 0.5 * report.named("composition").epsilon
    overflow = batch_overflow(10_000, 0.01, 190, 1000)
    assert 0 < overflow < 1e-10
    assert report.profile.delta(100.0) >= overflow
    with pytest.raises(CertificateError, match="raise max_batch_size"):
        best_bound(mechanism, certificate(1000, 0.01, 120), delta=1e-5)


def test_overflow_bounds_the_chance_of_a_large_batch():
    rng = np.random.default_rng(0)
    largest = rng.binomial(1000, 0.05, size=(4000, 20)).max(axis=1)
    frequency = np.mean(largest > 72)
    assert 0.5 * frequency < batch_overflow(1000, 0.05, 72, 20) < 2 * frequency


def test_a_small_set_caps_old_participation():
    free = hidden_participation_profile(Problem(1.0, 0.2, 400, 0.97), 1e-5).epsilon(1e-5)
    capped = hidden_participation_profile(Problem(1.0, 0.2, 400, 0.97, diameter=0.5), 1e-5).epsilon(1e-5)
    assert capped < free


@pytest.mark.parametrize(
    ("n", "p", "largest"),
    [(60, 0.1, 20), (100, 0.01, 5), (300, 0.05, 40), (500, 0.3, 200), (200, 0.9, 199), (400, 0.001, 1)],
)
def test_overflow_is_just_above_the_exact_tail(n, p, largest):
    rate = Fraction(p)
    masses = (math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(largest + 1, n + 1))
    exact = sum(masses)
    found = Fraction(batch_overflow(n, p, largest, 7))
    assert 7 * exact <= found <= 7 * exact * (1 + Fraction(1, 10**7))


@pytest.mark.parametrize("n", [10**6, 10**8, 10**9])
def test_overflow_of_large_data_is_near_the_incomplete_beta_function(n):
    mean = n * 1e-3
    largest = round(mean + 6 * math.sqrt(mean))
    assert batch_overflow(n, 1e-3, largest, 1) == pytest.approx(bdtrc(largest, n, 1e-3), rel=1e-3)
    assert batch_overflow(n, 1e-3, round(mean) - 1, 1) == 1.0

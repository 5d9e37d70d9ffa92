"""Deterministic participation: oracles, the slow quadratic program, exactness on quadratics, and what is
false."""

import math

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from dptaft_accounting.accountants.last_iterate import cyclic_mu, noisy_gd_mu, projected_mu, shifted_mu
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian
from dptaft_accounting.tradeoff import GaussianProfile, mu_to_epsilon


def slow_mu(shifts, noises, contractions):
    """The quadratic program over b, solved without structure."""
    steps = len(shifts)
    matrix, target = np.zeros((steps, steps - 1)), np.zeros(steps)
    for k in range(steps):
        if k > 0:
            matrix[k, k - 1] = contractions[k] / noises[k]
        if k < steps - 1:
            matrix[k, k] = -1 / noises[k]
        target[k] = -shifts[k] / noises[k]
    return math.sqrt(2 * lsq_linear(matrix, target, bounds=(0, np.inf), method="bvls", tol=1e-14).cost)


def quadratic_mu(shifts, noises, contractions):
    """The exact mu of the last iterate where every step is x -> c x + shift + noise: gap over standard
    deviation."""
    gap = variance = 0.0
    for s, v, c in zip(shifts, noises, contractions, strict=True):
        gap, variance = c * gap + s, c * c * variance + v * v
    return gap / math.sqrt(variance)


def certificate(mechanism, **changes):
    values = {
        "loss": "binary-logistic",
        "feature_bound": 1.0,
        "l2_clip_norm": 1.0,
        "regularization": 0.02,
        "step_size": 1.0,
        "normaliser": 100.0,
        "sampling": "full-batch",
        "steps": mechanism.steps,
        "records": 100,
    }
    return ConvexityCertificate.issue(**{**values, **changes})


def test_noisy_gd_oracles(oracles):
    table = oracles["noisy_gd"]
    z = 1 / table["sensitivity_over_noise"]
    for steps, row in table["mu"].items():
        for c, mu in row.items():
            assert noisy_gd_mu(z, float(c), int(steps)) == pytest.approx(mu, abs=1e-6)
    for steps, eps in table["epsilon_contraction_0.99_delta_1e-5"].items():
        assert mu_to_epsilon(noisy_gd_mu(z, 0.99, int(steps)), 1e-5) == pytest.approx(eps, abs=1e-6)


def test_cyclic_oracles(oracles):
    table = oracles["cyclic"]
    for epochs, row in table["mu"].items():
        for c, mu in row.items():
            found = cyclic_mu(1 / table["sensitivity_over_noise"], float(c), table["batches"], int(epochs), 0)
            assert found == pytest.approx(mu, abs=1e-6)
    table = oracles["cyclic_logistic"]
    z = 1 / table["sensitivity_over_noise"]
    for i, epochs in enumerate(table["epochs"]):
        for c in ("0.9999", "0.9998"):
            eps = mu_to_epsilon(cyclic_mu(z, float(c), table["batches"], epochs, 0), table["delta"])
            assert eps == pytest.approx(table[c][i], abs=1e-6)
        composition = best_bound(CyclicGaussian(z, table["batches"], epochs), delta=table["delta"]).epsilon
        assert composition == pytest.approx(table["composition"][i], abs=1e-5)


def test_shift_allocation_oracle(oracles):
    table = oracles["shift_allocation"]
    for after, squared in enumerate(table["mu_squared_by_steps_after"]):
        mu = cyclic_mu(1.0, table["contraction"], table["batches"], table["epochs"], after)
        assert mu**2 == pytest.approx(squared, abs=1e-6)


def test_minorant_solves_the_quadratic_program():
    rng = np.random.default_rng(3)
    for _ in range(60):
        steps = int(rng.integers(2, 25))
        shifts = rng.random(steps) * (rng.random(steps) < 0.5) + 1e-9
        noises, factors = rng.random(steps) + 0.2, rng.random(steps)
        fast, slow = shifted_mu(shifts, noises, factors), slow_mu(shifts, noises, factors)
        assert fast == pytest.approx(slow, rel=1e-6)


def test_exact_on_quadratics_and_never_below_them():
    rng = np.random.default_rng(4)
    constant = ([0.3] * 40, [1.7] * 40, [0.93] * 40)
    assert shifted_mu(*constant) == pytest.approx(quadratic_mu(*constant), rel=1e-9)
    assert noisy_gd_mu(1.7 / 0.3, 0.93, 40) == pytest.approx(quadratic_mu(*constant), rel=1e-9)
    for _ in range(40):
        plan = (rng.random(15), rng.random(15) + 0.1, rng.random(15))
        assert shifted_mu(*plan) >= quadratic_mu(*plan) * (1 - 1e-12)


def test_unconstrained_formula_is_false_for_a_record_of_the_last_step():
    # the gap of a quadratic is hidden by all the noise before, but a step may forget its past: only its own
    # noise counts
    plan = ([0.0] * 9 + [1.0], [1.0] * 10, [0.9] * 10)
    assert quadratic_mu(*plan) < 0.5
    assert shifted_mu(*plan) == pytest.approx(1.0, rel=1e-9)


def test_limits():
    assert noisy_gd_mu(3.0, 0.9, 1) == pytest.approx(1 / 3)
    assert noisy_gd_mu(3.0, 1.0, 49) == pytest.approx(7 / 3)
    assert noisy_gd_mu(3.0, 1 - 1e-12, 49) == pytest.approx(7 / 3, rel=1e-9)
    assert noisy_gd_mu(3.0, 0.0, 49) == pytest.approx(1 / 3)
    assert cyclic_mu(3.0, 1.0, 1, 49, 0) == pytest.approx(7 / 3)
    # without contraction the noise of the other batches still helps: sqrt(1 + (E-1)/l)
    assert cyclic_mu(3.0, 1.0, 5, 49, 0) == pytest.approx(math.sqrt(1 + 48 / 5) / 3)
    long = shifted_mu([1.0] * 20_000, [2.0] * 20_000, [0.9] * 20_000)  # 0.9^20000 underflows
    assert long == pytest.approx(noisy_gd_mu(2.0, 0.9, 20_000), rel=1e-9)


def test_projection_formula_and_its_minimum_with_composition():
    s, v, diameter, steps = 1.0, 10.0, 20.0, 1000
    plan = ([s] * steps, [v] * steps, [1.0] * steps)
    formula = min(r * s * s + 2 * s * diameter + diameter**2 / r for r in range(1, steps + 1)) / v**2
    assert projected_mu(*plan, diameter) ** 2 == pytest.approx(formula, rel=1e-3)
    assert projected_mu(*plan, diameter) ** 2 >= formula * (1 - 1e-12)
    assert projected_mu(*plan, 1e6) == pytest.approx(shifted_mu(*plan))
    assert projected_mu(*plan, 5.0) < projected_mu(*plan, 20.0)


def test_best_bound_reports_all_and_picks_the_smallest():
    mechanism = FullBatchGaussian(10.0, 200, released="last-iterate")
    report = best_bound(mechanism, certificate(mechanism), delta=1e-5)
    assert [b.name for b in report.bounds] == ["last-iterate noisy gradient descent", "composition"]
    assert report.best.mu == pytest.approx(noisy_gd_mu(10.0, 0.98, 200))
    projected = best_bound(mechanism, certificate(mechanism, diameter=0.05), delta=1e-5)
    assert projected.name == "last-iterate projected noisy gradient descent"
    assert projected.epsilon < report.epsilon
    pair = best_bound(mechanism, certificate(mechanism), delta=1e-5, records_per_unit=2)
    assert pair.best.mu == pytest.approx(2 * report.best.mu)


def test_schedules_of_noise_and_step_size():
    noise = tuple(5.0 + 0.1 * k for k in range(30))
    sizes = tuple(1.0 / (1 + 0.05 * k) for k in range(30))
    mechanism = FullBatchGaussian(noise, 30, released="last-iterate")
    report = best_bound(mechanism, certificate(mechanism, step_size=sizes), delta=1e-5)
    plan = (sizes, [e * z for e, z in zip(sizes, noise, strict=True)], [1 - 0.02 * e for e in sizes])
    assert report.named("last-iterate noisy gradient descent").profile.mu == pytest.approx(
        slow_mu(*plan), rel=1e-6
    )
    composition = math.sqrt(sum(z**-2 for z in noise))
    assert report.named("composition").profile.mu == pytest.approx(composition)


def test_replace_one_doubles_the_shift():
    one = FullBatchGaussian(10.0, 50, released="last-iterate")
    two = FullBatchGaussian(10.0, 50, "replace-one", "last-iterate")
    single = best_bound(one, certificate(one), delta=1e-5).best.mu
    assert best_bound(two, certificate(two, adjacency="replace-one"), delta=1e-5).best.mu == pytest.approx(
        2 * single
    )


def test_secret_partition_averages_over_positions():
    mechanism = CyclicGaussian(5.0, 10, 20, partition="secret-random", released="last-iterate")
    proof = certificate(mechanism, sampling="cyclic", batches_per_epoch=10, normaliser=10.0)
    report = best_bound(mechanism, proof, delta=1e-5)
    assert report.name == "last-iterate secret partition"
    mus = [cyclic_mu(5.0, 0.98, 10, 20, after) for after in range(10)]
    mean = sum(GaussianProfile(mu).delta(0.5) for mu in mus) / 10
    assert report.profile.delta(0.5) == pytest.approx(mean, rel=1e-9)
    fixed = report.named("last-iterate cyclic")
    assert fixed.mu == pytest.approx(max(mus))
    assert report.epsilon < fixed.epsilon

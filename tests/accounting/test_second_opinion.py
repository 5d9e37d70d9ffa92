"""The second path to epsilon agrees with the first one everywhere, from below, and shares no code with it."""

import ast
import inspect
import math

import numpy as np
import pytest
from scipy.stats import norm

from dptaft_accounting import best_bound, second_opinion
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.mechanisms import (
    CyclicGaussian,
    FullBatchGaussian,
    ObjectivePerturbation,
    OutputPerturbation,
    PoissonGaussian,
    SequenceComposition,
)

MECHANISMS = [
    FullBatchGaussian(10.0, 50),
    FullBatchGaussian((5.0, 6.0, 7.0), 3, adjacency="replace-one"),
    CyclicGaussian(3.0, 10, 4),
    OutputPerturbation(1.0, 0.1, 1000, 0.01, gradient_tolerance=1e-5),
    PoissonGaussian(1.0, 1.0, 3),
    PoissonGaussian(1.0, 0.01, 10_000),
    PoissonGaussian(0.5, 0.02, 100),
    PoissonGaussian(5.0, 0.3, 50),
    PoissonGaussian(50.0, 0.1, 200),
    SequenceComposition((PoissonGaussian(1.0, 0.05, 200), FullBatchGaussian(14.0, 100))),
    SequenceComposition((PoissonGaussian(2.0, 0.05, 200), PoissonGaussian(1.0, 0.01, 300))),
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m.kind)
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
def test_both_paths_agree(mechanism, delta):
    first = best_bound(mechanism, delta=delta).epsilon
    second = second_opinion.second_opinion(mechanism.to_dict(), delta).epsilon
    assert second <= first * (1 + 1e-9)
    assert second == pytest.approx(first, rel=1e-4 if delta > 1e-9 else 1e-3, abs=1e-7)


def test_a_mechanism_with_two_percent_less_noise_is_told_apart():
    for mechanism in (PoissonGaussian(1.0, 0.01, 1000), FullBatchGaussian(10.0, 50)):
        claimed = best_bound(mechanism, delta=1e-5).epsilon
        record = mechanism.to_dict()
        weaker = record | {"noise_multiplier": record["noise_multiplier"] * 0.98}
        assert second_opinion.second_opinion(weaker, 1e-5).epsilon > claimed * 1.01


def test_against_direct_integration():
    """delta(eps) of a sampled and a Gaussian step as a plain double sum over both outcomes."""
    noise, rate, mu = 0.8, 0.2, 0.7
    x = np.arange(-9, 11, 0.01)
    q = norm.pdf(x) * 0.01
    sampled = 1 - rate + rate * np.exp(x / noise - 0.5 / noise**2)
    ratio, weight = np.outer(sampled, np.exp(mu * x - mu * mu / 2)), np.outer(q, q)
    for epsilon in (0.2, 1.0, 3.0):
        removing = float(np.sum(weight * np.maximum(ratio - math.exp(epsilon), 0)))
        adding = float(np.sum(weight * np.maximum(1 - math.exp(epsilon) * ratio, 0)))
        for direction, delta in ((1, removing), (-1, adding)):
            step = second_opinion._Sampled(noise, (1 - rate, rate), 1)
            integral = second_opinion._Integral(mu * mu, (step,), direction)
            assert math.exp(integral.log_delta(epsilon)) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"kind": "poisson-gaussian", "noise_multiplier": 1e-3, "sampling_rate": 0.01, "steps": 9},
            "too extreme",
        ),
        (ObjectivePerturbation(1.0, 0.25, 1.0, 5.0, problems=3).to_dict(), "not covered"),
        ({"kind": "full-batch-gaussian"}, "cannot be read"),
        ({"kind": "full-batch-gaussian", "noise_multiplier": "x", "steps": 3}, "cannot be read"),
        ({}, "cannot be read"),
        (FullBatchGaussian(0.01, 100).to_dict(), "beyond 600"),
    ],
)
def test_where_it_has_none_it_says_why(record, words):
    found = second_opinion.second_opinion(record, 1e-5)
    assert found.epsilon is None
    assert words in found.method


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "group"),
    [
        (1.0, 0.01, 1, 1),
        (0.5, 0.2, 3, 1),
        (0.3, 0.01, 20, 1),
        (2.0, 0.05, 40, 2),
        (1.5, 0.02, 300, 4),
        (1.0, 1e-4, 10, 1),
    ],
)
def test_few_steps_little_noise_and_groups(noise, rate, steps, group, delta):
    mechanism = PoissonGaussian(noise, rate, steps)
    first = best_bound(mechanism, delta=delta, records_per_unit=group).epsilon
    second = second_opinion.second_opinion(mechanism.to_dict(), delta, records_per_unit=group).epsilon
    assert 0.98 * first - 1e-6 <= second <= first * (1 + 1e-6) + 1e-9


def test_objective_perturbation_is_covered_above_its_threshold():
    mechanism = ObjectivePerturbation(1.0, 0.25, 10.0, 5.0)
    for delta in (1e-2, 1e-5, 1e-9):
        first = best_bound(mechanism, delta=delta).epsilon
        second = second_opinion.second_opinion(mechanism.to_dict(), delta).epsilon
        assert second == pytest.approx(first, rel=1e-7)


def test_groups():
    found = second_opinion.second_opinion(FullBatchGaussian(10.0, 50).to_dict(), 1e-5, records_per_unit=3)
    assert found.epsilon == pytest.approx(
        best_bound(FullBatchGaussian(10.0, 50), delta=1e-5, records_per_unit=3).epsilon
    )


def test_deep_nesting_is_read_without_recursion():
    record = FullBatchGaussian(10.0, 50).to_dict()
    for _ in range(5000):
        record = {"kind": "sequence", "parts": [record]}
    assert second_opinion.second_opinion(record, 1e-5).epsilon > 1


def test_it_shares_no_code_with_the_first_path():
    tree = ast.parse(inspect.getsource(second_opinion))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not {m for m in modules if m and m.startswith("dptaft")}


@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
@pytest.mark.parametrize("noise", [8.0, (5.0, 9.0, 6.0, 7.0) * 10])
def test_no_last_iterate_bound_is_below_the_linear_instance(noise, adjacency):
    mechanism = FullBatchGaussian(noise, 40, adjacency=adjacency, released="last-iterate")
    proof = ConvexityCertificate.issue(
        loss="multinomial-logistic", feature_bound=0.5, l2_clip_norm=1.0, regularization=0.2, step_size=0.5,
        normaliser=100.0, sampling="full-batch", steps=40, records=100, adjacency=adjacency,
    )  # fmt: skip
    report = best_bound(mechanism, proof, delta=1e-5)
    assert report.name == "last-iterate noisy gradient descent"
    exact = second_opinion.linear_instance(mechanism.to_dict(), proof.to_dict(), 1e-5).epsilon
    assert exact <= report.epsilon * (1 + 1e-9)
    if isinstance(noise, float):
        assert exact == pytest.approx(report.epsilon, rel=1e-8)


def proof(**changes):
    """Certificate of cross-entropy with one clip norm 1.5 above its gradient bound."""
    return ConvexityCertificate.issue(**{
        "loss": "multinomial-logistic", "feature_bound": 1.0, "l2_clip_norm": 1.5, "regularization": 0.1,
        "step_size": 1.0, "normaliser": 100.0, "sampling": "full-batch", "steps": 2, "records": 100, **changes,
    })  # fmt: skip


def linear(mechanism, certificate, delta=1e-5):
    return second_opinion.linear_instance(mechanism.to_dict(), certificate.to_dict(), delta).epsilon


def test_a_projection_between_very_unequal_noises_hides_next_to_nothing():
    mechanism = FullBatchGaussian((1e9, 1.0), 2, released="last-iterate")
    assert 4.0 < linear(mechanism, proof(diameter=1.0)) <= best_bound(mechanism, delta=1e-5).epsilon
    assert linear(mechanism, proof()) < 1e-6


def test_the_projected_instance_is_below_a_simulation_of_it():
    """Two steps, half of the noise in either: P of the sets is what a fine simulation without rounding finds."""
    keep, shift, noise, steps = 0.9, 0.3, 0.5, 4
    chain = second_opinion._Chain(*(np.full(steps, v) for v in (keep, shift, noise)), 1.0)
    points = np.linspace(-0.5, 0.5, 501)
    low, high = (chain._above(points, True, up) for up in (False, True))
    x = np.zeros(400_000)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        x = np.clip(keep * x + shift + noise * rng.standard_normal(len(x)), -0.5, 0.5)
    for k in (100, 250, 400, 500):
        seen = float(np.mean(x >= points[k]))
        assert low[k] - 5e-3 <= seen <= high[k] + 5e-3
        assert 0 <= high[k] - low[k] < 0.02


@pytest.mark.parametrize("diameter", [None, 0.5])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_sampled_records_have_a_floor(rate, diameter):
    mechanism = PoissonGaussian(1.0, rate, 60, released="last-iterate")
    certificate = proof(
        sampling="poisson", steps=60, sampling_rate=rate, records=200, max_batch_size=200, feature_bound=0.5,
        regularization=0.2, normaliser=100.0, diameter=diameter,
    )  # fmt: skip
    found = linear(mechanism, certificate)
    assert 0 < found <= best_bound(mechanism, certificate, delta=1e-5).epsilon
    if diameter is None:  # against plain simulation of the sum of participations
        powers = 0.8 ** np.arange(60) / math.sqrt(np.sum(0.64 ** np.arange(60)))
        sums = (np.random.default_rng(1).random((20_000, 60)) < rate) @ powers
        means, weights = second_opinion._participation(powers, rate)
        assert 0.99 < weights.sum() <= 1 + 1e-9
        assert means @ weights == pytest.approx(sums.mean(), rel=0.04)
        assert means @ weights <= rate * powers.sum()


@pytest.mark.parametrize("partition", ["fixed", "secret-random"])
def test_cyclic_batches_have_a_floor(partition):
    mechanism = CyclicGaussian(3.0, 10, 20, partition=partition, released="last-iterate")
    certificate = proof(
        sampling="cyclic", steps=200, batches_per_epoch=10, feature_bound=0.5, regularization=0.02,
        normaliser=50.0,
    )  # fmt: skip
    found, bound = linear(mechanism, certificate), best_bound(mechanism, certificate, delta=1e-5).epsilon
    assert 0.5 * bound < found <= bound


def test_linear_instances_that_cannot_be_read():
    record, raw = FullBatchGaussian(8.0, 4).to_dict(), {"step_size": 1.0, "strong_convexity": 0.1}
    assert second_opinion.linear_instance(record, raw, 1e-5).epsilon > 0
    assert second_opinion.linear_instance(record, raw | {"diameter": 1.0}, 1e-5).epsilon is None
    assert second_opinion.linear_instance(record, {"step_size": "x"}, 1e-5).epsilon is None
    objective = ObjectivePerturbation(1.0, 0.25, 1.0, 5.0).to_dict()
    assert "no linear instance" in second_opinion.linear_instance(objective, raw, 1e-5).method
    assert "too many" in second_opinion.linear_instance(record | {"steps": 2**50}, raw, 1e-5).method

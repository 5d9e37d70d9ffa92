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
            integral = second_opinion._Integral(mu * mu, ((noise, rate, 1),), direction)
            assert math.exp(integral.log_delta(epsilon)) == pytest.approx(delta, rel=1e-4)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"kind": "poisson-gaussian", "noise_multiplier": 1.0, "sampling_rate": 0.01, "steps": 1},
            "too slowly",
        ),
        (
            {"kind": "poisson-gaussian", "noise_multiplier": 0.01, "sampling_rate": 0.01, "steps": 9},
            "finer grid",
        ),
        (ObjectivePerturbation(1.0, 0.25, 1.0, 5.0).to_dict(), "not covered"),
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


def test_groups():
    found = second_opinion.second_opinion(FullBatchGaussian(10.0, 50).to_dict(), 1e-5, records_per_unit=3)
    assert found.epsilon == pytest.approx(
        best_bound(FullBatchGaussian(10.0, 50), delta=1e-5, records_per_unit=3).epsilon
    )
    assert (
        second_opinion.second_opinion(
            PoissonGaussian(1.0, 0.01, 100).to_dict(), 1e-5, records_per_unit=2
        ).epsilon
        is None
    )


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


def test_linear_instances_exist_for_full_batches_alone():
    record, proof = FullBatchGaussian(8.0, 4).to_dict(), {"step_size": 1.0, "strong_convexity": 0.1}
    assert second_opinion.linear_instance(record, proof, 1e-5).epsilon > 0
    assert second_opinion.linear_instance(record, proof | {"diameter": 1.0}, 1e-5).epsilon is None
    assert second_opinion.linear_instance(PoissonGaussian(1.0, 0.1, 5).to_dict(), proof, 1e-5).epsilon is None
    assert second_opinion.linear_instance(record, {"step_size": "x"}, 1e-5).epsilon is None

"""Softmax objective perturbation: exact densities by change of variables lie below the derived curve."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dptaft_accounting.accountants.composition import composition_profile
from dptaft_accounting.accountants.one_shot import SoftmaxObjectiveProfile
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import (
    FullBatchGaussian,
    SequenceComposition,
    SoftmaxObjectivePerturbation,
    mechanism_from_dict,
)
from dptaft_accounting.tradeoff import mu_to_delta, mu_to_epsilon

EPSILONS = (0.0, 0.1, 0.3, 0.7, 1.5, 3.0)


def field_and_hessian(theta, rows, label, margin):
    """Gradient (..., d) and Hessian (..., d, d) of one record's loss at points theta (..., d)."""
    logits = theta @ rows.T + margin
    logits[..., label] -= margin
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    moved = rows - rows[label]
    mean = p @ moved
    second = np.einsum("...c,ci,cj->...ij", p, moved, moved)
    return mean, second - mean[..., :, None] * mean[..., None, :]


def log_density(theta, records, lam, sigma):
    """Log density of the minimiser of sum of losses + lam/2 |theta|^2 + <b, theta> for records (J, y, a)."""
    d = theta.shape[-1]
    gradient, hessian = lam * theta, np.broadcast_to(lam * np.eye(d), (*theta.shape, d)).copy()
    for record in records:
        mean, curvature = field_and_hessian(theta, *record)
        gradient, hessian = gradient + mean, hessian + curvature
    squared = (gradient**2).sum(-1) / (2 * sigma**2)
    return np.log(np.linalg.det(hessian)) - squared - d * math.log(math.sqrt(2 * math.pi) * sigma)


def grid(d, lam, sigma, pull, points):
    """Points that hold all but 1e-9 of the mass where the other gradients add up to at most `pull`."""
    half = (pull + 6.5 * sigma) / lam
    axis = np.linspace(-half, half, points)
    return np.stack(np.meshgrid(*[axis] * d, indexing="ij"), -1), (axis[1] - axis[0]) ** d


def true_deltas(others, record, lam, sigma, points=3001, new=None):
    """Exact delta at EPSILONS, with the record against without (or with `new`), and the other way."""
    d = record[0].shape[1]
    theta, cell = grid(d, lam, sigma, len(others) + 1.5, points)
    first = np.exp(log_density(theta, [*others, record], lam, sigma))
    second = np.exp(log_density(theta, [*others] + ([] if new is None else [new]), lam, sigma))
    assert first.sum() * cell == pytest.approx(1.0, abs=2e-3)
    assert second.sum() * cell == pytest.approx(1.0, abs=2e-3)
    return tuple(
        [np.maximum(p - math.exp(eps) * q, 0).sum() * cell for eps in EPSILONS]
        for p, q in ((first, second), (second, first))
    )


def random_rows(random, classes, d):
    """Rows whose largest distance is 1."""
    rows = random.normal(size=(classes, d))
    distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    return rows / distances.max()


def worst(exact, profile):
    """Largest exact delta over that of the curve."""
    pairs = [(x, eps) for side in exact for x, eps in zip(side, EPSILONS, strict=True)]
    return max(x / profile.delta(eps) for x, eps in pairs if x > 1e-9)


@pytest.mark.parametrize("seed", range(24))
def test_exact_privacy_loss_of_small_instances_is_below_the_curve(seed):
    random = np.random.default_rng(seed)
    d, classes = (1, int(random.integers(2, 6))) if seed % 3 else (2, int(random.integers(3, 5)))
    lam, sigma = math.exp(random.uniform(-2.5, 1)), math.exp(random.uniform(-0.7, 1))
    record = (random_rows(random, classes, d), 0, random.choice([0.0, 4.0]))
    others = [
        (random_rows(random, classes, d), int(random.integers(classes)), record[2])
        for _ in range(random.integers(0, 4))
    ]
    exact = true_deltas(others, record, lam, sigma, points=3001 if d == 1 else 301)
    profile = composition_profile(SoftmaxObjectivePerturbation(1.0, classes, lam, sigma))
    assert worst(exact, profile) <= 1 + 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_replace_one(seed):
    random = np.random.default_rng(seed)
    lam, sigma = math.exp(random.uniform(-2, 1)), math.exp(random.uniform(0, 1))
    record, new = ((random_rows(random, 3, 1), label, 0.0) for label in (0, 1))
    exact = true_deltas([], record, lam, sigma, new=new)
    mechanism = SoftmaxObjectivePerturbation(1.0, 3, lam, sigma, adjacency="replace-one")
    assert worst(exact, composition_profile(mechanism)) <= 1 + 1e-3
    # opposite pairs of rows move the noise by twice the diameter
    ends = np.array([[0.0], [1.0], [1.0]])
    exact = true_deltas([], (ends, 0, 9.0), lam, 1.0, new=(ends, 1, 9.0))
    assert worst(exact, composition_profile(replace(mechanism, noise_std=1.0))) <= 1 + 1e-3


def test_every_part_of_the_curve_is_needed():
    """Without kappa, without the factor C - 1, or with less diameter, an instance exceeds the curve."""
    equilateral = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    with_record, without = true_deltas([], (equilateral, 0, 0.0), 0.02, 1.0, points=501)
    curve = SoftmaxObjectiveProfile.of(SoftmaxObjectivePerturbation(1.0, 3, 0.02, 1.0))
    assert worst((with_record, without), curve) <= 1
    # the record's absence is told by the largest of C - 1 Gaussian losses, without help of the determinant
    free = replace(curve, shift=0.0)
    assert 0.8 < worst([without], free) <= 1
    assert worst([without], replace(free, alternatives=1)) > 1.4
    assert worst([without], replace(free, mu=0.9)) > 1.2
    assert worst([with_record], free) > 2
    segment = np.array([[0.0], [1.0]])
    exact = true_deltas([], (segment, 0, 0.0), 0.1, 3.0, points=10_001)
    curve = SoftmaxObjectiveProfile.of(SoftmaxObjectivePerturbation(1.0, 2, 0.1, 3.0))
    assert worst(exact, curve) <= 1
    assert worst(exact, replace(curve, shift=0.0)) > 1.5


def test_formula_limits_and_output_noise():
    lam, sigma = 5.0, 1.0
    profile = composition_profile(SoftmaxObjectivePerturbation(1.0, 2, lam, sigma))
    # lambda >= 2 sigma^2: the determinant never helps the adversary, two classes are a Gaussian mechanism
    for eps in (0.0, 0.5, 3.0):
        assert profile.delta(eps) == pytest.approx(mu_to_delta(1.0, eps), rel=1e-9)
    ten = composition_profile(SoftmaxObjectivePerturbation(1.0, 10, lam, sigma))
    assert ten.delta(3.0) == pytest.approx(9 * mu_to_delta(1.0, 3.0), rel=1e-9)
    assert ten.epsilon(9e-6) == pytest.approx(mu_to_epsilon(1.0, 1e-6), rel=1e-6)
    hidden = SoftmaxObjectivePerturbation(1.0, 10, lam, sigma, gradient_tolerance=0.5, output_noise_std=0.4)
    found = composition_profile(hidden)
    assert found.output_mu == pytest.approx(2 * 0.5 / (5 * 0.4))
    expected = mu_to_delta(0.5, 3.0) + 9 * mu_to_delta(math.sqrt(1.25), 3.0)
    assert found.delta(3.0) == pytest.approx(expected, rel=1e-9)
    # numerical composition of the two parts is the slow way to the same thing
    gaussian = FullBatchGaussian(2.0, 1)
    both = best_bound(
        SequenceComposition((replace(hidden, gradient_tolerance=0.0), gaussian)), delta=1e-5
    ).epsilon
    assert best_bound(hidden, delta=1e-5).epsilon == pytest.approx(both, rel=0.02)
    moved = composition_profile(SoftmaxObjectivePerturbation(1.0, 3, 0.5, 1.0))
    x = min(2 - 0.5, (1 / 3) / 2)
    assert moved.shift == pytest.approx(2 * (math.log1p(x / 0.5) - x / 2))
    swap = composition_profile(SoftmaxObjectivePerturbation(1.0, 3, 0.5, 1.0, adjacency="replace-one"))
    assert (swap.mu, swap.alternatives) == (pytest.approx(2.0), 8)


def test_curve_is_monotone_and_tamed_around_zero():
    curve = composition_profile(SoftmaxObjectivePerturbation(1.0, 10, 0.3, 2.0))
    epsilons = np.linspace(0.0, 4.0, 401)
    deltas = np.array([curve.delta(float(eps)) for eps in epsilons])
    assert (np.diff(deltas) <= 1e-15).all()
    # around 0 the sum over vertices is above 1; the chord between two known points is not
    raw = 9 * mu_to_delta(curve.mu, -curve.shift)
    assert curve.delta(0.0) < 0.85 < 1 < raw
    assert composition_profile(SoftmaxObjectivePerturbation(1.0, 10, 0.3, 2.1)).delta(2.0) < curve.delta(2.0)
    assert composition_profile(SoftmaxObjectivePerturbation(1.0, 10, 0.4, 2.0)).delta(2.0) < curve.delta(2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 10, 1.0, 1.0), "diameter"),
        ((1.0, 1, 1.0, 1.0), "classes must be at least 2"),
        ((1.0, 10, 0.0, 1.0), "regularization"),
        ((1.0, 10, 1.0, float("nan")), "noise_std"),
        ((1.0, 10, 1.0, 1.0, 1e-3), "output_noise_std above 0"),
        ((1.0, 10, 1.0, 1.0, 0.0, 0.0, "swap"), "adjacency must be one of"),
    ],
)
def test_bad_records(arguments, message):
    with pytest.raises(MechanismError, match=message):
        SoftmaxObjectivePerturbation(*arguments)


def test_record_round_trip():
    record = SoftmaxObjectivePerturbation(1.0, 10, 2.0, 1.5, 1e-3, 0.1, "add-remove")
    assert mechanism_from_dict(record.to_dict()) == record

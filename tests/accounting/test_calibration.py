"""Calibration: never less privacy than asked, overshoot below 0.1 %, clear errors where nothing works."""

import math

import pytest

from dptaft_accounting.bounds import best_bound
from dptaft_accounting.calibration import (
    Target,
    calibrate_noise_multiplier,
    calibrate_sampling_rate,
    calibrate_steps,
)
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import CalibrationError
from dptaft_accounting.mechanisms import FullBatchGaussian, ObjectivePerturbation, PoissonGaussian
from dptaft_accounting.tradeoff import epsilon_to_mu

TARGETS = [
    Target(epsilon=3.0, delta=1e-5),
    Target(epsilon=0.2, delta=1e-6),
    Target(epsilon=25.0, delta=1e-5),
    Target(mu=0.6),
    Target(advantage=0.2),
    Target(tpr=0.05, fpr=1e-2),
]
FAMILIES = {
    "full batch": lambda z: FullBatchGaussian(z, 50),
    "poisson": lambda z: PoissonGaussian(z, 0.02, 300),
    "objective": lambda z: ObjectivePerturbation(1.0, 0.01, 4.0, z),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.quantity} {t.value:g}")
def test_target_is_met_with_less_than_a_thousandth_to_spare(family, target):
    build = FAMILIES[family]
    z = calibrate_noise_multiplier(build, target)
    assert target.measure(build(z)) <= target.value
    assert target.measure(build(z * 0.999)) > target.value


def test_the_reference_calibration(oracles):
    z = calibrate_noise_multiplier(
        lambda z: PoissonGaussian(z, 0.01, 10_000), Target(epsilon=3.0, delta=1e-5)
    )
    assert z == pytest.approx(1.5650, rel=1e-3)
    assert 2.997 < best_bound(PoissonGaussian(z, 0.01, 10_000), delta=1e-5).epsilon <= 3.0


def test_full_batch_is_the_closed_form():
    z = calibrate_noise_multiplier(lambda z: FullBatchGaussian(z, 400), Target(epsilon=2.0, delta=1e-6))
    assert z == pytest.approx(20 / epsilon_to_mu(2.0, 1e-6), rel=5e-5)


def test_certificate_lowers_the_noise():
    proof = ConvexityCertificate.issue(
        loss="binary-logistic",
        feature_bound=1.0,
        l2_clip_norm=1.0,
        regularization=0.02,
        step_size=1.0,
        normaliser=100.0,
        sampling="full-batch",
        steps=500,
        records=100,
    )
    target = Target(epsilon=3.0, delta=1e-5)

    def build(z):
        return FullBatchGaussian(z, 500, released="last-iterate")

    plain = calibrate_noise_multiplier(build, target)
    convex = calibrate_noise_multiplier(build, target, certificate=lambda mechanism: proof)
    assert convex < 0.5 * plain
    assert best_bound(build(convex), proof, delta=1e-5).epsilon <= 3.0
    double = calibrate_noise_multiplier(build, target, records_per_unit=2)
    assert double == pytest.approx(2 * plain, rel=1e-4)


def test_steps_and_rate_are_the_largest_that_hold():
    target = Target(epsilon=2.0, delta=1e-5)
    steps = calibrate_steps(lambda t: PoissonGaussian(1.0, 0.01, t), target)
    assert target.measure(PoissonGaussian(1.0, 0.01, steps)) <= 2.0
    assert target.measure(PoissonGaussian(1.0, 0.01, steps + 1)) > 2.0
    p = calibrate_sampling_rate(lambda p: PoissonGaussian(1.0, p, 1000), target)
    assert target.measure(PoissonGaussian(1.0, p, 1000)) <= 2.0
    assert target.measure(PoissonGaussian(1.0, p * 1.001, 1000)) > 2.0
    assert calibrate_sampling_rate(lambda p: PoissonGaussian(100.0, p, 10), target) == 1.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "exactly one"),
        ({"epsilon": 1.0, "delta": 1e-5, "mu": 1.0}, "exactly one"),
        ({"epsilon": 1.0}, "go together"),
        ({"mu": 1.0, "delta": 1e-5}, "go together"),
        ({"tpr": 0.1}, "go together"),
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon must be greater than 0"),
        ({"epsilon": math.nan, "delta": 1e-5}, "epsilon must be finite"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta must lie strictly between"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta must lie strictly between"),
        ({"mu": -1.0}, "mu must be greater than 0"),
        ({"advantage": 1.0}, "advantage must lie strictly"),
        ({"tpr": 0.01, "fpr": 0.01}, "not above fpr"),
    ],
)
def test_targets_must_make_sense(values, words):
    with pytest.raises(CalibrationError, match=words):
        Target(**values)


def test_unreachable_targets_are_errors():
    target = Target(epsilon=0.01, delta=1e-5)
    # the Hessian term alone costs log(1/(1 - 1/2)), whatever the noise
    with pytest.raises(CalibrationError, match=r"no noise multiplier up to 1e.06 reaches epsilon 0.01"):
        calibrate_noise_multiplier(lambda z: ObjectivePerturbation(1.0, 1.0, 2.0, z), target)
    with pytest.raises(CalibrationError, match="one step already exceeds"):
        calibrate_steps(lambda t: FullBatchGaussian(1.0, t), target)
    with pytest.raises(CalibrationError, match="never binds"):
        calibrate_steps(lambda t: FullBatchGaussian(1e9, t), Target(mu=1.0))

"""Certificates: the numbers they hold, what they refuse, and that they fit one mechanism only."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import LOSSES, ConvexityCertificate
from dptaft_accounting.errors import CertificateError, MechanismError
from dptaft_accounting.mechanisms import (
    CyclicGaussian,
    FullBatchGaussian,
    OutputPerturbation,
    PoissonGaussian,
)

BASE = {
    "loss": "multinomial-logistic",
    "feature_bound": 2.0,
    "l2_clip_norm": 3.0,
    "regularization": 0.1,
    "step_size": 0.5,
    "normaliser": 50.0,
    "sampling": "full-batch",
    "steps": 20,
    "records": 50,
}
FULL = FullBatchGaussian(5.0, 20, released="last-iterate")


def issue(**changes):
    return ConvexityCertificate.issue(**{**BASE, **changes})


def test_numbers_follow_from_loss_and_features():
    proof = issue()
    assert proof.gradient_bound == pytest.approx(2 * math.sqrt(2))
    assert proof.smoothness == pytest.approx(0.5 * 4)
    assert proof.contractions == pytest.approx((max(abs(1 - 0.05), abs(1 - 0.5 * (0.1 + 2.0))),))
    assert issue(adjacency="add-remove").max_batch_size == 51
    assert ConvexityCertificate.from_dict(json.loads(json.dumps(proof.to_dict()))) == proof


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_loss_constants_bound_what_is_observed(classes):
    rng = np.random.default_rng(classes)
    constants = LOSSES["multinomial-logistic" if classes > 2 else "binary-logistic"]
    largest_gradient = largest_curvature = 0.0
    for _ in range(500):
        logits = rng.normal(size=classes) * rng.choice([0.1, 1, 10])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        if classes > 2:
            gradient, hessian = p - np.eye(classes)[rng.integers(classes)], np.diag(p) - np.outer(p, p)
            curvature = float(np.linalg.eigvalsh(hessian)[-1])
        else:
            gradient, curvature = p[0], p[0] * (1 - p[0])
        largest_gradient = max(largest_gradient, float(np.linalg.norm(gradient)))
        largest_curvature = max(largest_curvature, curvature)
    assert 0.7 * constants.gradient < largest_gradient <= constants.gradient
    assert 0.7 * constants.curvature < largest_curvature <= constants.curvature + 1e-12


def test_contraction_factor_bounds_a_real_training_step():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 5))
    x *= 2 / np.linalg.norm(x, axis=1, keepdims=True)
    y = rng.integers(0, 2, 50) * 2 - 1
    proof = issue(loss="binary-logistic", step_size=1.8, l2_clip_norm=2.0)

    def step(theta):
        slope = -y / (1 + np.exp(y * (x @ theta)))
        return theta - 1.8 * (x.T @ slope / 50 + 0.1 * theta)

    worst = 0.0
    for _ in range(300):
        a, b = rng.normal(size=(2, 5)) * rng.choice([0.1, 1, 5])
        worst = max(worst, float(np.linalg.norm(step(a) - step(b)) / np.linalg.norm(a - b)))
    assert worst <= proof.contractions[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"momentum": 0.9}, "momentum 0.9 is not covered"),
        ({"momentum": math.nan}, "momentum"),
        ({"optimizer": "adam"}, "optimizer 'adam' is not covered.*use sgd"),
        ({"released_iterate": "average"}, "released_iterate 'average' is not covered"),
        ({"released_iterate": "best"}, "checkpoints chosen on the data"),
        ({"gradient_clipping": True}, "breaks convexity.*bound the Jacobian"),
        ({"loss": "focal"}, "loss 'focal' is not known to be convex"),
        ({"loss": "squared"}, "unbounded; clip them"),
        ({"l2_clip_norm": 1.0}, "gradient_bound 2.82843 exceeds l2_clip_norm 1"),
        ({"step_size": 1.0}, "expands distances.*step_size must be at most 0.952381"),
        ({"step_size": -1.0}, "step_size must be greater than 0"),
        ({"step_size": (0.1, 0.2)}, "2 values for 20 steps"),
        ({"regularization": math.nan}, "strong_convexity must be finite"),
        ({"regularization": -0.1}, "strong_convexity must be at least 0"),
        ({"diameter": 0.0}, "diameter must be greater than 0"),
        ({"feature_bound": math.inf}, "feature_bound must be finite"),
        ({"sampling": "shuffled"}, "sampling must be one of"),
        ({"sampling": "poisson", "sampling_rate": 0.1}, "max_batch_size is needed"),
        ({"sampling": "poisson", "sampling_rate": 1.5, "max_batch_size": 50}, "sampling_rate"),
        ({"sampling_rate": 0.1}, "sampling_rate has no meaning"),
        ({"sampling": "cyclic"}, "batches_per_epoch must be a whole number"),
        ({"max_batch_size": 49}, "below the 50 records"),
        ({"steps": 2.5}, "steps must be a whole number"),
    ],
)
def test_refusals_name_the_assumption_and_the_remedy(changes, words):
    with pytest.raises(CertificateError, match=words) as caught:
        issue(**changes)
    assert "\n" not in str(caught.value)


def test_clipping_one_scalar_output_is_covered():
    proof = issue(loss="squared", gradient_clipping=True, l2_clip_norm=1.0, step_size=0.2)
    assert proof.gradient_bound == 1.0
    assert proof.smoothness == 4.0


@pytest.mark.parametrize(
    ("mechanism", "words"),
    [
        (FullBatchGaussian(5.0, 21, released="last-iterate"), "steps 20, the mechanism 21"),
        (FullBatchGaussian(5.0, 20), "released is 'all-iterates'"),
        (FullBatchGaussian(5.0, 20, "replace-one", "last-iterate"), "adjacency"),
        (
            PoissonGaussian(5.0, 0.1, 20, released="last-iterate"),
            "sampling 'full-batch', the mechanism 'poisson'",
        ),
        (CyclicGaussian(5.0, 2, 10, released="last-iterate"), "sampling"),
        (OutputPerturbation(1.0, 0.1, 10, 1.0), "released is 'undefined'"),
    ],
)
def test_a_certificate_fits_its_own_mechanism_only(mechanism, words):
    with pytest.raises((CertificateError, MechanismError), match=words):
        best_bound(mechanism, issue(), delta=1e-5)


def test_poisson_rate_and_cyclic_batches_must_match():
    poisson = issue(sampling="poisson", sampling_rate=0.1, max_batch_size=50)
    with pytest.raises(CertificateError, match="sampling_rate"):
        best_bound(PoissonGaussian(5.0, 0.2, 20, released="last-iterate"), poisson, delta=1e-5)
    cyclic = issue(sampling="cyclic", batches_per_epoch=5, normaliser=10.0)
    with pytest.raises(CertificateError, match="batches_per_epoch"):
        best_bound(CyclicGaussian(5.0, 2, 10, released="last-iterate"), cyclic, delta=1e-5)


def test_unknown_and_missing_fields_are_refused():
    values = issue().to_dict()
    with pytest.raises(CertificateError, match="no field 'trust'"):
        ConvexityCertificate.from_dict({**values, "trust": 1})
    del values["steps"]
    with pytest.raises(CertificateError, match="incomplete"):
        ConvexityCertificate.from_dict(values)


def test_without_certificate_only_composition():
    assert [b.name for b in best_bound(FULL, delta=1e-5).bounds] == ["composition"]


@pytest.mark.parametrize("step_size", [0.1, 1e-9, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("regularization", [0.0, 1e-12, 1e-7, 0.1, 1 / 3])
def test_contraction_is_rounded_up_from_exact_arithmetic(step_size, regularization):
    proof = issue(step_size=step_size, regularization=regularization)
    eta, low = Fraction(step_size), Fraction(regularization)
    top = low + Fraction(proof.smoothness) * proof.max_batch_size / Fraction(proof.normaliser)
    exact = max(abs(1 - eta * low), abs(1 - eta * top))
    (found,) = proof.contractions
    assert math.nextafter(found, 0) < exact <= Fraction(found)

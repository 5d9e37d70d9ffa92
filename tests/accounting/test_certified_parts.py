"""Certificates inside compositions: every part keeps its own last-iterate bound."""

import math

import pytest

from dptaft_accounting import (
    CertifiedLastIterate,
    ConvexityCertificate,
    FullBatchGaussian,
    ParallelComposition,
    PoissonGaussian,
    PrivacyStatement,
    SequenceComposition,
    best_bound,
    mechanism_from_dict,
)
from dptaft_accounting.errors import CertificateError, MechanismError

DELTA = 1e-5


def certificate_for(mechanism, **changes):
    values = {
        "sampling": "full-batch",
        "steps": mechanism.steps,
        "step_size": 1.0,
        "strong_convexity": 0.05,
        "smoothness": 0.5,
        "gradient_bound": 1.0,
        "l2_clip_norm": 1.0,
        "normaliser": 100.0,
        "records": 100,
        "max_batch_size": 100,
        "origin": {"test": "numbers of a test"},
    }
    return ConvexityCertificate(**values | changes)


def full_batch(noise=40.0, steps=300):
    return FullBatchGaussian(noise, steps=steps, released="last-iterate")


def part(noise=40.0, steps=300):
    base = full_batch(noise, steps)
    return CertifiedLastIterate(base, certificate_for(base), DELTA)


def test_a_part_keeps_its_bound():
    base = full_batch()
    own = best_bound(base, certificate_for(base), delta=DELTA)
    assert own.epsilon < 0.7 * own.named("composition").epsilon
    assert best_bound(part(), delta=DELTA).epsilon == own.epsilon
    assert best_bound(ParallelComposition((part(),)), delta=DELTA).epsilon == own.epsilon


def test_parallel_is_the_largest_and_sequence_adds_squares():
    small, large = part(60.0), part(30.0)
    largest = best_bound(large, delta=DELTA).epsilon
    both = best_bound(ParallelComposition((small, large)), delta=DELTA)
    assert both.epsilon == largest
    mus = [best_bound(p, delta=DELTA).profile.mu for p in (small, large)]
    sequence = best_bound(SequenceComposition((small, large)), delta=DELTA)
    assert sequence.profile.epsilon(DELTA) > largest
    from dptaft_accounting.tradeoff import GaussianProfile

    exact = GaussianProfile(math.hypot(*mus)).epsilon(DELTA)
    assert exact * (1 - 1e-9) <= sequence.epsilon <= exact * 1.01


def test_curves_that_are_not_gaussian_compose_soundly():
    base = PoissonGaussian(1.5, 0.05, 40, released="last-iterate")
    poisson = CertifiedLastIterate(
        base,
        certificate_for(
            base, sampling="poisson", sampling_rate=0.05, normaliser=5.0, max_batch_size=20, step_size=0.05
        ),
        DELTA,
    )
    own = best_bound(poisson, delta=DELTA).epsilon
    plain = best_bound(base, delta=DELTA).epsilon
    assert own <= plain
    mixed = best_bound(ParallelComposition((poisson, part())), delta=DELTA).epsilon
    assert mixed >= max(own, best_bound(part(), delta=DELTA).epsilon) * (1 - 1e-9)
    assert best_bound(SequenceComposition((poisson, part())), delta=DELTA).epsilon > mixed


def test_round_trip_and_statement():
    composed = ParallelComposition((part(), part(60.0)))
    assert mechanism_from_dict(composed.to_dict()) == composed
    assert hash(mechanism_from_dict(composed.to_dict())) == hash(composed)
    statement = PrivacyStatement.build(composed, DELTA)
    again = PrivacyStatement.from_json(statement.to_json())
    assert again.recompute().holds
    assert again.claim["epsilon"] == best_bound(part(), delta=DELTA).epsilon


def test_certificates_of_other_mechanisms_are_refused():
    base = full_batch()
    with pytest.raises(CertificateError, match="steps"):
        CertifiedLastIterate(base, certificate_for(full_batch(steps=299)), DELTA)
    released = FullBatchGaussian(40.0, steps=300)
    with pytest.raises(MechanismError, match="only the last iterate"):
        CertifiedLastIterate(released, certificate_for(base), DELTA)
    with pytest.raises(MechanismError, match="delta"):
        CertifiedLastIterate(base, certificate_for(base), 2.0)
    record = part().to_dict()
    record["certificate"]["strong_convexity"] = -1.0
    with pytest.raises(CertificateError):
        mechanism_from_dict(record)

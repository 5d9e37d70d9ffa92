"""One contract that every accountant passes: a valid, consistent, monotone curve."""

import itertools
import math

import pytest

from dptaft_accounting.accountants.hidden_participation import Problem, hidden_participation_profile
from dptaft_accounting.accountants.rdp import rdp_profile
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.mechanisms import (
    CyclicGaussian,
    FullBatchGaussian,
    ObjectivePerturbation,
    OutputPerturbation,
    ParallelComposition,
    PoissonGaussian,
    RepeatAndSelect,
    SequenceComposition,
)
from dptaft_accounting.tradeoff import advantage, bayes_error, tpr_at_fpr

FULL, POISSON = FullBatchGaussian(8.0, 20), PoissonGaussian(1.2, 0.05, 100)


def cyclic_secret():
    mechanism = CyclicGaussian(4.0, 5, 10, partition="secret-random", released="last-iterate")
    proof = ConvexityCertificate.issue(
        loss="binary-logistic",
        feature_bound=1.0,
        l2_clip_norm=1.0,
        regularization=0.05,
        step_size=1.0,
        normaliser=10.0,
        sampling="cyclic",
        steps=50,
        records=50,
        batches_per_epoch=5,
    )
    return best_bound(mechanism, proof, delta=1e-5).profile


PROFILES = {
    "gaussian": lambda: best_bound(FULL, delta=1e-5).profile,
    "pld": lambda: best_bound(POISSON, delta=1e-5).profile,
    "pld of a group": lambda: best_bound(POISSON, delta=1e-5, records_per_unit=2).profile,
    "generic group": lambda: best_bound(RepeatAndSelect(FULL, 4.0), delta=1e-5, records_per_unit=2).profile,
    "renyi": lambda: rdp_profile(POISSON),
    "selection": lambda: best_bound(RepeatAndSelect(FULL, 4.0), delta=1e-5).profile,
    "sequence": lambda: best_bound(SequenceComposition((FULL, POISSON)), delta=1e-5).profile,
    "parallel": lambda: best_bound(ParallelComposition((FULL, POISSON)), delta=1e-5).profile,
    "objective": lambda: best_bound(ObjectivePerturbation(1.0, 0.1, 5.0, 6.0), delta=1e-5).profile,
    "objectives": lambda: (
        best_bound(ObjectivePerturbation(1.0, 0.1, 5.0, 6.0, problems=3), delta=1e-5).profile
    ),
    "output": lambda: best_bound(OutputPerturbation(1.0, 0.1, 100, 0.3), delta=1e-5).profile,
    "secret partition": cyclic_secret,
    "hidden participation": lambda: hidden_participation_profile(Problem(1.2, 0.05, 100, 0.9), 1e-5),
}


@pytest.fixture(params=PROFILES, scope="module")
def profile(request):
    return PROFILES[request.param]()


def test_delta_decreases_from_at_most_one(profile):
    deltas = [profile.delta(eps) for eps in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0)]
    assert all(0 <= d <= 1 for d in deltas)
    assert all(b <= a for a, b in itertools.pairwise(deltas))


def test_epsilon_inverts_delta_on_the_safe_side(profile):
    found = []
    for delta in (0.3, 1e-2, 1e-4, 1e-6):
        eps = profile.epsilon(delta)
        found.append(eps)
        if math.isfinite(eps):
            assert profile.delta(eps * (1 + 1e-9) + 1e-12) <= delta * (1 + 1e-6)
            if eps > 0.01:
                assert profile.delta(eps * 0.99) > delta * 0.999
    assert found == sorted(found)
    assert math.isfinite(found[2])


def test_beta_is_a_trade_off_curve_below_the_deltas(profile):
    alphas = [1e-6, 1e-4, 0.01, 0.1, 0.3, 0.5, 0.9]
    betas = [profile.beta(a) for a in alphas]
    assert all(0 <= b <= 1 - a + 1e-12 for a, b in zip(alphas, betas, strict=True))
    assert betas == sorted(betas, reverse=True)
    for eps in (0.0, 0.3, 1.0, 3.0):  # every (eps, delta) cuts the region of tests; beta knows of all of them
        for a, b in zip(alphas, betas, strict=True):
            assert b >= 1 - profile.delta(eps) - math.exp(eps) * a - 2e-3


def test_risk_figures_are_consistent(profile):
    gain = advantage(profile)
    assert bayes_error(profile) == pytest.approx(0.5 * (1 - gain))
    assert all(tpr_at_fpr(profile, f) <= min(1.0, f + gain + 1e-9) for f in (1e-3, 0.1, 0.5))


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan, 2.0])
def test_delta_outside_the_open_unit_interval_is_refused(profile, delta):
    with pytest.raises(ValueError, match="delta"):
        profile.epsilon(delta)


def epsilon(mechanism, delta=1e-5):
    return best_bound(mechanism, delta=delta).epsilon


def hidden(z=1.0, p=0.05, steps=200, c=0.95, delta=1e-5):
    return hidden_participation_profile(Problem(z, p, steps, c), delta).epsilon(delta)


@pytest.mark.parametrize(
    "ladder",
    [
        [lambda z=z: epsilon(PoissonGaussian(z, 0.05, 100)) for z in (4.0, 2.0, 1.0, 0.5)],
        [lambda t=t: epsilon(PoissonGaussian(1.0, 0.05, t)) for t in (1, 10, 100, 1000)],
        [lambda p=p: epsilon(PoissonGaussian(1.0, p, 50)) for p in (1e-3, 0.01, 0.1, 0.5, 1.0)],
        [lambda d=d: epsilon(PoissonGaussian(1.0, 0.05, 100), d) for d in (1e-2, 1e-4, 1e-6, 1e-8)],
        [lambda z=z: epsilon(FullBatchGaussian(z, 10)) for z in (40.0, 10.0, 2.0)],
        [lambda z=z: hidden(z=z) for z in (4.0, 2.0, 1.0)],
        [lambda c=c: hidden(c=c) for c in (0.8, 0.9, 0.95)],
        [lambda p=p: hidden(p=p) for p in (0.01, 0.05, 0.2)],
        [lambda d=d: hidden(delta=d) for d in (1e-3, 1e-5, 1e-7)],
    ],
    ids=["z", "steps", "p", "delta", "full z", "hidden z", "hidden c", "hidden p", "hidden delta"],
)
def test_less_private_plans_cost_more(ladder):
    costs = [step() for step in ladder]
    assert all(b > a for a, b in itertools.pairwise(costs))

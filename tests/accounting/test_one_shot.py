"""Objective and output perturbation, selection, compositions in parallel."""

import math
from fractions import Fraction

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, dp_event
from dp_accounting.rdp import RdpAccountant

from dptaft_accounting._search import bisect
from dptaft_accounting.accountants.composition import composition_profile
from dptaft_accounting.accountants.one_shot import ObjectivePerturbationProfile
from dptaft_accounting.accountants.rdp import RdpProfile, rdp, rdp_profile
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import (
    FullBatchGaussian,
    ObjectivePerturbation,
    OutputPerturbation,
    ParallelComposition,
    PoissonGaussian,
    RepeatAndSelect,
    SequenceComposition,
)
from dptaft_accounting.tradeoff import mu_to_delta, mu_to_epsilon


def test_objective_perturbation_against_an_exact_instance():
    """One scalar weight, loss (beta/2)(theta - y)^2 on |theta - y| <= L/beta, against no record: exact
    densities."""
    L, beta, lam, sigma = 1.0, 0.5, 3.0, 1.5
    # minimiser: b = -(lam theta + l'(theta)), density of theta by change of variables
    theta = np.linspace(-6, 6, 400_001)
    y = 0.7
    slope = np.clip(beta * (theta - y), -L, L)
    curvature = lam + beta * (np.abs(theta - y) < L / beta)
    density = np.exp(-((lam * theta + slope) ** 2) / (2 * sigma**2)) * curvature
    without = np.exp(-((lam * theta) ** 2) / (2 * sigma**2)) * lam
    step = (theta[1] - theta[0]) / (math.sqrt(2 * math.pi) * sigma)
    assert density.sum() * step == pytest.approx(1.0, abs=1e-4)
    profile = composition_profile(ObjectivePerturbation(L, beta, lam, sigma))
    for eps in (0.2, 0.5, 1.0, 2.0):
        exact = max(
            np.maximum(density - math.exp(eps) * without, 0).sum(),
            np.maximum(without - math.exp(eps) * density, 0).sum(),
        )
        assert exact * step <= profile.delta(eps)


def test_objective_perturbation_formula_and_composition():
    single = ObjectivePerturbation(1.0, 0.25, 10.0, 5.0)
    curve = ObjectivePerturbationProfile.of(single)
    shift = abs(math.log(1 - 0.025))
    assert curve.delta(1.0) == pytest.approx(2 * mu_to_delta(0.2, 1.0 - shift), rel=1e-9)
    at, chord = math.exp(shift), 1 - (1 - curve.delta(shift)) * math.exp(-shift / 2)
    assert curve.delta(shift / 2) == pytest.approx(chord, rel=1e-9)
    assert curve.delta(0.0) == pytest.approx(1 - (1 - curve.delta(shift)) / at, rel=1e-9)
    edge = shift + 0.02
    assert curve.delta(edge - 1e-9) == pytest.approx(curve.delta(edge + 1e-9), rel=1e-5)
    one = best_bound(single, delta=1e-5).epsilon
    ten = best_bound(ObjectivePerturbation(1.0, 0.25, 10.0, 5.0, problems=10), delta=1e-5).epsilon
    assert math.sqrt(10) * 0.9 * one < ten < 10 * one
    inexact = ObjectivePerturbation(1.0, 0.25, 10.0, 5.0, gradient_tolerance=0.1, output_noise_std=0.2)
    assert one < best_bound(inexact, delta=1e-5).epsilon
    gaussian = FullBatchGaussian(1 / (2 * 0.1 / (10 * 0.2)), 1)
    both = best_bound(SequenceComposition((single, gaussian)), delta=1e-5).epsilon
    assert best_bound(inexact, delta=1e-5).epsilon == pytest.approx(both, rel=1e-6)


@pytest.mark.parametrize(("adjacency", "factor"), [("zero-out", 1.0), ("replace-one", 2.0)])
def test_output_perturbation_sensitivity(adjacency, factor):
    record = OutputPerturbation(1.5, 0.2, 100, 0.3, adjacency=adjacency)
    assert best_bound(record, delta=1e-5).best.mu == pytest.approx(factor * 1.5 / (100 * 0.2 * 0.3))
    inexact = OutputPerturbation(1.5, 0.2, 100, 0.3, gradient_tolerance=1e-3, adjacency=adjacency)
    assert best_bound(inexact, delta=1e-5).best.mu == pytest.approx((factor * 0.015 + 2e-3) / (0.2 * 0.3))


@pytest.mark.parametrize(("noise", "rate"), [(1e6, 0.5), (1e4, 0.1), (3.0, 1e-9), (1.0, 1e-3)])
def test_renyi_bounds_are_not_below_quadrature(noise, rate):
    """Moments that differ from 1 by less than a sum of logarithms can tell need an allowance."""
    orders = (1.05, 1.75, 4.25, 40.0, 430.5389646099018)
    step = 2.0**-12
    x = step * np.arange(-40 / step, (40 + orders[-1] / noise) / step if noise > 100 else 60 / step)
    weights = np.exp(-x * x / 2) * step / math.sqrt(2 * math.pi)
    ratio = rate * np.expm1(x / noise - 0.5 / noise**2)
    for order, value in zip(orders, rdp(PoissonGaussian(noise, rate, 1), orders), strict=True):
        if order / noise > 20:
            continue
        # the mean of the ratio is 0, which takes the linear term out exactly
        excess = np.sum(weights * (np.expm1(order * np.log1p(ratio)) - order * ratio))
        assert value >= math.log1p(excess) / (order - 1) * (1 - 1e-9)


def test_renyi_oracle_and_conversion(oracles):
    case = oracles["rdp_poisson"]
    values = rdp(
        PoissonGaussian(case["noise_multiplier"], case["sampling_rate"], case["steps"]), case["orders"]
    )
    assert values == pytest.approx(case["rdp"], rel=1e-7)
    exact = mu_to_epsilon(0.7, 1e-5)
    assert exact <= rdp_profile(FullBatchGaussian(1 / 0.7, 1)).epsilon(1e-5) <= 1.12 * exact


def test_selection_oracles(oracles):
    case = oracles["selection"]
    delta, mean = case["delta"], case["mean_candidates"]
    target = case["base_rdp_epsilon"]
    mu = bisect(lambda m: rdp_profile(FullBatchGaussian(1 / m, 1)).epsilon(delta) <= target, 0.1, 2.0)[0]
    base = FullBatchGaussian(1 / mu, 1)
    found = {
        "shape_0": RepeatAndSelect(base, mean),
        "shape_1": RepeatAndSelect(base, mean, shape=1.0),
        "poisson": RepeatAndSelect(base, mean, candidate_count="poisson"),
    }
    for name, mechanism in found.items():
        assert best_bound(mechanism, delta=delta).epsilon == pytest.approx(case[name], abs=5e-3)
    for shape in (0.0, 1.0, 2.5):
        peer = RdpAccountant()
        peer.compose(dp_event.RepeatAndSelectDpEvent(GaussianDpEvent(base.noise_multiplier), mean, shape))
        ours = best_bound(RepeatAndSelect(base, mean, shape=shape), delta=delta).epsilon
        assert ours == pytest.approx(peer.get_epsilon(delta), rel=2e-3)


def test_selection_costs_more_than_one_run_and_grows_with_candidates():
    base = PoissonGaussian(2.0, 0.01, 500)
    single = best_bound(base, delta=1e-5).epsilon
    costs = [best_bound(RepeatAndSelect(base, m), delta=1e-5).epsilon for m in (1.5, 10.0, 100.0)]
    assert single < costs[0] < costs[1] < costs[2]
    with pytest.raises(MechanismError, match="no Renyi bound"):
        best_bound(RepeatAndSelect(ObjectivePerturbation(1.0, 0.1, 1.0, 1.0), 10.0), delta=1e-5)


def test_selection_composes_with_other_runs():
    chosen = RepeatAndSelect(FullBatchGaussian(4.0, 1), 5.0)
    final = FullBatchGaussian(3.0, 1)
    both = best_bound(SequenceComposition((chosen, final)), delta=1e-5).epsilon
    parts = [best_bound(m, delta=5e-6).epsilon for m in (chosen, final)]
    assert max(parts) < both < sum(parts)


def test_disjoint_shards_cost_the_largest():
    a, b = FullBatchGaussian(3.0, 1), PoissonGaussian(1.0, 0.1, 100)
    both = best_bound(ParallelComposition((a, b)), delta=1e-5).epsilon
    assert both == max(best_bound(m, delta=1e-5).epsilon for m in (a, b))
    twice = best_bound(SequenceComposition((ParallelComposition((a, a)), a)), delta=1e-5).epsilon
    assert twice == pytest.approx(mu_to_epsilon(math.sqrt(2) / 3, 1e-5), rel=2e-3)


def test_renyi_orders_must_help():
    assert RdpProfile((2.0,), (1e9,)).delta(1.0) == 1.0


def test_regularization_just_above_the_hessian_bound():
    """log(1 - beta/lambda) from the exact difference: the ratio alone is 1e-4 off here."""
    lam = 1 + 1e-12
    curve = ObjectivePerturbationProfile(1.0, 1.0, lam, 1.0)
    exact = -math.log(float(Fraction(lam) - 1)) + math.log(lam)
    assert curve.delta(exact + 3.0) == pytest.approx(2 * mu_to_delta(1.0, 3.0), rel=1e-9)

"""Gaussian curves against high precision, and the identities between all views."""

import math

import mpmath as mp
import numpy as np
import pytest

from dptaft_accounting.dominating_gaussian import gaussian_view
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.profiles import GroupProfile, MaxProfile, MeanProfile, ResidualProfile
from dptaft_accounting.tradeoff import (
    GaussianProfile,
    advantage,
    bayes_error,
    epsilon_to_mu,
    mu_to_delta,
    mu_to_epsilon,
    risk,
    tpr_at_fpr,
)

mp.mp.dps = 60


def exact_delta(mu, eps):
    mu, eps = mp.mpf(mu), mp.mpf(eps)
    return mp.ncdf(mu / 2 - eps / mu) - mp.exp(eps) * mp.ncdf(-mu / 2 - eps / mu)


@pytest.mark.parametrize("mu", [1e-3, 0.03, 0.5, 1.0, 4.0, 30.0, 200.0])
@pytest.mark.parametrize("distance", [-1.0, 0.0, 1.0, 4.0, 7.0])
def test_delta_is_exact_and_never_below(mu, distance):
    eps = max(0.0, mu * mu / 2 + distance * mu)
    truth = exact_delta(mu, eps)
    value = mu_to_delta(mu, eps)
    assert value >= truth * (1 - mp.mpf(10) ** -12)
    assert value <= truth * (1 + mp.mpf(10) ** -7)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5, 1e-12])
def test_epsilon_is_tight_from_above(mu, delta):
    eps = mu_to_epsilon(mu, delta)
    assert exact_delta(mu, eps) <= delta
    if eps > 0:
        assert exact_delta(mu, eps * (1 - 1e-7)) > delta


def test_epsilon_and_mu_are_inverse_and_rounded_to_the_safe_side(oracles):
    for eps, mu in oracles["gdp_delta_1e-5"].items():
        found = epsilon_to_mu(float(eps), 1e-5)
        assert found == pytest.approx(mu, abs=6e-4)
        assert mu_to_epsilon(found, 1e-5) <= float(eps) * (1 + 1e-12)
        assert exact_delta(found, float(eps)) <= 1e-5


@pytest.mark.parametrize("bad", [0.0, 1.0, -1e-5, math.nan, "x"])
def test_delta_must_be_a_probability(bad):
    with pytest.raises(AccountingError, match="delta"):
        mu_to_epsilon(1.0, bad)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_mu_must_be_finite(bad):
    with pytest.raises(AccountingError, match="mu"):
        mu_to_delta(bad, 1.0)


def test_views_of_one_gaussian_agree():
    curve = GaussianProfile(1.3)
    for fpr in (1e-6, 1e-3, 0.2, 0.9):
        exact = 1 - mp.ncdf(mp.sqrt(2) * mp.erfinv(2 * (1 - mp.mpf(fpr)) - 1) - mp.mpf("1.3"))
        assert tpr_at_fpr(curve, fpr) == pytest.approx(float(exact), rel=1e-7)
    assert advantage(curve) == pytest.approx(float(2 * mp.ncdf(mp.mpf("0.65")) - 1), rel=1e-9)
    grid = np.linspace(1e-4, 1 - 1e-4, 4001)
    for prior in (0.5, 0.1, 0.9):
        direct = min(prior * curve.beta(a) + (1 - prior) * a for a in grid)
        assert bayes_error(curve, prior) == pytest.approx(min(direct, prior, 1 - prior), abs=2e-5)
        assert bayes_error(curve, prior) <= direct
    assert advantage(curve) == pytest.approx(max(tpr_at_fpr(curve, float(a)) - a for a in grid), abs=1e-6)
    assert set(risk(curve).tpr_at_fpr) == {1e-4, 1e-3, 1e-2, 1e-1}


def test_mixed_curves_bound_their_parts():
    a, b = GaussianProfile(0.5), GaussianProfile(1.0)
    mean, top = MeanProfile((a, b)), MaxProfile((a, b))
    for eps in (0.0, 0.5, 2.0):
        assert mean.delta(eps) == pytest.approx((a.delta(eps) + b.delta(eps)) / 2, rel=1e-9)
        assert top.delta(eps) == b.delta(eps)
        assert ResidualProfile(a, 1e-6).delta(eps) == pytest.approx(a.delta(eps) + 1e-6)
    assert a.epsilon(1e-5) < mean.epsilon(1e-5) < b.epsilon(1e-5)
    assert math.isinf(ResidualProfile(a, 1e-5).epsilon(1e-5))


def test_generic_group_conversion_is_above_the_exact_gaussian_one():
    single = GaussianProfile(0.3)
    assert GroupProfile(single, 3).epsilon(1e-5) >= GaussianProfile(0.9).epsilon(1e-5)
    assert GroupProfile(single, 1).epsilon(1e-5) == pytest.approx(single.epsilon(1e-5), rel=1e-8)


def test_gaussian_view_dominates_the_curve():
    curve = MeanProfile((GaussianProfile(0.5), GaussianProfile(1.0)))
    view = gaussian_view(curve, 1e-9)
    quoted = GaussianProfile(view.mu, view.residual_delta)
    assert 0.5 < view.mu <= 1.0
    assert 0 < view.regret < 0.2
    for eps in np.linspace(0, 12, 200):
        assert quoted.delta(float(eps)) >= curve.delta(float(eps)) * (1 - 1e-9)
    for alpha in (1e-4, 0.01, 0.3):
        assert quoted.beta(alpha) <= curve.beta(alpha)

"""Accounting at 10^6 to 10^9 records: tiny sampling rates and deltas, checked against closed forms."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from dptaft_accounting import (
    FullBatchGaussian,
    PoissonGaussian,
    Target,
    best_bound,
    calibrate_noise_multiplier,
    epsilon_to_mu,
)

SIZES = [10**6, 10**7, 10**8, 10**9]


def one_step_delta(epsilon, noise, rate, *, adding):
    """Exact delta of one Poisson step: mixture against Gaussian, both shifted by at most one clip norm.

    With T = N(0, z^2), M = (1-q) N(0, z^2) + q N(1, z^2): removal compares M to T, addition T to M. The
    likelihood ratio M/T = 1 - q + q exp((x - 1/2)/z^2) grows in x, so that the best test is a threshold.
    """
    if adding:
        inner = (math.exp(-epsilon) - (1 - rate)) / rate
        if inner <= 0:
            return 0.0
        at = noise**2 * math.log(inner) + 0.5  # T beats e^eps M below this point
        t, m = (math.exp(log_ndtr((at - shift) / noise)) for shift in (0.0, 1.0))
        return t - math.exp(epsilon) * ((1 - rate) * t + rate * m)
    at = noise**2 * math.log((math.exp(epsilon) - (1 - rate)) / rate) + 0.5
    t, m = (math.exp(log_ndtr((shift - at) / noise)) for shift in (0.0, 1.0))
    return (1 - rate) * t + rate * m - math.exp(epsilon) * t


def one_step_epsilon(delta, noise, rate):
    directions = []
    for adding in (False, True):

        def gap(epsilon, adding=adding):
            return one_step_delta(epsilon, noise, rate, adding=adding) - delta

        directions.append(0.0 if gap(1e-12) <= 0 else brentq(gap, 1e-12, 50.0, xtol=1e-13))
    return max(directions)


@pytest.mark.parametrize("records", SIZES)
@pytest.mark.parametrize("noise", [0.3, 0.5])
def test_one_step_at_a_tiny_rate_is_bounded_tightly(records, noise):
    rate, delta = 1e4 / records, min(1e-5, 0.1 / records)
    exact = one_step_epsilon(delta, noise, rate)
    found = best_bound(PoissonGaussian(noise, sampling_rate=rate, steps=1), delta=delta).epsilon
    assert exact <= found <= 1.02 * exact + 1e-3


@pytest.mark.parametrize("records", SIZES)
@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_a_full_batch_follows_its_closed_form(records, epsilon):
    delta = min(1e-5, 0.1 / records)
    target = Target(epsilon=epsilon, delta=delta)
    noise = calibrate_noise_multiplier(lambda z: FullBatchGaussian(z, steps=100), target)
    assert noise == pytest.approx(10.0 / epsilon_to_mu(epsilon, delta), rel=1e-4)
    assert noise >= 10.0 / epsilon_to_mu(epsilon, delta) * (1 - 1e-9)


@pytest.mark.parametrize("records", [10**6, pytest.param(10**9, marks=pytest.mark.slow)])
def test_a_calibrated_sample_spends_what_it_may(records):
    rate, delta = 1e5 / records, min(1e-5, 0.1 / records)
    target = Target(epsilon=3.0, delta=delta)

    def mechanism(z):
        return PoissonGaussian(z, sampling_rate=rate, steps=1000)

    noise = calibrate_noise_multiplier(mechanism, target)
    assert 0.98 * 3.0 < best_bound(mechanism(noise), delta=delta).epsilon <= 3.0
    assert best_bound(mechanism(0.9 * noise), delta=delta).epsilon > 3.0
    assert renyi_epsilon(rate, noise, 1000, delta) >= 0.99 * best_bound(mechanism(noise), delta=delta).epsilon


def renyi_epsilon(rate, noise, steps, delta):
    """Another accountant's bound, from Renyi divergences; never below the tight one."""
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
    accountant.compose(dp_event.SelfComposedDpEvent(event, steps))
    return accountant.get_epsilon(delta)


def test_noise_per_record_falls_with_the_records():
    for mechanism, rate in (
        (lambda z, q: FullBatchGaussian(z, steps=100), lambda n: 1.0),
        (lambda z, q: PoissonGaussian(z, sampling_rate=q, steps=100), lambda n: 1e-2),
    ):
        per_record = []
        for records in SIZES[:3]:
            q = rate(records)
            target = Target(epsilon=1.0, delta=min(1e-5, 0.1 / records))
            noise = calibrate_noise_multiplier(lambda z, q=q, m=mechanism: m(z, q), target)
            per_record.append(noise / (q * records))
        ratios = np.array(per_record[:-1]) / np.array(per_record[1:])
        assert (ratios > 8.5).all()  # ten times the records, a smaller delta: almost ten times less noise
        assert (ratios < 10).all()


def test_counts_and_rates_are_exact_in_float64():
    for records in SIZES:
        assert float(records) * 2**23 < 2**53  # sums of counts over millions of steps stay whole numbers
        for batch in (1, 1000, 99_991, 10**6):
            assert round(records * (batch / records)) == batch
            assert abs(records * (batch / records) - batch) <= batch * 2.0**-52
    assert 0.1 / 10**9 == 1e-10

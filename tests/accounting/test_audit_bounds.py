"""Lower bounds from counts: published vectors, slow oracles, monotone laws."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, norm

from dptaft_accounting import PoissonGaussian, best_bound, mu_to_epsilon
from dptaft_accounting.audit_bounds import (
    clopper_pearson,
    error_inverse,
    f_one_run_mu,
    f_one_run_rejects,
    one_run_epsilon,
    one_run_p_value,
    trials_epsilon,
    trials_mu,
    trials_reject,
)
from dptaft_accounting.errors import AuditError
from dptaft_accounting.tradeoff import GaussianProfile

VECTORS = json.loads((Path(__file__).parents[1] / "oracles" / "one_run_audit.json").read_text())["vectors"]


@pytest.mark.parametrize("vector", VECTORS)
def test_published_vectors_to_five_digits(vector):
    counts = {"canaries": vector["m"], "guesses": vector["r"], "correct": vector["v"]}
    level = {"significance": vector["significance"]}
    assert one_run_epsilon(vector["delta"], **counts, **level) == pytest.approx(vector["epsilon"], abs=6e-6)
    mu = f_one_run_mu(**counts, **level)
    assert mu_to_epsilon(mu, vector["delta"]) == pytest.approx(vector["epsilon_fdp"], abs=6e-6)


def slow_p_value(epsilon, delta, m, r, v):
    """The formula of the theorem, term by term."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [float(binom.pmf(k, r, q)) for k in range(r + 1)]
    tail = sum(pmf[v:])
    return min(1.0, tail + 2 * m * delta * max((sum(pmf[v - i : v]) / i for i in range(1, v + 1)), default=0))


@pytest.mark.parametrize("delta", [0.0, 1e-6, 1e-3])
@pytest.mark.parametrize(("m", "r", "v"), [(50, 10, 9), (40, 40, 25), (30, 12, 0), (30, 5, 5)])
def test_p_value_equals_the_slow_formula(m, r, v, delta):
    for epsilon in (0.0, 0.3, 1.0, 4.0):
        fast = one_run_p_value(epsilon, delta, canaries=m, guesses=r, correct=v)
        assert fast == pytest.approx(slow_p_value(epsilon, delta, m, r, v), rel=1e-9, abs=1e-300)


def slow_rejects(mu, m, guesses, correct, s):
    """The recursion in its published form, with all entries kept."""
    r, h = {correct: s * correct / m}, {correct: s * (guesses - correct) / m}
    for i in range(correct - 1, -1, -1):
        h[i] = max(h[i + 1], float(norm.cdf(norm.ppf(r[i + 1]) - mu))) if r[i + 1] < 1 else 1.0
        r[i] = r[i + 1] + i / (guesses - i) * (h[i] - h[i + 1])
    return r[0] + h[0] > guesses / m


@pytest.mark.parametrize(
    ("m", "guesses", "correct"), [(100, 20, 18), (100, 100, 70), (60, 30, 30), (40, 9, 5)]
)
def test_f_dp_recursion_equals_the_slow_one(m, guesses, correct):
    for s in (0.05, 0.3):
        for mu in np.linspace(0.01, 3.0, 40):
            fast = f_one_run_rejects(
                GaussianProfile(float(mu)), canaries=m, guesses=guesses, correct=correct, significance=s
            )
            assert fast == slow_rejects(float(mu), m, guesses, correct, s), mu


def test_curves_without_closed_form_are_read_from_below():
    exact = error_inverse(GaussianProfile(0.9))
    lines = error_inverse(GaussianProfile(0.9, residual_delta=1e-12))
    for x in (1e-4, 0.01, 0.2, 0.5, 0.9, 0.999):
        assert lines(x) <= exact(x) * (1 + 1e-9)
        assert lines(x) == pytest.approx(exact(x), rel=0.02, abs=2e-6)
    profile = best_bound(PoissonGaussian(1.0, 0.1, 200), delta=1e-5).profile
    inverse = error_inverse(profile)
    for x in (0.05, 0.3, 0.8):
        assert profile.beta(1 - x) - 2e-4 < inverse(x) <= profile.beta(1 - x) + 1e-12


def test_more_right_guesses_and_less_confidence_raise_every_bound():
    for bound in (
        lambda v, s: one_run_epsilon(1e-5, canaries=400, guesses=100, correct=v, significance=s),
        lambda v, s: f_one_run_mu(canaries=400, guesses=100, correct=v, significance=s),
        lambda v, s: trials_epsilon(
            1e-5,
            false_positives=100 - v,
            negatives=200,
            false_negatives=100 - v,
            positives=200,
            significance=s,
        ),
        lambda v, s: trials_mu(
            false_positives=100 - v, negatives=200, false_negatives=100 - v, positives=200, significance=s
        ),
    ):
        values = [bound(v, 0.05) for v in (40, 60, 75, 90, 100)]
        assert values == sorted(values)
        assert values[-1] > values[2] > 0
        assert bound(90, 0.2) > bound(90, 0.05) > bound(90, 0.001)


def test_a_chosen_number_of_guesses_costs_confidence():
    counts = {"canaries": 1000, "guesses": 100, "correct": 80}
    for epsilon in (0.1, 0.5, 1.0):
        fixed = one_run_p_value(epsilon, 1e-5, **counts)
        assert one_run_p_value(epsilon, 1e-5, **counts, chosen_guesses=True) >= min(1.0, fixed)
    assert 0 < one_run_epsilon(1e-5, **counts, chosen_guesses=True) < one_run_epsilon(1e-5, **counts)


def test_clopper_pearson_covers():
    for trials, p in ((20, 0.2), (200, 0.03)):
        errors = np.arange(trials + 1)
        missed = sum(binom.pmf(k, trials, p) for k in errors if clopper_pearson(int(k), trials, 0.05) < p)
        assert 0.01 < missed <= 0.05
    assert clopper_pearson(5, 5, 0.05) == 1.0


def test_largest_values_of_perfect_attacks():
    for arm, largest in ((100, 3.28), (1000, 5.60)):
        counts = {"false_positives": 0, "negatives": arm, "false_negatives": 0, "positives": arm}
        assert trials_epsilon(1e-5, **counts) == pytest.approx(largest, abs=0.005)
        assert trials_mu(**counts) == pytest.approx(2 * norm.isf(1 - 0.025 ** (1 / arm)), rel=1e-6)


def test_mu_of_trials_is_where_rejection_ends():
    counts = {"false_positives": 40, "negatives": 1000, "false_negatives": 300, "positives": 1100}
    mu = trials_mu(**counts)
    assert trials_reject(GaussianProfile(mu * 0.999), **counts)
    assert not trials_reject(GaussianProfile(mu * 1.001), **counts)
    useless = {"false_positives": 500, "negatives": 1000, "false_negatives": 500, "positives": 1000}
    assert trials_mu(**useless) == 0.0
    assert trials_epsilon(0.0, **useless) == 0.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: one_run_p_value(1.0, 1e-5, canaries=10, guesses=11, correct=5),
        lambda: one_run_p_value(1.0, 1e-5, canaries=10, guesses=5, correct=6),
        lambda: one_run_p_value(-1.0, 1e-5, canaries=10, guesses=5, correct=5),
        lambda: one_run_epsilon(1.0, canaries=10, guesses=5, correct=5),
        lambda: f_one_run_mu(canaries=10, guesses=5, correct=5, significance=0.0),
        lambda: clopper_pearson(3, 2, 0.05),
    ],
)
def test_impossible_counts_are_refused(call):
    with pytest.raises(AuditError):
        call()

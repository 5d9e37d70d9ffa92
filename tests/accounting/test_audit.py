"""Choices of the operating point, families and verdicts: power, and false violations at most as stated."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, norm

from dptaft_accounting import FullBatchGaussian, PoissonGaussian, epsilon_to_mu
from dptaft_accounting.audit import (
    Choice,
    audit_f_one_run,
    audit_one_run,
    audit_trials,
    combined_verdict,
    gaussian_family,
    mechanism_family,
    planned_guesses,
)
from dptaft_accounting.audit_bounds import one_run_p_value, trials_reject
from dptaft_accounting.errors import AuditError
from dptaft_accounting.tradeoff import GaussianProfile

DELTA = 1e-5
EPSILONS = (0.5, 1.0, 3.0, 8.0)


def gaussian_scores(rng, mu, count):
    coins = rng.random(count) < 0.5
    return rng.normal(size=count) + mu * coins, coins


def most_false_alarms(trials, level=0.05):
    """Exceeded with probability below 1e-4 where the true rate is the level."""
    return int(binom.isf(1e-4, trials, level))


def test_a_wider_choice_must_be_corrected():
    for correction in ("bonferroni", "split"):
        assert Choice((1.0, 2.0), correction).candidates == (1.0, 2.0)
    with pytest.raises(AuditError, match="cannot all be planned"):
        Choice((1.0, 2.0))
    with pytest.raises(AuditError, match="at least one"):
        Choice(())
    with pytest.raises(AuditError, match="correction"):
        Choice((1.0,), "best")


def test_the_best_operating_point_cries_wolf_and_the_corrected_ones_do_not():
    """Mechanisms that release noise alone, judged against epsilon 0."""
    rng, count, trials = np.random.default_rng(1), 300, 400
    numbers = tuple(range(10, count, 10))
    alarms = {"best": 0, "bonferroni": 0, "split": 0}
    for _ in range(trials):
        scores, coins = gaussian_scores(rng, 0.0, count)
        right = [_right(scores, coins, r) for r in numbers]
        p = [
            one_run_p_value(0.0, 0.0, canaries=count, guesses=r, correct=v)
            for r, v in zip(numbers, right, strict=True)
        ]
        alarms["best"] += min(p) <= 0.05
        alarms["bonferroni"] += min(p) <= 0.05 / len(numbers)
        half = rng.random(count) < 0.5
        shares = [_right(scores[half], coins[half], r // 2) / (r // 2) for r in numbers]
        r = numbers[int(np.argmax(shares))] // 2
        v = _right(scores[~half], coins[~half], r)
        alarms["split"] += one_run_p_value(0.0, 0.0, canaries=count, guesses=r, correct=v) <= 0.05
    assert alarms["best"] > 0.12 * trials
    assert alarms["bonferroni"] <= most_false_alarms(trials)
    assert alarms["split"] <= most_false_alarms(trials)


def _right(scores, coins, r):
    order = np.argsort(scores)
    return int(coins[order[len(order) - (r + 1) // 2 :]].sum() + (~coins[order[: r // 2]]).sum())


def all_tests(scores, coins, epsilon, mu, rng):
    family = gaussian_family(mu, DELTA)
    guesses = tuple(int(f * len(coins)) for f in (0.05, 0.2, 0.6))
    yield audit_trials(scores, coins, family, choice=Choice((mu / 2,)))
    yield audit_trials(scores, coins, family, choice=Choice((0.0, mu / 2, mu), "bonferroni"))
    yield audit_trials(scores, coins, family, choice=Choice((0.0, mu / 2, mu), "split"), rng=rng)
    yield audit_f_one_run(scores, coins, family, choice=Choice(guesses[1:2]))
    yield audit_f_one_run(scores, coins, family, choice=Choice(guesses, "bonferroni"))
    yield audit_one_run(scores, coins, epsilon, DELTA, choice=Choice(guesses, "bonferroni"))
    yield audit_one_run(scores, coins, epsilon, DELTA, choice=Choice(guesses, "split"), rng=rng)


@pytest.mark.parametrize(
    "epsilon", [EPSILONS[0], *(pytest.param(e, marks=pytest.mark.slow) for e in EPSILONS[1:])]
)
def test_clean_mechanisms_are_violations_at_most_at_the_significance(epsilon):
    """Mechanisms exactly as private as claimed: the worst case of a false alarm."""
    rng, mu, trials = np.random.default_rng(2), epsilon_to_mu(epsilon, DELTA), 40
    alarms, low = np.zeros(7, int), np.zeros(7, int)
    for _ in range(trials):
        scores, coins = gaussian_scores(rng, mu, 300)
        found = list(all_tests(scores, coins, epsilon, mu, rng))
        alarms += [evidence.rejected for evidence in found]
        low += [evidence.epsilon > epsilon * (1 + 1e-6) for evidence in found]
    assert (alarms <= most_false_alarms(trials)).all(), alarms
    assert (low == alarms).all()


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_mechanisms_with_a_tenth_of_the_noise_are_violations(epsilon):
    rng, mu = np.random.default_rng(3), epsilon_to_mu(epsilon, DELTA)
    scores, coins = gaussian_scores(rng, 10 * mu, 2000)
    found = list(all_tests(scores, coins, epsilon, mu, rng))
    for evidence in found[:5]:
        assert evidence.verdict == "violation", evidence
        assert evidence.epsilon > epsilon
    if epsilon < 8:
        assert all(evidence.verdict == "violation" for evidence in found)
    assert combined_verdict(found) == "violation"


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_bounds_come_near_the_truth(epsilon):
    rng, mu = np.random.default_rng(4), epsilon_to_mu(epsilon, DELTA)
    scores, coins = gaussian_scores(rng, mu, 50_000)
    family = gaussian_family(mu, DELTA)
    trials = audit_trials(scores, coins, family, choice=Choice((mu / 2,)))
    pooled = audit_f_one_run(scores, coins, family, choice=Choice((planned_guesses(mu, 50_000),)))
    assert 0.8 * epsilon < trials.epsilon < epsilon
    assert 0.4 * epsilon < pooled.epsilon < epsilon
    for evidence in (trials, pooled):
        assert evidence.verdict == "consistent"
        assert evidence.attainable > epsilon


def test_weak_tests_are_inconclusive():
    rng, mu = np.random.default_rng(5), epsilon_to_mu(8.0, DELTA)
    scores, coins = gaussian_scores(rng, mu, 20)
    few = audit_trials(scores, coins, gaussian_family(mu, DELTA), choice=Choice((mu / 2,)))
    assert few.attainable < 8.0
    assert few.verdict == "inconclusive"
    blind = audit_f_one_run(
        rng.normal(size=1000), rng.random(1000) < 0.5, gaussian_family(mu, DELTA), choice=Choice((1000,))
    )
    assert blind.epsilon == 0
    assert blind.verdict == "inconclusive"
    assert combined_verdict([few, blind]) == "inconclusive"


def test_families_scale_the_noise_of_the_claim():
    mechanism = FullBatchGaussian((4.0, 8.0), steps=2)
    family = mechanism_family(mechanism, DELTA)
    assert family.claimed_epsilon == pytest.approx(
        gaussian_family((1 / 16 + 1 / 64) ** 0.5, DELTA).claimed_epsilon
    )
    sampled = mechanism_family(PoissonGaussian(1.0, 0.05, 100), DELTA)
    halved = mechanism_family(PoissonGaussian(0.5, 0.05, 100), DELTA)
    assert sampled.curve(2.0).epsilon(DELTA) == pytest.approx(halved.claimed_epsilon)
    values = [sampled.epsilon(k) for k in (0.5, 1.0, 2.0, 4.0)]
    assert values == sorted(values)
    assert sampled.epsilon(1.0) == pytest.approx(sampled.claimed_epsilon)


def test_poisson_claims_are_tested_on_their_own_curve():
    """A log-likelihood ratio of the exact sampled mechanism stays below the claim, with less noise it does not."""
    z, p, steps, count = 1.0, 0.1, 60, 3000
    family = mechanism_family(PoissonGaussian(z, p, steps), DELTA)

    def scores(rng, noise):
        coins = rng.random(count) < 0.5
        drawn = rng.random((count, steps)) < p
        x = rng.normal(size=(count, steps)) * noise + drawn * coins[:, None]
        return np.log1p(p * np.expm1((x - 0.5) / noise**2)).sum(1), coins

    clean = audit_trials(*scores(np.random.default_rng(6), z), family, choice=Choice((0.0,)))
    assert clean.verdict == "consistent"
    assert 0.4 * clean.claimed < clean.epsilon < clean.claimed
    broken = audit_trials(*scores(np.random.default_rng(7), z / 2), family, choice=Choice((0.0,)))
    assert broken.verdict == "violation"
    assert broken.epsilon > broken.claimed


def test_bonferroni_tests_every_candidate_at_its_share():
    rng = np.random.default_rng(8)
    scores, coins = gaussian_scores(rng, 1.5, 2000)
    family = gaussian_family(1.5, DELTA)
    for test, candidate in ((audit_trials, 0.75), (audit_f_one_run, 500)):
        thrice = test(scores, coins, family, choice=Choice((candidate,) * 3, "bonferroni"))
        share = test(scores, coins, family, choice=Choice((candidate,)), significance=0.05 / 3)
        whole = test(scores, coins, family, choice=Choice((candidate,)))
        assert thrice.epsilon == share.epsilon < whole.epsilon
        assert thrice.attainable == share.attainable < whole.attainable
        assert (thrice.significance, thrice.choice) == (0.05, "Bonferroni over 3")


def test_planned_guesses_do_not_look_at_scores_and_follow_the_noise():
    few, many = planned_guesses(3.0, 500), planned_guesses(0.3, 500)
    assert 2 <= min(few, many) <= max(few, many) <= 500
    assert few != many


def test_wrong_input_is_refused():
    family, choice = gaussian_family(1.0, DELTA), Choice((0.0,))
    good = np.array([0.0, 1.0, 2.0]), np.array([True, False, True])
    with pytest.raises(AuditError, match="NaN"):
        audit_trials([0.0, np.nan, 1.0], good[1], family, choice=choice)
    with pytest.raises(AuditError, match="one bool"):
        audit_trials(good[0], [1, 0, 1], family, choice=choice)
    with pytest.raises(AuditError, match="too few"):
        audit_trials([0.0], [True], family, choice=choice)
    with pytest.raises(AuditError, match="no split"):
        audit_f_one_run(*good, family, choice=Choice((1, 2), "split"))
    with pytest.raises(AuditError, match="has no bound"):
        mechanism_family(FullBatchGaussian(1.0, 2), DELTA, bound="other")


def test_guesses_take_both_ends_and_ties_do_not_help():
    coins = np.array([False, True] * 50)
    scores = np.where(coins, 1.0, -1.0)
    family = gaussian_family(1.0, DELTA)
    for guesses in (10, 31, 100):
        found = audit_f_one_run(scores, coins, family, choice=Choice((guesses,)))
        assert (found.guesses, found.correct) == (guesses, guesses)
    flat = audit_f_one_run(np.zeros(100), coins, family, choice=Choice((100,)))
    assert flat.correct < 70


def test_significance_of_the_joint_box_is_not_exceeded_by_many_thresholds():
    """All pairs of error counts at the boundary: the exact level of the two Clopper-Pearson bounds."""
    mu, count = 1.0, 25
    a = norm.sf(mu / 2)
    level = 0.0
    for fp, fn in itertools.product(range(count + 1), repeat=2):
        if trials_reject(
            GaussianProfile(mu), false_positives=fp, negatives=count, false_negatives=fn, positives=count
        ):
            level += binom.pmf(fp, count, a) * binom.pmf(fn, count, a)
    assert 0 < level <= 0.05

import math

import pytest

from dptaft.training.plan import (
    PlanError,
    PrivacyConfig,
    Sampling,
    default_delta,
    delta_warning,
    make_plan,
    resolve_sampling,
    whole_epochs,
)
from dptaft_accounting import best_bound


def plan_for(privacy, n=1000, steps=40, automatic_rate=1.0, factors=None):
    sampling = resolve_sampling(privacy, n, automatic_rate)
    steps = whole_epochs(steps, sampling)
    return make_plan(privacy, num_records=n, steps=steps, sampling=sampling, noise_factors=factors)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjacency": "replace-one"},
        {"adjacency": "add-remove", "public_size": 900},
        {"sampling": "poisson", "expected_batch_size": 100},
        {"sampling": "cyclic-partition", "expected_batch_size": 100},
    ],
)
@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_planned_epsilon_is_met_and_not_wasted(options, epsilon):
    plan = plan_for(PrivacyConfig(epsilon, **options))
    spent = best_bound(plan.mechanism(), delta=plan.delta).epsilon
    assert 0.98 * epsilon < spent <= epsilon
    assert plan.delta == 1e-5


def test_replace_one_needs_twice_the_noise():
    one = plan_for(PrivacyConfig(2.0)).noise_multiplier
    two = plan_for(PrivacyConfig(2.0, adjacency="replace-one")).noise_multiplier
    assert two == pytest.approx(2 * one, rel=1e-4)


def test_repeated_steps_cost_more_than_planned():
    plan = plan_for(PrivacyConfig(2.0))
    again = plan.mechanism((*range(40), *range(10, 20)))
    assert again.steps == 50
    assert best_bound(again, delta=plan.delta).epsilon > 2.05


def test_lost_steps_never_cost_more_than_planned():
    rising = tuple(1.0 + 2.0 * i / 39 for i in range(40))
    for factors in ((1.0,) * 40, rising, rising[::-1]):
        plan = plan_for(PrivacyConfig(3.0), factors=factors)
        assert plan.last_step(0, ()) == 40
        for attempts in ((0, 10), (10, 10), (10, 10, 10), (40, 5)):
            charged = []
            for lost in attempts:  # every attempt starts over and loses its steps
                charged += range(min(lost, plan.last_step(0, charged)))
            executed = (*charged, *range(plan.last_step(0, charged)))
            assert best_bound(plan.mechanism(executed), delta=plan.delta).epsilon <= 3.0
    assert plan_for(PrivacyConfig(3.0)).last_step(20, list(range(30))) == 30
    assert plan_for(PrivacyConfig(3.0), steps=200_000).last_step(100_000, range(100_000)) == 200_000


def test_noise_schedule_is_accounted_step_by_step():
    factors = tuple(1.0 - 0.5 * i / 39 for i in range(40))
    plan = plan_for(PrivacyConfig(2.0), factors=factors)
    mechanism = plan.mechanism()
    assert mechanism.noise_schedule[-1] == pytest.approx(plan.noise_multiplier / 2)
    mu = math.sqrt(sum(1 / z**2 for z in mechanism.noise_schedule))
    assert best_bound(mechanism, delta=plan.delta).best.mu == pytest.approx(mu)
    assert best_bound(mechanism, delta=plan.delta).epsilon <= 2.0


def test_cyclic_steps_are_whole_epochs():
    plan = plan_for(PrivacyConfig(2.0, sampling="cyclic-partition", expected_batch_size=300), steps=40)
    assert plan.sampling.parts == 3
    assert plan.steps == 42
    assert plan.normaliser == pytest.approx(1000 / 3)


def test_add_remove_never_divides_by_the_private_count():
    privacy = PrivacyConfig(2.0, adjacency="add-remove", public_size=800)
    assert plan_for(privacy, n=1000).normaliser == 800
    assert plan_for(privacy, n=1000) == plan_for(privacy, n=999)


def test_auto_takes_the_full_batch_while_it_is_quick():
    assert resolve_sampling(PrivacyConfig(1.0), 1000, 1.0) == Sampling("full-batch")
    assert resolve_sampling(PrivacyConfig(1.0), 1000, 0.25) == Sampling("poisson", 0.25)


def test_delta_rule_and_warning():
    assert default_delta(10**7) == 1e-8
    assert delta_warning(1e-5, 1000) is None
    assert "above 1/n" in delta_warning(0.01, 1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be a positive number, got 0"),
        ({"epsilon": -1.0}, "got -1"),
        ({"epsilon": math.nan}, "got nan"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta must lie strictly between 0 and 1, got 0"),
        ({"epsilon": 1.0, "delta": 1.0}, "got 1"),
        ({"epsilon": 1.0, "delta": math.nan}, "got nan"),
        ({"epsilon": 1.0, "steps": 0}, "steps must be at least 1"),
        ({"epsilon": 1.0, "l2_clip_norm": 0.0}, "clip norm must be finite and positive, got 0"),
        ({"epsilon": 1.0, "l2_clip_norm": math.inf}, "got inf"),
        ({"epsilon": 1.0, "adjacency": "add-remove"}, "needs a public number"),
        ({"epsilon": 1.0, "public_size": 10}, "needs a public number"),
        ({"epsilon": 1.0, "sampling": "shuffle"}, "unknown sampling 'shuffle'"),
        ({"epsilon": 1.0, "sampling": "full-batch", "expected_batch_size": 9}, "no batch size to choose"),
    ],
)
def test_bad_privacy_requests(options, message):
    with pytest.raises(PlanError, match=message):
        PrivacyConfig(**options)


def test_bad_combinations():
    with pytest.raises(PlanError, match="larger than the 1000 records"):
        plan_for(PrivacyConfig(1.0, sampling="poisson", expected_batch_size=1001))
    with pytest.raises(PlanError, match="needs an expected batch size"):
        plan_for(PrivacyConfig(1.0, sampling="poisson"))
    with pytest.raises(PlanError, match="noise schedule needs full-batch"):
        plan_for(PrivacyConfig(1.0, sampling="poisson", expected_batch_size=10), factors=(1.0,) * 39 + (0.5,))
    with pytest.raises(ValueError, match="replace"):
        plan_for(PrivacyConfig(1.0, sampling="poisson", expected_batch_size=10, adjacency="replace-one"))

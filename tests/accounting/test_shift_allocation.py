"""Shift allocation: never below exact rational arithmetic, and as tight, whatever the ratios of a schedule."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dptaft_accounting.accountants import shift_allocation
from dptaft_accounting.accountants.shift_allocation import (
    cyclic_mu,
    noisy_gd_mu,
    projected_gd_mu,
    projected_mu,
    shifted_mu,
)
from dptaft_accounting.bounds import best_bound
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.mechanisms import FullBatchGaussian

ratios = st.floats(-12, 12).map(lambda x: 10.0**x)
steps = st.tuples(st.one_of(st.just(0.0), ratios), ratios, st.floats(0, 1))


def exact_energy(shifts, noises, contractions, start=0):
    """mu^2 by the best of all partitions into blocks that are feasible, in rationals."""
    s, v, c = ([Fraction(x) for x in values] for values in (shifts, noises, contractions))
    total = len(s)
    weights = [math.prod(c[k + 1 :], start=Fraction(1)) for k in range(total)]
    u = [a * r for a, r in zip(s, weights, strict=True)]
    t = [(a * r) ** 2 for a, r in zip(v, weights, strict=True)]
    u[0] += Fraction(start) * c[0] * weights[0]
    best = None
    for cuts in itertools.product((False, True), repeat=total - 1):
        ends = [k + 1 for k, cut in enumerate(cuts) if cut] + [total]
        energy = partition_energy(u, t, ends)
        if energy is not None and (best is None or energy < best):
            best = energy
    return best


def partition_energy(u, t, ends):
    energy, first = Fraction(0), 0
    for end in ends:
        arrived, time = sum(u[first:end]), sum(t[first:end])
        if time == 0:
            if arrived:
                return None
        else:
            for k in range(first, end):
                if arrived * sum(t[first : k + 1]) > time * sum(u[first : k + 1]):
                    return None
            energy += arrived**2 / time
        first = end
    return energy


def assert_just_above(mu, exact):
    """Never below; at most 1e-12 above, but for what is rounded up at the end of the range of floats."""
    assert Fraction(mu) ** 2 >= exact
    assert Fraction(mu) ** 2 <= exact * (1 + Fraction(1, 10**12)) ** 2 + Fraction(1, 10**400)


def root(energy, digits=40):
    """Square root of a fraction, correct to far more digits than a float has."""
    scale = 10**digits
    return Fraction(math.isqrt(energy.numerator * scale**2 // energy.denominator), scale)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, min_size=1, max_size=6), st.one_of(st.just(0.0), ratios))
def test_never_below_exact_arithmetic_and_as_tight(plan, start):
    s, v, c = zip(*plan, strict=True)
    exact = exact_energy(s, v, c, start)
    if exact is None or exact == 0:
        return
    assert_just_above(shifted_mu(s, v, c, start), exact)


@settings(max_examples=80, deadline=None)
@given(st.lists(steps, min_size=1, max_size=4), ratios)
def test_projection_is_the_best_moment_and_never_below_it(plan, diameter):
    s, v, c = zip(*plan, strict=True)
    tails = [exact_energy(s[k:], v[k:], c[k:], diameter) for k in range(len(s))]
    exact = min(energy for energy in [exact_energy(s, v, c), *tails] if energy is not None)
    assert_just_above(projected_mu(s, v, c, diameter), exact)


@settings(max_examples=200, deadline=None)
@given(st.lists(steps, min_size=2, max_size=3))
def test_never_below_an_exactly_solvable_chain(plan):
    """x -> c x + shift + noise is Gaussian: gap over standard deviation."""
    gap = variance = Fraction(0)
    for s, v, c in plan:
        gap = Fraction(c) * gap + Fraction(s)
        variance = Fraction(c) ** 2 * variance + Fraction(v) ** 2
    assert Fraction(shifted_mu(*zip(*plan, strict=True))) ** 2 >= gap**2 / variance


@pytest.mark.parametrize("contraction", [0.5, 0.98, 1 - 1e-9, 1 - 2.0**-52, 1.0])
@pytest.mark.parametrize(
    ("batches", "epochs", "after"), [(1, 5, 0), (3, 3, 0), (3, 3, 1), (4, 2, 3), (2, 1, 1)]
)
def test_cyclic_is_the_schedule_with_rare_arrivals(contraction, batches, epochs, after):
    total = batches * epochs
    shifts = [1.0 if (total - 1 - k) % batches == after else 0.0 for k in range(total)]
    exact = exact_energy(shifts, [2.0] * total, [contraction] * total)
    found = cyclic_mu(2.0, contraction, batches, epochs, after)
    assert Fraction(found) ** 2 >= exact
    assert found == pytest.approx(float(exact) ** 0.5, rel=1e-11)


@pytest.mark.parametrize("contraction", [0.0, 0.5, 1 - 1e-9, 1 - 2.0**-52, 1.0])
def test_constant_steps_in_closed_form(contraction):
    plan = ([1.0] * 9, [2.0] * 9, [contraction] * 9)
    exact = exact_energy(*plan)
    assert Fraction(noisy_gd_mu(2.0, contraction, 9)) ** 2 >= exact
    assert noisy_gd_mu(2.0, contraction, 9) == pytest.approx(float(exact) ** 0.5, rel=1e-11)
    for diameter in (0.3, 3.0, 1e6):
        exact = min(exact, *(exact_energy(*(p[k:] for p in plan), diameter) for k in range(9)))
        found = projected_gd_mu(2.0, contraction, 9, diameter)
        assert Fraction(found) ** 2 >= exact
        exact = exact_energy(*plan)
        assert found == pytest.approx(projected_mu(*plan, diameter), rel=1e-11)


def exact_mu(shifts, noises, contractions):
    """Pooling in rationals, for schedules too long to try all partitions."""
    blocks = []
    for s, v, c in zip(shifts, noises, contractions, strict=True):
        c2 = Fraction(c)
        blocks = [(u * c2, t * c2 * c2) for u, t in blocks]
        u, t = Fraction(s), Fraction(v) ** 2
        while blocks and blocks[-1][0] * t >= u * blocks[-1][1]:
            before = blocks.pop()
            u, t = before[0] + u, before[1] + t
        blocks.append((u, t))
    return root(sum((u * u / t for u, t in blocks), start=Fraction(0)))


def test_long_random_schedules_against_rational_pooling():
    rng = np.random.default_rng(8)
    for spread in (0, 2, 12):
        for _ in range(4):
            s, v = 10 ** rng.uniform(-spread, spread, (2, 40))
            c = np.where(rng.random(40) < 0.7, 1 - 10 ** rng.uniform(-14, 0, 40), 1.0)
            exact = exact_mu(s.tolist(), v.tolist(), c.tolist())
            found = shifted_mu(s.tolist(), v.tolist(), c.tolist())
            assert exact <= Fraction(found) <= exact * (1 + Fraction(1, 10**12))


def proof(steps, step_size, regularization=0.1):
    return ConvexityCertificate.issue(
        loss="multinomial-logistic",
        feature_bound=1.0,
        l2_clip_norm=1.5,
        regularization=regularization,
        step_size=step_size,
        normaliser=100.0,
        sampling="full-batch",
        steps=steps,
        records=100,
    )


@pytest.mark.parametrize(
    ("noise", "sizes", "epsilon"),
    [
        ((1e9, 1.0), 1.0, 4.3771780),
        ((1e8, 1.0), 1.0, 4.3771780),
        ((1.0, 1.0), (1.0, 1e-8), 6.5728),
        ((1.0, 1.0), (1.0, 1e-9), 6.5728),
    ],
)
def test_a_step_with_little_noise_is_never_lost(noise, sizes, epsilon):
    mechanism = FullBatchGaussian(noise, 2, released="last-iterate")
    found = best_bound(mechanism, proof(2, sizes), delta=1e-5).epsilon
    assert found == pytest.approx(epsilon, rel=1e-4)
    assert found >= best_bound(FullBatchGaussian(1.0, 1), delta=1e-5).epsilon


def test_decays_that_end_at_almost_nothing():
    fourth = tuple((1 - k / 1000) ** 4 for k in range(1000))
    mechanism = FullBatchGaussian(60.0, 1000, released="last-iterate")
    assert best_bound(mechanism, proof(1000, fourth, 0.05), delta=1e-5).epsilon == pytest.approx(
        1.872, abs=5e-4
    )


def test_a_wrong_order_of_slopes_only_costs_tightness(monkeypatch):
    """Whatever decides that blocks are pooled: refusing to pool gives composition, a valid bound."""
    plan = ([1.0, 2.0, 0.5], [1.0, 3.0, 2.0], [0.9, 0.8, 0.7])
    exact = exact_energy(*plan)
    monkeypatch.setattr(shift_allocation, "_pool", lambda early, late: None)
    assert Fraction(shifted_mu(*plan)) ** 2 >= exact
    assert shifted_mu(*plan) == pytest.approx(math.hypot(1, 2 / 3, 0.25))


def test_numbers_beyond_floats_are_rounded_against_the_claim():
    assert shifted_mu([1.0, 1.0], [1e200, 1e-200], [1.0, 1.0]) >= 1e200
    assert shifted_mu([1e-200, 1.0], [1e-200, 1.0], [1e-200, 1e-200]) >= 1.0
    assert shifted_mu([1.0] * 3000, [1.0] * 3000, [0.5] * 3000) == pytest.approx(noisy_gd_mu(1.0, 0.5, 3000))
    assert shifted_mu([0.0, 0.0], [1.0, 1.0], [0.5, 0.5]) == 0.0
    assert shifted_mu([1.0], [0.0], [0.5]) == math.inf
    assert projected_mu([1.0], [0.0], [0.5], 1.0) == math.inf

"""Clip factors and sums that carry their sensitivity."""

import math

import pytest
import torch

from dptaft.training.clipping import (
    FLOAT_SLACK,
    ClippedSum,
    PhysicalBatches,
    clip_factors,
    l2_sensitivity,
    require_finite_start,
)


def test_clipped_vectors_are_at_most_the_clip_norm_and_short_ones_untouched():
    g = torch.randn(1000, 17, dtype=torch.float64) * torch.logspace(-3, 3, 1000, dtype=torch.float64)[:, None]
    factors = clip_factors(g.norm(dim=1), 0.7)
    assert (factors[:, None] * g).norm(dim=1).max() <= 0.7 * (1 + 1e-12)
    assert (factors[g.norm(dim=1) <= 0.7] == 1).all()
    assert (factors[g.norm(dim=1) > 0.7] < 1).all()


def test_float32_rounding_stays_within_the_declared_sensitivity():
    g = torch.randn(2000, 1003) * 10
    exact = (clip_factors(g.norm(dim=1), 1.0)[:, None] * g).double().norm(dim=1)
    assert exact.max() <= l2_sensitivity(1.0, "zero-out")
    assert exact.max() > 1.0 - FLOAT_SLACK


def test_nonfinite_norms_contribute_exactly_zero():
    factors = clip_factors(torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e-30]), 1.0)
    assert factors.tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


def test_sensitivity_follows_the_adjacency():
    one = l2_sensitivity(2.0, "zero-out")
    assert one == l2_sensitivity(2.0, "add-remove")
    assert l2_sensitivity(2.0, "replace-one") == 2 * one
    assert one >= 2.0


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, math.inf])
def test_bad_clip_norms(norm):
    with pytest.raises(ValueError, match="l2_clip_norm must be finite and positive"):
        clip_factors(torch.ones(1), norm)
    with pytest.raises(ValueError, match="l2_clip_norm"):
        ClippedSum({}, norm)


def test_unknown_adjacency():
    with pytest.raises(ValueError, match="unknown adjacency 'add'"):
        l2_sensitivity(1.0, "add")


def test_merging_adds_values_and_keeps_the_sensitivity():
    a = ClippedSum({"w": torch.ones(2)}, 1.0, num_nonfinite=1)
    b = ClippedSum({"w": torch.full((2,), 3.0)}, 1.0, num_nonfinite=2)
    both = a.merged(b)
    assert both.value["w"].tolist() == [4.0, 4.0]
    assert both.sensitivity == a.sensitivity
    assert both.num_nonfinite == 3
    with pytest.raises(ValueError, match="same clip norm"):
        a.merged(ClippedSum({"w": torch.ones(2)}, 2.0))


def test_private_count_is_not_shown():
    assert "37" not in repr(ClippedSum({}, 1.0, num_nonfinite=37))


def test_a_start_without_any_finite_gradient_is_refused():
    require_finite_start(ClippedSum({}, 1.0, num_nonfinite=3), 4)
    require_finite_start(ClippedSum({}, 1.0), 0)
    require_finite_start(ClippedSum({}, 1.0, members=2, num_nonfinite=4), 4)
    for bad in (ClippedSum({}, 1.0, num_nonfinite=4), ClippedSum({}, 1.0, members=2, num_nonfinite=8)):
        with pytest.raises(ValueError, match="gradient of every example is not finite"):
            require_finite_start(bad, 4)


def test_member_of_a_sum_without_members():
    with pytest.raises(ValueError, match="no members axis"):
        ClippedSum({"w": torch.ones(2)}, 1.0).member(0)


def test_physical_batches_halve_only_when_memory_runs_out():
    seen = []

    def piece(start, stop):
        if stop - start > 2:
            raise MemoryError
        return start, stop

    batches = PhysicalBatches(9)
    batches.run(9, piece, seen.append)
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert batches.size == 2

    def broken(start, stop):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        batches.run(3, broken, seen.append)
    with pytest.raises(ValueError, match="physical_batch_size"):
        PhysicalBatches(0)
    with pytest.raises(MemoryError):
        PhysicalBatches(1).run(1, lambda start, stop: (_ for _ in ()).throw(MemoryError()), seen.append)


def test_what_a_piece_found_is_kept_once_or_not_at_all():
    kept = []

    def keep(found):
        kept.append(found)
        raise MemoryError("in the middle of keeping")

    with pytest.raises(MemoryError, match="in the middle"):
        PhysicalBatches(4).run(8, lambda start, stop: (start, stop), keep)
    assert kept == [(0, 4)]

import pytest
import rank_tasks
import torch
from ranks import succeeded, together

from dptaft.distributed.blocks import own_range
from dptaft.identity import identify
from dptaft.training.plan import Sampling

FULL = Sampling("full-batch")
POISSON = Sampling("poisson", 0.4)
VARIANTS = {
    "fused": ({}, FULL, None),
    "fused poisson": ({}, POISSON, "random"),
    "fused, a process without a record": ({}, POISSON, "without"),
    "hooks": ({"engine": "hooks", "scope": "head"}, FULL, None),
    "hooks poisson": ({"engine": "hooks", "method": "non-linear", "scope": "head"}, POISSON, "random"),
    "ghost": ({"engine": "ghost", "scope": "head"}, FULL, None),
    "cyclic": ({"scope": "head"}, Sampling("cyclic-partition", 1 / 3, 3), None),
}


@pytest.fixture(scope="module")
def alone():
    return rank_tasks.everything(VARIANTS)


@pytest.mark.parametrize("count", [1, 127, 128, 129, 300, 1437, 70_001])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 16])
def test_every_record_belongs_to_exactly_one_process(count, size):
    owned = [own_range(count, rank, size) for rank in range(size)]
    assert [number for own in owned for number in own] == list(range(count))
    assert all(own.start % 128 == 0 for own in owned if len(own))
    assert len(owned[0]) > 0
    assert max(len(own) for own in owned) - min(len(own) for own in owned) < 256


def total(clipped):
    return torch.cat([value.flatten() for value in clipped.values()])


@pytest.mark.parametrize("size", [2, 4])
def test_clipped_sums_are_those_of_one_process(size, alone):
    found = succeeded(together(size, rank_tasks.everything, VARIANTS))[0]
    for name, expected in alone.items():
        mine = found[name]
        if name != "cyclic":  # a secret partition differs from run to run
            assert mine["size"] == expected["size"], name
            whole = total(expected["sum"][0])
            assert (total(mine["sum"][0]) - whole).norm() <= 1e-6 * whole.norm(), name
            assert whole.norm() > 0.1, name
        assert mine["sensitivity"] == expected["sensitivity"], name
        assert mine["digest"] == expected["digest"], name
        assert mine["content"] == identify(rank_tasks.data()), name
        torch.testing.assert_close(mine["logits"], expected["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(mine["finite"], expected["finite"])
    cyclic, fused_head = found["cyclic"], alone["cyclic"]
    assert cyclic["size"] == [100, 100, 100]  # equal parts of all records, not of each process's
    whole = sum(total(part) for part in cyclic["sum"])
    expected = sum(total(part) for part in fused_head["sum"])
    assert (whole - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("seed", [None, 11])
def test_masks_are_independent_and_of_the_right_rate(seed):
    rate, draws = 0.3, 60
    first, second = succeeded(together(2, rank_tasks.masks, rate, draws, seed))
    count = first.numel()
    for drawn in (first, second):
        assert abs(float(drawn.double().mean()) - rate) < 5 * (rate * (1 - rate) / count) ** 0.5
    both, expected = float((first & second).double().mean()), rate**2
    assert abs(both - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
    assert not torch.equal(first, second)

"""Data larger than memory: bounded reads, forward samples, the same numbers as in memory."""

import tracemalloc

import torch

from dptaft.training.noise import InsecureSeededNoise
from dptaft.training.sampling import Poisson

LARGE = 2_000_000


def test_poisson_samples_are_the_draws_below_the_rate_at_bounded_memory():
    tracemalloc.start()
    batch = Poisson(LARGE, 1e-4, InsecureSeededNoise(3)).next_batch()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    draws = InsecureSeededNoise(3).integers(LARGE)
    assert torch.equal(batch, torch.nonzero(draws < int(1e-4 * 2**63)).squeeze(1))
    assert peak < 8 * LARGE / 2

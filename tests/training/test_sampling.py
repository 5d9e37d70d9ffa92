"""Samplers: exact probabilities, secret partitions, empty batches, bad input."""

import math
from fractions import Fraction

import pytest
import torch
from scipy import stats

from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.sampling import CyclicPartition, FullBatch, Poisson, automatic_sampling_rate


def test_poisson_batch_sizes_follow_the_binomial():
    sampler = Poisson(200, 0.05, NoiseSource())
    sizes = torch.tensor([len(sampler.next_batch()) for _ in range(4000)])
    expected = stats.binom.pmf(range(25), 200, 0.05) * 4000
    seen = torch.bincount(sizes.clamp(max=24), minlength=25).numpy()
    assert seen.sum() == 4000
    many = expected > 5
    assert ((seen[many] - expected[many]) ** 2 / expected[many]).sum() < stats.chi2.isf(1e-8, many.sum())


def test_poisson_examples_are_included_independently():
    sampler = Poisson(50, 0.3, NoiseSource())
    picks = torch.zeros(20_000, 50)
    for row in picks:
        row[sampler.next_batch()] = 1.0
    assert (picks.mean(0) - 0.3).abs().max() < 6 * math.sqrt(0.21 / 20_000)
    correlation = torch.corrcoef(picks.T) - torch.eye(50)
    assert correlation.abs().max() < 6 / math.sqrt(20_000)
    in_time = torch.corrcoef(torch.stack([picks[:-1].flatten(), picks[1:].flatten()]))[0, 1]
    assert abs(in_time) < 6 / math.sqrt(picks[1:].numel())


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 1e-9, 0.999999999, 5e-20])
def test_poisson_probability_is_never_above_the_accounted_rate(rate):
    threshold = Poisson(10, rate, NoiseSource())._threshold
    assert Fraction(0) <= Fraction(rate) - Fraction(threshold, 2**63) < Fraction(1, 2**63)


def test_poisson_with_rate_one_takes_everything():
    assert torch.equal(Poisson(5, 1.0, NoiseSource()).next_batch(), torch.arange(5))


def test_empty_batches_are_yielded():
    sampler = Poisson(3, 1e-6, NoiseSource())
    batches = [sampler.next_batch() for _ in range(50)]
    assert len(batches) == 50
    assert sum(len(batch) == 0 for batch in batches) >= 48
    assert all(batch.dtype == torch.int64 for batch in batches)


def test_normaliser_is_the_expected_size():
    assert Poisson.from_batch_size(1000, 64, NoiseSource()).expected_batch_size == pytest.approx(64)
    assert FullBatch(7).expected_batch_size == 7
    assert CyclicPartition(10, 4, NoiseSource()).expected_batch_size == pytest.approx(2.5)


def test_cyclic_parts_cover_everything_once_per_epoch_and_repeat():
    sampler = CyclicPartition(101, 7, NoiseSource())
    epochs = [[sampler.next_batch() for _ in range(7)] for _ in range(3)]
    assert torch.equal(torch.cat(epochs[0]).sort().values, torch.arange(101))
    for later in epochs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(epochs[0], later, strict=True))
    assert {len(part) for part in epochs[0]} == {14, 15}
    assert not sampler.resumable


def test_cyclic_partition_is_uniform():
    together = 0
    for _ in range(3000):
        together += bool(
            torch.isin(torch.tensor([0, 1]), CyclicPartition(6, 2, SOURCE).next_batch()).sum() != 1
        )
    # examples 0 and 1 share a part with probability 2/5
    assert abs(together / 3000 - 0.4) < 6 * math.sqrt(0.24 / 3000)


SOURCE = NoiseSource()


def test_seeded_sampling_repeats():
    a, b = (Poisson(100, 0.2, InsecureSeededNoise(5)) for _ in range(2))
    assert torch.equal(a.next_batch(), b.next_batch())
    assert not torch.equal(a.next_batch(), Poisson(100, 0.2, InsecureSeededNoise(6)).next_batch())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.5, float("nan")])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="sampling_rate must be in"):
        Poisson(10, rate, SOURCE)


def test_batch_larger_than_the_data():
    with pytest.raises(ValueError, match="at most the 10 examples"):
        Poisson.from_batch_size(10, 11, SOURCE)


def test_bad_partitions_and_sizes():
    with pytest.raises(ValueError, match="num_parts"):
        CyclicPartition(3, 4, SOURCE)
    with pytest.raises(ValueError, match="num_examples"):
        FullBatch(0)


def test_automatic_rate_prefers_full_batch_and_keeps_a_smallest_batch():
    budget = {"seconds_per_example": 1e-3, "steps": 100, "time_budget_s": 100.0}
    assert automatic_sampling_rate(num_examples=1000, **budget) == 1.0
    assert automatic_sampling_rate(num_examples=2000, **budget) == pytest.approx(0.5)
    assert automatic_sampling_rate(num_examples=10**6, **budget) == pytest.approx(1e-3)
    budget["time_budget_s"] = 1.0
    assert automatic_sampling_rate(num_examples=10**8, **budget) == pytest.approx(2.56e-6)
    with pytest.raises(ValueError, match="positive"):
        automatic_sampling_rate(num_examples=10, seconds_per_example=0.0, steps=1, time_budget_s=1.0)

"""Which examples take part in a step: everything, a Poisson sample, or the next part of a secret partition.

A sampler yields index tensors (int64, ascending). An empty Poisson sample is yielded like any other: the step
adds noise and moves. `expected_batch_size` is public; the size of a drawn batch is not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction

import torch
from torch import Tensor

from dptaft.training.noise import InsecureSeededNoise, NoiseSource

_DRAWS = 1 << 18
"""Draws held at once; a multiple of what a source draws at once, so that its stream does not depend on it."""


class Sampler(ABC):
    """Draws the batch of every step.

    Attributes:
        kind: name for records.
        num_examples: size of the data set.
        sampling_rate: probability that one example takes part in one step (the accounted number).
        expected_batch_size: ``num_examples * sampling_rate``, the public normaliser of the sum.
        resumable: whether a new sampler can continue an interrupted run.
    """

    kind: str
    num_examples: int
    sampling_rate: float
    resumable: bool = True

    def __init__(self, num_examples: int) -> None:
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        self.num_examples = num_examples

    @property
    def expected_batch_size(self) -> float:
        """``num_examples * sampling_rate``."""
        return self.num_examples * self.sampling_rate

    @abstractmethod
    def next_batch(self) -> Tensor:
        """Indices of the examples of the next step, possibly none."""


class FullBatch(Sampler):
    """Every example in every step; nothing secret.

    Example:
        >>> FullBatch(3).next_batch()
        tensor([0, 1, 2])
    """

    kind = "full-batch"
    sampling_rate = 1.0

    def __init__(self, num_examples: int) -> None:
        super().__init__(num_examples)
        self._all = torch.arange(num_examples)

    def next_batch(self) -> Tensor:  # noqa: D102
        return self._all


class Poisson(Sampler):
    """Each example takes part in each step independently with probability `sampling_rate`.

    Formal guarantees:
        An example is included iff a uniform 63-bit integer is below ``floor(sampling_rate * 2**63)``,
        computed exactly, so the true probability is never above `sampling_rate` and at most 2**-63 below.

    Args:
        num_examples: size of the data set.
        sampling_rate: inclusion probability in (0, 1].
        source: randomness; its draws must not be shared with another process.

    Example:
        >>> sampler = Poisson(1000, 0.01, NoiseSource())
        >>> sampler.expected_batch_size, len(sampler.next_batch()) < 100
        (10.0, True)
    """

    kind = "poisson"

    def __init__(
        self, num_examples: int, sampling_rate: float, source: NoiseSource | InsecureSeededNoise
    ) -> None:
        super().__init__(num_examples)
        if not 0.0 < sampling_rate <= 1.0:
            raise ValueError(
                f"sampling_rate must be in (0, 1], got {sampling_rate}; "
                f"the expected batch size can be at most the {num_examples} examples there are"
            )
        self.sampling_rate = float(sampling_rate)
        self._threshold = math.floor(Fraction(self.sampling_rate) * 2**63)
        self._source = source

    @classmethod
    def from_batch_size(
        cls, num_examples: int, expected_batch_size: float, source: NoiseSource | InsecureSeededNoise
    ) -> Poisson:
        """Sampler whose batches hold `expected_batch_size` examples on average."""
        return cls(num_examples, expected_batch_size / num_examples, source)

    def next_batch(self) -> Tensor:  # noqa: D102
        chosen = []
        for start in range(0, self.num_examples, _DRAWS):  # memory for the batch, not for all draws
            draws = self._source.integers(min(_DRAWS, self.num_examples - start))
            chosen.append(torch.nonzero(draws < self._threshold).squeeze(1) + start)
        return torch.arange(self.num_examples) if self._threshold == 2**63 else torch.cat(chosen)


class CyclicPartition(Sampler):
    """A secret uniformly random partition into equal parts, visited in a fixed order, again and again.

    Every example takes part once per epoch. The parts differ in size by at most one. The partition is drawn
    once, kept in memory only, and so an interrupted run cannot be continued.

    Args:
        num_examples: size of the data set.
        num_parts: steps per epoch, from 1 to num_examples.
        source: randomness.

    Example:
        >>> sampler = CyclicPartition(4, 2, NoiseSource())
        >>> torch.cat([sampler.next_batch(), sampler.next_batch()]).sort().values
        tensor([0, 1, 2, 3])
    """

    kind = "cyclic-partition"
    resumable = False

    def __init__(self, num_examples: int, num_parts: int, source: NoiseSource | InsecureSeededNoise) -> None:
        super().__init__(num_examples)
        if not 1 <= num_parts <= num_examples:
            raise ValueError(f"num_parts must be from 1 to the {num_examples} examples, got {num_parts}")
        self.num_parts = num_parts
        self.sampling_rate = 1.0 / num_parts
        order = source.permutation(num_examples)
        self._parts = [part.sort().values for part in torch.tensor_split(order, num_parts)]
        self._step = 0

    def part_numbers(self) -> Tensor:
        """The part (n,) int64 that each example is in; as secret as the partition."""
        numbers = torch.empty(self.num_examples, dtype=torch.int64)
        for number, part in enumerate(self._parts):
            numbers[part] = number
        return numbers

    def next_batch(self) -> Tensor:  # noqa: D102
        part = self._parts[self._step % self.num_parts]
        self._step += 1
        return part


class GivenParts(Sampler):
    """Some examples of a cyclic partition that another process has drawn over more of them.

    Args:
        part_numbers: (n,) int64, the part of each example here, from `CyclicPartition.part_numbers`.
        num_parts: steps per epoch.

    Example:
        >>> sampler = GivenParts(torch.tensor([2, 0, 2]), 3)
        >>> [sampler.next_batch().tolist() for _ in range(4)]
        [[1], [], [0, 2], [1]]
    """

    kind = "cyclic-partition"
    resumable = False

    def __init__(self, part_numbers: Tensor, num_parts: int) -> None:
        super().__init__(len(part_numbers))
        self.sampling_rate = 1.0 / num_parts
        self._numbers, self.num_parts, self._step = part_numbers, num_parts, 0

    def next_batch(self) -> Tensor:  # noqa: D102
        part = torch.nonzero(self._numbers == self._step % self.num_parts).squeeze(1)
        self._step += 1
        return part


def automatic_sampling_rate(
    *,
    num_examples: int,
    seconds_per_example: float,
    steps: int,
    time_budget_s: float,
    min_batch_size: int = 256,
) -> float:
    """Largest sampling rate that fits a time budget: 1.0 (full batch) where all steps fit, else Poisson.

    ``rate = min(1, time_budget_s / (steps * num_examples * seconds_per_example))``, but never an expected
    batch below `min_batch_size`. Time per example must be measured on public or random inputs.

    Example:
        >>> budget = dict(seconds_per_example=1e-4, steps=100, time_budget_s=60.0)
        >>> automatic_sampling_rate(num_examples=2000, **budget)
        1.0
        >>> automatic_sampling_rate(num_examples=60_000, **budget)
        0.1
    """
    if min(num_examples, steps, min_batch_size) < 1 or min(seconds_per_example, time_budget_s) <= 0:
        raise ValueError(
            "num_examples, steps, seconds_per_example, time_budget_s and batch size must be positive"
        )
    rate = time_budget_s / (steps * num_examples * seconds_per_example)
    return min(1.0, max(rate, min_batch_size / num_examples))

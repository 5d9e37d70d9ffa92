"""Where the clipped sum of a step comes from: the records of this process, or those of several processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from dptaft.learner import Learner
from dptaft.tangent.operator import Features
from dptaft.training.clipping import Adjacency, ClippedSum
from dptaft.training.losses import LOSSES
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.plan import Request, Sampling
from dptaft.training.sampling import CyclicPartition, FullBatch, Poisson, Sampler

Source = NoiseSource | InsecureSeededNoise
_STREAMS = 2**64


class StepSums(Protocol):
    """Draws the batch of every step and sums its clipped gradients.

    Formal guarantees:
        One call of `next_sum` is one draw of the sampler that the plan is accounted for, over all records of
        the run, and the returned sum has one vector per drawn record, of norm at most its `l2_clip_norm`.
    """

    def next_sum(self, parameters: Mapping[str, nn.Parameter]) -> tuple[ClippedSum, int]:
        """The clipped sum at these weights, and the number of records in the batch (private)."""
        ...


class RecordSums:
    """Sums over records that this process holds.

    Args:
        learner: model and engine.
        features: cached constants of the records.
        labels: (n,) their classes.
        sampler: over the records.
        loss: name of the loss.
        l2_clip_norm: of one record's gradient.
        adjacency: of the claim.
    """

    def __init__(
        self,
        learner: Learner,
        features: Features,
        labels: Tensor,
        sampler: Sampler,
        *,
        loss: str,
        l2_clip_norm: float,
        adjacency: Adjacency,
    ) -> None:
        self._sampler = sampler
        self._engine = learner.engine(
            features, labels, loss=LOSSES[loss](), l2_clip_norm=l2_clip_norm, adjacency=adjacency
        )

    def next_sum(self, parameters: Mapping[str, nn.Parameter]) -> tuple[ClippedSum, int]:
        """See `StepSums`."""
        indices = self._sampler.next_batch()
        return self._engine.clipped_sum(parameters, indices), len(indices)


def sources(request: Request, process: int = 0) -> tuple[Source, Source]:
    """Independent randomness for noise and for sampling; of its own for every process of a run."""
    seed = request.privacy.insecure_seed
    if seed is None:
        return NoiseSource(), NoiseSource()
    offset = process * _STREAMS
    return InsecureSeededNoise(2 * seed + offset), InsecureSeededNoise(2 * seed + 1 + offset)


def make_sampler(sampling: Sampling, num_records: int, source: Source) -> Sampler:
    """The sampler of a plan over all records of a run, or over the records of one process."""
    if sampling.kind == "full-batch":
        return FullBatch(num_records)
    if sampling.kind == "poisson":
        return Poisson(num_records, sampling.rate, source)
    return CyclicPartition(num_records, sampling.parts, source)

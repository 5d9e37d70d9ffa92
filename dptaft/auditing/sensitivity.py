"""The deterministic check: neighbouring batches, noise off, sampling fixed.

What is released must then move by at most the declared sensitivity.

Sums go through the run's own engine and its private optimiser without noise, and are read where training
reads them: in the gradients of the parameters, times the public normaliser. So clipping, microbatches, the
normaliser and the sensitivity that the noise is scaled to are all in the loop. Neighbours are records of the
data, each left out or exchanged in turn, and constructed worst cases:

*twins*     the same image again and again, confidently right and confidently wrong in turn, at weights where
            the two gradients are opposite and of very different length: averages of a few of them change sign
            with one record.
*aligned*   copies of one record and a single one against them: a sum divided by what was really drawn jumps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dptaft.learner import Learner
from dptaft.tangent.operator import Features
from dptaft.training.clipping import Adjacency
from dptaft.training.losses import Loss
from dptaft.training.noise import NoiseSource
from dptaft.training.optimizers import OptimizerConfig, build_optimizer

TOLERANCE = 2e-3
"""Relative allowance for float32 sums of the batches compared here."""
_COPIES = 12
_CONFIDENT = 0.9


@dataclass(frozen=True)
class SensitivityCheck:
    """Outcome of the check.

    Attributes:
        declared: sensitivity that the noise is scaled to.
        measured: largest change of the released sum over all neighbours.
        neighbours: number of pairs compared.
        worst: the pair with the largest change.
    """

    declared: float
    measured: float
    neighbours: int
    worst: str

    @property
    def holds(self) -> bool:
        """Whether nothing moved by more than declared."""
        return self.measured <= self.declared * (1 + TOLERANCE)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "declared": self.declared,
            "measured": self.measured,
            "ratio": self.measured / self.declared,
            "neighbours": self.neighbours,
            "worst": self.worst,
            "holds": self.holds,
        }


@dataclass(frozen=True)
class _Pair:
    """Two neighbouring batches (numbers of records in the pool) at given weights."""

    name: str
    theta: Mapping[str, Tensor]
    batch: Tensor
    neighbour: Tensor


def check_sensitivity(
    learner: Learner,
    features: Features,
    labels: Tensor,
    *,
    loss: Loss,
    l2_clip_norm: float,
    adjacency: Adjacency,
    normaliser: float,
    records: int = 32,
) -> SensitivityCheck:
    """Compare the change of the released sum with the declared sensitivity over many neighbours.

    Args:
        learner: of the run.
        features: constants of the records; the first `records` are used.
        labels: their classes.
        loss: of the run.
        l2_clip_norm: clip norm C.
        adjacency: zero-out and add-remove leave one record out, replace-one exchanges it.
        normaliser: public divisor of the sum.
        records: how many records are left out in turn.

    Returns:
        The largest change found, in units of the sum.
    """
    replace = adjacency == "replace-one"
    pool = _Pool(learner, features, labels, min(records, len(labels)), loss)
    engine = learner.engine(
        pool.features, pool.labels, loss=loss, l2_clip_norm=l2_clip_norm, adjacency=adjacency
    )
    released = _Released(learner, engine, l2_clip_norm, adjacency, normaliser)
    measured, worst, count = 0.0, "none", 0
    for pair in pool.pairs(replace):
        change = released.change(pair)
        count += 1
        if change > measured:
            measured, worst = change, pair.name
    released.close()
    return SensitivityCheck(released.declared, measured, count, worst)


class _Pool:
    """Records for all pairs in one feature set: the data's own, the same with other labels, twins, copies."""

    def __init__(self, learner: Learner, features: Features, labels: Tensor, count: int, loss: Loss) -> None:
        self._learner, self._count, self._loss = learner, count, loss
        classes = learner.operator.num_classes
        own = torch.arange(count)
        twin = torch.zeros(2 * _COPIES, dtype=torch.int64)
        first = int(labels[0])
        self._second = (first + 1) % classes
        marks = torch.tensor([first, self._second] * _COPIES)
        self.features = features.index(torch.cat([own, own, twin]).to(_device(features)))
        self.labels = torch.cat([labels[:count], (labels[:count] + 1) % classes, marks])
        self._first = first
        self._right = 2 * count + 2 * torch.arange(_COPIES)
        self._wrong = self._right + 1

    def pairs(self, replace: bool) -> Iterator[_Pair]:
        """All neighbouring batches at all weights."""
        n = self._count
        every = torch.arange(n)
        for where, theta in self._weights():
            for i in range(n):
                rest = every[every != i]
                yield _Pair(f"record {i} left out, {where}", theta, every, _with(rest, i + n, replace))
            yield _Pair(f"a record alone, {where}", theta, every[:1], _with(every[:0], n, replace))
            yield from self._constructed(where, theta, replace)

    def _constructed(self, where: str, theta: Mapping[str, Tensor], replace: bool) -> Iterator[_Pair]:
        right, wrong = self._right, self._wrong
        for copies in (1, 2, 3, _COPIES - 1):
            batch = torch.cat([right[:copies], wrong[:1]])
            for order, mixed in (("first", batch.sort().values), ("last", batch)):
                yield _Pair(
                    f"one against {copies} aligned copies ({order}), {where}",
                    theta,
                    mixed,
                    _with(right[:copies], int(right[copies]), replace),
                )
        both = torch.cat([right, wrong]).sort().values
        for i in both.tolist()[:4]:
            other = i + 1 if i in right.tolist() else i - 1
            rest = both[both != i]
            if replace:
                rest = rest[rest != other]
                yield _Pair(
                    f"twins, {where}", theta, torch.cat([rest, torch.tensor([i])]), _with(rest, other, True)
                )
            else:
                yield _Pair(f"twins, {where}", theta, both, rest)

    def _weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        start = {name: p.detach().clone() for name, p in self._learner.parameters.items()}
        yield "at the start", start
        generator = torch.Generator().manual_seed(3)
        moved = {
            name: p + (0.05 * torch.randn(p.shape, generator=generator)).to(p) for name, p in start.items()
        }
        yield "at random weights", moved
        confused = self._confused()
        if confused is not None:
            yield "at weights that are nearly sure", confused

    def _confused(self) -> dict[str, Tensor] | None:
        """Weights at which the twins' image is assigned to its first class with high probability."""
        if not self._learner.is_convex:
            return None
        operator = self._learner.operator
        image = self.features.index(slice(2 * self._count, 2 * self._count + 1))
        classes = operator.num_classes
        wanted = torch.full((1, classes), -8.0, dtype=torch.float64)
        wanted[0, self._first], wanted[0, self._second] = 0.0, float(torch.tensor(1 / _CONFIDENT - 1).log())
        gram = operator.gram(image)[0].double()
        if not self._learner.config.centered:
            wanted = wanted - operator.offset(image).double().cpu()
        if self._loss.name != "cross-entropy":
            wanted = wanted + 8.0
        solution = torch.linalg.lstsq(gram.cpu(), wanted[0], driver="gelsd").solution
        return operator.vjp(image, solution[None].to(gram.device, operator.offset(image).dtype))


def _with(rest: Tensor, other: int, replace: bool) -> Tensor:
    return torch.cat([rest, torch.tensor([other])]) if replace else rest


def _device(features: Features) -> torch.device:
    return next(iter(features.tensors.values())).device


class _Released:
    """The noise-free released sum of a batch, through engine and private optimiser."""

    def __init__(
        self, learner: Learner, engine: Any, l2_clip_norm: float, adjacency: Adjacency, normaliser: float
    ) -> None:
        self._learner, self._engine, self._normaliser = learner, engine, normaliser
        self._start = {name: p.detach().clone() for name, p in learner.parameters.items()}
        self._optimizer = build_optimizer(
            learner.parameters,
            OptimizerConfig(learning_rate=1.0),
            noise_multiplier=0.0,
            l2_clip_norm=l2_clip_norm,
            expected_batch_size=normaliser,
            source=NoiseSource(),
            adjacency=adjacency,
        )
        self.declared = self._declared()
        self._seen: dict[str, Tensor] = {}
        self._hook = self._optimizer.original_optimizer.register_step_post_hook(self._read)

    def _declared(self) -> float:
        """Standard deviation of the noise for a multiplier of 1: what the noise is scaled to."""
        self._optimizer.noise_multiplier = 1.0
        std = float(self._optimizer.noise_std)
        self._optimizer.noise_multiplier = 0.0
        return std

    def _read(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._seen = {
            name: cast(Tensor, p.grad).detach().double() * self._normaliser
            for name, p in self._learner.parameters.items()
        }

    def sum(self, theta: Mapping[str, Tensor], batch: Tensor) -> dict[str, Tensor]:
        """What a noise-free observer reads off the step."""
        with torch.no_grad():
            for name, p in self._learner.parameters.items():
                p.copy_(theta[name])
        self._optimizer.private_step(self._engine.clipped_sum(self._learner.parameters, batch))
        return self._seen

    def change(self, pair: _Pair) -> float:
        """L2 distance between the sums of the two batches."""
        first, second = self.sum(pair.theta, pair.batch), self.sum(pair.theta, pair.neighbour)
        return float(torch.stack([(first[k] - second[k]).square().sum().cpu() for k in first]).sum().sqrt())

    def close(self) -> None:
        """Put the weights back."""
        self._hook.remove()
        with torch.no_grad():
            for name, p in self._learner.parameters.items():
                p.copy_(self._start[name])
                p.grad = None
        if hasattr(self._engine, "close"):
            self._engine.close()

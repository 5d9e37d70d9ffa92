"""The run's own engine with canary slots behind its records, and what an observer of the run sees.

Records have numbers 0..n-1 and canary slots n..n+m-1. The training loop, its sampler, clipping, noise,
optimiser and checkpoints are the run's own (`dptaft.training.steps.train_steps`); only the engine is wrapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from dptaft.auditing.canaries import Canaries
from dptaft.auditing.noise_check import NoiseMeter
from dptaft.learner import Learner
from dptaft.tangent.operator import Features
from dptaft.training.clipping import ClippedSum
from dptaft.training.optimizers import PrivateOptimizer


class Engine(Protocol):
    """What the training loop asks of an engine."""

    def clipped_sum(self, theta: Mapping[str, Tensor], indices: Tensor) -> ClippedSum:
        """Sum over the batch of clipped gradients."""


class AuditEngine:
    """Clipped sums over sampled records and sampled, included canaries.

    Args:
        records: the run's engine over its n records.
        num_records: n.
        canaries: behind the records.
        coins: (m,) bool, which canaries are included.
        observer: is told of every step; None for a run that is not observed.
    """

    def __init__(
        self,
        records: Engine,
        num_records: int,
        canaries: Canaries,
        coins: Tensor,
        observer: StepObserver | None = None,
    ) -> None:
        self._records, self._n, self._canaries = records, num_records, canaries
        self._coins, self._observer = coins, observer

    def clipped_sum(self, theta: Mapping[str, Tensor], indices: Tensor) -> ClippedSum:
        """The engine's sum over the sampled records, merged with the canaries' own."""
        own, slots = indices[indices < self._n], indices[indices >= self._n] - self._n
        base = self._records.clipped_sum(theta, own)
        inserted = _like(self._canaries.clipped_sum(theta, slots, self._coins), base)
        if self._observer is not None:
            self._observer.before_step(theta, base, inserted, len(own), slots)
        return base.merged(inserted)


def _like(inserted: ClippedSum, base: ClippedSum) -> ClippedSum:
    """In the precision of the records' sum, so that canaries change no arithmetic of the run."""
    value = {name: tensor.to(base.value[name].dtype) for name, tensor in inserted.value.items()}
    return replace(inserted, value=value)


class StepObserver:
    """Sees every noised sum, as whoever holds all iterates does, and scores the canaries.

    It knows the records and so subtracts their sum, and it knows the noise level and the sampler's kind. The
    score is the log-likelihood ratio of the canary's presence: with u the step's projection in units of
    the sensitivity and s the noise in the same unit, ``sum_t (u - 1/2)/s^2`` over the steps that a canary
    takes part in, or ``sum_t log(1 - p + p exp((u - 1/2)/s^2))`` where Poisson sampling hides these.
    Batches of *other* records may be known without harm to a Poisson claim, since inclusions are
    independent; for cyclic partitions the claim for all iterates is the one of a known partition.

    Args:
        canaries: to be scored.
        noise: s of every step.
        normaliser: public divisor of the noised sum.
        rate: sampling rate p where it hides participation, else None.
        sensitivity: what s is relative to, for the noise check.
    """

    def __init__(
        self,
        canaries: Canaries,
        noise: tuple[float, ...],
        normaliser: float,
        rate: float | None,
        sensitivity: float,
    ) -> None:
        self._canaries, self._noise, self._normaliser, self._rate = canaries, noise, normaliser, rate
        self._base: Mapping[str, Tensor] | None = None
        self._inserted: Mapping[str, Tensor] = {}
        self.meter = NoiseMeter(tuple(s * sensitivity for s in noise))
        self._taking_part = torch.zeros(len(canaries), dtype=torch.bool)
        self._step = 0
        self.scores = torch.zeros(len(canaries), dtype=torch.float64)
        self.participations = torch.zeros(len(canaries), dtype=torch.int64)
        self.batch_sizes: list[int] = []

    def before_step(
        self,
        theta: Mapping[str, Tensor],
        base: ClippedSum,
        inserted: ClippedSum,
        records: int,
        slots: Tensor,
    ) -> None:
        """Sums of the sampled records and of the included canaries, and the slots that the sampler drew."""
        self._base, self._inserted = base.value, inserted.value
        self._canaries.prepare_step(theta)
        self._taking_part = torch.zeros(len(self._canaries), dtype=torch.bool)
        self._taking_part[slots] = True
        self.participations += self._taking_part
        self.batch_sizes.append(records + len(slots))

    def after_step(self, parameters: Mapping[str, Tensor]) -> None:
        """The noised mean that the optimiser stepped along, from the gradients of the parameters."""
        if self._base is None:
            return
        residual = {
            name: p.grad.detach() * self._normaliser - self._base[name] for name, p in parameters.items()
        }
        self.meter.add({name: value - self._inserted[name] for name, value in residual.items()})
        u = self._canaries.project(residual)
        ratio = (u - 0.5) / self._noise[self._step] ** 2
        if self._rate is None:
            self.scores += torch.where(self._taking_part, ratio, torch.zeros_like(ratio))
        else:
            p = torch.tensor(self._rate, dtype=torch.float64)
            self.scores += torch.logaddexp(torch.log1p(-p), torch.log(p) + ratio)
        self._base = None
        self._step += 1


@contextlib.contextmanager
def watching(observer: StepObserver, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Tell the observer after every optimiser step on these parameters what was stepped along."""
    mine = {id(p) for p in parameters.values()}

    def hook(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held == mine and not isinstance(optimizer, PrivateOptimizer):
            observer.after_step(parameters)

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class AuditLearner:
    """A learner whose engine has canary slots; everything else is the learner itself.

    Args:
        learner: of the run.
        num_records: n.
        canaries: behind the records.
        coins: which of them are included.
        observer: see `AuditEngine`.
    """

    def __init__(
        self,
        learner: Learner,
        num_records: int,
        canaries: Canaries,
        coins: Tensor,
        observer: StepObserver | None,
    ) -> None:
        self._learner, self._n = learner, num_records
        self._canaries, self._coins, self._observer = canaries, coins, observer
        self._made: Any = None

    def close(self) -> None:
        """Take the engine's hooks off the model, where it has some."""
        if hasattr(self._made, "close"):
            self._made.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def engine(self, features: Features, labels: Tensor, **options: Any) -> AuditEngine:
        """The run's engine over the records (the labels of canary slots are placeholders), wrapped."""
        records = self._learner.engine(features, labels[: self._n], **options)
        self._made = records
        return AuditEngine(records, self._n, self._canaries, self._coins, self._observer)

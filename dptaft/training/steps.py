"""The private loop: authorise, clipped sum, noise, step, checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dptaft.learner import Cached, Progress
from dptaft.training.account import Account
from dptaft.training.checkpoint import (
    Checkpointer,
    GracefulStop,
    ResumeError,
    check_resumable,
    data_fingerprint,
)
from dptaft.training.clipping import ClippedSum, require_finite_start
from dptaft.training.marks import PROGRESS
from dptaft.training.optimizers import IterateAverage, build_optimizer
from dptaft.training.plan import PlanError, Request, plain
from dptaft.training.preparation import Prepared
from dptaft.training.sampling import Sampler
from dptaft.training.sums import RecordSums, Source, StepSums, make_sampler, sources

MOST_BLOCK_STEPS = 25


Divide = Callable[[Prepared, Sampler], StepSums]


class TrainingInterruptedError(RuntimeError):
    """Training stopped early on request; what was spent is recorded in the partial folder."""


@dataclass(frozen=True)
class Trained:
    """Released weights, and all steps that may have touched the data.

    Attributes:
        weights: by name.
        l2_clip_norm: C, to which the noise was scaled.
        executed: numbers of all steps that may have touched the data, repeated ones again.
        completed: how many of them the weights contain.
        processes: that shared the records; the most, where the run was interrupted.
        images: digest of the pixels that were trained on (`dptaft.learner.Cached`); private.
    """

    weights: Mapping[str, Tensor]
    l2_clip_norm: float
    executed: tuple[int, ...] = ()
    completed: int = 0
    processes: int = 1
    images: str = field(default="", repr=False)

    @property
    def dimension(self) -> int:
        """Number of weights."""
        return sum(value.numel() for value in self.weights.values())


class RunState:
    """One run between two steps: weights, optimiser, average, checkpoint, account.

    Args:
        prepared: model and plan.
        request: what the run was asked for; a resumed run is held to it.
        parameters: the trained weights; a checkpoint that exists is restored into them.
        cached: features of the records.
        labels: (n,) their classes.
        partial: private folder of checkpoint and authorised steps.
        account: where the steps are charged.
        source: randomness of the noise.
        processes: that share the records.

    Raises:
        PlanError: no budget is left for another step.
        ResumeError: a partial run that cannot be continued.

    Formal guarantees:
        `authorise` returns only when account and checkpoint have recorded the step that follows, and `take`
        adds the noise that the plan was calibrated for.
    """

    def __init__(
        self,
        prepared: Prepared,
        request: Request,
        parameters: Mapping[str, nn.Parameter],
        cached: Cached,
        labels: Tensor,
        partial: Path,
        account: Account,
        source: Source,
        processes: int = 1,
    ) -> None:
        self.prepared, self.parameters = prepared, parameters
        self._account, self._images = account, cached.digest
        plan = prepared.plan
        self.private = build_optimizer(
            parameters,
            prepared.optimizer,
            noise_multiplier=plan.noise_over_sensitivity,
            l2_clip_norm=prepared.l2_clip_norm,
            expected_batch_size=plan.normaliser,
            source=source,
            adjacency=plan.adjacency,
        )
        self._average = IterateAverage(prepared.optimizer, plan.steps)
        fingerprint = _fingerprint(prepared, request, cached, labels)
        self._checkpointer = Checkpointer(partial, fingerprint, processes)
        try:
            self._check_ranges(partial)
            self.done = self._checkpointer.restore(parameters, self.private, self._average)
            self._last = plan.last_step(self.done, self._charged())
            if self._last == 0:
                raise PlanError(
                    f"the budget of {plan.steps} steps is spent and no result was saved; "
                    f"remove {partial} and start a new run, which spends it again"
                )
        except BaseException:
            self.close()
            raise
        self._authorised = self.done

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done >= self._last

    def authorise(self) -> None:
        """Record that the next step may touch the data, durably, before it does."""
        plan = self.prepared.plan
        if self.done == self._authorised:
            end = min(self.done + max(1, min(MOST_BLOCK_STEPS, plan.steps // 20)), self._last)
            self._account.authorise(self.prepared.spending((*self._charged(), *range(self.done, end))))
            self._checkpointer.authorise(self.done, end)
            self._authorised = end

    def take(self, clipped: ClippedSum, batch_size: int) -> None:
        """One private step with the clipped sum of its batch."""
        plan = self.prepared.plan
        if self.done == 0:
            require_finite_start(clipped, batch_size)
        self.private.set_step(self.prepared.optimizer, plan.noise_over_sensitivity, self.done, plan.steps)
        self.private.private_step(clipped)
        self._average.update(self.parameters, self.done)
        self.done += 1
        if self.done == self._authorised:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; steps that were authorised and did not run are given back."""
        self._checkpointer.save(self.done, self.parameters, self.private, self._average)
        self._authorised = self.done

    def interruption(self) -> TrainingInterruptedError:
        """What to tell the user who asked for a stop."""
        return TrainingInterruptedError(
            f"stopped after {self.done} of {self.prepared.plan.steps} steps; "
            f"continue with the same options, --output {_output(self._checkpointer.folder)} and --resume"
        )

    def trained(self) -> Trained:
        """The result.

        Raises:
            PlanError: the weights diverged.
        """
        weights = self._average.value(self.parameters)
        if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
            raise PlanError(
                "the weights diverged, and the budget is spent; lower the learning rate in a new run"
            )
        if self.prepared.design is not None:  # updated in float64, released in the precision of the model
            weights = {name: value.float() for name, value in weights.items()}
        kept = self._checkpointer
        completed, norm = kept.progress.completed, self.private.max_grad_norm
        return Trained(weights, norm, self._charged(), completed, kept.processes, self._images)

    def close(self) -> None:
        """Let another process continue the run; a run that never started leaves nothing."""
        if self._checkpointer.started:
            self._checkpointer.close()
        else:
            self._checkpointer.remove()

    def _check_ranges(self, partial: Path) -> None:
        last = max((stop for _, stop in self._checkpointer.progress.authorised), default=0)
        planned = self.prepared.plan.steps
        if last > planned:
            raise ResumeError(
                f"{partial / PROGRESS} is damaged (it lists steps up to {last}, {planned} are planned), so "
                "the steps to charge are unknown; start a new run"
            )

    def _charged(self) -> tuple[int, ...]:
        """Numbers of all steps that may have touched the data, repeated ones again."""
        return tuple(i for first, end in self._checkpointer.progress.authorised for i in range(first, end))


def train_steps(
    prepared: Prepared,
    request: Request,
    cached: Cached,
    labels: Tensor,
    partial: Path,
    account: Account,
    progress: Progress | None = None,
    divide: Divide | None = None,
    processes: int = 1,
) -> Trained:
    """Run all steps that are left, each authorised by checkpoint and account before it touches the data.

    Args:
        prepared: model and plan.
        request: what the run was asked for; a resumed run is held to it.
        cached: features of the records.
        labels: (n,) their classes.
        partial: private folder of checkpoint and authorised steps.
        account: where the steps are charged.
        progress: called with (stage, done, total).
        divide: makes sums over records of several processes, from the plan and the sampler of all records;
            None sums over `cached`.
        processes: how many they are.

    Raises:
        PlanError: nothing to train on, a spent budget, or weights that diverged.
        ResumeError: a partial run that cannot be continued.
        TrainingInterruptedError: a signal asked for a stop.
    """
    learner, plan = prepared.learner, prepared.plan
    noise, choice = sources(request)
    sampler = make_sampler(plan.sampling, len(labels), choice)
    if partial.is_dir():
        check_resumable(sampler, noise)
    sums = (
        _own_sums(prepared, request, cached, labels, sampler) if divide is None else divide(prepared, sampler)
    )
    state = RunState(
        prepared, request, learner.parameters, cached, labels, partial, account, noise, processes
    )
    try:
        with GracefulStop((signal.SIGTERM, signal.SIGINT)) as stop:
            while not state.finished:
                state.authorise()
                state.take(*sums.next_sum(learner.parameters))
                if progress is not None:
                    progress("training", state.done, plan.steps)
                if stop.requested:
                    state.save()
                    raise state.interruption()
        return state.trained()
    finally:
        state.close()


def is_resumable(prepared: Prepared, request: Request) -> bool:
    """Whether the last checkpoint of a run leads to its result: no secret partition, no seeded noise."""
    return prepared.plan.sampling.kind != "cyclic-partition" and request.privacy.insecure_seed is None


def _own_sums(
    prepared: Prepared, request: Request, cached: Cached, labels: Tensor, sampler: Sampler
) -> RecordSums:
    require_finite_features(cached)
    return RecordSums(
        prepared.learner,
        cached.features,
        labels,
        sampler,
        loss=request.model.loss,
        l2_clip_norm=prepared.l2_clip_norm,
        adjacency=prepared.plan.adjacency,
    )


def require_finite_features(cached: Cached) -> None:
    """Refuse data of which no image can be used, before anything is charged."""
    if not bool(cached.features["finite"].any()):
        raise PlanError("no image has finite features; check the images and the backbone's weights")


def _output(partial: Path) -> Path:
    return partial.with_name(partial.name.removesuffix(".partial"))


def _fingerprint(prepared: Prepared, request: Request, cached: Cached, labels: Tensor) -> dict[str, Any]:
    return {
        "privacy": plain(request.privacy),
        "model": plain(request.model),
        "optimizer": plain(prepared.optimizer),
        "plan": plain(prepared.plan) | {"noise_factors": [], "l2_clip_norm": prepared.l2_clip_norm},
        "backbone": prepared.learner.backbone.digest,
        "images": cached.digest,
        "labels": data_fingerprint([labels]),
    }

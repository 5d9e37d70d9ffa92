"""The private loop: authorise, clipped sum, noise, step, checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dptaft.learner import Cached, Progress
from dptaft.training.account import Account
from dptaft.training.checkpoint import Checkpointer, GracefulStop, check_resumable, data_fingerprint
from dptaft.training.clipping import require_finite_start
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import LOSSES
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.opacus_engine import OpacusEngine
from dptaft.training.optimizers import IterateAverage, PrivateOptimizer, build_optimizer
from dptaft.training.plan import Plan, PlanError, Request, plain
from dptaft.training.preparation import Prepared
from dptaft.training.sampling import CyclicPartition, FullBatch, Poisson, Sampler

MOST_BLOCK_STEPS = 25
Source = NoiseSource | InsecureSeededNoise


class TrainingInterruptedError(RuntimeError):
    """Training stopped early on request; what was spent is recorded in the partial folder."""


@dataclass(frozen=True)
class Trained:
    """Released weights, the optimiser that made them, and all steps that may have touched the data."""

    weights: Mapping[str, Tensor]
    private: PrivateOptimizer
    executed: tuple[int, ...]
    completed: int


def _sources(request: Request) -> tuple[Source, Source]:
    """Independent randomness for noise and for sampling."""
    seed = request.privacy.insecure_seed
    if seed is None:
        return NoiseSource(), NoiseSource()
    return InsecureSeededNoise(2 * seed), InsecureSeededNoise(2 * seed + 1)


def _sampler(plan: Plan, num_records: int, source: Source) -> Sampler:
    if plan.sampling.kind == "full-batch":
        return FullBatch(num_records)
    if plan.sampling.kind == "poisson":
        return Poisson(num_records, plan.sampling.rate, source)
    return CyclicPartition(num_records, plan.sampling.parts, source)


def train_steps(
    prepared: Prepared,
    request: Request,
    cached: Cached,
    labels: Tensor,
    partial: Path,
    account: Account,
    progress: Progress | None = None,
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

    Raises:
        PlanError: nothing to train on, a spent budget, or weights that diverged.
        ResumeError: a partial run that cannot be continued.
        TrainingInterruptedError: a signal asked for a stop.
    """
    learner, plan = prepared.learner, prepared.plan
    noise, choice = _sources(request)
    sampler = _sampler(plan, len(labels), choice)
    if partial.is_dir():
        check_resumable(sampler, noise)
    if not bool(cached.features["finite"].any()):
        raise PlanError("no image has finite features; check the images and the backbone's weights")
    engine = learner.engine(
        cached.features,
        labels,
        loss=LOSSES[request.model.loss](),
        l2_clip_norm=prepared.l2_clip_norm,
        adjacency=plan.adjacency,
    )
    private = build_optimizer(
        learner.parameters,
        prepared.optimizer,
        noise_multiplier=plan.noise_over_sensitivity,
        l2_clip_norm=prepared.l2_clip_norm,
        expected_batch_size=plan.normaliser,
        source=noise,
        adjacency=plan.adjacency,
    )
    average = IterateAverage(prepared.optimizer, plan.steps)
    checkpointer = Checkpointer(partial, _fingerprint(prepared, request, cached, labels))
    try:
        _run_steps(prepared, engine, sampler, private, average, checkpointer, account, progress)
        executed, completed = _charged(checkpointer), checkpointer.progress.completed
    finally:
        if checkpointer.started:
            checkpointer.close()
        else:
            checkpointer.remove()
    weights = average.value(learner.parameters)
    if not all(bool(torch.isfinite(value).all()) for value in weights.values()):
        raise PlanError("the weights diverged, and the budget is spent; lower the learning rate in a new run")
    return Trained(weights, private, executed, completed)


def _charged(checkpointer: Checkpointer) -> tuple[int, ...]:
    """Numbers of all steps that may have touched the data, repeated ones again."""
    return tuple(i for first, end in checkpointer.progress.authorised for i in range(first, end))


def _run_steps(
    prepared: Prepared,
    engine: FusedEngine | OpacusEngine,
    sampler: Sampler,
    private: PrivateOptimizer,
    average: IterateAverage,
    checkpointer: Checkpointer,
    account: Account,
    progress: Progress | None,
) -> None:
    """All steps that are left; steps that were authorised before but lost count against the plan."""
    plan, parameters = prepared.plan, prepared.learner.parameters
    done = checkpointer.restore(parameters, private, average)
    last = plan.last_step(done, _charged(checkpointer))
    if last == 0:
        raise PlanError(
            f"the budget of {plan.steps} steps is spent and no result was saved; "
            f"remove {checkpointer.folder} and start a new run, which spends it again"
        )
    block = max(1, min(MOST_BLOCK_STEPS, plan.steps // 20))
    with GracefulStop((signal.SIGTERM, signal.SIGINT)) as stop:
        while done < last:
            end = min(done + block, last)
            account.authorise(prepared.spending((*_charged(checkpointer), *range(done, end))))
            checkpointer.authorise(done, end)
            while done < end and not stop.requested:
                private.set_step(prepared.optimizer, plan.noise_over_sensitivity, done, plan.steps)
                indices = sampler.next_batch()
                clipped = engine.clipped_sum(parameters, indices)
                if done == 0:
                    require_finite_start(clipped, len(indices))
                private.private_step(clipped)
                average.update(parameters, done)
                done += 1
                if progress is not None:
                    progress("training", done, plan.steps)
            checkpointer.save(done, parameters, private, average)
            if stop.requested:
                raise TrainingInterruptedError(
                    f"stopped after {done} of {plan.steps} steps; "
                    f"continue with the same options, --output {_output(checkpointer.folder)} and --resume"
                )


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

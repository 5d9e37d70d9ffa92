"""From a request to a finished run: plan, features, private steps, evaluation, statement."""

from __future__ import annotations

import shutil
import signal
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dptaft.backbones import describe_preprocessing, load_backbone
from dptaft.data import ImageData
from dptaft.learner import Cached, Learner, Progress
from dptaft.predictor import HEAD, TRAINED
from dptaft.runs import (
    FORMAT,
    WEIGHTS,
    Run,
    check_output,
    load_run,
    new_run,
    sha256_file,
    write_config,
    write_metrics,
    write_statement,
)
from dptaft.training.checkpoint import Checkpointer, GracefulStop, check_resumable, data_fingerprint
from dptaft.training.clipping import require_finite_start
from dptaft.training.defaults import automatic_rate, default_hyperparameters, jacobian_scale
from dptaft.training.describe import build_statement, no_claim
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import LOSSES
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.opacus_engine import OpacusEngine
from dptaft.training.optimizers import IterateAverage, OptimizerConfig, PrivateOptimizer, build_optimizer
from dptaft.training.plan import (
    Plan,
    PlanError,
    Request,
    default_delta,
    delta_warning,
    make_plan,
    plain,
    resolve_sampling,
    whole_epochs,
)
from dptaft.training.sampling import CyclicPartition, FullBatch, Poisson, Sampler

MOST_BLOCK_STEPS = 25
Source = NoiseSource | InsecureSeededNoise


class TrainingInterruptedError(RuntimeError):
    """Training stopped early on request; what was spent is recorded in the partial folder."""


@dataclass(frozen=True)
class Prepared:
    """A run ready to read private images: model, plan, public hyperparameters."""

    learner: Learner
    plan: Plan
    optimizer: OptimizerConfig
    l2_clip_norm: float
    head: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """Released weights, the optimiser that made them, and all steps that may have touched the data."""

    weights: Mapping[str, Tensor]
    private: PrivateOptimizer
    executed: tuple[int, ...]
    completed: int


def partial_folder(output: Path) -> Path:
    """Where an unfinished run keeps its account and its checkpoint."""
    return output.with_name(output.name + ".partial")


def run_training(
    data: ImageData, request: Request, output: Path, *, resume: bool = False, progress: Progress | None = None
) -> Run:
    """Train as requested and write the run to `output`.

    While it trains, a private folder ``<output>.partial`` holds what is needed to resume and the account of
    all steps that may have touched the data.

    Raises:
        ValueError: a request that cannot be met (PlanError, DataError, BackboneError, RunError, ResumeError).
        TrainingInterruptedError: a signal asked for a stop.
    """
    check_output(output)
    partial = partial_folder(output)
    if resume and not partial.is_dir():
        raise PlanError(f"there is no interrupted run {partial}; leave --resume out")
    if partial.is_dir() and not resume:
        raise PlanError(
            f"{partial} holds an interrupted run (or one that still trains); continue it with --resume, "
            "or remove it"
        )
    prepared = prepare(data, request)
    warning = delta_warning(prepared.plan.delta, request.privacy.public_size or len(data.train))
    if warning is not None and request.privacy.is_private:
        warnings.warn(warning, UserWarning, stacklevel=2)
    learner = prepared.learner
    cached = learner.features(data.train, progress, "reading images")
    held_out = (
        None if data.evaluation is None else learner.features(data.evaluation, progress, "reading evaluation")
    )
    trained = _train(prepared, request, cached, data.train.labels, partial, progress)
    metrics = _evaluate(learner, data, held_out, trained.weights)
    with new_run(output) as folder:
        _write_run(folder, output.name, data, request, prepared, trained, metrics)
    shutil.rmtree(partial, ignore_errors=True)
    return load_run(output)


def prepare(data: ImageData, request: Request) -> Prepared:
    """Build the model and fix every number of the plan; no private image is read here."""
    privacy, model = request.privacy, request.model
    if model.loss not in LOSSES:
        raise PlanError(f"unknown loss {model.loss!r}; use {', '.join(LOSSES)}")
    backbone = load_backbone(
        model.name, num_classes=len(data.classes), seed=model.seed, weights=model.weights, head=model.head
    )
    classifier = backbone.model.get_classifier()
    head = {"weight": classifier.weight.detach().clone(), "bias": classifier.bias.detach().clone()}
    learner = Learner(backbone, model, request.performance)
    records = privacy.public_size or len(data.train)
    delta = privacy.delta if privacy.delta is not None else default_delta(records)
    defaults = default_hyperparameters(records, privacy.epsilon, delta)
    scale = jacobian_scale(learner)
    settings: dict[str, Any] = {
        "kind": "momentum",
        "momentum": defaults.momentum,
        "learning_rate": defaults.relative_learning_rate / scale**2,
    }
    optimizer = OptimizerConfig(**(settings | dict(request.optimizer)))
    if "momentum" in request.optimizer and optimizer.kind != "momentum":
        raise PlanError(f"momentum has no meaning for the optimizer {optimizer.kind}; leave it out")
    steps = privacy.steps or defaults.steps
    rate = automatic_rate(learner, privacy, records, steps)
    sampling = resolve_sampling(privacy, len(data.train), rate)
    steps = whole_epochs(steps, sampling)
    plan = make_plan(
        privacy,
        num_records=len(data.train),
        steps=steps,
        sampling=sampling,
        noise_factors=tuple(optimizer.noise_multipliers(1.0, steps)),
    )
    clip = privacy.l2_clip_norm or defaults.relative_clip_norm * scale
    return Prepared(learner, plan, optimizer, clip, head)


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


def _train(
    prepared: Prepared,
    request: Request,
    cached: Cached,
    labels: Tensor,
    partial: Path,
    progress: Progress | None,
) -> Trained:
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
        _run_steps(prepared, engine, sampler, private, average, checkpointer, progress)
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


def _evaluate(
    learner: Learner, data: ImageData, held_out: Cached | None, weights: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Accuracy and mean cross-entropy on the evaluation split; nothing about the training records."""
    if data.evaluation is None or held_out is None or not len(data.evaluation):
        return []
    logits, labels = learner.logits(held_out.features, weights), data.evaluation.labels
    return [
        {
            "split": "evaluation",
            "images": len(labels),
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
            "cross_entropy": float(torch.nn.functional.cross_entropy(logits, labels)),
        }
    ]


def _write_run(
    folder: Path,
    name: str,
    data: ImageData,
    request: Request,
    prepared: Prepared,
    trained: Trained,
    metrics: list[dict[str, Any]],
) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tensors = {f"{TRAINED}{key}": value for key, value in trained.weights.items()}
    tensors |= {f"{HEAD}{key}": value for key, value in prepared.head.items()}
    content = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(content))
    digest = sha256_file(folder / WEIGHTS)
    backbone = prepared.learner.backbone
    described = {"name": backbone.name, "source": backbone.source, "sha256": backbone.digest}
    reason, statement = no_claim(request), None
    if reason is None:
        statement = build_statement(
            data,
            request,
            prepared.plan,
            prepared.optimizer,
            trained.private,
            trained.executed,
            completed=trained.completed,
            backbone=described,
            utility=_utility(metrics),
            admin={"id": name, "time": now, "weights_sha256": digest},
        )
    privacy = {key: value for key, value in plain(request.privacy).items() if key != "insecure_seed"}
    config = {
        "run": {"format": FORMAT, "id": name, "time": now, "weights_sha256": digest},
        "privacy": privacy,
        "model": plain(request.model),
        "optimizer": plain(prepared.optimizer),
        "engine": {"kind": prepared.learner.engine_kind},
        "backbone": described,
        "preprocessing": describe_preprocessing(backbone.preprocessing),
        "data": {"name": request.data, "classes": list(data.classes)},
    }
    write_config(folder, config)
    write_statement(folder, statement, reason)
    write_metrics(folder, metrics)


def _utility(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    if not metrics:
        return {}
    return {"metric": "accuracy", "value": metrics[0]["accuracy"], "split": "evaluation", "private": False}

"""A run without steps, from a request to a finished folder: plan, features, one solution, statement."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dptaft.data import ImageData
from dptaft.estimate_room import require_memory
from dptaft.learner import Cached, Progress
from dptaft.runs import Run
from dptaft.tangent.diameter import double_operator
from dptaft.training.account import Account
from dptaft.training.finish import evaluate, rehearse, warn_of_delta, write_one_shot_run
from dptaft.training.marks import RESULT
from dptaft.training.one_shot import train_once
from dptaft.training.plan import Request
from dptaft.training.preparation import PreparedOneShot, prepare_one_shot
from dptaft.training.result import identity, keep_result, read_result, settle, spare_room
from dptaft.training.steps import Trained, require_finite_features
from dptaft.training.sums import sources


def run_one_shot(
    data: ImageData,
    request: Request,
    output: Path,
    partial: Path,
    *,
    account: Account,
    progress: Progress | None = None,
) -> Run:
    """Train as requested and write the run to `output`, which has been checked.

    Nothing of an unfinished solution is kept: there is nothing to resume, and all of it stays charged. A
    finished one that could not be written is kept in `partial`, and written by the next call.

    Raises:
        ValueError: a request that cannot be met (PlanError, DataError, BackboneError, RunError).
        OutputLostError: the run could not be written.
    """
    prepared = prepare_one_shot(data, request)
    plan, learner = prepared.plan, prepared.learner
    warn_of_delta(plan.delta, data, request)
    same = identity(prepared, request, data.train.labels)
    kept = read_result(partial, same, data.train, learner.device)
    trained, metrics = (None, None) if kept is None else kept
    try:
        if trained is None:
            require_memory(learner, data)
            rehearse(output, data, request, prepared)
        account.reserve(prepared.spending())
        held_out = None
        if metrics is None and data.evaluation is not None:
            held_out = learner.features(data.evaluation, progress, "reading evaluation")
        if trained is None:
            trained = _trained(prepared, data, request, partial, same, account, progress)
        if metrics is None:
            metrics = evaluate(learner, data, held_out, trained.weights)
            keep_result(partial, same, trained, metrics)
        made, found = trained, metrics

        def write(folder: Path, charged: Mapping[str, Any]) -> None:
            write_one_shot_run(folder, output.name, data, request, prepared, made, found, charged)

        return settle(output, partial, account, prepared.spending(), write, resumable=False)
    finally:
        account.close()
        if not (partial / RESULT).exists():
            shutil.rmtree(partial, ignore_errors=True)  # where the account kept the name of its entry


def _trained(
    prepared: PreparedOneShot,
    data: ImageData,
    request: Request,
    partial: Path,
    same: Mapping[str, Any],
    account: Account,
    progress: Progress | None,
) -> Trained:
    """Read the records, solve once, and keep the result, for which room was held before."""
    cached = prepared.learner.features(data.train, progress, "reading images")
    require_finite_features(cached)
    data.warn_copies()
    with spare_room(partial, prepared.learner.parameters):
        account.authorise(prepared.spending())
        weights = solve(prepared, request, cached, data.train.labels, progress)
        trained = Trained(weights, 1.0, images=cached.digest)
        keep_result(partial, same, trained, None)
    return trained


def solve(
    prepared: PreparedOneShot,
    request: Request,
    cached: Cached,
    labels: Tensor,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """The private computation: noise, solution, release; weights in float32.

    Args:
        prepared: model and plan.
        request: what the run was asked for.
        cached: features of the records.
        labels: (n,) their classes.
        progress: called with (stage, done, total).
    """
    learner, features = prepared.learner, cached.features
    size = request.performance.physical_batch_size
    noise, _ = sources(request)
    wide = double_operator(learner.operator, learner.tangent)
    offsets = None
    if not learner.config.centered:
        with torch.no_grad():
            offsets = wide.offset(features)
    found = train_once(
        wide,
        features,
        labels.to(learner.device),
        prepared.plan,
        noise,
        offsets=offsets,
        progress=None if progress is None else lambda share: progress("solving", round(100 * share), 100),
        **({} if size is None else {"physical_batch_size": size}),
    )
    return {name: value.float() for name, value in found.items()}

"""A run without steps, from a request to a finished folder: plan, features, one solution, statement."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dptaft.data import ImageData
from dptaft.estimate_room import require_memory
from dptaft.learner import Cached, Progress
from dptaft.runs import Run, load_run, new_run, write_statement
from dptaft.tangent.diameter import double_operator
from dptaft.training.account import Account
from dptaft.training.describe import build_one_shot_statement
from dptaft.training.facts import facts_of_one_shot
from dptaft.training.finish import evaluate, utility_of, warn_of_delta, write_files
from dptaft.training.one_shot import train_once
from dptaft.training.plan import Request
from dptaft.training.preparation import PreparedOneShot, prepare_one_shot
from dptaft.training.steps import require_finite_features
from dptaft.training.sums import sources


def run_one_shot(
    data: ImageData,
    request: Request,
    output: Path,
    *,
    account: Account,
    progress: Progress | None = None,
) -> Run:
    """Train as requested and write the run to `output`, which has been checked.

    Nothing of an unfinished run is kept: there is nothing to resume, and all of it stays charged.

    Raises:
        ValueError: a request that cannot be met (PlanError, DataError, BackboneError, RunError).
    """
    prepared = prepare_one_shot(data, request)
    plan, learner = prepared.plan, prepared.learner
    warn_of_delta(plan.delta, data, request)
    try:
        require_memory(learner, data)
        account.reserve(prepared.spending())
        cached = learner.features(data.train, progress, "reading images")
        held_out = None
        if data.evaluation is not None:
            held_out = learner.features(data.evaluation, progress, "reading evaluation")
        require_finite_features(cached)
        account.authorise(prepared.spending())
        weights = solve(prepared, request, cached, data.train.labels, progress)
        metrics = evaluate(learner, data, held_out, weights)
        charged = account.commit(prepared.spending())
        tables = {
            "optimizer": {"kind": plan.method, "l2_regularization": plan.regularization},
            "training": facts_of_one_shot(data, request, plan),
        }
        with new_run(output) as folder:
            found = write_files(folder, output.name, data, request, prepared, weights, metrics, tables)
            if not found.no_claim:
                statement = build_one_shot_statement(
                    data,
                    request,
                    plan,
                    backbone=found.backbone,
                    charged=charged,
                    utility=utility_of(metrics),
                    admin=found.admin,
                )
                write_statement(folder, statement)
    finally:
        account.close()
    return load_run(output)


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

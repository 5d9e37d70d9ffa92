"""From a request to a finished run: plan, features, private steps, evaluation, statement."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

from dptaft.data import ImageData
from dptaft.learner import Progress
from dptaft.runs import Run, check_output, load_run, new_run
from dptaft.training.account import Account
from dptaft.training.finish import evaluate, write_run
from dptaft.training.plan import PlanError, Request, delta_warning
from dptaft.training.preparation import prepare
from dptaft.training.steps import train_steps


def partial_folder(output: Path) -> Path:
    """Where an unfinished run keeps its account and its checkpoint."""
    return output.with_name(output.name + ".partial")


def run_training(
    data: ImageData,
    request: Request,
    output: Path,
    *,
    account: Account,
    resume: bool = False,
    progress: Progress | None = None,
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
    account.reserve(prepared.spending())
    try:
        cached = learner.features(data.train, progress, "reading images")
        held_out = None
        if data.evaluation is not None:
            held_out = learner.features(data.evaluation, progress, "reading evaluation")
        trained = train_steps(prepared, request, cached, data.train.labels, partial, account, progress)
        metrics = evaluate(learner, data, held_out, trained.weights)
        charged = account.commit(prepared.spending(trained.executed))
        with new_run(output) as folder:
            write_run(folder, output.name, data, request, prepared, trained, metrics, charged)
    finally:
        account.close()
    shutil.rmtree(partial, ignore_errors=True)
    return load_run(output)

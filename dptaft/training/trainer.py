"""From a request to a finished run: plan, features, private steps, evaluation, statement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.data import ImageData
from dptaft.estimate_room import require_memory
from dptaft.learner import Cached, Progress
from dptaft.runs import Run, check_output
from dptaft.training.account import Account
from dptaft.training.finish import evaluate, rehearse, scores, warn_of_delta, write_run
from dptaft.training.marks import RESULT
from dptaft.training.one_shot_run import run_one_shot
from dptaft.training.plan import PlanError, Request
from dptaft.training.preparation import Prepared, prepare
from dptaft.training.result import discard_blank, identity, keep_result, read_result, settle
from dptaft.training.steps import is_resumable, train_steps

if TYPE_CHECKING:
    from dptaft.distributed.team import Team


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
    team: Team | None = None,
) -> Run:
    """Train as requested and write the run to `output`.

    While it trains, a private folder ``<output>.partial`` holds what is needed to resume and the account of
    all steps that may have touched the data.

    Args:
        data: the records.
        request: what was asked for.
        output: folder of the run.
        account: where the privacy is charged.
        resume: continue the interrupted run of that folder.
        progress: called with (stage, done, total).
        team: the processes that share the records; None for this process alone.

    Raises:
        ValueError: a request that cannot be met (PlanError, DataError, BackboneError, RunError, ResumeError).
        OutputLostError: the trained run could not be written; a resumed one writes it.
        TrainingInterruptedError: a signal asked for a stop.
    """
    if request.model.is_one_shot and discard_blank(partial_folder(output)):
        resume = False
    partial = check_folders(output, resume)
    if request.model.is_one_shot:
        if resume and not (partial / RESULT).exists():
            raise PlanError(
                f"{request.model.method} has no steps to continue; remove {partial} and train again"
            )
        return run_one_shot(data, request, output, partial, account=account, progress=progress)
    prepared = prepare(data, request, None if team is None else team.build())

    def features() -> tuple[Cached, Cached | None]:
        if team is not None:
            return team.features(progress)
        cached = prepared.learner.features(data.train, progress, "reading images")
        if data.evaluation is None:
            return cached, None
        return cached, prepared.learner.features(data.evaluation, progress, "reading evaluation")

    return train_prepared(
        prepared, data, request, output, partial, features, account=account, progress=progress, team=team
    )


def check_folders(output: Path, resume: bool) -> Path:
    """Refuse an output that exists, and a partial run that is not to be resumed; returns the partial folder.

    Raises:
        PlanError: with the remedy.
        RunError: the output exists or cannot be made.
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
    return partial


def train_prepared(
    prepared: Prepared,
    data: ImageData,
    request: Request,
    output: Path,
    partial: Path,
    features: Callable[[], tuple[Cached, Cached | None]],
    *,
    account: Account,
    progress: Progress | None = None,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    team: Team | None = None,
) -> Run:
    """Reserve, read, train, commit and write: all of a run that touches private data, in this order.

    Args:
        prepared: every public decision.
        data: the records.
        request: what was asked for.
        output: folder of the run.
        partial: private folder of the unfinished run.
        features: reads the images of the records and of the evaluation split, once the plan is reserved.
        account: where the privacy is charged.
        progress: called with (stage, done, total).
        sections: further tables of the run's configuration.
        team: the processes that share the records; None for this process alone.

    Raises:
        ValueError: as for `run_training`.
        OutputLostError: the trained run could not be written; a resumed one writes it.
        TrainingInterruptedError: a signal asked for a stop.
    """
    warn_of_delta(prepared.plan.delta, data, request)
    same = identity(prepared, request, data.train.labels)
    kept = read_result(partial, same, data.train, prepared.learner.device)
    trained, metrics = (None, None) if kept is None else kept
    try:
        if trained is None:
            require_memory(prepared.learner, data)
            rehearse(output, data, request, prepared, sections)
        account.reserve(prepared.spending())
        if metrics is None:
            cached, held_out = features()
            data.warn_copies()
            if trained is None:
                divide, processes = (None, 1) if team is None else (team.divide, team.size)
                labels = data.train.labels
                trained = train_steps(
                    prepared, request, cached, labels, partial, account, progress, divide, processes
                )
                keep_result(partial, same, trained, None)
            if team is None:
                metrics = evaluate(prepared.learner, data, held_out, trained.weights)
            else:
                metrics = [] if held_out is None else scores(data, *team.logits(trained.weights))
            keep_result(partial, same, trained, metrics)
        made, found = trained, metrics

        def write(folder: Path, charged: Mapping[str, Any]) -> None:
            write_run(folder, output.name, data, request, prepared, made, found, charged, sections)

        spent = prepared.spending(trained.executed)
        return settle(output, partial, account, spent, write, resumable=is_resumable(prepared, request))
    finally:
        account.close()

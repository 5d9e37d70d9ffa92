"""Many runs of one model in one pass: they share features, and every step is one batched product.

The runs may differ in everything that is not the model: noise, epsilon, learning rate, optimiser, clip norm,
L2 regularisation, number of steps. Each keeps what makes its claim true for itself: noise source, optimiser,
checkpoint, account and statement; only the clipped sums are computed together, every one with the clip norm
of its own run. For full batches: there all runs use the same records in every step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dptaft.data import ImageData, Split
from dptaft.estimate_room import require_memory
from dptaft.learner import Cached, Learner, Progress
from dptaft.runs import Run, check_output
from dptaft.training.account import Account
from dptaft.training.checkpoint import GracefulStop, check_resumable
from dptaft.training.finish import evaluate, rehearse, write_run
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import LOSSES
from dptaft.training.optimizers import member_parameters
from dptaft.training.plan import PlanError, Request
from dptaft.training.preparation import Prepared, build_learner, prepare
from dptaft.training.result import identity, keep_result, read_result, settle
from dptaft.training.sampling import FullBatch
from dptaft.training.steps import RunState, Trained, is_resumable, require_finite_features
from dptaft.training.sums import sources
from dptaft.training.trainer import partial_folder

MOST_BYTES = 1 << 30
"""Members of one batch hold at most this many bytes of weights and optimiser state."""

FeatureReader = Callable[[Learner, Split, Progress | None, str], Cached]
_COPIES = 6
_FAILURES = (ValueError, OSError)


@dataclass(frozen=True)
class Point:
    """One run of several.

    Attributes:
        request: what is asked.
        output: folder of the run; an interrupted run of this folder is continued.
        account: where it is charged.
        prepared: its plan, where the caller has made it already.
    """

    request: Request
    output: Path
    account: Account
    prepared: Prepared | None = None


@dataclass(frozen=True)
class Member:
    """A point with its plan, and its result where an earlier attempt has kept one."""

    point: Point
    prepared: Prepared
    same: Mapping[str, Any] = field(default_factory=dict, repr=False)
    kept: Trained | None = None


def can_share_steps(prepared: Prepared) -> bool:
    """Whether the steps of a run can be batched with others of the same model.

    True for tangent models with the fused engine, full batches, and steps that are not certified.
    """
    fused = prepared.learner.engine_kind == "fused"
    return fused and prepared.plan.sampling.kind == "full-batch" and prepared.design is None


def most_members(learner: Learner) -> int:
    """How many runs fit into one batch."""
    size = sum(p.numel() * p.element_size() for p in learner.parameters.values())
    return max(1, MOST_BYTES // (_COPIES * size))


def run_members(
    data: ImageData,
    points: Sequence[Point],
    *,
    learner: Learner | None = None,
    features: FeatureReader = Learner.features,
    progress: Progress | None = None,
) -> list[Run | Exception]:
    """Train all points, which must have the same model, and write a run for each.

    Args:
        data: the records.
        points: with equal model, performance settings and adjacency.
        learner: from `build_learner` for them; None builds it.
        features: reads the features of a split, for callers that keep them.
        progress: called with (stage, done, total).

    Returns:
        For every point its run, or the error that ended it (a failed point does not stop the others; what it
        had authorised stays charged).

    Raises:
        PlanError: points of different models, or points whose steps cannot be shared.
        TrainingInterruptedError: a signal asked for a stop; every point can be continued.

    Formal guarantees:
        Each run is the mechanism of its own plan: its clipped sum has the sensitivity of its own clip norm,
        its noise comes from a source of its own, and every step was authorised by its own account.
    """
    _check_equal([point.request for point in points])
    learner = learner or build_learner(data, points[0].request)
    outcomes: list[Run | Exception | None] = [None] * len(points)
    members: dict[int, Member] = {}
    with ExitStack() as accounts:
        for i, point in enumerate(points):
            accounts.callback(point.account.close)
            try:
                members[i] = _member(data, point, learner)
            except _FAILURES as error:
                outcomes[i] = error
        if not members:
            return [outcome for outcome in outcomes if outcome is not None]
        cached = features(learner, data.train, progress, "reading images")
        held_out = None
        if data.evaluation is not None:
            held_out = features(learner, data.evaluation, progress, "reading evaluation")
        open_ones = [member for member in members.values() if member.kept is None]
        trained = iter(train_members(open_ones, cached, data.train.labels, progress))
        for i, member in members.items():
            result = member.kept or next(trained)
            outcomes[i] = result if isinstance(result, Exception) else _finish(data, member, result, held_out)
    return [outcome for outcome in outcomes if outcome is not None]


def _check_equal(requests: Sequence[Request]) -> None:
    first = requests[0]
    for other in requests[1:]:
        same = (other.model, other.performance, other.privacy.adjacency, other.data)
        if same != (first.model, first.performance, first.privacy.adjacency, first.data):
            raise PlanError(
                "runs that share steps need the same data, model, adjacency and performance settings"
            )


def _member(data: ImageData, point: Point, learner: Learner) -> Member:
    """Plan one point and reserve its budget, before any private image is read."""
    check_output(point.output)
    prepared = point.prepared or prepare(data, point.request, learner)
    if not can_share_steps(prepared):
        raise PlanError("only full-batch runs of tangent models with the fused engine share steps")
    partial = partial_folder(point.output)
    same = identity(prepared, point.request, data.train.labels)
    kept = read_result(partial, same, data.train, learner.device)
    if kept is None:
        require_memory(learner, data)
        rehearse(point.output, data, point.request, prepared)
    point.account.reserve(prepared.spending())
    return Member(point, prepared, same, None if kept is None else kept[0])


def train_members(
    members: Sequence[Member], cached: Cached, labels: Tensor, progress: Progress | None = None
) -> list[Trained | Exception]:
    """All private steps of all members, one batched clipped sum per step.

    Args:
        members: of one learner.
        cached: features of the records.
        labels: (n,) their classes.
        progress: called with (stage, done, total) over the steps of all members.

    Raises:
        TrainingInterruptedError: a signal asked for a stop, after every member was saved.
    """
    if not members:
        return []
    require_finite_features(cached)
    learner = members[0].prepared.learner
    stacked = {
        name: p.detach().expand(len(members), *p.shape).clone() for name, p in learner.parameters.items()
    }
    outcomes: list[Trained | Exception | None] = [None] * len(members)
    states: dict[int, RunState] = {}
    try:
        for i, member in enumerate(members):
            try:
                states[i] = _state(member, i, stacked, cached, labels)
            except _FAILURES as error:
                outcomes[i] = error
        if states:
            first = members[0]
            engine = learner.engine(
                cached.features,
                labels,
                loss=LOSSES[first.point.request.model.loss](),
                l2_clip_norm=first.prepared.l2_clip_norm,
                adjacency=first.prepared.plan.adjacency,
            )
            if not isinstance(engine, FusedEngine):
                raise PlanError("only the fused engine has members; train these runs one after the other")
            _run(engine, states, stacked, outcomes, len(labels), progress)
        for i, state in states.items():
            try:
                outcomes[i] = outcomes[i] or state.trained()
            except _FAILURES as error:
                outcomes[i] = error
    finally:
        for state in states.values():
            state.close()
    return [outcome for outcome in outcomes if outcome is not None]


def _state(
    member: Member, index: int, stacked: dict[str, Tensor], cached: Cached, labels: Tensor
) -> RunState:
    partial = partial_folder(member.point.output)
    noise, _ = sources(member.point.request)
    if partial.is_dir():
        check_resumable(FullBatch(len(labels)), noise)
    parameters = member_parameters(stacked, index)
    point, prepared = member.point, member.prepared
    return RunState(prepared, point.request, parameters, cached, labels, partial, point.account, noise)


def _run(
    engine: FusedEngine,
    states: dict[int, RunState],
    stacked: dict[str, Tensor],
    outcomes: list[Trained | Exception | None],
    count: int,
    progress: Progress | None,
) -> None:
    """Step every member that is not finished, until none is left."""
    everything = torch.arange(count)
    total = sum(state.prepared.plan.steps for state in states.values())
    with GracefulStop((signal.SIGTERM, signal.SIGINT)) as stop:
        while True:
            active = _authorised(states, outcomes)
            if not active:
                return
            whole = len(active) == len(next(iter(stacked.values())))
            theta = stacked if whole else {name: value[active] for name, value in stacked.items()}
            norms = [states[i].prepared.l2_clip_norm for i in active]
            clipped = engine.clipped_sum(theta, everything, norms)
            for place, i in enumerate(active):
                try:
                    states[i].take(clipped.member(place), count)
                except _FAILURES as error:
                    outcomes[i] = error
            if progress is not None:
                progress("training", sum(state.done for state in states.values()), total)
            if stop.requested:
                _stop(states, outcomes)


def _authorised(states: dict[int, RunState], outcomes: list[Trained | Exception | None]) -> list[int]:
    """Members with a step left that may run now."""
    active = []
    for i, state in states.items():
        if outcomes[i] is None and not state.finished:
            try:
                state.authorise()
                active.append(i)
            except _FAILURES as error:
                outcomes[i] = error
    return active


def _stop(states: dict[int, RunState], outcomes: list[Trained | Exception | None]) -> None:
    running = [state for i, state in states.items() if outcomes[i] is None]
    for state in running:
        state.save()
    if running:
        raise running[0].interruption()


def _finish(data: ImageData, member: Member, trained: Trained, held_out: Cached | None) -> Run | Exception:
    point, prepared = member.point, member.prepared
    try:
        partial = partial_folder(point.output)
        keep_result(partial, member.same, trained, None)
        metrics = evaluate(prepared.learner, data, held_out, trained.weights)

        def write(folder: Path, charged: Mapping[str, Any]) -> None:
            write_run(folder, point.output.name, data, point.request, prepared, trained, metrics, charged)

        spent = prepared.spending(trained.executed)
        return settle(
            point.output,
            partial,
            point.account,
            spent,
            write,
            resumable=is_resumable(prepared, point.request),
        )
    except _FAILURES as error:
        return error

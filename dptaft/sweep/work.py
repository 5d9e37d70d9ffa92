"""Training the points of one task: batched where steps can be shared, one after the other elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import dptaft
from dptaft.backends.attempts import Attempt, StopRequestedError
from dptaft.data import ImageData
from dptaft.identity import content_digest
from dptaft.learner import Learner, Progress
from dptaft.prepaid import Payment, PaymentError
from dptaft.runs import Run
from dptaft.sweep.points import SweepPoint, Task, load_source
from dptaft.sweep.shared import Boundaries, memory_share, use_fastest_layout
from dptaft.training.finish import rehearse
from dptaft.training.members import Point, can_share_steps, most_members, run_members
from dptaft.training.plan import Request
from dptaft.training.preparation import Prepared, PreparedOneShot, build_learner, prepare, prepare_one_shot
from dptaft.training.steps import TrainingInterruptedError
from dptaft.training.trainer import partial_folder


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Attributes:
        point: its id.
        accuracy: on the evaluation split; None where there is none, or no run.
        error: why there is no run; None for a finished one.
    """

    point: str
    accuracy: float | None = None
    error: str | None = None


class Worker:
    """Trains tasks in one process and keeps what they share: images, and activations below the trained part.

    Args:
        folder: holds one run folder per point.
        public: the images are public by the treatment of the budget.
        most_bytes: that features may take; None takes a quarter of the machine's memory.

    Attributes:
        folder: as given; it may be changed between tasks.
        public: as given.
    """

    def __init__(self, folder: Path, public: bool, most_bytes: int | None = None) -> None:
        self.folder, self.public = folder, public
        self._most_bytes = memory_share() if most_bytes is None else most_bytes
        self._images: dict[str, ImageData] = {}
        self._contents: dict[str, str] = {}
        self._boundaries = Boundaries()

    def images(self, point: SweepPoint) -> ImageData:
        """The data of a point, loaded once."""
        if point.data.name not in self._images:
            self._images[point.data.name] = load_source(point.data, self.public)
        return self._images[point.data.name]

    def check_content(self, point: SweepPoint, content: str | None) -> None:
        """Refuse records other than those that were charged, which the same path may hold on another machine.

        Raises:
            PaymentError: they are others.
        """
        name = point.data.name
        if content is not None and name not in self._contents:
            self._contents[name] = content_digest(self.images(point).train)
        if content is not None and self._contents[name] != content:
            raise PaymentError(
                f"{point.data.source} on this machine holds other records than those that were charged; give "
                "every machine the same data"
            )

    def output(self, point: SweepPoint) -> Path:
        """Run folder of a point."""
        return self.folder / point.id

    def plans(self, task: Task) -> dict[str, Prepared | PreparedOneShot]:
        """Every public decision of the points, by id; no private image is read.

        Raises:
            ValueError: a point that cannot be planned.
        """
        found: dict[str, Prepared | PreparedOneShot] = {}
        learner: Learner | None = None
        for point in task.points:
            images, request = self.images(point), self._request(point)
            images.check_adjacency(request.privacy.adjacency)
            if request.model.is_one_shot:
                found[point.id] = prepare_one_shot(images, request)
                continue
            if learner is None or learner.config != request.model or not task.shared:
                learner = build_learner(images, request)
                use_fastest_layout(learner, len(images.train), self._most_bytes)
            found[point.id] = prepare(images, request, learner)
        return found

    def rehearse(self, task: Task, plans: Mapping[str, Prepared | PreparedOneShot]) -> None:
        """Write the first point of a task with blank weights and remove it, before anything is charged.

        Raises:
            RunError: it cannot be written.
        """
        point = task.points[0]
        rehearse(self.output(point), self.images(point), self._request(point), plans[point.id])

    def run(self, task: Task, payment: Payment, progress: Progress | None = None) -> list[Outcome]:
        """Train all points of a task; a point that fails does not stop the others.

        Raises:
            TrainingInterruptedError: a signal asked for a stop.
        """
        outcomes: dict[str, Outcome] = {}
        batched: dict[str, Prepared] = {}
        if task.shared and len(task.points) > 1:
            try:
                plans = self.plans(task)
                batched = {k: p for k, p in plans.items() if isinstance(p, Prepared) and can_share_steps(p)}
            except (ValueError, OSError):
                batched = {}  # each point says for itself what is wrong with it
        together = [point for point in task.points if point.id in batched]
        for start in range(0, len(together), _chunk(batched)):
            part = together[start : start + _chunk(batched)]
            outcomes |= self._together(part, batched, payment, progress)
        if together:
            self.images(together[0]).warn_unreadable()
            self.images(together[0]).warn_copies()
        for point in task.points:
            if point.id not in outcomes:
                outcomes[point.id] = self._alone(point, payment, len(task.points) > 1, progress)
        return [outcomes[point.id] for point in task.points]

    def _request(self, point: SweepPoint) -> Request:
        request = point.request()
        if request is None:
            raise ValueError(f"{point.id} uses a procedure that has no plan of its own")
        return replace(request, data=self.images(point).name)

    def _together(
        self,
        points: Sequence[SweepPoint],
        plans: Mapping[str, Prepared],
        payment: Payment,
        progress: Progress | None,
    ) -> dict[str, Outcome]:
        data = self.images(points[0])
        given = [
            Point(
                self._request(point),
                self.output(point),
                payment.account(point.id, partial_folder(self.output(point))),
                plans[point.id],
            )
            for point in points
        ]
        runs = run_members(
            data,
            given,
            learner=plans[points[0].id].learner,
            features=self._boundaries.features,
            progress=progress,
        )
        return {point.id: _outcome(point, run) for point, run in zip(points, runs, strict=True)}

    def _alone(self, point: SweepPoint, payment: Payment, shares: bool, progress: Progress | None) -> Outcome:
        output = self.output(point)
        options = point.train_options()
        if shares and options.get("feature_cache") is None:
            options["feature_cache"] = str(self.folder.parent / FEATURES)
        try:
            run = dptaft.train(
                self.images(point),
                **options,
                output=output,
                resume=partial_folder(output).is_dir(),
                ledger=payment.account(point.id, partial_folder(output)),
                progress=progress,
            )
        except TrainingInterruptedError:
            raise
        except Exception as error:  # whatever stops one point must not stop the others
            return _outcome(point, error)
        return _outcome(point, run)


FEATURES = "features"
"""Folder of cached features beside the runs; removed at the end."""


def _chunk(plans: Mapping[str, Prepared]) -> int:
    return most_members(next(iter(plans.values())).learner) if plans else 1


def _outcome(point: SweepPoint, run: Run | Exception) -> Outcome:
    if isinstance(run, Run):
        return Outcome(point.id, run.accuracy)
    return Outcome(point.id, error=" ".join(str(run).split()) or type(run).__name__)


def run_task(
    attempt: Attempt, task: Task, payment: Payment, public: bool, threads: int, most_bytes: int
) -> dict[str, str]:
    """The points of one execution, in whatever process a backend chose.

    Args:
        attempt: the permission for (some of) the points of the task.
        task: the points.
        payment: what was paid for them.
        public: the images are public by the treatment of the budget.
        threads: of this process.
        most_bytes: that features may take.

    Returns:
        Why points have no run, by id.

    Raises:
        StopRequestedError: a signal asked for a stop.
    """
    torch.set_num_threads(threads)
    worker = _worker(attempt.folder.parent, public, most_bytes)
    worker.folder = attempt.work
    worker.check_content(task.points[0], payment.content)
    points = tuple(point for point in task.points if point.id in attempt.names)
    try:
        outcomes = worker.run(replace(task, points=points), replace(payment, lease=attempt.lease))
    except TrainingInterruptedError:
        raise StopRequestedError from None
    return {outcome.point: outcome.error for outcome in outcomes if outcome.error is not None}


_WORKERS: dict[tuple[int, Path, bool, int], Worker] = {}


def _worker(sweep: Path, public: bool, most_bytes: int) -> Worker:
    """The worker of this process, so that tasks of one sweep that follow each other share what they can.

    Another sweep may give the same name to other data.
    """
    key = (os.getpid(), sweep, public, most_bytes)
    if key not in _WORKERS:
        _WORKERS.clear()
        _WORKERS[key] = Worker(Path(), public, most_bytes)
    return _WORKERS[key]

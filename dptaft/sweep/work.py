"""Training the points of one task: batched where steps can be shared, one after the other elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dptaft
from dptaft.data import ImageData
from dptaft.learner import Learner, Progress
from dptaft.runs import Run
from dptaft.sweep.points import SweepPoint, Task, load_source
from dptaft.sweep.shared import Boundaries, memory_share, use_fastest_layout
from dptaft.sweep.treatment import SweepAccount
from dptaft.training.account import Spending
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


@dataclass(frozen=True)
class Payment:
    """What was settled before a point starts.

    Attributes:
        fields: what its statement says about the sweep.
        allowed: what was paid, by id of the point; points that are missing are not checked.
        finished: folder that remembers the points that were trained; None where each may be trained again.
    """

    fields: Mapping[str, Any]
    allowed: Mapping[str, Spending]
    finished: Path | None = None

    def account(self, point: SweepPoint, output: Path) -> SweepAccount:
        """The account of one point, whose run is written to `output`."""
        trace = None if self.finished is None else self.finished / point.id
        return SweepAccount(self.fields, self.allowed.get(point.id), trace, partial_folder(output))


class Worker:
    """Trains tasks in one process and keeps what they share: images, and activations below the trained part.

    Args:
        folder: holds one run folder per point, and features that several points need one after the other.
        public: the images are public by the treatment of the budget.
        processes: that work at the same time and share the memory of the machine.
    """

    def __init__(self, folder: Path, public: bool, processes: int = 1) -> None:
        self._folder, self._public = folder, public
        self._most_bytes = memory_share(processes)
        self._images: dict[str, ImageData] = {}
        self._boundaries = Boundaries()

    def images(self, point: SweepPoint) -> ImageData:
        """The data of a point, loaded once."""
        if point.data.name not in self._images:
            self._images[point.data.name] = load_source(point.data, self._public)
        return self._images[point.data.name]

    def output(self, point: SweepPoint) -> Path:
        """Run folder of a point."""
        return self._folder / point.id

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
                payment.account(point, self.output(point)),
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
            options["feature_cache"] = str(self._folder.parent / FEATURES)
        try:
            run = dptaft.train(
                self.images(point),
                **options,
                output=output,
                resume=partial_folder(output).is_dir(),
                ledger=payment.account(point, output),
                progress=progress,
            )
        except TrainingInterruptedError:
            raise
        except Exception as error:  # whatever stops one point must not stop the others
            return _outcome(point, error)
        return _outcome(point, run)


FEATURES = "features"
"""Folder of cached features in the folder of a sweep; removed at the end."""


def _chunk(plans: Mapping[str, Prepared]) -> int:
    return most_members(next(iter(plans.values())).learner) if plans else 1


def _outcome(point: SweepPoint, run: Run | Exception) -> Outcome:
    if isinstance(run, Run):
        return Outcome(point.id, run.accuracy)
    return Outcome(point.id, error=" ".join(str(run).split()) or type(run).__name__)


def run_task(folder: Path, public: bool, task: Task, payment: Payment, jobs: int) -> list[Outcome]:
    """One task in a process of its own, for several tasks at once."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    return _worker(folder, public, jobs).run(task, payment)


_WORKERS: dict[tuple[int, Path, bool], Worker] = {}


def _worker(folder: Path, public: bool, jobs: int) -> Worker:
    """The worker of this process, so that tasks that follow each other share what they can."""
    key = (os.getpid(), folder, public)
    if key not in _WORKERS:
        _WORKERS[key] = Worker(folder, public, jobs)
    return _WORKERS[key]

"""Running a recipe: resumable, one folder per point, failures reported at the end.

A sweep folder holds ``recipe.toml`` (what was asked, overrides included), ``runs/<point>`` (finished runs),
``finished`` (which points of a sweep with a ledger were trained), ``failures.json`` and the results. A
finished point is never trained again; an interrupted one goes on where it stopped; what was charged is
remembered before it is authorised.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from dptaft.data import DataError
from dptaft.features import FeatureCacheError, remove_cache
from dptaft.learner import Progress
from dptaft.runs import RunError, load_run
from dptaft.sweep.points import SweepPoint, Task, expand, group
from dptaft.sweep.recipe import Recipe, RecipeError
from dptaft.sweep.treatment import Whole, charge, compose, public_fields, published_fields
from dptaft.sweep.work import FEATURES, Outcome, Payment, Worker, run_task
from dptaft.training.account import Spending
from dptaft.training.trainer import partial_folder
from dptaft_accounting import PrivacyStatement

RUNS, FAILURES, RECIPE, FINISHED = "runs", "failures.json", "recipe.toml", "finished"

Report = Callable[[int, int, Sequence[Outcome]], None]


@dataclass(frozen=True)
class SweepResult:
    """A sweep that has come to its end.

    Attributes:
        folder: of the sweep.
        outcomes: of all points, in the order of the recipe.
        kept: ids of points that were finished before.
        wholes: what each data set paid, by name; empty for public data.
    """

    folder: Path
    outcomes: tuple[Outcome, ...]
    kept: tuple[str, ...]
    wholes: Mapping[str, Whole] = field(default_factory=dict)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Points without a run."""
        return tuple(outcome for outcome in self.outcomes if outcome.error is not None)


def run_sweep(
    recipe: Recipe,
    folder: Path,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    report: Report | None = None,
) -> SweepResult:
    """Train all points of a recipe that are not finished yet.

    Args:
        recipe: with the treatment ``public-benchmark`` or ``publish-all``.
        folder: of the sweep, made where missing; an earlier part of the same sweep is continued.
        jobs: processes that train at the same time, each on its share of the processor.
        progress: called with (stage, done, total) where one process trains.
        report: called with (points done, points in all, outcomes) after every task.

    Raises:
        RecipeError: another sweep in the folder, another process in it, or a total that is not allowed.
        LedgerError: the budget does not permit the whole.
        TrainingInterruptedError: a signal asked for a stop; the same call continues.
    """
    if jobs < 1:
        raise RecipeError(f"jobs must be at least 1, got {jobs}")
    points = expand(recipe)
    with sweep_folder(folder, recipe):
        runs = folder / RUNS
        runs.mkdir(exist_ok=True)
        kept = {point.id: outcome for point in points if (outcome := _finished(runs, point)) is not None}
        public = recipe.budget.treatment == "public-benchmark"
        worker = Worker(runs, public)
        payments, wholes = _settle(recipe, points, worker, folder)
        tasks = group([point for point in points if point.id not in kept])
        found = dict(kept)
        try:
            for outcomes in _run_tasks(tasks, payments, worker, runs, public, jobs, progress):
                found |= {outcome.point: outcome for outcome in outcomes}
                _write_failures(folder, found.values())
                if report is not None:
                    report(len(found), len(points), outcomes)
        finally:
            if (folder / FEATURES).exists():
                with contextlib.suppress(FeatureCacheError):
                    remove_cache(folder / FEATURES)
        _write_failures(folder, found.values())
    return SweepResult(folder, tuple(found[point.id] for point in points), tuple(kept), wholes)


@contextlib.contextmanager
def sweep_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold a sweep folder alone, and remember the recipe in it.

    Raises:
        RecipeError: another process holds it, or it belongs to another sweep that was charged to a ledger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(f"another process works on the sweep {folder}; wait for it") from None
        path, text = folder / RECIPE, tomli_w.dumps(dict(recipe.content))
        before = path.read_text(encoding="utf-8") if path.exists() else text
        if before != text and recipe.budget.treatment != "public-benchmark":
            raise RecipeError(
                f"{folder} holds a sweep of another recipe, whose cost is settled; choose another --output"
            )
        if not path.exists() and any(p.name != "lock" for p in folder.iterdir()):
            raise RecipeError(f"{folder} holds other files; choose an empty or new folder for the sweep")
        path.write_text(text, encoding="utf-8")
        yield
    finally:
        os.close(descriptor)


def _finished(runs: Path, point: SweepPoint) -> Outcome | None:
    for draft in runs.glob(f".{point.id}-*"):
        shutil.rmtree(draft, ignore_errors=True)  # left by a process killed while it wrote the run
    if not (runs / point.id).is_dir():
        return None
    try:
        found = Outcome(point.id, load_run(runs / point.id).accuracy)
    except RunError as error:
        raise RecipeError(
            f"{error}; or, for public data, remove that folder to train the point again"
        ) from None
    # a process killed right after it wrote the run leaves the checkpoint behind
    shutil.rmtree(partial_folder(runs / point.id), ignore_errors=True)
    return found


def _settle(
    recipe: Recipe, points: Sequence[SweepPoint], worker: Worker, folder: Path
) -> tuple[dict[str, Payment], dict[str, Whole]]:
    """What every data set pays, before anything is trained; by name of the data set."""
    if recipe.budget.treatment == "public-benchmark":
        payment = Payment(public_fields(len(points)), {})
        return {data.name: payment for data in recipe.data}, {}
    payments, wholes = {}, {}
    for data in recipe.data:
        own = [point for point in points if point.data.name == data.name]
        spendings = _spendings(own, worker)
        whole = compose(list(spendings.values()), recipe.budget.most_epsilon)
        name = "".join(c if c.isalnum() else "-" for c in data.name)
        ledger = Path(recipe.budget.ledger) if recipe.budget.ledger else folder.parent / "ledger.sqlite"
        images = worker.images(own[0])
        fields = charge(whole, images, ledger, folder / f"ledger-{name}.json", f"sweep {folder.name}")
        wholes[data.name] = whole
        payments[data.name] = Payment(published_fields(whole, fields), spendings, folder / FINISHED)
        _write_whole(folder / f"privacy-{name}.json", whole, fields)
    return payments, wholes


def _spendings(points: Sequence[SweepPoint], worker: Worker) -> dict[str, Spending]:
    """The plan of every point.

    Raises:
        RecipeError: a point whose cost is not known before it is trained.
    """
    found = {}
    for task in group(points):
        try:
            plans = worker.plans(task)
        except DataError:
            raise
        except ValueError as error:
            raise RecipeError(
                f"the cost of {task.points[0].id} is not known before the start: {error}"
            ) from None
        found |= {name: prepared.spending() for name, prepared in plans.items()}
    return found


def _write_whole(path: Path, whole: Whole, fields: Mapping[str, Any]) -> None:
    """The statement about all points together."""
    caveat = "covers all runs of a sweep together; each run folder holds the statement about its run alone"
    statement = PrivacyStatement.build(
        whole.mechanism,
        whole.delta,
        cross_check=False,
        composition=dict(fields) | {"hyperparameter_choice": f"all {whole.points} points are published"},
        admin={"run": path.parent.name, "caveats": [caveat]},
    )
    path.write_text(statement.to_json(), encoding="utf-8")


def _run_tasks(
    tasks: Sequence[Task],
    payments: Mapping[str, Payment],
    worker: Worker,
    runs: Path,
    public: bool,
    jobs: int,
    progress: Progress | None,
) -> Iterator[list[Outcome]]:
    """Outcomes of one task after the other; several processes where asked for."""
    if jobs == 1 or len(tasks) < 2:
        for task in tasks:
            yield worker.run(task, payments[task.points[0].data.name], progress)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
        waiting = [
            pool.submit(run_task, runs, public, task, payments[task.points[0].data.name], jobs)
            for task in tasks
        ]
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _write_failures(folder: Path, outcomes: Iterator[Outcome] | Any) -> None:
    failed = {outcome.point: outcome.error for outcome in outcomes if outcome.error is not None}
    path = folder / FAILURES
    if failed:
        path.write_text(json.dumps(failed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)

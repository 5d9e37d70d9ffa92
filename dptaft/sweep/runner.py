"""Running a recipe: resumable, one folder per point, failures reported at the end.

A sweep folder holds ``recipe.toml`` (what was asked, overrides included), ``runs/<point>`` (finished runs),
``finished`` (which points of a sweep with a ledger were begun and trained), ``attempts`` (private: what other
processes and machines are working on), ``failures.json`` and the results. A finished point is never trained
again; an interrupted one goes on where it stopped; what was charged is remembered before it is authorised.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import tomli_w

from dptaft.backends import Backend, BackendConfig
from dptaft.backends.attempts import Attempts
from dptaft.backends.driver import Work, run_work
from dptaft.backends.holding import LOCK, OWNER, HeldError, hold
from dptaft.data import DataError
from dptaft.features import FeatureCacheError, remove_cache
from dptaft.learner import Progress
from dptaft.prepaid import Payment, charge
from dptaft.runs import RunError, load_run
from dptaft.sweep.points import SweepPoint, Task, expand, group
from dptaft.sweep.recipe import Recipe, RecipeError
from dptaft.sweep.shared import memory_share
from dptaft.sweep.treatment import Whole, compose, public_fields, published_fields
from dptaft.sweep.work import FEATURES, Outcome, Worker, run_task
from dptaft.training.account import Spending
from dptaft.training.trainer import partial_folder
from dptaft_accounting import PrivacyStatement

RUNS, FAILURES, RECIPE, FINISHED, ATTEMPTS = "runs", "failures.json", "recipe.toml", "finished", "attempts"
_JOBS = "jobs"

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
    backend: BackendConfig = BackendConfig(),  # noqa: B008 - frozen
    progress: Progress | None = None,
    report: Report | None = None,
) -> SweepResult:
    """Train all points of a recipe that are not finished yet.

    Args:
        recipe: with the treatment ``public-benchmark`` or ``publish-all``.
        folder: of the sweep, made where missing; an earlier part of the same sweep is continued.
        backend: where points are trained; this process, one after the other, unless said otherwise.
        progress: called with (stage, done, total) where this process trains.
        report: called with (points done, points in all, outcomes) after every task.

    Raises:
        RecipeError: another sweep in the folder, another process in it, or a total that is not allowed.
        BackendError: the backend cannot be used here.
        LedgerError: the budget does not permit the whole.
        TrainingInterruptedError: a signal asked for a stop; the same call continues.

    Formal guarantees:
        This process alone opens the ledger, and pays for every point before anything is trained. Each point
        spends at most what was paid for it, however often its executions are lost and go on, and has one
        result at most (`Attempts`, `PrepaidAccount`).
    """
    points = expand(recipe)
    with sweep_folder(folder, recipe):
        runs = folder / RUNS
        runs.mkdir(exist_ok=True)
        place = Attempts(folder / ATTEMPTS, runs)
        opened = None if backend.in_this_process else backend.open((folder / _JOBS).absolute())
        with contextlib.nullcontext() if opened is None else contextlib.closing(opened):
            doubtful = place.recover((lambda job: False) if opened is None else opened.has_ended)
            kept = {p.id: outcome for p in points if (outcome := _finished(runs, p)) is not None}
            worker = Worker(runs, recipe.budget.treatment == "public-benchmark")
            payments, wholes = _settle(recipe, points, worker, folder)
            found = {name: Outcome(name, error=text) for name, text in doubtful.items()} | kept
            tasks = group([point for point in points if point.id not in found])
            parts = (
                _one_by_one(tasks, payments, worker, progress)
                if opened is None
                else _elsewhere(tasks, payments, worker.public, backend, opened, place)
            )
            try:
                for outcomes in parts:
                    found |= {outcome.point: outcome for outcome in outcomes}
                    _write_failures(folder, found.values())
                    if report is not None:
                        report(len(found), len(points), outcomes)
            finally:
                parts.close()
                _clean(folder, place)
        _write_failures(folder, found.values())
        if all(outcome.error is None for outcome in found.values()):
            shutil.rmtree(folder / _JOBS, ignore_errors=True)
    return SweepResult(folder, tuple(found[point.id] for point in points), tuple(kept), wholes)


@contextlib.contextmanager
def sweep_folder(folder: Path, recipe: Recipe) -> Iterator[None]:
    """Hold a sweep folder alone, and remember the recipe in it.

    Raises:
        RecipeError: another process holds it, or it belongs to another sweep that was charged to a ledger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with hold(folder):
            path, text = folder / RECIPE, tomli_w.dumps(dict(recipe.content))
            before = path.read_text(encoding="utf-8") if path.exists() else text
            if before != text and recipe.budget.treatment != "public-benchmark":
                raise RecipeError(
                    f"{folder} holds a sweep of another recipe, whose cost is settled; "
                    "choose another --output"
                )
            if not path.exists() and any(p.name not in (LOCK, OWNER) for p in folder.iterdir()):
                raise RecipeError(f"{folder} holds other files; choose an empty or new folder for the sweep")
            path.write_text(text, encoding="utf-8")
            yield
    except HeldError as error:
        raise RecipeError(f"cannot use the sweep {folder}: {error}") from None


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
        name = "".join(c if c.isalnum() else "-" for c in data.name)
        pointer = folder / f"ledger-{name}.json"
        spendings = _spendings(own, worker, rehearse=not pointer.exists())
        whole = compose(list(spendings.values()), recipe.budget.most_epsilon)
        ledger = Path(recipe.budget.ledger) if recipe.budget.ledger else folder.parent / "ledger.sqlite"
        images = worker.images(own[0])
        bill = whole.bill(images, f"sweep {folder.name}")
        fields = charge(bill, ledger, pointer)
        wholes[data.name] = whole
        payments[data.name] = Payment(
            published_fields(whole, fields), spendings, folder / FINISHED, bill.content
        )
        _write_whole(folder / f"privacy-{name}.json", whole, fields)
    return payments, wholes


def _spendings(points: Sequence[SweepPoint], worker: Worker, *, rehearse: bool) -> dict[str, Spending]:
    """The plan of every point; whether its run can be written is tried where nothing is charged yet.

    Raises:
        RecipeError: a point whose cost is not known before it is trained.
        RunError: runs that cannot be written.
    """
    found: dict[str, Spending] = {}
    for task in group(points):
        try:
            plans = worker.plans(task)
        except DataError:
            raise
        except ValueError as error:
            raise RecipeError(
                f"the cost of {task.points[0].id} is not known before the start: {error}"
            ) from None
        if rehearse:
            worker.rehearse(task, plans)
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


def _one_by_one(
    tasks: Sequence[Task], payments: Mapping[str, Payment], worker: Worker, progress: Progress | None
) -> Generator[list[Outcome], None, None]:
    """Outcomes of one task after the other, in this process."""
    for task in tasks:
        yield worker.run(task, payments[task.points[0].data.name], progress)


def _elsewhere(
    tasks: Sequence[Task],
    payments: Mapping[str, Payment],
    public: bool,
    config: BackendConfig,
    backend: Backend,
    place: Attempts,
) -> Generator[list[Outcome], None, None]:
    """Outcomes as other processes or machines report them."""
    here = config.most_jobs if config.kind == "local" else 1
    threads = config.threads or max(1, (os.cpu_count() or 1) // here)
    share = memory_share(here) if config.memory is None else min(memory_share(), config.memory // 4)
    work = [
        Work(
            tuple(point.id for point in task.points),
            run_task,
            (task, _absolute(payments[task.points[0].data.name]), public, threads, share),
        )
        for task in tasks
    ]
    for ended in run_work(work, backend, place, config):
        yield [
            Outcome(name, load_run(place.home / name).accuracy)
            if error is None
            else Outcome(name, error=error)
            for name, error in ended.items()
        ]


def _clean(folder: Path, place: Attempts) -> None:
    """Remove what is kept only while a sweep runs."""
    if (folder / FEATURES).exists():
        with contextlib.suppress(FeatureCacheError):
            remove_cache(folder / FEATURES)
    place.close()


def _absolute(payment: Payment) -> Payment:
    return payment if payment.finished is None else replace(payment, finished=payment.finished.absolute())


def _write_failures(folder: Path, outcomes: Iterator[Outcome] | Any) -> None:
    failed = {outcome.point: outcome.error for outcome in outcomes if outcome.error is not None}
    path = folder / FAILURES
    if failed:
        path.write_text(json.dumps(failed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    else:
        path.unlink(missing_ok=True)

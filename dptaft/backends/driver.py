"""The parent's loop: hand out what is missing, take in what ended, try again what was lost, stop in order."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dptaft.backends.attempts import (
    DONE,
    LOST,
    TWICE,
    Attempt,
    Attempts,
    await_visible,
    execute,
    remember_job,
)
from dptaft.backends.base import Backend, Report
from dptaft.backends.config import BackendConfig
from dptaft.training.checkpoint import GracefulStop
from dptaft.training.steps import TrainingInterruptedError

_POLL = 0.5
_GRACE = 60.0
_NONE: Mapping[str, str] = {}

Outcomes = dict[str, str | None]
"""Why a name was not finished; None for a finished one."""


@dataclass(frozen=True)
class Work:
    """Names to be made by one execution.

    Attributes:
        names: of the folders.
        function: called as ``function(attempt, *arguments)``; returns why names were not finished.
        arguments: picklable.
        lost: how often an execution was lost.
    """

    names: tuple[str, ...]
    function: Callable[..., Mapping[str, str]]
    arguments: tuple[Any, ...]
    lost: int = 0


def run_work(
    work: Sequence[Work], backend: Backend, attempts: Attempts, config: BackendConfig
) -> Iterator[Outcomes]:
    """Run all work; outcomes come as executions end.

    An execution that is lost (killed, pre-empted) is followed by another that goes on from its state, at most
    ``retries`` times; one that may still run is not.

    Raises:
        TrainingInterruptedError: SIGINT or SIGTERM asked for a stop; pending jobs were withdrawn, running
            ones asked to save their state, and everything is ready for the next parent.

    Formal guarantees:
        Those of `Attempts`. Nothing is charged here: work comes with what was paid for it.
    """
    waiting = deque(work)
    running: dict[str, tuple[Work, Attempt]] = {}
    try:
        with GracefulStop((signal.SIGTERM, signal.SIGINT)) as stop:
            while (waiting or running) and not stop.requested:
                while waiting and len(running) < config.most_jobs and not stop.requested:
                    _hand_out(waiting.popleft(), backend, attempts, running)
                for report in backend.finished(_POLL):
                    outcomes, again = _take_in(report, *running.pop(report.job), attempts, config.retries)
                    if again is not None:
                        waiting.append(again)
                    if outcomes:
                        yield outcomes
            if stop.requested and (waiting or running):
                yield from _stop(backend, attempts, running)
                raise TrainingInterruptedError("stopped; the same command goes on")
    finally:
        if running:
            backend.close()
        for _, attempt in running.values():
            attempts.settle(attempt, certain=False)


def _hand_out(
    work: Work, backend: Backend, attempts: Attempts, running: dict[str, tuple[Work, Attempt]]
) -> None:
    attempt = attempts.grant(work.names)
    job = backend.submit(execute, attempt, work.function, work.arguments)
    running[job] = (work, attempt)
    remember_job(attempt, job)


def _take_in(
    report: Report, work: Work, attempt: Attempt, attempts: Attempts, retries: int
) -> tuple[Outcomes, Work | None]:
    """What an ended execution made, and what is left to be tried again."""
    how, failed = (LOST, _NONE) if report.value is None else report.value
    if how == DONE and not await_visible(attempt, [name for name in work.names if name not in failed]):
        return dict.fromkeys(work.names, f"its result is not to be seen in {attempt.work}"), None
    done = attempts.settle(attempt, report.ended and how != TWICE)
    if done is None:
        return dict.fromkeys(work.names, attempt.doubt()), None
    outcomes: Outcomes = dict.fromkeys(done, None)
    left = tuple(name for name in work.names if name not in done)
    if how == DONE:
        return outcomes | {name: failed[name] for name in left}, None
    if left and work.lost < retries:
        return outcomes, replace(work, names=left, lost=work.lost + 1)
    reason = report.error or "it was asked to stop from outside"
    return outcomes | dict.fromkeys(left, f"lost {work.lost + 1} times, at last: {reason}"), None


def _stop(
    backend: Backend, attempts: Attempts, running: dict[str, tuple[Work, Attempt]]
) -> Iterator[Outcomes]:
    """Withdraw what is pending, let the rest save its state, and take in what still gets done."""
    for job, (_, attempt) in list(running.items()):
        if not attempt.withdraw(begun=False):
            attempt.ask_to_stop()
        else:
            backend.cancel(job)
            attempts.settle(attempt, certain=True)
            del running[job]
    end = time.monotonic() + _GRACE
    while running and time.monotonic() < end:
        for report in backend.finished(_POLL):
            if report.job not in running:
                continue
            outcomes, _ = _take_in(report, *running.pop(report.job), attempts, retries=1)
            finished: Outcomes = {name: error for name, error in outcomes.items() if error is None}
            if finished:
                yield finished

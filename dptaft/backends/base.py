"""The seam between a parent that hands out trainings and whatever runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol


class BackendError(ValueError):
    """A backend cannot be used as asked; the message names the option or the package, and the remedy."""


@dataclass(frozen=True)
class Report:
    """The end of one job.

    Attributes:
        job: its id.
        value: what the function returned; None where it returned nothing.
        error: why there is no value; None where there is one.
        ended: whether the job certainly does nothing any more. A backend that has merely lost sight of a
            job says False.
    """

    job: str
    value: Any = None
    error: str | None = None
    ended: bool = True


class Backend(Protocol):
    """Runs functions elsewhere; every job runs at most once, and is never started again by the backend."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Start `function(*arguments)`, which must be picklable; returns the id of the job."""

    def finished(self, timeout: float) -> list[Report]:
        """Jobs that ended since the last call, after at most about `timeout` seconds."""

    def cancel(self, job: str) -> None:
        """Take a job out of the queue, or end it."""

    def has_ended(self, job: str) -> bool:
        """Whether a job of an earlier parent certainly does nothing any more."""

    def close(self) -> None:
        """End: what still runs is asked to stop or, where that is certain to succeed, killed."""

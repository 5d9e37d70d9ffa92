"""Ray: a cluster by its address, or one of its own on this machine."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from dptaft.backends.base import BackendError, Report


class RayBackend:
    """One Ray task per training; Ray is told never to start a task again.

    Args:
        options: as described in `BackendConfig`; without an address, and outside a cluster, Ray starts on
            this machine and ends with the backend.

    Raises:
        BackendError: ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise BackendError(
                "the backend ray needs a package that is not installed: pip install 'dptaft[ray]'"
            ) from None
        self._ray, self._started = ray, not ray.is_initialized()
        if self._started:
            try:
                ray.init(
                    address=options.get("address"),
                    include_dashboard=None if options.get("address") else False,
                    log_to_driver=False,
                    logging_level=logging.WARNING,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise BackendError(
                    f"no Ray cluster at {options.get('address', 'this machine')} ({_line(error)}); "
                    "start one, or correct --backend-option address=..."
                ) from None
        self._settings = {"num_cpus": options.get("cpus", 1), "num_gpus": options.get("gpus", 0)}
        if "mem_gb" in options:
            self._settings["memory"] = int(options["mem_gb"] * 2**30)
        if "resources" in options:
            self._settings["resources"] = dict(options["resources"])
        self._jobs: dict[Any, str] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Start a task."""
        task = self._ray.remote(max_retries=0, **self._settings)(function)
        name = secrets.token_hex(8)
        self._jobs[task.remote(*arguments)] = name
        return name

    def finished(self, timeout: float) -> list[Report]:
        """Tasks that returned, and those that Ray lost."""
        if not self._jobs:
            return []
        ready, _ = self._ray.wait(list(self._jobs), num_returns=1, timeout=timeout)
        return [self._report(reference) for reference in ready]

    def cancel(self, job: str) -> None:
        """KeyboardInterrupt in the worker."""
        for reference, name in self._jobs.items():
            if name == job:
                self._ray.cancel(reference, force=False)

    def has_ended(self, job: str) -> bool:
        """Unknown: references do not outlive the process that made them."""
        return False

    def close(self) -> None:
        """Cancel what is left, and leave Ray."""
        for name in self._jobs.values():
            self.cancel(name)
        self._jobs.clear()
        if self._started:
            self._started = False
            self._ray.shutdown()

    def _report(self, reference: Any) -> Report:
        name, errors = self._jobs.pop(reference), self._ray.exceptions
        try:
            return Report(name, self._ray.get(reference))
        except (errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
            return Report(name, error=f"its worker died ({_line(error)})")
        except errors.RayTaskError as error:
            return Report(name, error=_line(error.cause) if error.cause else _line(error))
        except errors.RayError as error:  # a node that is gone, a task that was cancelled
            return Report(name, error=f"Ray lost it ({_line(error)})", ended=False)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__

"""Slurm through `submitit` (or processes of this machine in the same way, to try it out)."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dptaft.backends.base import BackendError, Report

_MINUTES = 240
_SETTLING = {"slurm": 30.0, "local": 0.5}
"""Seconds for which a result may be on its way over a shared disk."""
_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")
"""States of Slurm after whose report the processes of a job are gone; NODE_FAIL tells nothing about them."""
_LOCAL_ENDED = ("FINISHED", "INTERRUPTED")


class SubmititBackend:
    """One Slurm job per training.

    Args:
        folder: private folder for submitit's files: pickled arguments and results, and logs. They hold paths
            and options, never images or weights.
        options: as described in `BackendConfig`.

    Raises:
        BackendError: submitit is not installed, or there is no Slurm here.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError:
            raise BackendError(
                "the backend submitit needs a package that is not installed: pip install 'dptaft[slurm]'"
            ) from None
        self._cluster = str(options.get("cluster", "slurm"))
        if self._cluster == "slurm" and shutil.which("sbatch") is None:
            raise BackendError(
                "there is no Slurm on this machine (no sbatch); submit from a login node, or try "
                "--backend-option cluster=local"
            )
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        self._folder, self._submitit = folder, submitit
        self._executor = submitit.AutoExecutor(folder=str(folder), cluster=self._cluster)
        self._executor.update_parameters(**slurm_parameters(options))
        self._jobs: dict[str, Any] = {}
        self._silent: dict[str, float] = {}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Start a job by sbatch; its id names the cluster, since another one has the same numbers."""
        job = self._executor.submit(function, *arguments)
        name = f"{self._cluster}:{job.job_id}"
        self._jobs[name] = job
        return name

    def finished(self, timeout: float) -> list[Report]:
        """Jobs with a result, and jobs that the cluster says are over."""
        end = time.monotonic() + timeout
        while True:
            reports = [report for name in list(self._jobs) if (report := self._look(name)) is not None]
            if reports or time.monotonic() >= end:
                return reports
            time.sleep(min(0.5, timeout))

    def cancel(self, job: str) -> None:
        """Scancel: SIGTERM, and SIGKILL after the delay that the cluster allows."""
        if job in self._jobs:
            self._jobs[job].cancel(check=False)

    def has_ended(self, job: str) -> bool:
        """Whether Slurm reports a final state."""
        cluster, _, number = job.partition(":")
        if cluster != "slurm" or self._cluster != "slurm":
            return False
        found: Any = self._submitit.SlurmJob(self._folder, number)
        return str(found.state).split(" ")[0].rstrip("+") in _ENDED

    def close(self) -> None:
        """Cancel what is left."""
        for name in list(self._jobs):
            self.cancel(name)
        self._jobs.clear()

    def _look(self, name: str) -> Report | None:
        """The report of a job, or None while it is under way (results may appear late on shared disks)."""
        job = self._jobs[name]
        if not job.done():
            return None
        if not job.paths.result_pickle.exists():
            first = self._silent.setdefault(name, time.monotonic())
            if time.monotonic() - first < _SETTLING[self._cluster]:
                return None
            del self._jobs[name]
            state = str(job.state).split(" ")[0].rstrip("+")
            ended = state in (_ENDED if self._cluster == "slurm" else _LOCAL_ENDED)
            return Report(name, error=f"its job {name} ended without a result ({state})", ended=ended)
        del self._jobs[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            error = job.exception()
            if error is None:
                return Report(name, job.result())
        return Report(name, error=_last_line(str(error)))


def slurm_parameters(options: Mapping[str, Any]) -> dict[str, Any]:
    """What submitit is told; jobs are never queued again by Slurm itself.

    >>> slurm_parameters({"partition": "gpu", "gpus": 1})["slurm_partition"]
    'gpu'
    """
    names = {
        "timeout_min": "timeout_min",
        "cpus": "cpus_per_task",
        "gpus": "gpus_per_node",
        "mem_gb": "mem_gb",
        "partition": "slurm_partition",
        "account": "slurm_account",
    }
    given = {names[name]: value for name, value in options.items() if name in names}
    return {
        "name": "dptaft",
        "timeout_min": _MINUTES,
        "slurm_additional_parameters": {"no-requeue": True},
        **given,
    }


def _last_line(text: str) -> str:
    """The exception of a traceback as submitit wraps it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    rules = [i for i, line in enumerate(lines) if set(line) == {"-"}]
    return lines[rules[-1] - 1] if rules and rules[-1] else lines[-1]

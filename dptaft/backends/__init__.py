"""Where independent trainings run: processes of this machine, a Slurm cluster, or Ray.

A backend takes functions with picklable arguments and reports them as they end. It schedules nothing itself.
What may run, what is tried again and what is released is decided by one parent process
(`dptaft.backends.driver`), which gives every execution a private folder of its own
(`dptaft.backends.attempts`).
"""

from dptaft.backends.base import Backend, BackendError, Report
from dptaft.backends.config import BackendConfig

__all__ = ["Backend", "BackendConfig", "BackendError", "Report"]

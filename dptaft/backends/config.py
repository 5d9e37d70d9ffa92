"""Which backend, how many jobs at once, and the options of the cluster, checked before anything starts."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dptaft.backends.base import Backend, BackendError

KINDS = ("local", "submitit", "ray")
_MOST_CLUSTER_JOBS = 100
_NUMBER = (int, float)
_COMMON: dict[str, type | tuple[type, ...]] = {"retries": int}
_OPTIONS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "local": _COMMON,
    "submitit": _COMMON
    | {"cluster": str, "partition": str, "account": str, "timeout_min": int}
    | {"cpus": int, "gpus": int, "mem_gb": _NUMBER},
    "ray": _COMMON
    | {"address": str, "cpus": _NUMBER, "gpus": _NUMBER, "mem_gb": _NUMBER, "resources": Mapping},
}
_MAY_BE_ZERO = ("retries", "gpus")


@dataclass(frozen=True)
class BackendConfig:
    """Where independent trainings run.

    Attributes:
        kind: ``local`` (processes of this machine), ``submitit`` (Slurm) or ``ray``.
        jobs: most jobs at once; None means 1 for ``local`` and 100 on a cluster, whose own queue decides.
        options: ``retries`` (of a job that was lost; 2), for ``submitit`` ``cluster`` (``slurm``, or
            ``local`` to try it without one), ``partition``, ``account``, ``timeout_min``, ``cpus``, ``gpus``,
            ``mem_gb``, for ``ray`` ``address``, ``cpus``, ``gpus``, ``mem_gb``, ``resources``.

    Raises:
        BackendError: an unknown kind or option, or a value that cannot be used.

    >>> BackendConfig("submitit", options={"partition": "gpu", "cpus": 4}).threads
    4
    """

    kind: str = "local"
    jobs: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BackendError(f"there is no backend {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.jobs is not None and self.jobs < 1:
            raise BackendError(f"jobs must be at least 1, got {self.jobs}")
        for name, value in self.options.items():
            self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        known = _OPTIONS[self.kind]
        if name not in known:
            raise BackendError(f"the backend {self.kind} knows no option {name!r}; it has {', '.join(known)}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            raise BackendError(f"the backend option {name} is {value!r}; it must be {_words(known[name])}")
        least = 0 if name in _MAY_BE_ZERO else 1e-9
        if isinstance(value, _NUMBER) and not least <= value < float("inf"):
            raise BackendError(f"the backend option {name} is {value!r}; it must be positive")
        if name == "cluster" and value not in ("slurm", "local"):
            raise BackendError(f"the backend option cluster is {value!r}; it must be slurm or local")
        if isinstance(value, Mapping) and not all(isinstance(v, _NUMBER) for v in value.values()):
            raise BackendError(f"the backend option resources is {value!r}; it must map names to numbers")

    @classmethod
    def parse(
        cls,
        kind: str | None,
        jobs: int | None,
        texts: Sequence[str] = (),
        table: Mapping[str, Any] | None = None,
    ) -> BackendConfig:
        """From the command line, over the table ``[backend]`` of a recipe.

        Args:
            kind: ``--backend``; None takes the one of the table, or ``local``.
            jobs: ``--jobs``.
            texts: ``--backend-option key=value``, values as in TOML or plain text.
            table: ``kind``, ``jobs`` and options, which count only for the kind that it names.

        Raises:
            BackendError: as for the class, or a text without ``=``.

        >>> BackendConfig.parse(None, 4, ["partition=gpu"], {"kind": "submitit", "cpus": 2})
        BackendConfig(kind='submitit', jobs=4, options={'cpus': 2, 'partition': 'gpu'})
        """
        given = dict(table or {})
        named = str(given.pop("kind", "local"))
        asked = given.pop("jobs", None)
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool)):
            raise BackendError(f"jobs is {asked!r}; it must be a whole number")
        if kind not in (None, named):
            given, asked = {}, None
        options = given
        for text in texts:
            name, sign, value = text.partition("=")
            if not sign or not name.strip():
                raise BackendError(f"cannot read {text!r}; write key=value, for example partition=gpu")
            options[name.strip()] = _value(value.strip())
        return cls(kind or named, jobs if jobs is not None else asked, options)

    @property
    def in_this_process(self) -> bool:
        """Whether everything runs in the process that asks, one job after the other."""
        return self.kind == "local" and self.most_jobs == 1

    @property
    def most_jobs(self) -> int:
        """Jobs that are handed out at once."""
        return self.jobs or (1 if self.kind == "local" else _MOST_CLUSTER_JOBS)

    @property
    def retries(self) -> int:
        """How often a lost job is tried again."""
        return int(self.options.get("retries", 2))

    @property
    def threads(self) -> int | None:
        """Threads of one job; None where jobs share the cores of this machine evenly."""
        return None if self.kind == "local" else max(1, int(self.options.get("cpus", 1)))

    @property
    def memory(self) -> int | None:
        """Bytes that one job may take; None where that is not limited."""
        limit = self.options.get("mem_gb")
        return None if limit is None else int(limit * 2**30)

    def open(self, folder: Path) -> Backend:
        """The backend, ready to take jobs.

        Args:
            folder: private folder for what the backend itself must write.

        Raises:
            BackendError: its package is not installed, or there is no such cluster here.
        """
        if self.kind == "submitit":
            from dptaft.backends.slurm import SubmititBackend

            return SubmititBackend(folder, self.options)
        if self.kind == "ray":
            from dptaft.backends.ray_cluster import RayBackend

            return RayBackend(self.options)
        from dptaft.backends.local import LocalPool

        return LocalPool()


def _words(kinds: type | tuple[type, ...]) -> str:
    names = {int: "a whole number", _NUMBER: "a number", str: "text", Mapping: "a table of numbers"}
    return names[kinds]


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text

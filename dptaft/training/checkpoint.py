"""Checkpoints that keep the privacy account right: killed runs are resumed, repeated steps are charged.

Three files in one private folder. ``progress.json`` lists the step ranges that were authorised, written
durably before any of their steps runs; ``authorised.json`` lists them again, so that an edit of one file
hides no step. ``checkpoint.safetensors`` holds weights and optimiser state, with the completed steps and the
fingerprint of configuration and data in its header. All are replaced atomically. No random state is stored:
a resumed run draws fresh noise, so the same noise never meets another batch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dptaft.storage import draft_file
from dptaft.training.marks import COPY, PROGRESS, read_ranges
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.optimizers import IterateAverage, PrivateOptimizer
from dptaft.training.sampling import Sampler

_FORMAT = 1
_HEADER = "dptaft_checkpoint"


class ResumeError(ValueError):
    """An interrupted run cannot be continued."""


@dataclass(frozen=True)
class Progress:
    """What has been done and what must be charged.

    Attributes:
        completed: steps whose result is in the checkpoint.
        authorised: half-open ranges of steps that may have touched the data, repeated ones listed again.
    """

    completed: int
    authorised: tuple[tuple[int, int], ...]

    @property
    def charged_steps(self) -> int:
        """Number of executions to account for, at least `completed`.

        Example:
            >>> Progress(completed=40, authorised=((0, 50), (40, 90))).charged_steps
            100
        """
        return sum(stop - start for start, stop in self.authorised)


class Checkpointer:
    """Reads and writes the checkpoint folder of one run; one process at a time.

    Args:
        folder: private folder, created with mode 0700 where missing.
        fingerprint: JSON values that must not change between attempts: configuration, data, weights.
        processes: that share the records in this attempt.

    Attributes:
        processes: the most of them that shared the records of any attempt that authorised a step.

    Raises:
        ResumeError: another process works on the run, or the run was started with another fingerprint.

    Formal guarantees:
        If `authorise` is called before the steps it names, `progress.charged_steps` is never below the number
        of steps that touched the data, at whatever moment the process or the machine stops.
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Mapping[str, Any], processes: int = 1
    ) -> None:
        self.folder, self.processes = Path(folder), processes
        self.fingerprint = json.loads(json.dumps(dict(fingerprint), sort_keys=True))
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _sync_folder(self.folder.parent)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise ResumeError(f"another process is training in {self.folder}; wait for it") from None
        try:
            self._authorised = self._read_progress()
            self._completed, self._tensors, self._extra = self._read_checkpoint()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process continue the run."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def progress(self) -> Progress:
        """Completed and authorised steps over all attempts."""
        return Progress(self._completed, tuple(self._authorised))

    @property
    def started(self) -> bool:
        """Whether an earlier attempt authorised a step."""
        return bool(self._authorised)

    def authorise(self, start: int, stop: int) -> None:
        """Record durably that the steps from `start` to before `stop` may now run."""
        if not self._completed <= start < stop:
            raise ValueError(f"steps {start} to {stop} do not follow the {self._completed} completed ones")
        self._authorised.append((start, stop))
        self._write_progress()

    def save(
        self,
        completed: int,
        theta: Mapping[str, Tensor],
        optimizer: PrivateOptimizer,
        average: IterateAverage | None = None,
    ) -> None:
        """Store the state after `completed` steps; authorised steps that did not run are given back."""
        if not self._authorised or completed > self._authorised[-1][1]:
            raise ValueError(f"{completed} steps were never authorised")
        tensors = {f"theta/{name}": value for name, value in theta.items()} | _optimizer_tensors(optimizer)
        extra = {"averaged": 0}
        if average is not None:
            tensors |= {f"average/{name}": value for name, value in average.mean.items()}
            extra = {"averaged": average.count}
        header = {
            "format": _FORMAT,
            "completed": completed,
            "fingerprint": self.fingerprint,
            "extra": extra,
        }
        # safetensors refuses tensors that share memory, and a checkpoint must not follow later updates
        own = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
        write_atomically(self.folder / "checkpoint.safetensors", save(own, {_HEADER: json.dumps(header)}))
        self._completed, self._tensors, self._extra = completed, own, extra
        start, stop = self._authorised[-1]
        if start < completed < stop:
            self._authorised[-1] = (start, completed)
            self._write_progress()

    @torch.no_grad()
    def restore(
        self,
        theta: Mapping[str, Tensor],
        optimizer: PrivateOptimizer,
        average: IterateAverage | None = None,
    ) -> int:
        """Copy the stored state into the given objects and return the number of completed steps.

        Raises:
            ResumeError: the stored tensors do not fit.
        """
        if not self._tensors:
            return 0
        stored = _split(self._tensors)
        if stored.get("theta", {}).keys() != theta.keys():
            raise ResumeError("the checkpoint holds other parameters; start a new run")
        for name, value in theta.items():
            if value.shape != stored["theta"][name].shape:
                raise ResumeError(f"the checkpoint holds {name!r} with another shape; start a new run")
        for name, value in theta.items():
            value.copy_(stored["theta"][name])
        _load_optimizer(optimizer, stored.get("optimizer", {}))
        if average is not None:
            average.mean = {k: v.to(theta[k].device, copy=True) for k, v in stored.get("average", {}).items()}
            average.count = int(self._extra["averaged"])
        return self._completed

    def remove(self) -> None:
        """Delete the files of a run that is complete."""
        for name in ("checkpoint.safetensors", PROGRESS, COPY, "lock"):
            (self.folder / name).unlink(missing_ok=True)
        self.close()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _write_progress(self) -> None:
        content = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "authorised": self._authorised,
            "processes": self.processes,
        }
        # in this order: a run killed before its first copy is one that has none, and can be continued
        write_atomically(self.folder / PROGRESS, json.dumps(content).encode())
        write_atomically(self.folder / COPY, json.dumps(self._authorised).encode())

    def _read_progress(self) -> list[tuple[int, int]]:
        path = self.folder / PROGRESS
        if not path.exists():
            if any((self.folder / name).exists() for name in ("checkpoint.safetensors", COPY)):
                raise ResumeError(f"{path} is missing, so the steps to charge are unknown; start a new run")
            return []
        try:
            content = json.loads(path.read_text())
            authorised = read_ranges(self.folder, content["authorised"])
            self.processes = max(self.processes, int(content.get("processes", 1)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ResumeError(
                f"{path} is damaged ({error}), so the steps to charge are unknown; start a new run"
            ) from error
        self._check_fingerprint(content)
        return authorised

    def _read_checkpoint(self) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return 0, {}, {}
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError, KeyError, OSError) as error:
            raise ResumeError(f"{path} is damaged ({error}); start a new run") from error
        self._check_fingerprint(header)
        completed = int(header["completed"])
        if not self._authorised or completed > max(stop for _, stop in self._authorised):
            raise ResumeError(f"{path} is ahead of the authorised steps; start a new run")
        return completed, tensors, header["extra"]

    def _check_fingerprint(self, content: Mapping[str, Any]) -> None:
        if content.get("format") != _FORMAT:
            raise ResumeError(
                f"the checkpoint has format {content.get('format')}, this version reads {_FORMAT}"
            )
        require_same(content.get("fingerprint", {}), self.fingerprint)


def require_same(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse to continue what was begun with another fingerprint.

    Raises:
        ResumeError: naming what differs.
    """
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise ResumeError(
                f"{key} was {_short(before.get(key))} when the run started and is "
                f"{_short(after.get(key))} now; restore it, or start a new run"
            )


def check_resumable(sampler: Sampler, source: NoiseSource | InsecureSeededNoise) -> None:
    """Refuse to continue what cannot be continued soundly.

    Raises:
        ResumeError: a cyclic partition (secret, never stored), or seeded noise (it would repeat).
    """
    if not sampler.resumable:
        raise ResumeError(
            f"a run with {sampler.kind} sampling cannot be resumed: its secret partition is not stored"
        )
    if not source.is_secure:
        raise ResumeError("a run with seeded noise cannot be resumed: it would use the same noise again")


def data_fingerprint(tensors: Sequence[Tensor]) -> str:
    """SHA-256 over dtypes, shapes and bytes; for private files only (it identifies the data).

    Example:
        >>> data_fingerprint([torch.zeros(2)]) == data_fingerprint([torch.zeros(1, 2)])
        False
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for part in flat.split(1 << 24):
            digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


class GracefulStop:
    """While active, a termination signal asks for a stop after the current step, and does not kill.

    Example:
        >>> with GracefulStop() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     stop.requested
        True
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGTERM,)) -> None:
        self.requested = False
        self._signals, self._before = tuple(signals), {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._request) for number in self._signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._request:  # else someone wants to outlive more signals
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _split(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parts.setdefault(kind, {})[name] = value
    return parts


def _optimizer_tensors(optimizer: PrivateOptimizer) -> dict[str, Tensor]:
    return {
        f"optimizer/{key}/{name}": value
        for name, p in optimizer.parameters_by_name.items()
        for key, value in optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _load_optimizer(optimizer: PrivateOptimizer, stored: Mapping[str, Tensor]) -> None:
    for key_and_name, value in stored.items():
        key, name = key_and_name.split("/", 1)
        p = optimizer.parameters_by_name[name]
        device = "cpu" if key == "step" else p.device
        optimizer.state[p][key] = value.to(device, copy=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` (mode 0600) so that after a crash the old or the new content is there, no mixture.

    Raises:
        OSError: no room, with a message that names the folder and the remedy.
    """
    try:
        _replace(path, content)
    except OSError as error:
        reason = f"{error.strerror or error}; make room, then continue the run by --resume"
        raise OSError(error.errno, reason, str(path.parent)) from error
    _sync_folder(path.parent)


def _replace(path: Path, content: bytes) -> None:
    with draft_file(path.parent, f".{path.name}.") as (descriptor, temporary):
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fsync(descriptor)
        os.replace(temporary, path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

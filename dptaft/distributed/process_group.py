"""Processes of a launcher, joined by torch.distributed: gloo on CPUs, NCCL for tensors on CUDA devices.

Messages, and the word that every process is ready, go through gloo: it notices at once when a process dies,
since its connections close. Weights and sums on a CUDA device go through NCCL, and only when all processes
have said that they are ready, so that its short time limit is never spent on waiting for work.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dptaft.distributed.launch import Launch
from dptaft.distributed.ranks import RankLostError, Ranks, RunEndedError, T
from dptaft.training.clipping import is_out_of_memory
from dptaft.training.plan import PlanError

PATIENCE = timedelta(hours=4)
"""How long a process waits for the slowest one: for features, for the lock of a ledger."""

TRANSFER_LIMIT = timedelta(minutes=10)
"""How long one transfer between CUDA devices may take, when all processes are ready for it."""

_USER_ERRORS = (ValueError, OSError)


class PeerError(ValueError):
    """What another process could not do."""


class ProcessGroup(Ranks):
    """All processes that a launcher started; see `joined`.

    Args:
        launch: place of this process.
        control: gloo group of all processes.
    """

    def __init__(self, launch: Launch, control: dist.ProcessGroup | None) -> None:
        self.rank, self.world_size, self._launch = launch.rank, launch.world_size, launch
        self._control: dist.ProcessGroup | None = control
        self._bulk: dist.ProcessGroup | None = control
        self._device = torch.device("cpu")
        self.over = False
        """Whether the processes have parted: no message can be sent any more."""

    def use_device(self, device: torch.device) -> None:
        """Exchange tensors of this device from now on.

        Raises:
            PlanError: the processes do not have the same kind of device.
        """
        kind = self.broadcast(device.type)
        self.agree(lambda: _require_same(kind, device.type, self.rank))
        self._device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            self._bulk = self._joint(lambda: _new_group("nccl", TRANSFER_LIMIT))

    def _joint(self, exchange: Callable[[], T]) -> T:
        """One exchange; whatever goes wrong in it, the processes cannot go on together."""
        if self.over:
            raise RankLostError("the processes of this run have parted")
        try:
            return exchange()
        except RuntimeError as error:
            self.over = True
            _outlive_the_launcher()
            raise RankLostError(
                f"process {self.rank} of {self.world_size} has lost another one, and the run stops; what it "
                "was authorised to do stays charged; continue with the same options, --output and --resume "
                f"({_first_line(error)})"
            ) from error
        except BaseException:
            self.over = True
            raise

    def broadcast(self, message: Any) -> Any:  # noqa: D102
        content = json.dumps(message).encode() if self.is_first else b""
        length = torch.tensor([len(content)])
        self._joint(lambda: dist.broadcast(length, 0, group=self._control))
        body = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else None
        if body is None:
            body = torch.empty(int(length), dtype=torch.uint8)
        self._joint(lambda: dist.broadcast(body, 0, group=self._control))
        return json.loads(body.numpy().tobytes())

    def broadcast_tensor(self, tensor: Tensor) -> None:  # noqa: D102
        self._joint(lambda: dist.broadcast(tensor, 0, group=self._group_of(tensor)))

    def sum_to_first(self, tensor: Tensor) -> None:  # noqa: D102
        self._joint(lambda: dist.reduce(tensor, 0, group=self._group_of(tensor)))

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else self._bulk

    def collect(self, rows: Tensor) -> Tensor:  # noqa: D102
        rows = rows.detach().cpu().contiguous()
        if not self.is_first:
            self._send(torch.tensor([len(rows)]), 0)
            self._send(rows, 0)
            return rows[:0]
        parts = [rows]
        for rank in range(1, self.world_size):
            count = torch.zeros(1, dtype=torch.int64)
            self._receive(count, rank)
            parts.append(rows.new_empty(int(count), *rows.shape[1:]))
            self._receive(parts[-1], rank)
        return torch.cat(parts)

    def deal(self, parts: Sequence[Tensor] | None, mine: Tensor) -> None:  # noqa: D102
        if not self.is_first:
            self._receive(mine, 0)
            return
        if parts is None or len(parts) != self.world_size:
            raise ValueError(f"there are {self.world_size} processes; give a part for each")
        for rank in range(1, self.world_size):
            self._send(parts[rank].contiguous(), rank)
        mine.copy_(parts[0])

    def _send(self, tensor: Tensor, rank: int) -> None:
        if tensor.numel():
            self._joint(lambda: dist.send(tensor, rank, group=self._control))

    def _receive(self, tensor: Tensor, rank: int) -> None:
        if tensor.numel():
            self._joint(lambda: dist.recv(tensor, rank, group=self._control))

    def agree(self, work: Callable[[], T]) -> T:  # noqa: D102
        failure: Exception | None = None
        results: list[T] = []
        try:
            results.append(work())
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        except (RankLostError, RunEndedError):
            raise
        except Exception as error:  # told to all processes, then raised again
            failure = error
        except BaseException:  # an interrupt: the others notice that this process is gone
            self.over = True
            raise
        failed = torch.tensor([int(failure is not None)])
        self._joint(lambda: dist.all_reduce(failed, group=self._control))
        if int(failed):
            self._part(failure)
        return results[0]

    def _part(self, failure: Exception | None) -> NoReturn:
        """Tell the first process what went wrong where, and end on all of them."""
        told = _told(failure, self.rank)
        rows = self.collect(torch.frombuffer(bytearray(told + b"\n"), dtype=torch.uint8))
        self.over = True
        if failure is not None:
            raise _explained(failure, self.rank)
        if not self.is_first:
            raise RunEndedError("another process could not go on; the first one says why")
        messages = [json.loads(line) for line in rows.numpy().tobytes().splitlines() if line]
        first = next(message for message in messages if message)
        if first["user"]:
            raise PeerError(first["text"])
        raise RuntimeError(first["text"])


@contextmanager
def joined(launch: Launch) -> Iterator[ProcessGroup]:
    """The group of all processes of a launcher, for as long as the context is open.

    A process group that the program has made already is used beside its own.
    """
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", timeout=PATIENCE, rank=launch.rank, world_size=launch.world_size)
    try:
        yield ProcessGroup(launch, _new_group("gloo", PATIENCE))
    finally:
        if made:
            dist.destroy_process_group()


def _new_group(backend: str, limit: timedelta) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=limit))


def local_device(name: str, launch: Launch) -> str:
    """The device of one process: a CUDA device of its own, or the CPU.

    Args:
        name: as the user gave it: ``auto``, ``cpu`` or ``cuda``.
        launch: place of the process.

    Raises:
        PlanError: a single named device for all, or fewer devices than processes.

    >>> local_device("cpu", Launch(1, 2, 1, 2))
    'cpu'
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if name not in ("auto", "cuda"):
        raise PlanError(
            f"device {name} is one device for {launch.world_size} processes; use --device cuda, which gives "
            "each its own, or cpu"
        )
    if torch.cuda.device_count() < launch.local_world_size:
        raise PlanError(
            f"there are {torch.cuda.device_count()} CUDA devices for {launch.local_world_size} processes on "
            "this machine; start one for each device, or use --device cpu"
        )
    return f"cuda:{launch.local_rank}"


def _require_same(first: str, own: str, rank: int) -> None:
    if first != own:
        raise PlanError(f"process 0 works on {first} and process {rank} on {own}; give --device")


def _explained(error: Exception, rank: int) -> Exception:
    """The error itself; running out of memory is one that the user can do something about."""
    if is_out_of_memory(error):
        return PeerError(
            f"process {rank} is out of memory; use a smaller --physical-batch-size, a --feature-cache, or "
            "fewer processes on a machine"
        )
    return error


def _told(error: Exception | None, rank: int) -> bytes:
    if error is None:
        return b"null"
    error = _explained(error, rank)
    if isinstance(error, _USER_ERRORS):
        return json.dumps({"user": True, "text": " ".join(str(error).split())}).encode()
    trace = "".join(traceback.format_exception(error))
    return json.dumps({"user": False, "text": f"process {rank} failed:\n{trace}"}).encode()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _outlive_the_launcher() -> None:
    """Ignore the launcher's request to stop, which follows a lost process, while the run is closed."""
    if threading.current_thread() is threading.main_thread() and os.environ.get("TORCHELASTIC_RUN_ID"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

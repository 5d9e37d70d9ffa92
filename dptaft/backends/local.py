"""Processes of this machine, each with a pipe of its own: one that dies takes only its own job with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from dptaft.backends.base import Report

_PATIENCE = 10.0


@dataclass
class _Member:
    process: SpawnProcess
    connection: Connection
    job: str | None = None


class LocalPool:
    """A pool of processes that keep what consecutive jobs share; a dead process is replaced by a new one.

    (`concurrent.futures.ProcessPoolExecutor` cannot say which job was lost with a process, and fails all.)
    """

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._members: list[_Member] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> str:
        """Start a job in an idle process, or in a new one."""
        job = secrets.token_hex(8)
        member = next((m for m in self._members if m.job is None and m.process.is_alive()), None)
        if member is None:
            member = self._start()
        member.job = job
        # a process that died just now is noticed by `finished`
        with contextlib.suppress(ConnectionError):
            member.connection.send((function, arguments))
        return job

    def finished(self, timeout: float) -> list[Report]:
        """Jobs that returned, and those whose process died."""
        busy = [member for member in self._members if member.job is not None]
        ready = set(wait([member.connection for member in busy], timeout)) if busy else set()
        return [self._report(member) for member in busy if member.connection in ready]

    def cancel(self, job: str) -> None:
        """SIGTERM."""
        for member in self._members:
            if member.job == job:
                member.process.terminate()

    def has_ended(self, job: str) -> bool:
        """Unknown here: the process itself is looked up by its number."""
        return False

    def close(self) -> None:
        """Let idle processes go; kill the others and wait until they are gone."""
        for member in self._members:
            if member.job is not None:
                member.process.kill()
            member.connection.close()
        for member in self._members:
            member.process.join(_PATIENCE)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
        self._members = []

    def _start(self) -> _Member:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._members.append(_Member(process, ours))
        return self._members[-1]

    def _report(self, member: _Member) -> Report:
        job, member.job = member.job or "", None
        try:
            value, error = member.connection.recv()
        except (EOFError, OSError):
            member.process.join()
            self._members.remove(member)
            member.connection.close()
            return Report(job, error=_died(member.process.exitcode or 0))
        return Report(job, value, error)


def _died(code: int) -> str:
    how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"its process ended {how}"


def _serve(connection: Connection) -> None:
    """Loop of one process: take a job, run it, answer; end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_follow_parent, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = connection.recv()
            answer: tuple[Any, str | None]
            try:
                answer = (function(*arguments), None)
            except Exception as error:
                answer = (None, " ".join(str(error).split()) or type(error).__name__)
            connection.send(answer)


def _follow_parent() -> None:
    """Ask this process to stop when its parent has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

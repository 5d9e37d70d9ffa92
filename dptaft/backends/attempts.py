"""One execution of a training: a private folder, a permission that is used once, and how it ends.

An attempt is a folder of mode 0700 below the parent's. Its state is the name of one file, changed by renames
alone, of which exactly one succeeds on any file system::

    granted     -> begun       by the execution, before it reads anything
    granted     -> withdrawn   by the parent: the execution will never begin
    begun       -> withdrawn   by the parent, once the execution has certainly ended

An execution writes below its own folder only; what it finished is moved into place by the parent, and the
state of what it did not finish is copied home. A new attempt at the same names is granted only when no
earlier one is left.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dptaft.backends.holding import certainly_gone, described, identity, read_owner

GRANTED, BEGUN, WITHDRAWN, ENDED = "granted", "begun", "withdrawn", "ended"
_OWNER, _STOP = "owner.json", "stop"
PARTIAL = ".partial"
_GONE = ".gone-"
_PATIENCE = 600.0
_WATCH = 1.0
_VISIBLE = 300.0


class StopRequestedError(BaseException):
    """A signal asked the execution to stop; what it saved is continued by the next one."""


class WithdrawnError(ValueError):
    """The permission of an execution was taken back: it must neither go on nor release anything."""


@dataclass(frozen=True)
class Attempt:
    """One execution.

    Attributes:
        folder: its private folder.
        names: of the folders that it makes below `work`.
    """

    folder: Path
    names: tuple[str, ...]

    @property
    def work(self) -> Path:
        """Where it writes: ``NAME`` for what is finished, ``NAME.partial`` for what is not."""
        return self.folder / "work"

    @property
    def lease(self) -> Path:
        """File that exists exactly while the execution may go on."""
        return self.folder / BEGUN

    def begin(self) -> None:
        """Use the permission.

        Raises:
            WithdrawnError: it was used before (the job was started a second time), or taken back.
        """
        if not self._rename(GRANTED, BEGUN):
            raise WithdrawnError("this execution was withdrawn, or had begun before; it does nothing")
        _write(self.folder / _OWNER, identity())

    def ask_to_stop(self) -> None:
        """Ask the execution, wherever it is, to save its state and end."""
        _write(self.folder / _STOP, {})

    def end(self) -> None:
        """Say that the execution does nothing any more."""
        with contextlib.suppress(FileNotFoundError):
            _write(self.folder / ENDED, {})

    def has_ended(self) -> bool:
        """Whether the execution said so, or its process is certainly gone."""
        owner = read_owner(self.folder / _OWNER)
        return (self.folder / ENDED).exists() or (owner is not None and certainly_gone(owner))

    def runs_here(self) -> bool:
        """Whether the execution is a living process of this machine."""
        owner = read_owner(self.folder / _OWNER) or {}
        return owner.get("boot") == identity()["boot"] != "" and not self.has_ended()

    def withdraw(self, begun: bool) -> bool:
        """Take the permission back, an unused one or (where it has ended) one in use; whether it was so."""
        return self._rename(BEGUN if begun else GRANTED, WITHDRAWN)

    def doubt(self) -> str:
        """What to tell a user about an execution of which nobody knows whether it still runs."""
        owner = read_owner(self.folder / _OWNER) or {}
        return (
            f"an execution of it may still run ({described(owner)}): stop it; when it has certainly ended, "
            f"make the file {self.folder / ENDED} and give the same command again"
        )

    def _rename(self, before: str, after: str) -> bool:
        try:
            os.rename(self.folder / before, self.folder / after)
        except FileNotFoundError:
            return False
        return True


class Attempts:
    """All executions of one parent, which alone may use this.

    Args:
        root: private folder of the attempts, made with mode 0700.
        home: where finished folders go, and where ``NAME.partial`` waits for the next attempt.

    Formal guarantees:
        Whatever the locks of the file system do: an execution begins at most once; at most one execution of
        a name is in force, and it starts from everything that the earlier ones recorded; only the execution
        in force can become visible under its name.
    """

    def __init__(self, root: Path, home: Path) -> None:
        self.root, self.home = root.absolute(), home.absolute()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.root.chmod(0o700)

    def grant(self, names: Sequence[str]) -> Attempt:
        """Permit one execution, with the state that earlier ones left."""
        attempt = Attempt(self.root / secrets.token_hex(8), tuple(names))
        attempt.folder.mkdir(mode=0o700)
        attempt.work.mkdir(mode=0o700)
        for name in names:
            if (self.home / f"{name}{PARTIAL}").is_dir():
                _copy_state(self.home / f"{name}{PARTIAL}", attempt.work / f"{name}{PARTIAL}")
        _write(attempt.folder / "names.json", list(names))
        _write(attempt.folder / GRANTED, {})
        return attempt

    def settle(self, attempt: Attempt, certain: bool) -> set[str] | None:
        """Bring home what an execution left, if it certainly does nothing any more.

        Args:
            attempt: which.
            certain: the backend vouches for its end.

        Returns:
            Names that it finished, which are in place now; None where it may still run, and nothing was done.
        """
        if not attempt.withdraw(begun=False):
            if not (certain or attempt.has_ended() or (attempt.folder / WITHDRAWN).exists()):
                return None
            attempt.withdraw(begun=True)
        done = {name for name in attempt.names if self._publish(attempt, name)}
        for name in attempt.names:
            if name not in done:
                self._bring_home(attempt, name)
        self._remove(attempt)
        return done

    def recover(self, has_ended: Callable[[str], bool]) -> dict[str, str]:
        """Settle what an earlier parent left.

        Args:
            has_ended: whether a job of the backend certainly has ended.

        Returns:
            Names with an execution that may still run, each with what to do.
        """
        doubtful: dict[str, str] = {}
        end = time.monotonic() + _PATIENCE  # a process whose parent died stops by itself
        for folder in sorted(path for path in self.root.iterdir() if path.is_dir()):
            if folder.name.startswith(_GONE):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            attempt = self._found(folder)
            if attempt is None:
                continue
            while attempt.runs_here() and time.monotonic() < end:
                time.sleep(0.2)
            job = (read_owner(folder / "job.json") or {}).get("job", "")
            if self.settle(attempt, bool(job) and has_ended(job)) is None:
                doubtful |= dict.fromkeys(attempt.names, attempt.doubt())
        return doubtful

    def close(self) -> None:
        """Remove the folder where nothing is left in it."""
        for folder in self.root.glob(f"{_GONE}*"):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def _found(self, folder: Path) -> Attempt | None:
        """The attempt in a folder; None for one that was never granted, which is removed."""
        if not any((folder / state).exists() for state in (GRANTED, BEGUN, WITHDRAWN)):
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return Attempt(folder, tuple(json.loads((folder / "names.json").read_text())))

    def _publish(self, attempt: Attempt, name: str) -> bool:
        source, target = attempt.work / name, self.home / name
        if not target.exists():  # else a parent died after this very step: nothing else may be there
            if not source.is_dir():
                return False
            os.rename(source, target)
        shutil.rmtree(self.home / f"{name}{PARTIAL}", ignore_errors=True)
        return True

    def _bring_home(self, attempt: Attempt, name: str) -> None:
        """Replace the state at home; repeated after a crash, since the attempt is removed last."""
        source, target = attempt.work / f"{name}{PARTIAL}", self.home / f"{name}{PARTIAL}"
        if not source.is_dir():
            return
        new, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)
        _copy_state(source, new)
        if target.exists():
            os.rename(target, old)
        os.rename(new, target)
        _make_durable(self.home)
        shutil.rmtree(old, ignore_errors=True)

    def _remove(self, attempt: Attempt) -> None:
        """Under another name first, so that what still had the path open finds nothing there."""
        gone = attempt.folder.with_name(f"{_GONE}{attempt.folder.name}")
        os.rename(attempt.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


DONE, STOPPED, TWICE, LOST = "done", "stopped", "twice", "lost"


def execute(
    attempt: Attempt, function: Callable[..., Mapping[str, str]], arguments: Sequence[Any]
) -> tuple[str, dict[str, str]]:
    """What a backend runs: one attempt, once.

    Returns:
        How it ended, and why names were not finished. ``TWICE`` says nothing about the execution that used
        the permission first.
    """
    try:
        attempt.begin()
    except WithdrawnError:
        return TWICE, {}
    try:
        with _stoppable(attempt.folder / _STOP):
            return DONE, dict(function(attempt, *arguments))
    except StopRequestedError:
        return STOPPED, {}
    except Exception as error:  # whatever it is, it is the answer of this job
        return DONE, dict.fromkeys(attempt.names, " ".join(str(error).split()) or type(error).__name__)
    finally:
        attempt.end()


@contextlib.contextmanager
def _stoppable(stop_file: Path) -> Iterator[None]:
    """SIGTERM and SIGINT, Slurm's warning and the parent end it in good order, also outside training."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR2:  # training listens to SIGTERM
            os.kill(os.getpid(), signal.SIGTERM)
            return
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise StopRequestedError

    over = threading.Event()
    threading.Thread(target=_watch, args=(stop_file, over), daemon=True).start()
    try:
        for number in numbers:
            if before[number] is not signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _watch(stop_file: Path, over: threading.Event) -> None:
    """Turn the parent's wish into a signal."""
    while not over.wait(_WATCH):
        if stop_file.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            return


def remember_job(attempt: Attempt, job: str) -> None:
    """Write down the id that the backend knows the attempt by, for a parent that comes later."""
    with contextlib.suppress(FileNotFoundError):
        _write(attempt.folder / "job.json", {"job": job})


def await_visible(attempt: Attempt, names: Sequence[str]) -> bool:
    """Wait until folders that an execution finished are seen here; shared disks show them late."""
    end = time.monotonic() + _VISIBLE
    while not all((attempt.work / name).is_dir() for name in names):
        if time.monotonic() > end:
            return False
        os.listdir(attempt.work)
        time.sleep(0.5)
    return True


def refuse_withdrawn(lease: Path | None) -> None:
    """Fail where an execution has lost its permission.

    Raises:
        WithdrawnError: it has.
    """
    if lease is not None and not lease.exists():
        raise WithdrawnError("this execution was withdrawn; another one may have taken its place")


def _copy_state(source: Path, target: Path) -> None:
    """Copy an unfinished training, the record of its steps last: it is never behind what it goes with."""
    target.mkdir(mode=0o700)
    files = sorted(path for path in source.iterdir() if path.is_file() and path.name != "lock")
    for path in sorted(files, key=lambda path: path.name == "progress.json"):
        if not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)
            (target / path.name).chmod(0o600)
            _make_durable(target / path.name)
    _make_durable(target)


def _make_durable(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: Any) -> None:
    """Replace a small file at once."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(content))
    os.replace(draft, path)

"""How a command ends: one line on standard error and an exit code, whatever happens.

====  =============================================================================
0     done
1     a check failed, or some points of a sweep
2     refused: bad input, no room, no permission, no memory
3     trained and charged, but the run is not written; --resume writes it
70    an internal error; the traceback is in a private file
130   interrupted
141   the reader of the output is gone
====  =============================================================================
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

import click

from dptaft.cli.echo import echo
from dptaft.report.text import plain

CHECK_FAILED, REFUSED, OUTPUT_LOST, INTERNAL, INTERRUPTED, READER_GONE = 1, 2, 3, 70, 130, 141


class _LineError(click.ClickException):
    """One line on standard error, where somebody listens."""

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it."""
        with contextlib.suppress(OSError):
            super().show(file)


class UserError(_LineError):
    """One clear line on standard error, exit code 2."""

    exit_code = REFUSED


class LostError(_LineError):
    """The line of a run that was trained and charged, and is not written."""

    exit_code = OUTPUT_LOST


class InternalError(_LineError):
    """The line of an error that nobody foresaw."""

    exit_code = INTERNAL


def open_streams() -> None:
    """Make sure that the three standard streams exist and print any text.

    A closed one becomes the null device: else the next file that is opened would take its number, and receive
    what is printed. A character that the terminal's encoding does not have is shown as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def say(line: str) -> None:
    """One line on standard error; whoever does not listen must not stop the work."""
    with contextlib.suppress(OSError, ValueError):
        echo(line, err=True)


def reader_is_gone() -> bool:
    """Whether nobody reads standard output or standard error any more."""
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def leave_quietly() -> NoReturn:
    """End as a program does whose reader has gone: nothing is said, nothing is flushed."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(null, number)
    raise SystemExit(READER_GONE)


def explained(error: Exception) -> click.ClickException:
    """What to tell the user about an error, in one line."""
    from dptaft.runs import OutputLostError

    if isinstance(error, OutputLostError):
        return LostError(plain(error))
    if _out_of_memory(error):
        return UserError(
            "out of memory; use a smaller --physical-batch-size, a --feature-cache, or a smaller model or "
            "--scope (a run that had begun goes on with the same --output and --resume)"
        )
    if isinstance(error, ValueError | OSError):
        return UserError(plain(error) or type(error).__name__)
    where = _write_traceback(error)
    kept = "its traceback could not be written" if where is None else f"its traceback is in {where}"
    return InternalError(
        f"internal error ({type(error).__name__}), a fault of dptaft; {kept}; please report it (read the "
        "file first: it may name your data)"
    )


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from dptaft.training.clipping import is_out_of_memory

    return is_out_of_memory(error)


def _write_traceback(error: Exception) -> Path | None:
    """A private file (mode 0600) in the user's cache folder, or in the folder for temporary files."""
    text = "".join(traceback.format_exception(error))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    for parent in (Path(base) / "dptaft", Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError):
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix="traceback-", suffix=".txt", dir=parent)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return Path(name)
    return None

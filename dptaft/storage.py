"""Drafts: files and folders on their way to their name, told apart from what a killed process left behind.

A draft is locked (``flock``) for as long as its writer lives, so that the next writer of the same name can
remove the drafts whose writer is gone, and those only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_ENDING = r"[a-z0-9_]{8}"
"""What `tempfile` puts at the end of a name."""


@contextlib.contextmanager
def draft_file(parent: Path, prefix: str) -> Iterator[tuple[int, Path]]:
    """An open, locked file (mode 0600) of a new name; what is left of it at the end is removed.

    Drafts of the same prefix that killed processes left are removed first.

    Yields:
        The descriptor, which the caller may write to and must not close, and the path, which may be renamed.
    """
    remove_stale(parent, prefix)
    descriptor, path = _locked_file(parent, prefix)
    try:
        yield descriptor, path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


@contextlib.contextmanager
def draft_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """A locked folder (mode 0700) of a new name, as `draft_file`."""
    remove_stale(parent, prefix)
    descriptor, path = _locked_folder(parent, prefix)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove the drafts of a prefix whose writers are gone; one that cannot be removed stays."""
    pattern = re.compile(re.escape(prefix) + _ENDING)
    with contextlib.suppress(OSError):
        for name in os.listdir(parent):
            if pattern.fullmatch(name):
                _remove_unlocked(parent / name)


def _remove_unlocked(path: Path) -> None:
    with contextlib.suppress(OSError):
        mode = os.O_RDONLY if path.is_dir() else os.O_RDWR  # a network file system locks no file for reading
        descriptor = os.open(path, mode | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
        finally:
            os.close(descriptor)


def _locked_file(parent: Path, prefix: str) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(dir=parent, prefix=prefix)
        if _hold(descriptor, Path(name)):
            return descriptor, Path(name)


def _locked_folder(parent: Path, prefix: str) -> tuple[int, Path]:
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _hold(descriptor, path):
                return descriptor, path


def _hold(descriptor: int, path: Path) -> bool:
    """Lock a draft; False where another process took it for a stale one before it was locked."""
    with contextlib.suppress(OSError):  # where folders cannot be locked, none is ever found to be stale
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return True
    os.close(descriptor)
    return False

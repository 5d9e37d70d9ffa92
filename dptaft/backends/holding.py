"""Who works in a folder: one parent at a time, and whether a process of another time is certainly gone.

Locks of `flock` hold among the processes of one machine. On file systems that several machines share they may
not, so a file that is created exclusively (atomic there as well) names the holder, and only a holder that is
certainly gone is replaced.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from dptaft_accounting.ledger_owner import is_gone, this_process

LOCK, OWNER = "lock", "owner.json"
_LOCAL_DISKS = frozenset(
    {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "tmpfs", "ramfs"}
    | {"overlay", "apfs", "hfs", "ntfs", "ntfs3", "vfat", "exfat"}
)


class HeldError(ValueError):
    """Another process works in a folder, or may; the message names it and the remedy."""


def identity() -> dict[str, str]:
    """This process on this machine."""
    return {"host": socket.gethostname(), **this_process()}


def certainly_gone(owner: Mapping[str, str]) -> bool:
    """Whether the process has ended, as far as that can be seen from this machine.

    Another boot may be another machine, so it says nothing here.

    >>> certainly_gone(identity()), certainly_gone(identity() | {"boot": "another"})
    (False, False)
    """
    here = this_process()
    return bool(here["boot"]) and owner.get("boot") == here["boot"] and is_gone(owner) is True


def described(owner: Mapping[str, str]) -> str:
    """A process in words."""
    return f"process {owner.get('pid', 'of unknown number')} on {owner.get('host', 'an unknown machine')}"


def on_local_disk(path: Path, mounts: str | None = None) -> bool:
    """Whether a path certainly lies on a disk of this machine; False where that cannot be told."""
    try:
        device = path.stat().st_dev
        text = Path("/proc/self/mountinfo").read_text(errors="replace") if mounts is None else mounts
    except OSError:
        return False
    name = f"{os.major(device)}:{os.minor(device)}"
    rows = [line.split() for line in text.splitlines()]
    kinds = {row[row.index("-") + 1] for row in rows if len(row) > 2 and row[2] == name and "-" in row}
    return bool(kinds) and kinds <= _LOCAL_DISKS


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Work in a folder alone.

    Raises:
        HeldError: another process holds it, or one of another machine did and is not certainly gone.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(folder, _try_lock(descriptor))
        try:
            yield
        finally:
            (folder / OWNER).unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether the lock was had; False where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise HeldError("another process works on it; wait for it") from None
        return False
    return True


def _take(folder: Path, locked: bool) -> None:
    path = folder / OWNER
    before = read_owner(path)
    if before is not None:
        if not (locked and on_local_disk(folder)) and not certainly_gone(before):
            raise HeldError(
                f"{described(before)} works on {folder}, or did; wait for it, or remove {path} once it has "
                "certainly ended"
            )
        path.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(identity(), file)
    except FileExistsError:
        raise HeldError(f"another process works on {folder}; wait for it") from None


def read_owner(path: Path) -> dict[str, str] | None:
    """The owner that a file names; empty where it is damaged, None where there is no file."""
    try:
        return {str(key): str(value) for key, value in json.loads(path.read_text()).items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError):
        return {}

"""Which process holds a reservation, and whether it is certainly gone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> dict[str, str]:
    """Identity of the running process: boot, process-id namespace, number, start time; no host name."""
    return {
        "boot": _read(_PROC / "sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "pid": str(os.getpid()),
        "started": _started(os.getpid()),
    }


def is_gone(owner: Mapping[str, str]) -> bool | None:
    """Whether that process has ended: True or False where it is certain, None where it cannot be told.

    A ledger lies on a local file system, so its users run on this machine: another boot means that the
    machine was restarted since. Process numbers of another namespace (a container) say nothing.

    >>> is_gone(this_process()), is_gone({"boot": "", "namespace": "", "pid": "1", "started": ""})
    (False, None)
    """
    here = this_process()
    if not here["boot"] or not owner.get("boot"):
        return None
    if owner["boot"] != here["boot"]:
        return True
    if owner.get("namespace") != here["namespace"] or not str(owner.get("pid")).isdigit():
        return None
    return _started(int(owner["pid"])) != owner.get("started")


def _namespace() -> str:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start time of a process in ticks since boot; empty where there is none, or a zombie."""
    fields = _read(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in ("Z", "X") else ""


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

"""Functions that jobs of the backend tests run; importable in other processes."""

import os
import signal
import time
from pathlib import Path


def entries(folder):
    """All entries of the ledger in a folder."""
    from dptaft_accounting.ledger import Ledger

    ledger = Ledger(Path(folder) / "ledger.sqlite")
    if ledger.verify():
        raise ValueError(ledger.verify())
    return [entry for name in ledger.datasets() for entry in ledger.account(name).entries]


def make(attempt, text="made", fail=()):
    """Finish every name but those in `fail`."""
    for name in attempt.names:
        if name not in fail:
            (attempt.work / name).mkdir()
            (attempt.work / name / "text").write_text(text)
    return dict.fromkeys(fail, "cannot be made")


def die_then_make(attempt, marks, times):
    """Count executions by files in `marks`; die by SIGKILL in the first `times` of them, leaving some state."""
    mark = Path(marks) / f"{len(list(Path(marks).iterdir()))}-{os.getpid()}"
    partials = [attempt.work / f"{name}.partial" / "progress.json" for name in attempt.names]
    mark.write_text(" ".join(path.read_text() for path in partials if path.exists()))
    for path in partials:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.read_text() + "+" if path.exists() else "+")
    if len(list(Path(marks).iterdir())) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(attempt)


def wait_long(attempt, mark):
    """Say that it runs, then wait to be stopped."""
    Path(mark).write_text("")
    time.sleep(1200)
    Path(f"{mark}.end").write_text("")
    return make(attempt)


def explode(attempt):
    raise RuntimeError("no such luck")

"""Progress bars for work that takes longer than two seconds, on a terminal only."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, suppress
from types import TracebackType
from typing import Any

import click

from dptaft.report.text import plain

_PATIENCE_S = 2.0


class Bars(AbstractContextManager["Bars"]):
    """One bar per stage on standard error; call it with (stage, done, total)."""

    def __init__(self) -> None:
        self._visible = sys.stderr is not None and sys.stderr.isatty()
        self._stage: str | None = None
        self._bar: Any = None
        self._since = 0.0
        self._shown = 0

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of a stage are complete."""
        if self._visible:
            try:
                self._show(stage, done, total)
            except OSError:  # a terminal that is gone must not stop the work
                self._visible, self._bar = False, None

    def _show(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._since = stage, time.monotonic()
        if self._bar is None and time.monotonic() - self._since > _PATIENCE_S:
            self._bar, self._shown = click.progressbar(length=total, label=plain(stage), file=sys.stderr), 0
            self._bar.__enter__()
        if self._bar is not None:
            self._bar.update(done - self._shown)
            self._shown = done

    def _finish(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the last bar."""
        with suppress(OSError):
            self._finish()

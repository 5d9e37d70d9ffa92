"""A process that does not lead: it works, prints nothing, and leaves the exit code to the first one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import NoReturn

import click

from dptaft.cli.failure import InternalError, say


def follow(work: Callable[[], object]) -> NoReturn:
    """Do the work in silence and exit.

    The exit code is 0 also where the run failed and the first process says why: a launcher then reports that
    one. It is 1, with one line, where the first process cannot say anything any more.
    """
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            work()
    except click.exceptions.Exit as end:
        raise SystemExit(end.exit_code) from None
    except InternalError as error:
        say(error.format_message())
        raise SystemExit(error.exit_code) from None
    except (click.ClickException, click.Abort):
        raise SystemExit(0) from None
    except RuntimeError as error:
        raise SystemExit(_failed(error)) from None
    raise SystemExit(0)


def _failed(error: RuntimeError) -> int:
    from dptaft.distributed.ranks import RankLostError, RunEndedError

    if isinstance(error, RunEndedError):
        return 0
    if not isinstance(error, RankLostError):
        raise error
    say(str(error))
    sys.stderr.flush()
    return 1

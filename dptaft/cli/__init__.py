"""The `dptaft` command; every subcommand lives in a module of its own and is imported when it is used."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from dptaft.cli.failure import INTERRUPTED, explained, leave_quietly, open_streams, reader_is_gone, say
from dptaft.report.text import plain, printable

_COMMANDS = {
    "train": ("dptaft.cli.train", "train"),
    "predict": ("dptaft.cli.predict", "predict"),
    "sweep": ("dptaft.cli.sweep", "sweep"),
    "compose": ("dptaft.cli.compose", "compose"),
    "remove": ("dptaft.cli.remove", "remove"),
    "budget": ("dptaft.cli.budget", "budget"),
    "report": ("dptaft.cli.report", "report"),
    "verify": ("dptaft.cli.verify", "verify"),
    "compare": ("dptaft.cli.compare", "compare"),
    "audit": ("dptaft.cli.audit", "audit"),
    "ledger": ("dptaft.cli.ledger", "ledger"),
    "models": ("dptaft.cli.models", "models"),
    "plan": ("dptaft.cli.plan", "plan"),
    "clear-cache": ("dptaft.cli.clear_cache", "clear_cache"),
}


class Commands(click.Group):
    """A group whose commands are imported on demand; errors meant for users become one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order in which a user meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import the module of one command."""
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name]
        return getattr(importlib.import_module(module), attribute)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run as a program; of several processes that a launcher started, only the first one speaks."""
        from dptaft.distributed import launched

        open_streams()
        place = launched()
        if place is None or place.is_first:
            return super().main(*args, **options)
        from dptaft.cli.follow import follow

        return follow(lambda: super(Commands, self).main(*args, **{**options, "standalone_mode": False}))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Only training is divided between processes."""
        found = super().resolve_command(ctx, args)
        if found[0] != "train":
            from dptaft.distributed import require_one_process

            require_one_process(f"dptaft {found[0]}")
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; bad input, a full disk and an interrupt end without a traceback."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=UserWarning, module=r"dptaft\b")
            warnings.showwarning = _show_warning
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt:
                say(
                    "interrupted; no run was written, and what was spent stays charged; where a folder "
                    "ending in .partial is left, the same command with its --output and --resume goes on"
                )
                raise SystemExit(INTERRUPTED) from None
            except click.ClickException as error:
                error.message = printable(error.message)
                raise
            except (click.exceptions.Exit, click.Abort):
                raise
            except Exception as error:
                if _is_of_another_process(error):
                    raise
                if isinstance(error, BrokenPipeError) and reader_is_gone():
                    leave_quietly()
                raise explained(error) from error


def _is_of_another_process(error: Exception) -> bool:
    """Whether a process that follows another one was told to end (see `dptaft.cli.follow`)."""
    ranks = sys.modules.get("dptaft.distributed.ranks")
    return ranks is not None and isinstance(error, ranks.RankLostError | ranks.RunEndedError)


def _show_warning(message: Warning | str, *_: Any) -> None:
    say(f"Warning: {plain(message)}")


_EXIT_CODES = """\b
Exit codes: 0 done; 1 a check failed, or points of a sweep; 2 refused, nothing lost;
3 trained and charged but not written (--resume writes it at no cost);
70 internal error; 130 interrupted; 141 the reader of the output is gone."""


@click.group(cls=Commands, epilog=_EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dptaft")
def main() -> None:
    """Fine-tune vision transformers with differential privacy, and show what it cost.

    Start with `dptaft train --epsilon 3`: it trains on bundled digits in under a minute.
    """

"""The `dptaft` command; every subcommand lives in a module of its own and is imported when it is used."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import click

from dptaft.cli.echo import echo
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


class UserError(click.ClickException):
    """One clear line on standard error, exit code 2."""

    exit_code = 2


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
                echo(
                    "interrupted; no run was written (a folder ending in .partial keeps what was spent)",
                    err=True,
                )
                raise SystemExit(130) from None
            except click.ClickException as error:
                error.message = printable(error.message)
                raise
            except ValueError as error:
                raise UserError(_one_line(error)) from error
            except OSError as error:
                raise UserError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return plain(error)


def _show_warning(message: Warning | str, *_: Any) -> None:
    echo(f"Warning: {plain(message)}", err=True)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dptaft")
def main() -> None:
    """Fine-tune vision transformers with differential privacy, and show what it cost.

    Start with `dptaft train --epsilon 3`: it trains on bundled digits in under a minute.
    """

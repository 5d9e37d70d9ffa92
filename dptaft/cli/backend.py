"""The options that say where independent trainings run: for `dptaft sweep` and `dptaft train --shards`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dptaft.backends import BackendConfig

F = TypeVar("F", bound=Callable[..., Any])
_NAMES = ("backend", "jobs", "backend_option")


def backend_options(command: F) -> F:
    """Add `--backend`, `--jobs` and `--backend-option` to a command."""
    for option in (
        click.option(
            "--backend-option",
            multiple=True,
            metavar="KEY=VALUE",
            help="Option of the cluster, such as partition=gpu or address=auto.",
        ),
        click.option("--jobs", type=int, help="Trainings at the same time.  [default: 1; on a cluster 100]"),
        click.option(
            "--backend",
            type=click.Choice(["local", "submitit", "ray"]),
            help="Where they run: processes of this machine, Slurm, or Ray.  [default: local]",
        ),
    ):
        command = option(command)
    return command


def chosen_backend(options: Mapping[str, Any], table: Mapping[str, Any] | None = None) -> BackendConfig:
    """The backend that the options name, over the table of a recipe.

    Raises:
        BackendError: an option that does not fit.
    """
    from dptaft.backends import BackendConfig

    kind, jobs, texts = (options[name] for name in _NAMES)
    return BackendConfig.parse(kind, jobs, texts, table)

"""`dptaft clear-cache`: remove cached features, which are functions of private images."""

from __future__ import annotations

from pathlib import Path

import click

from dptaft.cli.echo import echo


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def clear_cache(folder: Path) -> None:
    """Delete the features cached in FOLDER (made by `dptaft train --feature-cache FOLDER`)."""
    from dptaft.feature_cache import remove_cache

    freed = remove_cache(folder)
    echo(f"freed {freed / 2**20:.1f} MiB")

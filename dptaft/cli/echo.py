"""The one way to print: text from run folders, statements, ledgers and data cannot steer a terminal."""

from __future__ import annotations

import click

from dptaft.report.text import printable


def echo(text: object = "", *, nl: bool = True, err: bool = False) -> None:
    """Print text; control and formatting characters become a replacement sign, line breaks and tabs stay."""
    click.echo(printable(text), nl=nl, err=err)

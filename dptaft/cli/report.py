"""`dptaft report`: one run, for a person."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dptaft.cli.echo import echo

if TYPE_CHECKING:
    from dptaft.runs import Run


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "kind",
    type=click.Choice(["md", "html", "json", "model-card", "registry"]),
    default="md",
    show_default=True,
    help="Markdown, a page, all numbers, a model card, or a draft entry for the deployments registry.",
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="File to write.  [default: screen]"
)
def report(run: Path, kind: str, output: Path | None) -> None:
    """Say what a run claims, what that means, what it rests on and what it leaves out."""
    from dptaft.runs import load_run

    text = _render(kind)(load_run(run))
    if output is None:
        echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")
        echo(f"wrote {output}")


def _render(kind: str) -> Callable[[Run], str]:
    if kind == "model-card":
        from dptaft.report.card import render_card

        return render_card
    if kind == "registry":
        from dptaft.report.registry import render_registry

        return render_registry
    from dptaft.report.facts import facts

    if kind == "html":
        from dptaft.report.page import render

        return lambda run: render(facts(run))
    from dptaft.report.document import render_json, render_markdown

    return lambda run: (render_json if kind == "json" else render_markdown)(facts(run))

"""`dptaft compare`: budgets and accuracy of several runs, and what they cost together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dptaft.cli.echo import echo

if TYPE_CHECKING:
    from dptaft.comparison import Comparison, Line, Total


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def compare(runs: tuple[Path, ...], as_json: bool) -> None:
    """Show runs side by side, and the budget that is spent if all of them are released."""
    from dptaft.comparison import compare as put_together
    from dptaft.runs import RunError, load_run

    folders = [path.resolve() for path in runs]
    for path, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise RunError(f"{path} is named twice; a run is released once")
    found = put_together([load_run(path) for path in runs])
    echo(json.dumps(found.to_dict(), indent=2) if as_json else table(found))


def table(found: Comparison) -> str:
    """Aligned columns, then one line for each total."""
    head = ("run", "epsilon", "delta", "adjacency", "bound", "accuracy")
    rows = [head, *(_cells(line) for line in found.lines)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, "", *(_sum(total) for total in found.totals)])


def _cells(line: Line) -> tuple[str, ...]:
    from dptaft.report.text import plain, up

    accuracy = "-" if line.accuracy is None else f"{line.accuracy:.2%}"
    if line.no_claim is not None:
        return plain(line.run), "NO CLAIM", "-", "-", "-", accuracy
    privacy = (up(line.epsilon, 6), up(line.delta, 3), line.adjacency or "-", plain(line.bound))
    return (plain(line.run), *privacy, accuracy)


def _sum(total: Total) -> str:
    from dptaft.report.text import plain, up

    which = f"all {total.runs} runs" if total.runs > 1 else "the run"
    same = total.dataset == _unknown()
    data = "the data are assumed to be the same" if same else f"data set {plain(total.dataset)}"
    if total.epsilon is None:
        return f"total for {which} ({data}): {plain(total.method)}"
    added = f"; plain addition: {up(total.plain_epsilon, 6)} at delta {up(total.plain_delta, 3)}"
    return (
        f"total for {which} ({data}): epsilon {up(total.epsilon, 6)} at delta {up(total.delta, 3)} "
        f"by {total.method}{added if total.runs > 1 else ''}"
    )


def _unknown() -> str:
    from dptaft.comparison import UNKNOWN

    return UNKNOWN

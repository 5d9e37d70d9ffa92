"""`dptaft sweep`: many runs from a recipe, with a table and a picture of accuracy over epsilon."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.backend import backend_options, chosen_backend
from dptaft.cli.echo import echo

if TYPE_CHECKING:
    from dptaft.backends import BackendConfig
    from dptaft.sweep.points import SweepPoint
    from dptaft.sweep.recipe import Recipe
    from dptaft.sweep.work import Outcome


@click.command()
@click.argument("recipe")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change an entry, such as seeds=[0]."
)
@backend_options
@click.option("--dry-run", is_flag=True, help="Check the recipe and show its points; train nothing.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the sweep; the same folder continues it.  [default: runs/sweep-<recipe>]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def sweep(
    recipe: str, overrides: Sequence[str], dry_run: bool, output: Path | None, as_json: bool, **where: Any
) -> None:
    """Train every point of RECIPE, a shipped name (such as digits) or a .toml file.

    Finished points are never trained again: after an interruption, give the same command.
    """
    from dptaft.sweep.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    backend = chosen_backend(where, loaded.backend)
    if dry_run:
        found = _dry(loaded)
        echo(json.dumps(found, indent=2) if as_json else _plan_table(found))
        return
    content = _run(loaded, output or Path("runs") / f"sweep-{loaded.name}", backend)
    echo(json.dumps(content, indent=2) if as_json else _table(content))
    if content["failed"]:
        raise SystemExit(1)


def _run(recipe: Recipe, folder: Path, backend: BackendConfig) -> dict[str, Any]:
    from dptaft.cli.progress import Bars
    from dptaft.sweep.runner import run_sweep
    from dptaft.sweep.select import run_selection
    from dptaft.sweep.write import write_results
    from dptaft.training.steps import TrainingInterruptedError

    def report(done: int, total: int, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.error is not None:
                echo(f"failed: {outcome.point}: {outcome.error}", err=True)
        echo(f"{done} of {total} points", err=True)

    try:
        with Bars() as bars:
            if recipe.budget.treatment == "select-best":
                _refuse_parallel(backend)
                run_selection(recipe, folder, progress=bars)
            else:
                result = run_sweep(recipe, folder, backend=backend, progress=bars, report=report)
                content = write_results(recipe, result)
                return {"folder": str(folder), **content}
    except TrainingInterruptedError:
        echo(f"stopped; the same command with --output {folder} goes on", err=True)
        raise SystemExit(130) from None
    return {"folder": str(folder), **json.loads((folder / "summary.json").read_text())}


def _refuse_parallel(backend: BackendConfig) -> None:
    if not backend.in_this_process:
        raise click.UsageError(
            "select-best trains in one process: jobs of other processes would tell the secret number of "
            "candidates; leave --backend and --jobs out"
        )


def _dry(recipe: Recipe) -> dict[str, Any]:
    """Points, groups and data of a recipe; data that are not there are named, and are no error."""
    from dptaft.data import DataError
    from dptaft.sweep.points import expand, group, load_source

    points = expand(recipe)
    found = {}
    for data in recipe.data:
        try:
            images = load_source(data, recipe.budget.treatment == "public-benchmark")
            found[data.name] = f"{len(images.train)} training images, {len(images.classes)} classes"
        except DataError as error:
            found[data.name] = f"NOT FOUND: {error}"
    tasks = group(points)
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "treatment": recipe.budget.treatment,
        "data": found,
        "points": [_facts(point) for point in points],
        "batches": [len(task.points) for task in tasks if task.shared],
        "one_by_one": sum(len(task.points) for task in tasks if not task.shared),
    }


def _facts(point: SweepPoint) -> dict[str, Any]:
    epsilon = "inf" if point.epsilon == float("inf") else point.epsilon
    return {
        "id": point.id,
        "data": point.data.name,
        "method": point.method,
        "epsilon": epsilon,
        "seed": point.seed,
    }


def _plan_table(found: dict[str, Any]) -> str:
    lines = [f"{found['title']} ({found['treatment']})"]
    lines += [f"  data {name}: {text}" for name, text in found["data"].items()]
    lines += [f"  {point['id']}" for point in found["points"]]
    batches = ", ".join(str(size) for size in found["batches"]) or "none"
    return "\n".join(
        [*lines, f"{len(found['points'])} points; batches of {batches}; {found['one_by_one']} one by one"]
    )


def _table(content: dict[str, Any]) -> str:
    from dptaft.sweep.page import cells
    from dptaft.sweep.results import Row

    rows = [Row(**{**row, "epsilon": float(row["epsilon"])}) for row in content["rows"]]
    head = ("method", "epsilon", "accuracy", "without privacy", "lost")
    several = len({row.data for row in rows}) > 1
    body = [(*((row.data,) if several else ()), *cells(row)) for row in rows]
    table = [(*(("data",) if several else ()), *head), *body]
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in table
    ]
    failed = [f"failed: {point}: {error}" for point, error in content["failed"].items()]
    return "\n".join([*lines, "", content["privacy"], *failed, f"folder: {content['folder']}"])

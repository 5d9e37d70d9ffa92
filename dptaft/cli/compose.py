"""`dptaft compose`: one run from several, by adding their tangent weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft.runs import Run


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new run.")
@click.option(
    "--how",
    type=click.Choice(["average", "add"]),
    default="average",
    show_default=True,
    help="Mean of the models, or their sum (centred models only).",
)
@click.option("--weights", help="Comma-separated factors, one per RUN, in place of --how.")
@click.option(
    "--disjoint",
    is_flag=True,
    help="Your word that the runs share no record; shards of one parent need none.",
)
@click.option("--evaluate", "data", help="Data to measure the accuracy on, as in train --data.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def compose(
    runs: tuple[Path, ...],
    output: Path,
    how: str,
    weights: str | None,
    disjoint: bool,
    data: str | None,
    as_json: bool,
) -> None:
    """Average or add RUNs of one base model; a folder of shards stands for all of them.

    The outputs of the new run are the same average of the RUNs' outputs, at the cost of one model. Its
    statement covers all of them: the largest epsilon where the runs are disjoint shards, their composition in
    sequence otherwise.
    """
    from dptaft.shards import compose as compose_runs
    from dptaft.shards.collection import expand

    if weights is not None and how == "add":
        raise click.UsageError("give either --weights or --how add")
    factors = None if weights is None else _numbers(weights)
    evaluate_on = None
    if data is not None:
        from dptaft.data import load_data

        evaluate_on = load_data(data)
    run = compose_runs(
        expand(runs),
        output,
        how=how if factors is None else "weighted",
        weights=factors,
        disjoint=disjoint,
        evaluate_on=evaluate_on,
    )
    echo(json.dumps(summary(run), indent=2) if as_json else table(run))


def _numbers(text: str) -> list[float]:
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise click.UsageError(f"--weights takes numbers with commas between them, not {text!r}") from None


def summary(run: Run) -> dict[str, Any]:
    """The public facts of a composed run."""
    made = run.config["composition"]
    facts = {
        "run": str(run.path),
        "evaluation_accuracy": run.accuracy,
        "how": made["how"],
        "parts": [part.get("shard", part["run"]) for part in made["parts"]],
        "removed": [item["reveals"] for item in made["removed"]],
    }
    if run.statement is None:
        return facts | {"no_privacy_claim": run.no_claim}
    return facts | {
        "epsilon": run.statement.claim["epsilon"],
        "delta": run.statement.claim["delta"],
        "adjacency": run.statement.claim["adjacency"],
        "unit": run.statement.claim["unit"],
        "disjointness": run.statement.composition["disjointness"],
    }


def table(run: Run) -> str:
    """The summary as aligned lines."""
    facts = summary(run)
    rows = [("parts", f"{len(facts['parts'])} ({facts['how']})")]
    if run.accuracy is not None:
        rows.append(("accuracy", f"{run.accuracy:.2%} on held-out evaluation images"))
    if run.statement is None:
        rows.append(("privacy", f"NO CLAIM: {run.no_claim}"))
    else:
        rows += [
            ("epsilon", f"{up(facts['epsilon'], 6)} at delta {up(facts['delta'], 3)}, all parts together"),
            ("disjointness", facts["disjointness"]),
            ("adjacency", f"{facts['adjacency']}, unit: {facts['unit']}"),
        ]
    rows += [("removed", text) for text in facts["removed"]]
    rows.append(("run", facts["run"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

"""`dptaft predict`: labels and scores of images, from a trained run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from dptaft.cli.echo import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array with the score of every class.")
def predict(run: Path, images: tuple[Path, ...], as_json: bool) -> None:
    """Label IMAGES with the model of RUN (a folder that `dptaft train` wrote)."""
    from dptaft.runs import load_run

    predictions = load_run(run).predict(list(images))
    pairs = list(zip(images, predictions, strict=True))
    if as_json:
        rows = [{"image": str(path), "label": p.label, "scores": dict(p.scores)} for path, p in pairs]
        echo(json.dumps(rows, indent=2))
        return
    for path, prediction in pairs:
        echo(f"{path}\t{prediction.label}\t{prediction.scores[prediction.label]:.4f}")

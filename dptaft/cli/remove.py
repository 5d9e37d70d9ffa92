"""`dptaft remove`: a composed run without one shard, or without one record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dptaft.cli.compose import summary, table
from dptaft.cli.echo import echo


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder of the new run.")
@click.option("--shard", help="Name of the shard to leave out.")
@click.option(
    "--record", help="Number of a training record, or its image file: leaves out the shard that holds it."
)
@click.option("--retrain", is_flag=True, help="Train that shard again without the record; this is charged.")
@click.option("--data", help="Data to retrain on.  [default: loaded again from where it came]")
@click.option("--classes", help="Comma-separated class names of --data.")
@click.option("--evaluate", help="Data to measure the accuracy on, as in train --data.")
@click.option(
    "--ledger",
    type=click.Path(path_type=Path),
    help="Budget ledger for --retrain.  [default: ledger.sqlite beside the folder of shards]",
)
@click.option("--no-ledger", is_flag=True, help="Charge no ledger; the statement says so.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def remove(
    run: Path,
    output: Path,
    shard: str | None,
    record: str | None,
    retrain: bool,
    data: str | None,
    classes: str | None,
    evaluate: str | None,
    ledger: Path | None,
    no_ledger: bool,
    as_json: bool,
) -> None:
    """Write the run that would have been composed without a shard of RUN, or without one record.

    The new weights do not depend on what was removed, not by one bit. Releases made before are not undone:
    the new statement says what they still reveal, and up to which epsilon.
    """
    if (shard is None) == (record is None):
        raise click.UsageError("give either --shard or --record")
    if shard is not None and (retrain or data is not None):
        raise click.UsageError(
            "--retrain and --data belong to --record; a removed shard is not trained again"
        )
    if ledger is not None and no_ledger:
        raise click.UsageError("--ledger and --no-ledger exclude each other; give one of them")
    from dptaft.shards import remove_record, remove_shard

    evaluate_on = None if evaluate is None else _load(evaluate, None)
    if shard is not None:
        made = remove_shard(run, shard, output, evaluate_on=evaluate_on)
    else:
        from dptaft.cli.progress import Bars
        from dptaft.training.steps import TrainingInterruptedError

        try:
            with Bars() as bars:
                made = remove_record(
                    run,
                    str(record),
                    output,
                    retrain=retrain,
                    data=None if data is None else _load(data, classes),
                    ledger=None if no_ledger else ledger or "auto",
                    evaluate_on=evaluate_on,
                    progress=bars,
                )
        except TrainingInterruptedError as stop:
            echo(str(stop), err=True)
            raise SystemExit(130) from None
    echo(json.dumps(summary(made), indent=2) if as_json else table(made))


def _load(spec: str, classes: str | None) -> Any:
    from dptaft.data import load_data

    names = None if classes is None else [name.strip() for name in classes.split(",")]
    return load_data(spec, classes=names)

"""`dptaft train --shards` and `--shards-of`: one run per disjoint shard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft.shards import Collection

_OF_THE_DATA = ("data", "classes", "public_data", "skip_corrupt", "resume", "ledger", "no_ledger", "as_json")
_OF_THE_WORK = ("backend", "jobs", "backend_option")


def train_parts(
    shards: Mapping[str, Any], optimizer: Mapping[str, Any], *, as_json: bool, **options: Any
) -> str:
    """Train shards as asked on the command line; returns what to print."""
    from dptaft.shards import add_shard, train_shards

    parent, number = shards["shards_of"], shards["public_shards"]
    if parent is not None:
        _refuse_others(shards)
        known = ("data", "classes", "public_data", "skip_corrupt", "resume", "ledger", "backend", "progress")
        return _show(add_shard(parent, **{name: options[name] for name in known}), as_json)
    if shards["shards"] is None:
        raise click.UsageError("--public-shards needs --shards with a number")
    if options["output"] is None:
        raise click.UsageError("--shards needs --output, the folder for all of them")
    asked = shards["shards"]
    made = train_shards(
        options.pop("data"),
        int(asked) if asked.isdecimal() else asked,
        public_seed=number,
        optimizer=optimizer,
        **options,
    )
    return _show(made, as_json)


def _refuse_others(shards: Mapping[str, Any]) -> None:
    """A shard that is added takes the options of the others; one given here would be ignored."""
    context = click.get_current_context()
    given = [
        name
        for name in context.params
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        and name not in (*_OF_THE_DATA, *_OF_THE_WORK, "shards_of")
    ]
    if given:
        raise click.UsageError(
            f"--{given[0].replace('_', '-')} cannot be given with --shards-of: the new shard takes it from "
            "the others"
        )


def _show(collection: Collection, as_json: bool) -> str:
    from dptaft.runs import load_run

    runs = [load_run(path) for path in collection.runs()]
    claims = [run.statement.claim for run in runs if run.statement is not None]
    facts: dict[str, Any] = {
        "shards": str(collection.path),
        "runs": [str(run.path) for run in runs],
        "assignment": collection.assignment,
        "records": [shard.records for shard in collection.shards],
        "evaluation_accuracies": [run.accuracy for run in runs],
    }
    if len(claims) == len(runs):
        facts |= {name: max(claim[name] for claim in claims) for name in ("epsilon", "delta")}
    else:
        facts["no_privacy_claim"] = next(run.no_claim for run in runs if run.statement is None)
    return json.dumps(facts, indent=2) if as_json else _table(facts, collection.path)


def _table(facts: Mapping[str, Any], parent: Path) -> str:
    sizes = facts["records"]
    rows = [("shards", f"{len(sizes)} of {min(sizes)} to {max(sizes)} records, {facts['assignment']}")]
    measured = [value for value in facts["evaluation_accuracies"] if value is not None]
    if measured:
        rows.append(("accuracy", f"{min(measured):.2%} to {max(measured):.2%} for one shard alone"))
    if "epsilon" in facts:
        rows.append(
            ("epsilon", f"at most {up(facts['epsilon'], 6)} at delta {up(facts['delta'], 3)} for each")
        )
    else:
        rows.append(("privacy", f"NO CLAIM: {facts['no_privacy_claim']}"))
    rows.append(("next", f"dptaft compose {parent} -o RUN"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

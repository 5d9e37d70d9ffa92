"""Composition of runs: one model whose outputs are the weighted sum of the outputs of its parts."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.algebra import weighted_sum
from dptaft.runs import (
    FORMAT,
    WEIGHTS,
    Run,
    check_output,
    hash_files,
    load_run,
    new_run,
    write_config,
    write_metrics,
    write_no_claim,
    write_statement,
)
from dptaft.said import record_digest
from dptaft.shards.claim import composed_statement, mechanism_of
from dptaft.shards.collection import is_collection
from dptaft.shards.parts import Part, gather
from dptaft.shards.records import write_trail

if TYPE_CHECKING:
    from dptaft.data import ImageData


def compose(
    runs: Sequence[str | os.PathLike[str] | Run],
    output: str | os.PathLike[str],
    *,
    how: str = "average",
    weights: Sequence[float] | None = None,
    disjoint: bool = False,
    evaluate_on: ImageData | None = None,
) -> Run:
    """Add the tangent weights of runs to one run, whose outputs are the same sum of their outputs.

    Args:
        runs: trained or composed runs; a composed one stands for its parts.
        output: folder of the new run.
        how: ``average``; ``weighted`` with `weights`; ``add`` (centred models only).
        weights: one per run.
        disjoint: the user's word that runs of different partitions share no record; shards of one partition
            need no such word.
        evaluate_on: data whose evaluation split measures the accuracy of the new run.

    Raises:
        ValueError: runs that do not belong together, an output that exists, or a part that is missing.

    Formal guarantees:
        Adding released weights is post-processing. The statement covers all parts together: parallel over
        disjoint shards, in sequence otherwise. If one part claims nothing, so does the sum.
    """
    target = Path(output)
    check_output(target)
    loaded = [run if isinstance(run, Run) else load_run(run) for run in runs]
    parts = gather(loaded, how, weights)
    return write_composition(parts, target, how=how, disjoint=disjoint, evaluate_on=evaluate_on)


def write_composition(
    parts: Sequence[Part],
    output: Path,
    *,
    how: str,
    disjoint: bool,
    removed: Sequence[Mapping[str, Any]] = (),
    evaluate_on: ImageData | None = None,
) -> Run:
    """Write the run that `parts` add up to.

    Args:
        parts: what to add, with factors.
        output: folder of the new run.
        how: name of the composition, for the record.
        disjoint: see `compose`.
        removed: shards that were taken out, with what earlier releases still reveal.
        evaluate_on: data whose evaluation split measures the accuracy.
    """
    ordered = sorted(parts, key=lambda part: len(part.run.classes), reverse=True)
    total = weighted_sum((part.factor, part.weights()) for part in ordered)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with new_run(output) as folder:
        (folder / WEIGHTS).write_bytes(total.content())
        config = _config(ordered[0].run, parts, output, now, how=how, disjoint=disjoint, removed=removed)
        write_config(folder, config)
        metrics = [] if evaluate_on is None else _evaluate(folder, config, evaluate_on)
        write_metrics(folder, metrics)
        admin = {"run": output.name, "time": now, "files": hash_files(folder)}
        silent = [part for part in parts if part.run.statement is None]
        if silent:
            reason = f"{silent[0].label} claims nothing: {silent[0].run.no_claim}"
            write_no_claim(folder, reason, admin)
        else:
            statement = composed_statement(
                parts, how=how, disjoint=disjoint, removed=removed, utility=_utility(metrics), admin=admin
            )
            write_statement(folder, statement)
    made = load_run(output)
    _note(parts, made)
    return made


def _note(parts: Sequence[Part], made: Run) -> None:
    """Write the composition into the private trail of every parent folder that a part lies in."""
    claim = {} if made.statement is None else {key: made.statement.claim[key] for key in ("epsilon", "delta")}
    for folder in {part.run.path.parent for part in parts if part.partition is not None}:
        if is_collection(folder):
            with contextlib.suppress(OSError):  # a parent that only others may write to
                ids = [part.run.id for part in parts]
                write_trail(folder, "compose", run=made.id, name=made.path.name, parts=ids, **claim)


def _config(
    base: Run,
    parts: Sequence[Part],
    output: Path,
    now: str,
    *,
    how: str,
    disjoint: bool,
    removed: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    names = {str(part.run.config["data"].get("name")) for part in parts}
    shared = {key: base.config[key] for key in ("model", "engine", "backbone", "preprocessing")}
    privacy = {
        key: value for key, value in base.config["privacy"].items() if key in ("adjacency", "public_size")
    }
    return {
        "run": {"format": FORMAT, "id": output.name, "time": now},
        "privacy": privacy,
        **shared,
        "data": {"name": ", ".join(sorted(names)), "classes": list(base.classes)},
        "composition": {
            "how": how,
            "disjoint": disjoint,
            "parts": [_entry(part, output) for part in parts],
            "removed": [dict(item) for item in removed],
        },
    }


def _entry(part: Part, output: Path) -> dict[str, Any]:
    """A part by content (its statement's id holds the hashes of its files), and where it was found."""
    statement, where = part.run.statement, os.path.relpath(part.run.path, output)
    entry = {"id": part.run.id, "run": part.run.path.name, "path": where, "factor": part.factor}
    if statement is not None:
        entry["weights_sha256"] = statement.admin["files"][WEIGHTS]
        entry["record_sha256"] = record_digest(mechanism_of(statement).to_dict())
        entry |= {name: statement.claim[name] for name in ("epsilon", "delta")}
    if part.shard is not None:
        entry |= {"partition": part.partition, "shard": part.shard}
    return entry


def _evaluate(folder: Path, config: Mapping[str, Any], data: ImageData) -> list[dict[str, Any]]:
    from dptaft.predictor import load_predictor
    from dptaft.training.finish import evaluate

    predictor = load_predictor(folder, config)
    if data.classes != predictor.classes:
        raise ValueError(
            f"{data.name} has the classes {', '.join(data.classes)}, the run {', '.join(predictor.classes)}; "
            "evaluate on data with the same classes"
        )
    held_out = None if data.evaluation is None else predictor.learner.features(data.evaluation)
    return evaluate(predictor.learner, data, held_out, predictor.weights)


def _utility(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not metrics:
        return {}
    first = metrics[0]
    return {
        "metric": "accuracy",
        "value": first["accuracy"],
        "split": first["split"],
        "records": first["images"],
        "private": False,
    }

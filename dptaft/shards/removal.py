"""Removal of a shard from a composed run, and of a record by removing or retraining the shard that holds it.

The new run is composed from the remaining parts, in the same order and arithmetic as if the removed one had
never been
trained: not one bit depends on it. Subtracting it from the old weights would be the same up to rounding, and
would leave that rounding behind. What was released before stays released: all of it is computed from the
shard's own runs, so the differential privacy of those runs bounds what it reveals.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.runs import OutputLostError, Run, check_output, load_run
from dptaft.shards.claim import mechanism_of
from dptaft.shards.collection import Collection, Shard, ShardError, is_collection, load_collection
from dptaft.shards.composition import write_composition
from dptaft.shards.parts import ComposeError, Part, is_composed, part_path, parts_of
from dptaft.shards.records import Records, load_records, locate, read_trail, write_trail

if TYPE_CHECKING:
    from dptaft.data import ImageData
    from dptaft.learner import Progress

Entry = Mapping[str, Any]


def remove_shard(
    run: str | os.PathLike[str] | Run,
    shard: str,
    output: str | os.PathLike[str],
    *,
    evaluate_on: ImageData | None = None,
) -> Run:
    """The run that would have been composed without one shard.

    Args:
        run: a composed run.
        shard: name of the shard, or of the part's run folder.
        output: folder of the new run.
        evaluate_on: data whose evaluation split measures the accuracy.

    Raises:
        ValueError: not a composed run, an unknown shard, the last one, or a remaining part that is missing.

    Formal guarantees:
        The new weights are those of composing the remaining parts. Earlier releases are not undone; the new
        statement names them and bounds what they reveal about the removed records.
    """
    whole = _composed(run)
    check_output(Path(output))
    gone = _entries_of(whole, shard)
    made = _without(whole, gone, {}, Path(output), evaluate_on)
    for folder in _parents(whole, gone):
        _strike(folder, {str(entry["shard"]) for entry in gone})
        write_trail(folder, "remove", shard=shard, run=made.id, before=whole.id)
    return made


def remove_record(
    run: str | os.PathLike[str] | Run,
    record: int | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    retrain: bool = False,
    data: ImageData | None = None,
    ledger: str | Path | None = "auto",
    evaluate_on: ImageData | None = None,
    progress: Progress | None = None,
) -> Run:
    """The run without one record: the shards that hold it are left out, or trained again without it.

    Every shard that holds an identical image counts as holding the record.

    Args:
        run: a composed run.
        record: number of the record in the data that was trained on, or an image file.
        output: folder of the new run.
        retrain: train the shards that held it again on their other records, which is charged.
        data: the data to retrain on, with or without the record; None loads it again from where it came.
        ledger: as for `train_shards`; used by `retrain` only.
        evaluate_on: data whose evaluation split measures the accuracy.
        progress: called with (stage, done, total).

    Raises:
        ValueError: as for `remove_shard`; a record in no shard of the run, or a shard that would be empty.
    """
    whole = _composed(run)
    check_output(Path(output))
    folder, records, digest = _find(whole, record)
    holders = set(records.holders(digest))
    gone = [
        entry for entry in _listed(whole) if entry.get("shard") in holders and _is_in(whole, entry, folder)
    ]
    if not gone:
        raise ShardError(
            f"no shard of {whole.path} holds record {record}; it is in {', '.join(sorted(holders))}"
        )
    new: dict[str, Part] = {}
    if retrain:
        new = _retrained(folder, records, digest, gone, data, ledger, progress)
    try:
        made = _without(whole, gone, new, Path(output), evaluate_on)
    except Exception as error:
        if not new:
            raise
        raise OutputLostError(
            f"the shards that held the record were trained again without it and are charged, but no run was "
            f"composed ({' '.join(str(error).split())}); this composes them at no cost: "
            f"dptaft compose {folder} -o RUN"
        ) from error
    names = sorted(str(entry["shard"]) for entry in gone)
    if not retrain:
        _strike(folder, set(names))
    write_trail(folder, "remove", shard=names, record=digest, retrained=retrain, run=made.id, before=whole.id)
    return made


def _composed(run: str | os.PathLike[str] | Run) -> Run:
    if not isinstance(run, Run) and is_collection(Path(run)):
        raise ShardError(
            f"{run} is a folder of shards, from which nothing is removed; compose it first (dptaft compose "
            f"{run} -o RUN) and remove from that run"
        )
    whole = run if isinstance(run, Run) else load_run(run)
    if not is_composed(whole):
        raise ShardError(
            f"{whole.path} was trained as a whole and has no shards; train it again without the record"
        )
    return whole


def _listed(run: Run) -> list[Entry]:
    return list(run.config["composition"]["parts"])


def _entries_of(run: Run, shard: str) -> list[Entry]:
    """All parts of one shard (it may have been trained more than once)."""
    entries = _listed(run)
    gone = [entry for entry in entries if entry.get("shard", entry["run"]) == shard]
    if not gone:
        known = ", ".join(str(entry.get("shard", entry["run"])) for entry in entries[:20])
        raise ShardError(f"{run.path} has no shard {shard!r}; it has {known}")
    if len({entry.get("partition") for entry in gone}) > 1:
        raise ShardError(
            f"{run.path} has shards {shard!r} of several parents; compose the others anew instead"
        )
    return gone


def _without(
    whole: Run, gone: Sequence[Entry], new: Mapping[str, Part], output: Path, evaluate_on: ImageData | None
) -> Run:
    """Compose all parts but those in `gone`; `new` parts, by id of the old ones, take their place."""
    struck = {entry["id"] for entry in gone}
    entries = [entry for entry in _listed(whole) if entry["id"] not in struck or entry["id"] in new]
    if not entries:
        raise ShardError(
            f"shard {gone[0].get('shard', gone[0]['run'])} is the last one; nothing would be left"
        )
    kept = {
        part.run.id: part for part in parts_of(whole, [entry for entry in entries if entry["id"] not in new])
    }
    made = whole.config["composition"]
    parts = [
        dataclasses.replace(new[e["id"]], factor=float(e["factor"])) if e["id"] in new else kept[e["id"]]
        for e in entries
    ]
    return write_composition(
        _refactored(parts, made["how"], [float(entry["factor"]) for entry in _listed(whole)]),
        output,
        how=made["how"],
        disjoint=bool(made["disjoint"]),
        removed=[*made["removed"], *(_removal(whole, entry) for entry in gone)],
        evaluate_on=evaluate_on,
    )


def _refactored(parts: Sequence[Part], how: str, before: Sequence[float]) -> list[Part]:
    """Factors of what is left: equal for an average, unchanged for a sum, else with the same total."""
    if how == "average":
        return [dataclasses.replace(part, factor=1.0 / len(parts)) for part in parts]
    if how == "add" or len(parts) == len(before):
        return list(parts)
    left = sum(part.factor for part in parts)
    if left == 0:
        raise ComposeError(
            "the remaining weights add up to zero; compose the remaining runs with other weights"
        )
    return [dataclasses.replace(part, factor=part.factor * (sum(before) / left)) for part in parts]


def _removal(whole: Run, entry: Entry) -> dict[str, Any]:
    """What was taken out, where it was before, and what bounds that."""
    of_shard = f" of shard {entry['shard']}" if "shard" in entry else ""
    item = {key: entry[key] for key in ("run", "partition", "shard") if key in entry}
    item |= {"statement": entry["id"], "releases": _releases(whole, entry)}
    try:
        statement = parts_of(whole, [entry])[0].run.statement
    except ComposeError:
        statement = None
    count = len(item["releases"])
    text = (
        f"run {entry['run']}{of_shard} is not part of these weights; what was released before and computed "
        f"from it (the run itself, {count} composition{'s' * (count != 1)}) still reveals its records"
    )
    if statement is None:
        return item | {"reveals": f"{text}, without a bound: it claims no privacy, or is not there any more"}
    epsilon, delta = statement.claim["epsilon"], statement.claim["delta"]
    bound = f"all of it together by at most epsilon {epsilon} at delta {delta} (statement {entry['id']})"
    return item | {
        "epsilon": epsilon,
        "delta": delta,
        "record": mechanism_of(statement).to_dict(),
        "reveals": f"{text}, {bound}",
    }


def _releases(whole: Run, entry: Entry) -> list[str]:
    """Ids of all compositions that are known to have contained a part."""
    folder = part_path(whole, entry).parent
    trail = read_trail(folder) if is_collection(folder) else []
    found = [
        str(line["run"]) for line in trail if line["action"] == "compose" and entry["id"] in line["parts"]
    ]
    return found if whole.id in found else [*found, whole.id]


def _parents(whole: Run, entries: Sequence[Entry]) -> list[Path]:
    """Parent folders that still hold the partition of these parts."""
    folders = dict.fromkeys(part_path(whole, entry).parent for entry in entries if "shard" in entry)
    return [folder for folder in folders if any(_is_in(whole, entry, folder) for entry in entries)]


def _is_in(whole: Run, entry: Entry, folder: Path) -> bool:
    here = part_path(whole, entry).parent == folder and is_collection(folder)
    return here and load_collection(folder).partition == entry.get("partition")


def _strike(folder: Path, names: set[str]) -> None:
    """Take shards out of a parent folder, so that no later composition of the folder contains them."""
    collection = load_collection(folder)
    left = tuple(shard for shard in collection.shards if shard.name not in names)
    dataclasses.replace(collection, shards=left).save()


def _find(whole: Run, record: int | str | os.PathLike[str]) -> tuple[Path, Records, str]:
    """The parent folder whose shards hold a record, its private list, and the record's digest."""
    folders = _parents(whole, _listed(whole))
    if not folders:
        raise ShardError(
            f"the folder of the shards of {whole.path} is not where it was composed; it says which shard "
            "holds a record"
        )
    text = os.fspath(record) if isinstance(record, os.PathLike) else str(record)
    for folder in folders:
        records = load_records(folder)
        digest = records.number(int(text)) if text.isdecimal() else _digest_of_file(records, Path(text))
        if digest is not None and records.holders(digest):
            return folder, records, digest
    raise ShardError(f"no shard of {whole.path} holds record {text}; give its number or the image file")


def _digest_of_file(records: Records, path: Path) -> str:
    from dptaft.data import read_image

    return records.digest(read_image(path))


def _retrained(
    folder: Path,
    records: Records,
    digest: str,
    gone: Sequence[Entry],
    data: ImageData | None,
    ledger: str | Path | None,
    progress: Progress | None,
) -> dict[str, Part]:
    """Train the shards of `gone` again without the record; returns id of the old part -> new part."""
    from dptaft.shards.requests import Source, stored_request
    from dptaft.shards.training import ShardTrainer

    collection, new = load_collection(folder), {}
    for entry in gone:
        shard = collection.shard(str(entry["shard"]))
        rest = [held for held in records.shards[shard.name] if held.digest != digest]
        if not rest:
            raise ShardError(f"shard {shard.name} holds nothing else; remove it without --retrain")
        source = Source.again(shard, data)
        numbers = locate(rest, records.digests(source.images.train))
        place = _begun_before(folder, shard, digest)
        if place is None:
            place = _next_folder(folder, shard)
            write_trail(folder, "retrain", shard=shard.name, place=place, without=digest)
        again = dataclasses.replace(shard, folder=place, records=len(rest))
        request = stored_request(collection, source.name)
        trainer = ShardTrainer(collection, source.images, request, records, ledger, progress)
        known = (folder / place).is_dir()  # trained and charged by a call that ended before it said so
        trained = load_run(folder / place) if known else trainer.train(again, numbers)
        new[str(entry["id"])] = Part(trained, 1.0)
        records.shards[shard.name] = rest
        collection = _replaced(collection, again)
        records.save(folder)
        collection.save()
    return new


def _begun_before(folder: Path, shard: Shard, digest: str) -> str | None:
    """The folder in which an interrupted call was training a shard again without the same record.

    The call ended before it listed that folder, so the charge of what it trained is not made again.
    """
    for line in reversed(read_trail(folder)):
        if line["action"] == "retrain" and line["shard"] == shard.name:
            same = line["without"] == digest and line["place"] != shard.folder
            return str(line["place"]) if same else None
    return None


def _replaced(collection: Collection, again: Shard) -> Collection:
    shards = tuple(again if shard.name == again.name else shard for shard in collection.shards)
    return dataclasses.replace(collection, shards=shards)


def _next_folder(folder: Path, shard: Shard) -> str:
    base = shard.folder.split("-again", 1)[0]
    number = next(n for n in range(1, 10**6) if not (folder / f"{base}-again{n}").exists())
    return f"{base}-again{number}"

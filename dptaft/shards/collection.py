"""The parent folder of shards: which runs belong to one partition, and how to train more of them.

shards.toml    public: id of the partition, rule of assignment, shards with their folders and sizes, request
records.json   private (mode 0600): which record is in which shard, by number and by keyed digest
trail.jsonl    private (mode 0600): what was trained, composed and removed, in order
NAME/          one finished run per shard
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

FORMAT = 1
INDEX = "shards.toml"


class ShardError(ValueError):
    """Shards cannot be made, found or used as asked; the message names the shard and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One shard of a partition.

    Attributes:
        name: its name.
        folder: name of its run's folder below the parent.
        records: public number of its records.
        assignment: the rule that put records into it, in words.
        source: arguments of `dptaft.load_data` for the data that it is a part of; only ``name`` where that
            was given as images.
    """

    name: str
    folder: str
    records: int
    assignment: str
    source: Mapping[str, Any]


@dataclass(frozen=True)
class Collection:
    """A partition of records into shards, each with a run of its own.

    Attributes:
        path: the parent folder.
        partition: public id.
        shards: all that are part of it now.
        request: what every shard was asked for (tables privacy, model, optimizer).
        classes: names.
    """

    path: Path
    partition: str
    shards: tuple[Shard, ...]
    request: Mapping[str, Any]
    classes: tuple[str, ...]

    @property
    def assignment(self) -> str:
        """The rules that put records into shards."""
        return ", ".join(dict.fromkeys(shard.assignment for shard in self.shards))

    def shard(self, name: str) -> Shard:
        """The shard of that name.

        Raises:
            ShardError: there is none.
        """
        found = next((shard for shard in self.shards if shard.name == name), None)
        if found is None:
            names = ", ".join(shard.name for shard in self.shards[:20])
            raise ShardError(f"{self.path} has no shard {name!r}; it has {names}")
        return found

    def runs(self) -> list[Path]:
        """Folders of all shards' runs, in order.

        Raises:
            ShardError: a shard that is not trained yet.
        """
        folders = [self.path / shard.folder for shard in self.shards]
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing:
            raise ShardError(f"{missing[0]} is not trained yet; continue the training with --resume")
        return folders

    def save(self) -> None:
        """Write ``shards.toml``, whole or not at all."""
        content = {
            "shards": {
                "format": FORMAT,
                "partition": self.partition,
                "classes": list(self.classes),
                "shard": [vars(shard) for shard in self.shards],
            },
            "request": dict(self.request),
        }
        draft = self.path / f".{INDEX}.new"
        draft.write_text(tomli_w.dumps(content), encoding="utf-8")
        os.replace(draft, self.path / INDEX)


def is_collection(path: Path) -> bool:
    """Whether a folder is a parent of shards."""
    return (path / INDEX).is_file()


def load_collection(path: str | os.PathLike[str]) -> Collection:
    """Read a parent folder.

    Raises:
        ShardError: none, a damaged one, or one of another version.
    """
    folder = Path(path)
    try:
        content = tomllib.loads((folder / INDEX).read_text(encoding="utf-8"))
        own = content["shards"]
        if own["format"] != FORMAT:
            raise ShardError(f"{folder / INDEX} has format {own['format']}; this version reads {FORMAT}")
        shards = tuple(Shard(**item) for item in own["shard"])
        return Collection(folder, own["partition"], shards, content["request"], tuple(own["classes"]))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ShardError(
            f"{folder} is no folder of shards that can be read ({error}); `dptaft train --shards` writes one"
        ) from None


def expand(paths: Sequence[Path]) -> list[Path]:
    """Runs as they are; a parent folder stands for the runs of its shards."""
    return [
        run for path in paths for run in (load_collection(path).runs() if is_collection(path) else [path])
    ]

"""Which shard a record is in: by its position and random numbers, or by a column of its own row.

Never by other records or by pixels: that is what parallel composition needs. The sizes of random shards
follow from the number of records alone, which is public under zero-out; sizes and names of named shards are
declared public.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptaft.shards.collection import ShardError

if TYPE_CHECKING:
    from dptaft.data import ImageData

RANDOM = "random"


@dataclass(frozen=True)
class Assignment:
    """Name of the shard of every record, and the rule in words."""

    names: tuple[str, ...]
    rule: str
    by_column: bool = False

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of all shards, in order of first use for random ones, sorted for named ones."""
        found = dict.fromkeys(self.names)
        return tuple(sorted(found)) if self.by_column else tuple(sorted(found, key=int))


def random_assignment(records: int, shards: int, public_seed: int | None = None) -> Assignment:
    """Split positions into shards of equal size (up to one) uniformly at random, blind to what they hold.

    Args:
        records: number of records n.
        shards: number of shards S.
        public_seed: makes the assignment reproducible and public; None draws it secretly.

    Raises:
        ShardError: fewer than one shard, or more shards than records.

    >>> sorted(random_assignment(5, 2, public_seed=1).names)
    ['1', '1', '1', '2', '2']
    """
    if shards < 1:
        raise ShardError(f"there must be at least one shard, got {shards}")
    if shards > records:
        raise ShardError(
            f"{shards} shards need at least as many records, there are {records}; use fewer shards"
        )
    positions = list(range(records))
    source = secrets.SystemRandom() if public_seed is None else random.Random(public_seed)
    source.shuffle(positions)
    names = [""] * records
    for place, position in enumerate(positions):
        names[position] = str(place % shards + 1)
    rule = f"{RANDOM} and secret" if public_seed is None else f"{RANDOM}, public number {public_seed}"
    return Assignment(tuple(names), rule)


def named_assignment(names: Sequence[str], rule: str) -> Assignment:
    """Shards as named by the records' own rows.

    Raises:
        ShardError: a record without a name, or names that cannot be folders.
    """
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ShardError(f"record {empty[0]} names no shard; name one for every record")
    assignment = Assignment(tuple(names), rule, by_column=True)
    folders: dict[str, str] = {}
    for name in assignment.shards:
        other = folders.setdefault(folder_name(name).casefold(), name)
        if other != name:
            raise ShardError(f"the shards {other!r} and {name!r} would share a folder; rename one")
    return assignment


def folder_name(name: str) -> str:
    """A file name that shows the name of a shard.

    >>> folder_name("site/A 1")
    'site-A-1'
    """
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[:80].lstrip(".")
    return safe or "shard"


def assign(data: ImageData, shards: int | str | Sequence[str], public_seed: int | None) -> Assignment:
    """Shards of a data set: a number of random ones, those of a column, or one name per record.

    Raises:
        ShardError: no such column, or another number of names than records.
    """
    if isinstance(shards, int):
        return random_assignment(len(data.train), shards, public_seed)
    if public_seed is not None:
        raise ShardError("a public number belongs to random shards; leave it out where the data names them")
    if isinstance(shards, str):
        columns = data.train.columns
        if shards not in columns:
            known = f"it has {', '.join(columns)}" if columns else "it has no columns"
            raise ShardError(f"{data.name} has no column {shards!r} to take shards from; {known}")
        return named_assignment(columns[shards], f"column {shards}")
    if len(shards) != len(data.train):
        raise ShardError(
            f"there are {len(shards)} names of shards for {len(data.train)} records; give one each"
        )
    return named_assignment([str(name) for name in shards], "given, one name per record")

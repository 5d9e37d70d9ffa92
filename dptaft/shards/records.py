"""The private list of which record is in which shard: kept in one file of mode 0600, never part of a run.

A record is known by its number in the data it was trained from, and by a keyed digest of its pixels
(HMAC-SHA256 under a random key of the same file). So a record is found again when the data was reordered or
shortened, and an image in two shards is noticed; without the key the digests tell nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.shards.collection import ShardError

if TYPE_CHECKING:
    from torch import Tensor

    from dptaft.data import Split

RECORDS, TRAIL = "records.json", "trail.jsonl"
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One training record: its number in the data, and the keyed digest of its pixels."""

    number: int
    digest: str


@dataclass
class Records:
    """Which records every shard holds.

    Attributes:
        key: of the digests.
        shards: name of the shard -> its records.
        contents: name of the shard -> digest of the whole data that it is a part of, for the budget ledger.
    """

    key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    shards: dict[str, list[Record]] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)

    def digests(self, split: Split) -> list[str]:
        """Keyed digest of every image of a split, in order."""
        return [self.digest(split.pixels[i]) for i in range(len(split))]

    def digest(self, image: Tensor) -> str:
        """HMAC-SHA256 of shape and pixels."""
        code = hmac.new(self.key, str(tuple(image.shape)).encode(), hashlib.sha256)
        code.update(image.contiguous().numpy().tobytes())
        return code.hexdigest()

    def holders(self, digest: str) -> tuple[str, ...]:
        """Names of the shards that hold an image with this digest."""
        return tuple(
            name
            for name, records in self.shards.items()
            if any(record.digest == digest for record in records)
        )

    def number(self, number: int) -> str | None:
        """Digest of the record of this number in the data; None where no shard holds it.

        Raises:
            ShardError: shards of different data hold records of this number.
        """
        found = {
            record.digest for records in self.shards.values() for record in records if record.number == number
        }
        if len(found) > 1:
            raise ShardError(f"several data sets have a record {number} in these shards; give the image file")
        return next(iter(found), None)

    def check_apart(self, name: str, digests: Sequence[str]) -> None:
        """Refuse a shard one of whose images is in another shard already.

        Raises:
            ShardError: with the number of the first such image and both shards.
        """
        known = {
            record.digest: other
            for other, records in self.shards.items()
            if other != name
            for record in records
        }
        twice = [(i, known[digest]) for i, digest in enumerate(digests) if digest in known]
        if twice:
            number, other = twice[0]
            raise ShardError(
                f"{len(twice)} of the images of shard {name} are also in other shards (image {number} is in "
                f"shard {other}): a record in two shards is protected by neither's claim alone; leave them "
                "out of one"
            )

    def save(self, folder: Path) -> None:
        """Write the private file durably."""
        from dptaft.training.checkpoint import write_atomically

        content = {
            "format": _FORMAT,
            "key": self.key.hex(),
            "contents": self.contents,
            "shards": {
                name: [[record.number, record.digest] for record in records]
                for name, records in self.shards.items()
            },
        }
        write_atomically(folder / RECORDS, json.dumps(content).encode())


def load_records(folder: Path) -> Records:
    """Read the private file of a parent folder.

    Raises:
        ShardError: it is missing, damaged, or of another version.
    """
    path = folder / RECORDS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ShardError(f"{path} has format {content['format']}; this version reads {_FORMAT}")
        shards = {
            name: [Record(int(number), str(digest)) for number, digest in records]
            for name, records in content["shards"].items()
        }
        return Records(bytes.fromhex(content["key"]), shards, dict(content["contents"]))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"cannot read {path} ({error}): it says which record is in which shard; restore it"
        ) from None


def locate(records: Sequence[Record], digests: Sequence[str]) -> list[int]:
    """Numbers, in the data as it is now, of the images that a shard was trained on.

    Args:
        records: of the shard.
        digests: keyed digests of all images of the data.

    Raises:
        ShardError: an image that is not there any more.
    """
    places: dict[str, list[int]] = {}
    for number, digest in enumerate(digests):
        places.setdefault(digest, []).append(number)
    need = Counter(record.digest for record in records)
    missing = sum(max(0, count - len(places.get(digest, []))) for digest, count in need.items())
    if missing:
        raise ShardError(
            f"{missing} of the {len(records)} images of the shard are not in the data any more; give the "
            "data that it was trained on"
        )
    found: set[int] = set()
    for record in records:
        here = places[record.digest]
        own = record.number if record.number in here else here[0]
        here.remove(own)
        found.add(own)
    return sorted(found)


def write_trail(folder: Path, action: str, **facts: Any) -> None:
    """Append one line to the private trail of a parent folder; removed records appear as keyed digests."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": time, "action": action, **facts}, sort_keys=True) + "\n"
    descriptor = os.open(folder / TRAIL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_trail(folder: Path) -> list[Mapping[str, Any]]:
    """All lines of the trail of a parent folder, oldest first.

    Raises:
        ShardError: a damaged line.
    """
    path = folder / TRAIL
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ShardError(f"cannot read {path}: {error}; restore it") from None

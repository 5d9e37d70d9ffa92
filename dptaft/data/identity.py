"""Which records are one: the same file under several names, and the same pixels in several records.

A claim is made per record. A file that is read twice is two records of one image, which is then protected at
the group level 2 only, so that a file has to be one record. Copies with the same pixels are told to the owner
of the data. What is found is private: it is shown, and never part of a run.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

DIGEST_BYTES = 16
_CHUNK = 4096


def same_files(paths: Sequence[Path]) -> Iterator[tuple[int, int]]:
    """Pairs of numbers (first, again) of paths that lead to one file: spellings, symbolic and hard links.

    Files that do not exist are left to whoever reads them.
    """
    seen: dict[tuple[int, int] | str, int] = {}
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            key: tuple[int, int] | str = os.path.abspath(path)
            linked = True
        else:
            key, linked = (status.st_dev, status.st_ino), status.st_nlink > 1
        first = seen.setdefault(key, number)
        if first != number and (linked or _spelling(paths[first]) == _spelling(path)):
            yield first, number


def _spelling(path: Path) -> str:
    """The resolved name, alike where a file system may take names for the same."""
    return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()


def pixel_digest(image: Tensor) -> bytes:
    """Sixteen bytes that name the pixels of one image; grey stored as three equal channels is grey.

    >>> import torch
    >>> pixel_digest(torch.zeros(1, 2, 2)) == pixel_digest(torch.zeros(3, 2, 2))
    True
    >>> pixel_digest(torch.zeros(1, 2, 2)) == pixel_digest(torch.zeros(1, 1, 4))
    False
    """
    values = image.numpy()
    if len(values) == 3 and _is_grey(values):
        values = values[:1]
    found = hashlib.sha256(f"{values.dtype} {values.shape}\n".encode())
    found.update(np.ascontiguousarray(values))
    return found.digest()[:DIGEST_BYTES]


def _is_grey(values: np.ndarray) -> bool:
    first = values[0]
    return all(np.array_equal(first[:1], c[:1]) and np.array_equal(first, c) for c in values[1:])


class Notes:
    """Digests of the images that were read, by number; 16 bytes each, in chunks made when they are needed.

    >>> import torch
    >>> notes = Notes()
    >>> notes.add(7, torch.zeros(1, 2, 2))
    >>> notes.of([6, 7]).any(axis=1).tolist()
    [False, True]
    """

    def __init__(self) -> None:
        self._chunks: dict[int, np.ndarray] = {}

    def add(self, index: int, image: Tensor) -> None:
        """Take in an image, once."""
        chunk = self._chunks.get(index // _CHUNK)
        if chunk is None:
            chunk = self._chunks[index // _CHUNK] = np.zeros((_CHUNK, DIGEST_BYTES), dtype=np.uint8)
        row = chunk[index % _CHUNK]
        if not row.any():
            row[:] = np.frombuffer(pixel_digest(image), dtype=np.uint8)

    def of(self, indices: Sequence[int]) -> np.ndarray:
        """(n, 16) digests; zeros where the image was not read."""
        found = np.zeros((len(indices), DIGEST_BYTES), dtype=np.uint8)
        numbers = np.asarray(indices, dtype=np.int64)
        for number in np.unique(numbers // _CHUNK):
            chunk = self._chunks.get(int(number))
            if chunk is not None:
                here = numbers // _CHUNK == number
                found[here] = chunk[numbers[here] % _CHUNK]
        return found


@dataclass(frozen=True)
class Copies:
    """Images with the same pixels.

    Attributes:
        count: how many images are there again.
        most: how often the most frequent one is there, among the images that are counted.
        first: numbers of the first pair.
    """

    count: int
    most: int
    first: tuple[int, int]


def copies_within(digests: np.ndarray) -> Copies | None:
    """Images that are there again; None where there are none. Zero digests are unknown and left out."""
    known = np.flatnonzero(digests.any(axis=1))
    if not len(known):
        return None
    _, earliest, group, counts = np.unique(
        _keys(digests[known]), return_index=True, return_inverse=True, return_counts=True
    )
    again = np.flatnonzero(earliest[group] != np.arange(len(known)))
    if not len(again):
        return None
    pair = int(known[earliest[group[again[0]]]]), int(known[again[0]])
    return Copies(len(again), int(counts.max()), pair)


def copies_between(digests: np.ndarray, others: np.ndarray) -> Copies | None:
    """Images among `others` with the pixels of one that `digests` names; the first pair is (own, other)."""
    own, known = (np.flatnonzero(rows.any(axis=1)) for rows in (digests, others))
    keys, earliest = np.unique(_keys(digests[own]), return_index=True)
    found = _keys(others[known])
    again = np.flatnonzero(np.isin(found, keys))
    if not len(again):
        return None
    pair = int(own[earliest[np.searchsorted(keys, found[again[0]])]]), int(known[again[0]])
    return Copies(len(again), int(np.unique(found[again], return_counts=True)[1].max()), pair)


def _keys(digests: np.ndarray) -> np.ndarray:
    """Digests (n, 16) as (n,) values that sort: pairs of unsigned integers."""
    pairs = np.ascontiguousarray(digests).view(np.uint64)
    return pairs.view([("high", np.uint64), ("low", np.uint64)]).reshape(-1)

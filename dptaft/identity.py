"""Which records a data set holds, told by their pixels alone: what the ledger knows private data by.

Names of files and classes, class numbers, order, kind of source, file format and hold-out are no part of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dptaft.data import ImageData, Split
from dptaft.learner import Progress

_LEVELS = 65535


@dataclass(frozen=True)
class Identity:
    """What private data is known by; as private as the data, only keyed digests of it are ever stored.

    Attributes:
        content: digest of labels and pixels of the training records (`content_of`).
        records: digests of the pixels of all records given (`record_mark`).
    """

    content: str
    records: tuple[bytes, ...]


def identify(data: ImageData, progress: Progress | None = None) -> Identity:
    """Read every record once.

    Images that were held out of the records by rule count among them: another hold-out of the same images is
    the same data. Evaluation images of their own are left out.
    """
    pairs = list(record_pairs(data.train, progress))
    marks = [mark for _, mark in pairs if mark is not None]
    return Identity(content_of(digest for digest, _ in pairs), (*marks, *held_out_marks(data)))


def record_marks(data: ImageData) -> tuple[bytes, ...]:
    """`Identity.records` alone."""
    own = (record_mark(data.train.pixels[i]) for i in range(len(data.train)))
    return (*(mark for mark in own if mark is not None), *held_out_marks(data))


def held_out_marks(data: ImageData, held_out: Split | None = None) -> tuple[bytes, ...]:
    """Marks of the evaluation images that were held out of the records by rule.

    Args:
        data: all images.
        held_out: those of the evaluation images to read; None reads all.
    """
    if data.evaluation is None or not data.held_out:
        return ()
    split = data.evaluation if held_out is None else held_out
    found = (record_mark(split.pixels[i]) for i in range(len(split)))
    return tuple(mark for mark in found if mark is not None)


def record_pairs(split: Split, progress: Progress | None = None) -> Iterator[tuple[bytes, bytes | None]]:
    """For every record in order: SHA-256 over label and pixels, and `record_mark`."""
    for label, pixels in _read(split, progress):
        yield digest_of_record(label, pixels), record_mark(pixels)


def content_digest(split: Split, progress: Progress | None = None) -> str:
    """SHA-256 over labels and pixels of all records, in whatever order and from whatever files.

    Identifies private data: only its keyed fingerprint is ever stored.
    """
    return content_of(record_digests(split, progress))


def record_digests(split: Split, progress: Progress | None = None) -> list[bytes]:
    """SHA-256 over label and pixels of every record, in order; as private as the records."""
    return [digest_of_record(label, pixels) for label, pixels in _read(split, progress)]


def _read(split: Split, progress: Progress | None) -> Iterator[tuple[int, Tensor]]:
    labels = split.labels.tolist()
    for i, label in enumerate(labels):
        yield label, split.pixels[i]
        if progress is not None:
            progress("identifying the data", i + 1, len(labels))


def digest_of_record(label: int, pixels: Tensor) -> bytes:
    """SHA-256 over label and pixels (channels, height, width) of one record."""
    pixels = pixels.contiguous()
    record = hashlib.sha256(f"{label} {pixels.dtype} {tuple(pixels.shape)}\n".encode())
    record.update(pixels.numpy().tobytes())
    return record.digest()


def record_mark(image: Tensor) -> bytes | None:
    """SHA-256 over the size and the pixels of an image (1 or 3, h, w) in [0, 1], rounded to 16 bits.

    So 8 and 16 bits, whole numbers and floats of the same picture are one, and so is grey stored as three
    equal channels. None for an image that cannot be read: the null record, which contributes nothing.

    >>> grey = torch.arange(4.0).view(1, 2, 2) / 255
    >>> record_mark(grey) == record_mark(grey.expand(3, 2, 2)), record_mark(grey) == record_mark(grey.flip(1))
    (True, False)
    """
    if not bool(torch.isfinite(image).all()):
        return None
    levels = (image.double() * _LEVELS).round().to(torch.int32)
    if len(levels) == 3 and torch.equal(levels[:1].expand_as(levels), levels):
        levels = levels[:1]
    found = hashlib.sha256(f"pixels {tuple(levels.shape)}\n".encode())
    found.update(levels.contiguous().numpy().astype("<u2").tobytes())
    return found.digest()


def content_of(records: Iterable[bytes]) -> str:
    """`content_digest` of records with these digests."""
    return hashlib.sha256(b"".join(sorted(records))).hexdigest()

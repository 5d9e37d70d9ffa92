"""Arrays of images: .npz archives and IDX files."""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dptaft.data.images import ImageData, Split, whole_labels
from dptaft.data.names import by_name
from dptaft.data.pixels import ArrayPixels, DataError
from dptaft.data.wanted import Wanted

_IDX_SPLITS = {"train": ("train",), "evaluation": ("t10k", "test")}
_IDX_KINDS = {"images": "idx3", "labels": "idx1"}


def npz_archive(path: Path, wanted: Wanted) -> ImageData:
    """Arrays ``images``, ``labels`` (or ``train_images``, ``train_labels``), optionally those of ``test``.

    Declared classes are matched by name to an array ``classes``; without one they name the labels in order.

    Raises:
        DataError: no archive, missing arrays, arrays that are no images or labels, or classes of other names.
    """
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is no .npz archive; write it with numpy.savez")
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    prefix = "train_" if "train_images" in arrays and "images" not in arrays else ""
    train = _npz_split(arrays, prefix, path)
    tested = "test_images" in arrays and "test_labels" in arrays
    evaluation = _npz_split(arrays, "test_", path) if tested else None
    if "classes" not in arrays:
        return wanted.data(path.stem, wanted.classes or _numbered(train.labels), train, evaluation)
    found = [_text(name) for name in np.atleast_1d(arrays["classes"])]
    if wanted.classes is not None:
        train = replace(train, labels=by_name(train.labels, found, wanted.classes, str(path)))
        if evaluation is not None:
            labels = by_name(evaluation.labels, found, wanted.classes, f"{path} (test)")
            evaluation = replace(evaluation, labels=labels)
    return wanted.data(path.stem, found, train, evaluation)


def _text(name: object) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _npz_split(arrays: dict[str, np.ndarray], prefix: str, path: Path) -> Split:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            raise DataError(f"{path} has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    pixels = ArrayPixels(arrays[f"{prefix}images"])
    labels = arrays[f"{prefix}labels"]
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(
            f"labels in {path} are {labels.dtype} of shape {labels.shape}; expected whole numbers"
        )
    return Split(pixels, whole_labels(labels.astype(np.int64), str(path)))


def _numbered(labels: Tensor) -> tuple[str, ...]:
    """Class names 0, 1, ... up to the largest label."""
    largest = int(labels.max()) if len(labels) else -1
    if largest > len(labels):
        raise DataError(
            f"the labels of {len(labels)} images go up to {largest}; number the classes 0, 1, 2, ... "
            "or declare them"
        )
    return tuple(str(label) for label in range(largest + 1))


def is_idx_folder(path: Path) -> bool:
    """Whether a folder holds IDX training images, named as those of MNIST."""
    return _idx_file(path, "train", "images") is not None


def idx_folder(path: Path, wanted: Wanted) -> ImageData:
    """IDX files ``*train-images-idx3-ubyte[.gz]`` with labels, and those of ``t10k`` or ``test`` if any.

    Raises:
        DataError: a split without images or labels, or a damaged file.
    """
    train = _idx_split(path, "train")
    evaluation = _idx_split(path, "evaluation") if _idx_file(path, "evaluation", "images") else None
    return wanted.data(path.name, wanted.classes or _numbered(train.labels), train, evaluation)


def _idx_file(folder: Path, split: str, what: str) -> Path | None:
    found = sorted(
        path
        for stem in _IDX_SPLITS[split]
        for ending in ("", ".gz")
        for path in folder.glob(f"*{stem}-{what}[-.]{_IDX_KINDS[what]}-ubyte{ending}")
    )
    if len({path.name.removesuffix(".gz") for path in found}) > 1:
        raise DataError(
            f"{folder} holds several IDX data sets ({found[0].name}, {found[-1].name}); part them"
        )
    return found[0] if found else None


def _idx_split(folder: Path, split: str) -> Split:
    images, labels = _idx_file(folder, split, "images"), _idx_file(folder, split, "labels")
    if images is None or labels is None:
        raise DataError(f"{folder} lacks IDX files of the {split} split; it needs images and labels")
    return Split(ArrayPixels(read_idx(images)), torch.from_numpy(read_idx(labels).astype(np.int64)))


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped or not (LeCun, Cortes, Burges: the MNIST file format).

    Raises:
        DataError: another format, or a truncated file.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zero, kind, axes = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{axes}I", raw, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise DataError(f"cannot read the IDX file {path}: {error}") from None
    if zero != 0 or kind != 8 or len(raw) != 4 + 4 * axes + math.prod(shape):
        raise DataError(f"{path} is no complete IDX file of unsigned bytes; fetch it again")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)

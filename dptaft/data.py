"""Labelled images: the bundled digits, image folders, npz archives and IDX files.

Pixels are read one image at a time, so that a data set larger than memory can stream. Nothing is estimated
from the images: normalisation is the backbone's own, the evaluation split is a fixed public rule.
"""

from __future__ import annotations

import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
HOLD_OUT_EVERY = 5
_IDX_NAMES = {"train": "train", "evaluation": "t10k"}


class DataError(ValueError):
    """Images or labels cannot be used; the message names the file or value and the remedy."""


class Pixels(Protocol):
    """Images by number, each float32 (channels, height, width) in [0, 1] with 1 or 3 channels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...


class ArrayPixels:
    """Images of one size in one array: (n, h, w), (n, h, w, channels) in uint8, or floats in [0, 1].

    Raises:
        DataError: another shape, number of channels or range.

    >>> ArrayPixels(np.full((2, 4, 4), 255, dtype=np.uint8))[0].shape
    torch.Size([1, 4, 4])
    """

    def __init__(self, array: np.ndarray) -> None:
        if array.ndim == 3:
            array = array[..., None]
        if array.ndim != 4 or array.shape[3] not in (1, 3):
            raise DataError(
                f"images have shape {array.shape}; expected (n, height, width) or (n, height, width, 1 or 3)"
            )
        if 0 in array.shape[1:]:
            raise DataError(f"images have shape {array.shape}: they hold no pixel; remove them")
        if array.dtype != np.uint8:
            _check_unit_range(array)
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> Tensor:
        pixels = torch.from_numpy(np.array(self._array[index])).permute(2, 0, 1)
        return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()


def _check_unit_range(array: np.ndarray) -> None:
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"images have type {array.dtype}; use uint8, or floats in [0, 1]")
    if array.size and not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise DataError(
            "images hold values outside [0, 1] or not finite; scale them by a public constant, or use uint8"
        )


class FilePixels:
    """Image files, decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return read_image(self.paths[index])


def read_image(path: Path) -> Tensor:
    """Decode one file to float32 (1 or 3, height, width) in [0, 1]: 8 bits are divided by 255, 16 by 65535.

    Raises:
        DataError: the file cannot be read as an image, or holds floats, which have no public range.
    """
    try:
        with Image.open(path) as image:
            gray = image.mode in ("1", "L", "LA")
            wide = image.mode.startswith("I")
            if image.mode == "F":
                raise ValueError("it holds floats; store 8 or 16 bits per channel")
            pixels = np.asarray(image if wide else image.convert("L" if gray else "RGB"), dtype=np.float32)
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        raise DataError(f"cannot read the image {path}: {error}") from None
    scaled = pixels / (65535.0 if wide else 255.0)
    return torch.from_numpy(scaled if scaled.ndim == 3 else scaled[..., None]).permute(2, 0, 1).clamp(0, 1)


class Subset:
    """Some of the images, by number."""

    def __init__(self, pixels: Pixels, indices: Sequence[int]) -> None:
        self._pixels, self._indices = pixels, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._pixels[self._indices[index]]


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        pixels: the images.
        labels: (n,) int64 class numbers.
    """

    pixels: Pixels
    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            raise DataError(f"labels have shape {tuple(self.labels.shape)}; expected one number per image")
        if len(self.pixels) != len(self.labels):
            raise DataError(f"there are {len(self.pixels)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Sequence[int]) -> Split:
        """The images of these numbers."""
        return Split(Subset(self.pixels, indices), self.labels[torch.as_tensor(indices, dtype=torch.int64)])

    def batches(self, size: int, prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Prepared images, stacked in order to batches of at most `size`."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield torch.stack([prepare(self.pixels[i]) for i in range(start, stop)])


@dataclass(frozen=True)
class ImageData:
    """A training split to protect, and an evaluation split.

    Attributes:
        name: for records.
        classes: names, in the order of the class numbers.
        train: records that the privacy claim covers.
        evaluation: records that are never trained on; None where there are none.
        classes_are_public: whether the class list comes from outside the private records.
        is_public: public benchmark images (the claim is computed all the same).
        unstable_under: adjacencies under which one record would move others between the two splits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    evaluation: Split | None
    classes_are_public: bool
    is_public: bool = False
    unstable_under: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise DataError(f"{self.name} holds no training image")
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class; classification needs at least two")
        if "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise DataError(f"the class names {', '.join(self.classes)} must differ and not be empty")
        for split in (self.train, self.evaluation):
            if split is not None and len(split) and int(split.labels.min()) < 0:
                raise DataError(f"{self.name} has the label {int(split.labels.min())}; labels start at 0")
            if split is not None and len(split) and int(split.labels.max()) >= len(self.classes):
                raise DataError(
                    f"{self.name} has the label {int(split.labels.max())} but {len(self.classes)} classes; "
                    "declare all classes"
                )

    def check_adjacency(self, adjacency: str) -> None:
        """Refuse an adjacency under which one record decides on which side of the hold-out others are.

        Raises:
            DataError: the claim would hold for a fixed training split only, not for the data set.
        """
        if adjacency in self.unstable_under:
            raise DataError(
                f"under {adjacency} one record of {self.name} would move others between training and "
                "evaluation (every fifth is held out); give evaluation images of their own, or use zero-out"
            )


def load_data(spec: str, *, classes: Sequence[str] | None = None, hold_out: bool = True) -> ImageData:
    """Load a data set by name or path.

    ``digits``: scikit-learn's 1,797 handwritten digits. A folder: one sub-folder of images per class, or such
    folders below ``train`` and ``test`` (or ``val``), or four IDX files named as those of MNIST. A file
    ``.npz``: arrays ``images`` and ``labels``, and optionally ``test_images``, ``test_labels``, ``classes``.

    Where a data set has no evaluation split, every fifth image in the order of the source (numbers 0, 5, ...;
    of each class for folders) is held out: a public rule that does not look at the images. Where adding or
    replacing one record shifts the numbers of others, the data says so (`ImageData.unstable_under`).

    Args:
        spec: name or path.
        classes: declared class names; left out, they are taken from the source, which the privacy claim does
            not cover for private data.
        hold_out: whether to hold out an evaluation split where the source has none.

    Raises:
        DataError: unknown name, unreadable or unlabelled data, fewer than two classes.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.evaluation), len(data.classes)
    (1437, 360, 10)
    """
    if spec == "digits":
        if classes is not None:
            raise DataError(f"digits has public classes of its own, not {', '.join(classes)}; leave them out")
        return _digits()
    path = Path(spec).expanduser()
    if path.is_dir():
        loader = _idx_folder if _idx_file(path, "train", "images") else _image_folder
    elif path.suffix == ".npz" and path.is_file():
        loader = _npz
    else:
        raise DataError(
            f"no data set or path {spec!r}; use digits, a folder with one folder per class, or a .npz"
        )
    data = loader(path, None if classes is None else tuple(classes))
    return data if data.evaluation is not None or not hold_out else _held_out(data)


def _held_out(data: ImageData) -> ImageData:
    by_class = isinstance(data.train.pixels, FilePixels)
    held = _every_fifth(data.train.labels if by_class else None, len(data.train))
    kept = sorted(set(range(len(data.train))) - set(held))
    return ImageData(
        data.name,
        data.classes,
        data.train.take(kept),
        data.train.take(held),
        data.classes_are_public,
        data.is_public,
        () if data.is_public else ("add-remove", "replace-one") if by_class else ("add-remove",),
    )


def _every_fifth(labels: Tensor | None, count: int) -> list[int]:
    """Numbers 0, 5, 10, ... of the source, or of each class where files are sorted by class."""
    if labels is None:
        return list(range(0, count, HOLD_OUT_EVERY))
    seen: dict[int, int] = {}
    held = []
    for index, label in enumerate(labels.tolist()):
        if seen.setdefault(label, 0) % HOLD_OUT_EVERY == 0:
            held.append(index)
        seen[label] += 1
    return held


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    source = load_digits()
    labels = torch.from_numpy(np.asarray(source.target)).long()
    pixels = ArrayPixels((source.images / 16.0).astype(np.float32))
    whole = ImageData("digits", tuple("0123456789"), Split(pixels, labels), None, True, True)
    return _held_out(whole)


def _image_folder(path: Path, classes: tuple[str, ...] | None) -> ImageData:
    train = path / "train"
    evaluation = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    nested = train.is_dir() and evaluation is not None
    root = train if nested else path
    names = classes or tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    )
    if not names:
        raise DataError(f"{root} holds no folders; put the images of each class into a folder of its own")
    return ImageData(
        path.name,
        names,
        _class_folders(root, names),
        _class_folders(evaluation, names) if nested and evaluation is not None else None,
        classes is not None,
    )


def _class_folders(root: Path, classes: tuple[str, ...]) -> Split:
    strange = sorted(
        p.name for p in root.iterdir() if p.is_dir() and p.name not in classes and p.name[0] != "."
    )
    if strange:
        raise DataError(f"the folder {root / strange[0]} is none of the classes; declare it or move it away")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        files = sorted(p for p in folder.glob("**/*") if _is_image(p))
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return Split(FilePixels(paths), torch.tensor(labels, dtype=torch.int64))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _npz(path: Path, classes: tuple[str, ...] | None) -> ImageData:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is no .npz archive; write it with numpy.savez")
            arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for name in ("images", "labels"):
        if name not in arrays:
            raise DataError(f"{path} has no array {name!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    train = Split(ArrayPixels(arrays["images"]), _labels(arrays["labels"], path))
    evaluation = None
    if "test_images" in arrays and "test_labels" in arrays:
        evaluation = Split(ArrayPixels(arrays["test_images"]), _labels(arrays["test_labels"], path))
    names = classes
    if names is None and "classes" in arrays:
        names = tuple(str(name) for name in np.atleast_1d(arrays["classes"]))
    if names is None:
        names = _numbered(train.labels)
    return ImageData(path.stem, names, train, evaluation, classes is not None)


def _numbered(labels: Tensor) -> tuple[str, ...]:
    """Class names 0, 1, ... up to the largest label."""
    largest = int(labels.max()) if len(labels) else -1
    if largest > len(labels):
        raise DataError(
            f"the labels of {len(labels)} images go up to {largest}; number the classes 0, 1, 2, ... "
            "or declare them"
        )
    return tuple(str(label) for label in range(largest + 1))


def _labels(array: np.ndarray, path: Path) -> Tensor:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(
            f"labels in {path} are {array.dtype} of shape {array.shape}; expected whole numbers (n,)"
        )
    return torch.from_numpy(array.astype(np.int64))


def _idx_file(folder: Path, split: str, what: str) -> Path | None:
    kind = {"images": "idx3", "labels": "idx1"}[what]
    stem = f"{_IDX_NAMES[split]}-{what}-{kind}-ubyte"
    return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)


def _idx_folder(path: Path, classes: tuple[str, ...] | None) -> ImageData:
    train = _idx_split(path, "train")
    evaluation = _idx_split(path, "evaluation") if _idx_file(path, "evaluation", "images") else None
    names = classes or _numbered(train.labels)
    return ImageData(path.name, names, train, evaluation, classes is not None)


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

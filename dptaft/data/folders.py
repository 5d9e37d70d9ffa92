"""Image files: one folder per class, or a table of files and labels."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dptaft.data.images import ImageData, Split
from dptaft.data.pixels import IMAGE_SUFFIXES, CheckedPixels, DataError, FilePixels

_TRAIN = ("train", "training")
_EVALUATION = ("test", "val", "validation", "evaluation")


@dataclass(frozen=True)
class Wanted:
    """What a loader is asked for.

    Attributes:
        classes: declared class names; None takes them from the source.
        public: the images are a public benchmark.
        skip_corrupt: an image that cannot be read counts as an empty record.
    """

    classes: tuple[str, ...] | None = None
    public: bool = False
    skip_corrupt: bool = False

    def data(self, name: str, found: Sequence[str], train: Split, evaluation: Split | None) -> ImageData:
        """The data set, with the declared classes or those `found` in the source."""
        return ImageData(
            name,
            self.classes or tuple(found),
            train,
            evaluation,
            self.classes is not None or self.public,
            self.public,
            skips_corrupt=self.skip_corrupt,
        )

    def files(self, paths: Sequence[Path], labels: Sequence[int]) -> Split:
        """Image files with their labels."""
        pixels = CheckedPixels(FilePixels(paths), skip=self.skip_corrupt)
        return Split(pixels, torch.tensor(labels, dtype=torch.int64))


def image_folder(path: Path, wanted: Wanted) -> ImageData:
    """One sub-folder of images per class, or such folders below ``train`` and ``test`` (or ``val``).

    Raises:
        DataError: no folders, no images, or a folder that is none of the declared classes.
    """
    train = path / "train"
    evaluation = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    nested = train.is_dir() and evaluation is not None
    root = train if nested else path
    names = wanted.classes or tuple(
        sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    )
    if not names:
        raise DataError(
            f"{root} holds no folders; put the images of each class into a folder of its own, or give a CSV "
            "table of files and labels"
        )
    held = _class_folders(evaluation, names, wanted) if nested and evaluation is not None else None
    return wanted.data(path.name, names, _class_folders(root, names, wanted), held)


def _class_folders(root: Path, classes: tuple[str, ...], wanted: Wanted) -> Split:
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
    return wanted.files(paths, labels)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


@dataclass(frozen=True)
class _Row:
    number: int
    file: Path
    label: str
    evaluation: bool
    others: Mapping[str, str]


def label_table(path: Path, wanted: Wanted) -> ImageData:
    """A CSV table with the columns ``file`` and ``label``, and optionally ``split`` (train or test).

    Files are named relative to the folder of the table; one row is one record. Other columns are kept.

    Raises:
        DataError: a missing column, a row without a value, a file named twice, an undeclared label.
    """
    rows = _rows(path)
    names = wanted.classes or tuple(sorted({row.label for row in rows}))
    number = {name: index for index, name in enumerate(names)}
    for row in rows:
        if row.label not in number:
            raise DataError(
                f"row {row.number} of {path} has the label {row.label!r}, which is none of the classes "
                f"{', '.join(names)}; declare it or correct the row"
            )

    def split(part: list[_Row]) -> Split:
        columns = {name: tuple(row.others[name] for row in part) for name in (rows[0].others if rows else ())}
        found = wanted.files([row.file for row in part], [number[row.label] for row in part])
        return replace(found, columns=columns)

    held = [row for row in rows if row.evaluation]
    train = split([row for row in rows if not row.evaluation])
    return wanted.data(path.stem, names, train, split(held) if held else None)


def _rows(path: Path) -> list[_Row]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("file", "label") if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(
                    f"{path} has no column {missing[0]!r}; its first row must name file and label"
                )
            rows = [_row(path, number, record) for number, record in enumerate(reader, start=2)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}") from None
    seen: set[Path] = set()
    for row in rows:
        if row.file in seen:
            raise DataError(f"row {row.number} of {path} names {row.file} again; one row is one record")
        seen.add(row.file)
    return rows


def _row(path: Path, number: int, record: dict[str, str | None]) -> _Row:
    file, label = (record.get("file") or "").strip(), (record.get("label") or "").strip()
    split = (record.get("split") or "train").strip().lower()
    if not file or not label:
        raise DataError(f"row {number} of {path} lacks a file or a label; fill it in or remove the row")
    if split not in (*_TRAIN, *_EVALUATION):
        raise DataError(f"row {number} of {path} has the split {split!r}; use train or test")
    known = ("file", "label", "split", None)
    others = {name: (value or "").strip() for name, value in record.items() if name not in known}
    return _Row(number, path.parent / file, label, split in _EVALUATION, others)

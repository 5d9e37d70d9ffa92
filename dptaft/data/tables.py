"""Tables of image files and labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dptaft.data.identity import same_files
from dptaft.data.images import ImageData, Split
from dptaft.data.pixels import DataError
from dptaft.data.splits import EVALUATION, TRAIN
from dptaft.data.wanted import Wanted

TABLE_SUFFIXES = (".csv", ".tsv")
_SEPARATORS = (",", ";", "\t")
_NEEDED = ("file", "label")
_NOTHING = ("nan", "na", "n/a", "null", "none", "?")


@dataclass(frozen=True)
class _Row:
    number: int
    file: Path
    label: str
    evaluation: bool
    others: Mapping[str, str]


def label_table(path: Path, wanted: Wanted) -> ImageData:
    """A table with the columns ``file`` and ``label``, and optionally ``split`` (train or test).

    Columns are separated by commas, semicolons or tabs; the text is UTF-8, or UTF-16 with its mark. Files are
    named relative to the folder of the table; one row is one record. Other columns are kept.

    Raises:
        DataError: a missing column, a row without a value, a file named twice, an undeclared label, or labels
            that are taken for names and mean nothing or the same.
    """
    rows = _rows(path)
    names = wanted.classes or _label_names(rows, path)
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


def _label_names(rows: list[_Row], path: Path) -> tuple[str, ...]:
    """The labels as class names, none of which is a missing value or another spelling of one before."""
    first: dict[str, _Row] = {}
    for row in rows:
        meant = _meaning(row.label)
        if meant in _NOTHING:
            raise DataError(
                f"row {row.number} of {path} has the label {row.label!r}, which stands for none; fill it in, "
                "remove the row, or declare the classes"
            )
        known = first.setdefault(meant, row)
        if known.label != row.label:
            raise DataError(
                f"row {row.number} of {path} has the label {row.label!r} and row {known.number} "
                f"{known.label!r}: two spellings of one class; correct them, or declare the classes"
            )
    return tuple(sorted(row.label for row in first.values()))


def _meaning(label: str) -> str:
    """What a label means whatever its case and number format."""
    try:
        number = float(label)
    except ValueError:
        return " ".join(label.casefold().split())
    return str(int(number)) if number.is_integer() else str(number)


def _rows(path: Path) -> list[_Row]:
    try:
        text = _text(path.read_bytes())
        separator = _separator(text)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
        reader.fieldnames = header = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in _NEEDED if name not in header]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}; its first row must name file and label, and is "
                f"{separator.join(header)!r} (columns separated by {separator!r})"
            )
        rows = [_row(path, number, record) for number, record in enumerate(reader, start=2)]
    except (OSError, UnicodeError, csv.Error) as error:
        raise DataError(f"cannot read the table {path}: {error}; write it as UTF-8") from None
    for first, again in same_files([row.file for row in rows]):
        row, before = rows[again], rows[first]
        same = "" if row.file == before.file else f", the file {before.file} of row {before.number}"
        raise DataError(f"row {row.number} of {path} names {row.file} again{same}; one row is one record")
    return rows


def _text(raw: bytes) -> str:
    marked = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    return raw.decode("utf-16" if marked else "utf-8-sig")


def _separator(text: str) -> str:
    """The one that parts the first row into the needed columns, else the one that is there most often."""
    header = text.splitlines()[0] if text else ""

    def fit(separator: str) -> tuple[int, int]:
        names = [name.strip().strip('"') for name in header.split(separator)]
        return sum(name in names for name in _NEEDED), len(names)

    return max(_SEPARATORS, key=fit)


def _row(path: Path, number: int, record: dict[str, str | None]) -> _Row:
    file, label = (record.get("file") or "").strip(), (record.get("label") or "").strip()
    split = (record.get("split") or "train").strip().lower()
    if not file or not label:
        raise DataError(f"row {number} of {path} lacks a file or a label; fill it in or remove the row")
    if split not in (*TRAIN, *EVALUATION):
        raise DataError(f"row {number} of {path} has the split {split!r}; use train or test")
    known = (*_NEEDED, "split", None)
    others = {name: (value or "").strip() for name, value in record.items() if name not in known}
    return _Row(number, path.parent / file, label, split in EVALUATION, others)

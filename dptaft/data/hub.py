"""Hugging Face datasets, by name or from local disk (needs the extra ``hf``).

hf:NAME                       splits ``train`` and ``test`` (or ``validation``) of a dataset by name
hf:NAME?config=C&image=I&label=L&train=T&test=E      with its parts named
a folder written by ``save_to_disk``, possibly followed by ?image=I&label=L&train=T&test=E

An empty ``test=`` leaves the evaluation split of the source out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl

from dptaft.data.images import ImageData, Split, whole_labels
from dptaft.data.names import check_numbers, listed, renumbered, require_same_names
from dptaft.data.pixels import CheckedPixels, DataError, ItemPixels
from dptaft.data.wanted import Wanted

PREFIX = "hf:"
_OPTIONS = ("config", "image", "label", "train", "test")
_EVALUATION = ("test", "validation", "valid", "val")


class Table(Protocol):
    """One split: rows by number, columns by name, and what the columns hold."""

    features: Mapping[str, Any]

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any) -> Any: ...


def parse_options(text: str, spec: str) -> dict[str, str]:
    """Read ``key=value&key=value``.

    Raises:
        DataError: an unknown or repeated key, or one but ``test`` without a value.

    >>> parse_options("image=img&label=fine_label", "hf:x")
    {'image': 'img', 'label': 'fine_label'}
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=bool(text))
    except ValueError as error:
        raise DataError(f"cannot read the options of {spec!r}: {error}; write key=value&key=value") from None
    found = dict(pairs)
    unknown = sorted(set(found) - set(_OPTIONS))
    empty = [key for key, value in found.items() if not value and key != "test"]
    if unknown or len(found) < len(pairs) or empty:
        what = f"unknown option {unknown[0]!r}" if unknown else "a repeated or empty option"
        raise DataError(f"{what} in {spec!r}; use {', '.join(_OPTIONS)}, each once and with a value")
    return found


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk``."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def hub_dataset(spec: str, wanted: Wanted) -> ImageData:
    """A dataset by name: ``hf:NAME`` with options.

    Raises:
        DataError: the extra is not installed, the dataset cannot be had, or its columns are not clear.
    """
    name, _, text = spec.removeprefix(PREFIX).partition("?")
    options = parse_options(text, spec)
    datasets = _library(spec)
    try:
        found = datasets.load_dataset(name, options.pop("config", None))
    except Exception as error:  # network, authorisation, missing names: errors of many kinds
        raise DataError(f"cannot get the dataset {name!r}: {str(error).splitlines()[0]}") from error
    return from_tables(name, found, options, wanted)


def saved_dataset(path: Path, text: str, wanted: Wanted) -> ImageData:
    """A dataset in a local folder, as ``save_to_disk`` wrote it.

    Raises:
        DataError: as for `hub_dataset`.
    """
    options = parse_options(text, f"{path}?{text}")
    if "config" in options:
        raise DataError(f"a dataset on disk has no config, got {options['config']!r}; leave it out")
    datasets = _library(str(path))
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged folders raise errors of many kinds
        raise DataError(f"cannot read the dataset {path}: {str(error).splitlines()[0]}") from error
    return from_tables(path.name, found, options, wanted)


def from_tables(
    name: str, found: Table | Mapping[str, Table], options: Mapping[str, str], wanted: Wanted
) -> ImageData:
    """Images and labels of one table, or of the splits of a dictionary of tables.

    Columns may be named; otherwise there must be exactly one of type Image and one of type ClassLabel. Labels
    are matched to the classes by the names of a ClassLabel, each split by its own, or as text; numbers alone
    count the classes in order.

    Raises:
        DataError: missing splits, columns that are not clear, classes of other names, or a row without a
            label of the classes.
    """
    splits: Mapping[str, Table] = found if isinstance(found, Mapping) else {"train": found}
    trained = options.get("train", "train")
    train = _named(splits, trained, name, "split")
    tested = options.get("test", next((s for s in _EVALUATION if s in splits and s != trained), ""))
    if tested == trained:
        raise DataError(f"{name} would be trained and evaluated on one split, {trained!r}; name another one")
    image = _column(train, options.get("image"), "Image", name)
    label = _column(train, options.get("label"), "ClassLabel", name)
    names = _names(train, label)
    if names is not None and wanted.classes is not None:
        require_same_names(names, wanted.classes, name)
    classes = wanted.classes or names or _text_names(list(train[label]))
    if classes is None:
        raise DataError(f"the labels of {name} have no names; declare the classes")

    def split(part: str) -> Split:
        table, source = _named(splits, part, name, "split"), f"the split {part} of {name}"
        for column in (image, label):
            _named(table.features, column, source, "column")
        pixels = ItemPixels(len(table), lambda i: table[i][image], f"{name} ({part})")
        checked = CheckedPixels(pixels, skip=wanted.skip_corrupt)
        return _labelled(checked, list(table[label]), _names(table, label), classes, source)

    held = None
    if tested:
        try:
            held = split(tested)
        except DataError as error:
            raise DataError(f"{error} (?test= leaves that split out)") from None
    return wanted.data(name.replace("/", "-"), classes, split(trained), held)


def _labelled(
    pixels: CheckedPixels,
    values: Sequence[Any],
    names: Sequence[str] | None,
    classes: Sequence[str],
    source: str,
) -> Split:
    """A split whose labels number the classes, from numbers of `names`, from text or from numbers."""
    missing = [row for row, value in enumerate(values) if value is None]
    if missing:
        more = f" ({len(missing)} of {len(values)} rows have none)" if len(missing) > 1 else ""
        raise DataError(f"row {missing[0]} of {source} has no label{more}; fill it in or remove the row")
    if _text_names(values) is not None:
        return Split(pixels, whole_labels(_numbers(values, classes, source), source))
    labels = whole_labels(values, source)
    if names is None:
        check_numbers(labels, len(classes), source)
    else:
        labels = renumbered(labels, names, classes, source)
    return Split(pixels, labels)


def _names(table: Table, column: str) -> tuple[str, ...] | None:
    """Names of a ClassLabel; None for other columns."""
    names = getattr(table.features[column], "names", None)
    return None if names is None else tuple(names)


def _text_names(labels: Sequence[Any]) -> tuple[str, ...] | None:
    """Labels that are text, in alphabetical order; None for other labels."""
    texts = [label for label in labels if isinstance(label, str)]
    return tuple(sorted(set(texts))) if texts and len(texts) == len(labels) else None


def _numbers(labels: Sequence[str], classes: Sequence[str], source: str) -> list[int]:
    number = {name: index for index, name in enumerate(classes)}
    for row, label in enumerate(labels):
        if label not in number:
            raise DataError(
                f"row {row} of {source} has the label {label!r}, which is none of the classes "
                f"{listed(classes)}; declare it or correct the row"
            )
    return [number[label] for label in labels]


def _named(items: Mapping[str, Any], key: str, name: str, what: str) -> Any:
    if key not in items:
        raise DataError(f"{name} has no {what} {key!r}; it has {', '.join(items)}; name it after a ?")
    return items[key]


def _column(table: Table, given: str | None, kind: str, name: str) -> str:
    if given is not None:
        _named(table.features, given, name, "column")
        return given
    found = [key for key, value in table.features.items() if type(value).__name__ == kind]
    if len(found) != 1:
        option = "image" if kind == "Image" else "label"
        raise DataError(
            f"{name} has {len(found)} columns of type {kind} among {', '.join(table.features)}; "
            f"name one with ?{option}=COLUMN"
        )
    return found[0]


def _library(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{spec!r} needs the extra hf; install it with: pip install 'dptaft[hf]'") from None
    return datasets

"""Which folders hold splits, which hold classes, and which are none of the data."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dptaft.data.names import listed
from dptaft.data.pixels import IMAGE_SUFFIXES, DataError
from dptaft.data.wanted import say_left_out

TRAIN = ("train", "training")
_TEST = ("test", "testing", "holdout", "hold-out", "hold_out")
_VALIDATION = ("val", "valid", "validation", "dev", "eval", "evaluation")
EVALUATION = (*_TEST, *_VALIDATION)
_ARCHIVE_REMAINS = "__MACOSX"
_OWN = ("ledger.sqlite", "run.toml", "shards.toml", "recipe.toml")
_PARTIAL, _CACHE, _RUNS = ".partial", "CACHEDIR.TAG", "runs of dptaft"


@dataclass(frozen=True)
class Roots:
    """Where the class folders are.

    Attributes:
        train: holds the class folders of the records.
        evaluation: holds those of the evaluation images; None where the source has none.
    """

    train: Path
    evaluation: Path | None


def find_roots(path: Path, classes: Sequence[str] | None) -> Roots:
    """Whether a folder holds class folders or splits with class folders, by their names.

    A training split is called train or training, an evaluation split test, testing, holdout, val, valid,
    validation, dev, eval or evaluation, in any case. Of several evaluation splits with class folders the one
    called test is taken. Where a folder is called as a declared class, all of them are
    classes.

    Args:
        path: of the data.
        classes: declared class names.

    Raises:
        DataError: splits that cannot be told from classes, or from each other.
    """
    folders = list(subfolders(path, classes or ()))
    if classes is not None and any(p.name in classes for p in folders):
        return Roots(path, None)
    train, test, validation = (_called(folders, names) for names in (TRAIN, _TEST, _VALIDATION))
    if not train and not test and not validation:
        if classes is None:
            _refuse_hints(path, folders)
        return Roots(path, None)
    if len(train) != 1 or not _holds_classes(train[0]):
        raise _unclear(path, [*train, *test, *validation])
    for kind in (test, validation):
        if len(kind) > 1:
            raise DataError(
                f"{path} holds {kind[0].name} and {kind[1].name}, either of which may be the evaluation "
                "split; move one of them away"
            )
    held = [p for p in (*test, *validation) if _holds_classes(p)]
    others = [p for p in folders if p not in (*train, *test, *validation)]
    if others and not held:
        raise DataError(
            f"{path} holds the split {train[0].name} beside {_names(others)}, splits or classes; "
            "move them away, or declare the classes"
        )
    unlabelled = [p.name for p in (*test, *validation) if p not in held]
    say_left_out(unlabelled, path, "no class folders with images")
    if held:
        unread = [p.name for p in (*held[1:], *others)]
        say_left_out(unread, path, f"{train[0].name} is read for training, {held[0].name} for evaluation")
    return Roots(train[0], held[0] if held else None)


def _called(folders: Sequence[Path], names: Sequence[str]) -> list[Path]:
    return [p for p in folders if p.name.lower() in names]


def _holds_classes(folder: Path) -> bool:
    """Whether images lie in folders of the folder."""
    return any(_has_images(p) for p in subfolders(folder))


def _has_images(folder: Path) -> bool:
    return next(images_below(folder), None) is not None


def _unclear(path: Path, found: Sequence[Path]) -> DataError:
    if len(_called(found, TRAIN)) > 1:
        what = "which may each be the training split; move one of them away"
    elif not _called(found, TRAIN):
        what = "evaluation splits without one for training; call that train, or declare the classes"
    else:
        what = (
            "splits without class folders below them; put the images of each class into a folder of its own "
            "in each split, give a CSV table of files and labels, or declare the classes if these are some"
        )
    return DataError(f"{path} holds {_names(found)}: {what}")


def _refuse_hints(path: Path, folders: Sequence[Path]) -> None:
    """Refuse folders whose names hold the words of both splits, such as seg_train and seg_test."""
    words = {p: {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", p.name)} for p in folders}
    train = [p for p in folders if words[p] & set(TRAIN)]
    held = [p for p in folders if words[p] & set(EVALUATION) and p not in train]
    if train and held:
        raise DataError(
            f"{path} holds {train[0].name} and {held[0].name}, which look like splits and not like classes; "
            "call them train and test, or declare the classes"
        )


def refuse_hidden_structure(root: Path, folders: Sequence[Path], declared: bool) -> None:
    """Refuse classes below which there are splits, or that repeat each other's folders.

    Args:
        root: holds the folders.
        folders: of the classes.
        declared: the user says that these are the classes.

    Raises:
        DataError: with the structure and the remedy.
    """
    inner = {p: [f for f in subfolders(p) if _has_images(f)] for p in folders}
    for folder, below in inner.items():
        train, held = _called(below, TRAIN), _called(below, EVALUATION)
        if train and held:
            raise DataError(
                f"{folder} holds {train[0].name} and {held[0].name}, splits below a class; move them up: "
                f"{train[0].name}/{folder.name} and {held[0].name}/{folder.name}"
            )
    names = [{f.name for f in below} for below in inner.values()]
    largest = max(names, key=len, default=set())
    repeated = len(names) > 1 and all(len(found) > 1 and found <= largest for found in names)
    if repeated and not declared:
        raise DataError(
            f"the folders {_names(folders)} of {root} hold the same folders {listed(sorted(largest))}: these "
            "look like the classes, and the outer ones like parts of the data; call the outer ones train and "
            "test, or declare the outer ones if they are the classes"
        )


def subfolders(folder: Path, declared: Sequence[str] = ()) -> Iterator[Path]:
    """Folders in order of their names, without those that are none of the data."""
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if path.name in declared or _why_skipped(path) is None:
            yield path


def tell_skipped(folder: Path, declared: Sequence[str]) -> None:
    """Name the folders that are none of the data."""
    skipped = {p: _why_skipped(p) for p in folder.iterdir() if p.is_dir() and p.name not in declared}
    for why in sorted({why for why in skipped.values() if why}):
        say_left_out(sorted(p.name for p, reason in skipped.items() if reason == why), folder, why)


def _why_skipped(path: Path) -> str | None:
    if path.name.startswith("."):
        return "hidden"
    if path.name == _ARCHIVE_REMAINS:
        return "remains of an archive"
    if (path / _CACHE).is_file():
        return "a cache"
    if _is_run(path):
        return _RUNS
    inner = _inner(path)
    runs = [p for p in inner if _is_run(p)]
    if not runs or any(is_image(p) for p in path.iterdir()):
        return None
    return None if any(_has_images(p) for p in inner if p not in runs) else _RUNS


def _is_run(folder: Path) -> bool:
    return folder.name.endswith(_PARTIAL) or any((folder / name).is_file() for name in _OWN)


def _inner(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry in entries if entry.is_dir()]


def images_below(folder: Path, hidden: list[Path] | None = None) -> Iterator[Path]:
    """Image files below a folder, in no order; hidden files and folders, runs and caches are not read.

    Args:
        folder: may be missing.
        hidden: takes in the folders that are not read.

    Raises:
        OSError: a folder that cannot be listed.
    """

    def stop(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=stop) if folder.is_dir() else ():
        if Path(place) != folder and not {*_OWN, _CACHE}.isdisjoint(files):
            folders.clear()
            if hidden is not None:
                hidden.append(Path(place))
            continue
        left_out = [name for name in folders if name.startswith(".") or name == _ARCHIVE_REMAINS]
        folders[:] = [name for name in folders if name not in left_out]
        if hidden is not None:
            hidden += [Path(place, name) for name in left_out]
        yield from (path for path in (Path(place, name) for name in files) if is_image(path))


def is_image(path: Path) -> bool:
    """Whether a path is a visible file with the suffix of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _names(folders: Sequence[Path]) -> str:
    return listed([p.name for p in folders])

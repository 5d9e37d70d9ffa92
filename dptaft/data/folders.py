"""Image files: one folder per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dptaft.data.images import ImageData
from dptaft.data.pixels import IMAGE_SUFFIXES, DataError
from dptaft.data.splits import find_roots, images_below, refuse_hidden_structure, subfolders, tell_skipped
from dptaft.data.wanted import Wanted, require_different_files, say_left_out

__all__ = ["Wanted", "image_folder"]


def image_folder(path: Path, wanted: Wanted) -> ImageData:
    """One sub-folder of images per class, or such folders below a training and an evaluation split.

    Raises:
        DataError: no folders, no images, a folder that is none of the declared classes, an undeclared class
            without images, a structure that is not clear (`dptaft.data.splits`), or one file under two names.
    """
    roots = find_roots(path, wanted.classes)
    for root in dict.fromkeys((path, roots.train, roots.evaluation or path)):
        tell_skipped(root, wanted.classes or ())
    names = wanted.classes or tuple(p.name for p in subfolders(roots.train))
    if not names:
        raise DataError(
            f"{roots.train} holds no folders; put the images of each class into a folder of its own, or give "
            "a CSV table of files and labels"
        )
    train = _class_files(roots.train, names, wanted)
    if wanted.classes is None:
        _refuse_empty(roots.train, names, train[1])
    held = None if roots.evaluation is None else _class_files(roots.evaluation, names, wanted)
    require_different_files(train[0], () if held is None else held[0])
    return wanted.data(path.name, names, wanted.files(*train), None if held is None else wanted.files(*held))


def _class_files(root: Path, classes: Sequence[str], wanted: Wanted) -> tuple[list[Path], list[int]]:
    """Files and their labels: class by class, in order of their paths."""
    folders = list(subfolders(root, classes))
    strange = [p for p in folders if p.name not in classes]
    if strange:
        raise DataError(f"the folder {strange[0]} is none of the classes; declare it or move it away")
    refuse_hidden_structure(root, folders, wanted.classes is not None)
    paths: list[Path] = []
    labels: list[int] = []
    hidden: list[Path] = []
    for label, name in enumerate(classes):
        files = sorted(images_below(root / name, hidden))
        paths += files
        labels += [label] * len(files)
    say_left_out(sorted(str(p.relative_to(root)) for p in hidden), root, "hidden, or not of the data")
    if not paths:
        raise DataError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths, labels


def _refuse_empty(root: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Refuse a folder that is taken for a class and holds no image."""
    seen = set(labels)
    for label, name in enumerate(names):
        if label not in seen:
            kinds = Counter(p.suffix.lower() or p.name for p in (root / name).rglob("*") if p.is_file())
            held = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3)) or "no file"
            raise DataError(
                f"the folder {root / name} holds no image ({', '.join(IMAGE_SUFFIXES)}) but {held}; move it "
                "away, convert its files, or declare the classes"
            )

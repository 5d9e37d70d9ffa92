"""A data set by name or path."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dptaft.data.arrays import idx_folder, is_idx_folder, npz_archive
from dptaft.data.folders import image_folder
from dptaft.data.hub import PREFIX, hub_dataset, is_saved_dataset, saved_dataset
from dptaft.data.images import ImageData, Split, part_evaluation
from dptaft.data.pixels import ArrayPixels, DataError
from dptaft.data.tables import TABLE_SUFFIXES, label_table
from dptaft.data.wanted import Wanted

_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_data(
    spec: str,
    *,
    classes: Sequence[str] | None = None,
    public: bool = False,
    skip_corrupt: bool = False,
    hold_out: bool = True,
) -> ImageData:
    """Load a data set by name or path.

    ``digits``: scikit-learn's 1,797 handwritten digits. ``fashion-mnist``: 70,000 images, from the Debian
    package ``dataset-fashion-mnist``. ``hf:NAME``: a Hugging Face dataset (see `dptaft.data.hub`). A folder:
    one sub-folder of images per class, or such folders below a training and an evaluation split (see
    `dptaft.data.splits`), or IDX files named as those of MNIST, or what ``save_to_disk`` of Hugging Face
    datasets wrote. A file ``.csv`` or ``.tsv``: columns ``file``, ``label`` and optionally ``split``. A file
    ``.npz``: arrays ``images`` and ``labels``, and optionally ``test_images``, ``test_labels``, ``classes``.

    One file is one record: a file that is there under two names is refused. Declared classes are matched by
    name, in any order, where the source names its classes; they number labels in order where it does not.

    Where a data set has no evaluation split, every fifth image in the order of the source (numbers 0, 5, ...;
    of each class for folders) is held out: a public rule that does not look at the images. Where adding or
    replacing one record shifts the numbers of others, the data says so (`ImageData.unstable_under`).

    Args:
        spec: name or path.
        classes: declared class names; left out, they are taken from the source, which the privacy claim does
            not cover for private data.
        public: declare the images a public benchmark, whose class list is public too.
        skip_corrupt: count an image that cannot be read as an empty record (see
            `dptaft.data.CheckedPixels`); otherwise such images are named and refused.
        hold_out: whether to hold out an evaluation split where the source has none.

    Raises:
        DataError: unknown name, unreadable or unlabelled data, a structure or names that are not clear, one
            file under two names, fewer than two classes.

    >>> data = load_data("digits")
    >>> len(data.train), len(data.evaluation), len(data.classes)
    (1437, 360, 10)
    """
    wanted = Wanted(None if classes is None else tuple(classes), public, skip_corrupt)
    data, by_class = _find(spec, wanted)
    return data if data.evaluation is not None or not hold_out else part_evaluation(data, by_class=by_class)


def published_name(spec: str) -> str:
    """What a run says of the data that it was trained on: a name, or the last part of a path.

    >>> published_name("/home/ada/scans"), published_name("hf:ylecun/mnist"), published_name("digits")
    ('scans', 'hf:ylecun/mnist', 'digits')
    """
    path, mark, options = spec.partition("?")
    return spec if spec.startswith(PREFIX) else (Path(path).expanduser().name or path) + mark + options


def _find(spec: str, wanted: Wanted) -> tuple[ImageData, bool]:
    """The data, and whether its images are sorted by class."""
    named = {"digits": _digits, "fashion-mnist": _fashion_mnist}
    if spec in named:
        if wanted.classes is not None:
            given = ", ".join(wanted.classes)
            raise DataError(f"{spec} has public classes of its own, not {given}; leave them out")
        return named[spec](), False
    if spec.startswith(PREFIX):
        return hub_dataset(spec, wanted), False
    text, _, options = spec.partition("?")
    path = Path(text).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        return saved_dataset(path, options, wanted), False
    path = Path(spec).expanduser()
    if path.is_dir():
        return (
            (idx_folder(path, wanted), False) if is_idx_folder(path) else (image_folder(path, wanted), True)
        )
    loader = {".npz": npz_archive, **dict.fromkeys(TABLE_SUFFIXES, label_table)}.get(path.suffix.lower())
    if loader is None or not path.is_file():
        raise DataError(
            f"no data set or path {spec!r}; use digits, fashion-mnist, hf:NAME, a folder with one folder per "
            "class, a .csv of files and labels, or a .npz"
        )
    return loader(path, wanted), False


def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    source = load_digits()
    labels = torch.from_numpy(np.asarray(source.target)).long()
    pixels = ArrayPixels((source.images / 16.0).astype(np.float32))
    return ImageData("digits", tuple("0123456789"), Split(pixels, labels), None, True, True)


def _fashion_mnist() -> ImageData:
    if not _FASHION_FOLDER.is_dir():
        raise DataError(
            "fashion-mnist is not installed; install the Debian package dataset-fashion-mnist, or give a "
            "folder with its four IDX files"
        )
    return idx_folder(_FASHION_FOLDER, Wanted(_FASHION_CLASSES, public=True))

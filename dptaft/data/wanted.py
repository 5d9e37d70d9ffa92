"""What a loader is asked for, and image files of which each is one record."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dptaft.data.identity import same_files
from dptaft.data.images import ImageData, Split
from dptaft.data.names import listed
from dptaft.data.pixels import CheckedPixels, DataError, FilePixels


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


def require_different_files(train: Sequence[Path], evaluation: Sequence[Path]) -> None:
    """Refuse image files that are there under several names, in training, in evaluation or in both.

    Raises:
        DataError: with the number of such names and the first pair.
    """
    paths = [*train, *evaluation]
    pairs = list(same_files(paths))
    if pairs:
        first, again = pairs[0]
        across = " (one in training, one in evaluation)" if first < len(train) <= again else ""
        count = "a file" if len(pairs) == 1 else f"{len(pairs)} files"
        raise DataError(
            f"{count} would be read again under another name: {paths[again]} is the same file as "
            f"{paths[first]}{across}; one file is one record, remove the second name"
        )


def say_left_out(names: Sequence[str], root: Path, why: str) -> None:
    """Tell the owner of the data which folders are not read."""
    if names:
        warnings.warn(f"{listed(names)} in {root}: left out ({why})", UserWarning, stacklevel=2)

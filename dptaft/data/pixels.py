"""Images by number: arrays, files, decoded objects; and what happens to one that cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_EMPTY_SIDE = 8
_NAMED = 10


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

    def name(self, index: int) -> str:
        """Path of one image."""
        return str(self.paths[index])


class ItemPixels:
    """Images of any source that returns one by number: a PIL image, an array (h, w[, channels]) or a tensor.

    Args:
        count: number of images.
        read: returns image `index`; whatever it raises means that the image cannot be read.
        source: name of the source, for messages.

    >>> ItemPixels(1, lambda i: Image.new("RGB", (4, 2), "white"), "white")[0].shape
    torch.Size([3, 2, 4])
    """

    def __init__(self, count: int, read: Callable[[int], Any], source: str) -> None:
        self._count, self._read, self._source = count, read, source

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        try:
            return as_pixels(self._read(index))
        except Exception as error:  # a foreign source may raise errors of any kind
            raise DataError(f"cannot read {self.name(index)}: {error}") from error

    def name(self, index: int) -> str:
        """Source and number of one image."""
        return f"image {index} of {self._source}"


def as_pixels(image: Any) -> Tensor:
    """One image as float32 (1 or 3, height, width) in [0, 1].

    Args:
        image: a PIL image; a uint8 or float array (h, w) or (h, w, 1 or 3); a tensor (h, w) or
            (1 or 3, h, w). Floats must lie in [0, 1].

    Raises:
        DataError: another type, shape or range.

    >>> as_pixels(torch.zeros(3, 2, 2)).shape, as_pixels(np.zeros((2, 2, 3), np.uint8)).shape
    (torch.Size([3, 2, 2]), torch.Size([3, 2, 2]))
    """
    if isinstance(image, Image.Image):
        return _decode(image)
    if isinstance(image, Tensor):
        array = image.detach().cpu().numpy()
        array = array[None] if array.ndim == 2 else array
        if array.ndim != 3 or array.shape[0] not in (1, 3):
            raise DataError(f"a tensor has shape {tuple(image.shape)}; expected (1 or 3, height, width)")
        return ArrayPixels(array.transpose(1, 2, 0)[None])[0]
    if isinstance(image, np.ndarray):
        return ArrayPixels(image[None])[0]
    raise DataError(f"an image has type {type(image).__name__}; use a PIL image, an array or a tensor")


def read_image(path: Path) -> Tensor:
    """Decode one file to float32 (1 or 3, height, width) in [0, 1]: 8 bits are divided by 255, 16 by 65535.

    Raises:
        DataError: the file cannot be read as an image, or holds floats, which have no public range.
    """
    try:
        with Image.open(path) as image:
            return _decode(image)
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        raise DataError(f"cannot read the image {path}: {error}") from None


def _decode(image: Image.Image) -> Tensor:
    gray = image.mode in ("1", "L", "LA")
    wide = image.mode.startswith("I")
    if image.mode == "F":
        raise ValueError("it holds floats; store 8 or 16 bits per channel")
    pixels = np.asarray(image if wide else image.convert("L" if gray else "RGB"), dtype=np.float32)
    scaled = pixels / (65535.0 if wide else 255.0)
    return torch.from_numpy(scaled if scaled.ndim == 3 else scaled[..., None]).permute(2, 0, 1).clamp(0, 1)


class Named(Pixels, Protocol):
    """Images that can say what one of them is called."""

    def name(self, index: int) -> str:
        """For messages to the owner of the data."""
        ...


class CheckedPixels:
    """Images some of which may be unreadable: all of them named and refused, or skipped as asked.

    A skipped image stays a record. It is returned as an image of NaN, its features are then not finite and
    its gradient is zero in every step: the null record of zero-out adjacency. The number of records n, the
    normaliser and the noise do not change, so what a record contributes is a function of that record alone.
    Which images were skipped, and how many, is private: it is shown to the owner and never published.

    Args:
        pixels: the images.
        skip: return an empty image in place of one that cannot be read.

    Attributes:
        unreadable: number -> why, for all images that were asked for and could not be read.
    """

    def __init__(self, pixels: Named, *, skip: bool = False) -> None:
        self._pixels, self._skip = pixels, skip
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.unreadable:
            return _empty_image()
        try:
            return self._pixels[index]
        except DataError as error:
            if not self._skip:
                raise self._refusal(index, error) from None
            self.unreadable[index] = str(error)
            if len(self.unreadable) <= _NAMED:
                warnings.warn(f"{error}; it counts as an empty record", UserWarning, stacklevel=2)
            return _empty_image()

    def name(self, index: int) -> str:
        """What one image is called."""
        return self._pixels.name(index)

    def _refusal(self, first: int, error: DataError) -> DataError:
        """One error that counts and names every image that cannot be read."""
        names = [self._pixels.name(first)]
        for index in range(first + 1, len(self)):
            try:
                self._pixels[index]
            except DataError:
                names.append(self._pixels.name(index))
        if len(names) == 1:
            return DataError(f"{error}; repair or remove it, or skip such images with --skip-corrupt")
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return DataError(
            f"{len(names)} of {len(self)} images cannot be read: {', '.join(names[:_NAMED])}{more}; repair "
            f"or remove them, or skip such images with --skip-corrupt (the first one: {error})"
        )


def _empty_image() -> Tensor:
    return torch.full((1, _EMPTY_SIDE, _EMPTY_SIDE), float("nan"))


class Subset:
    """Some of the images, by number."""

    def __init__(self, pixels: Pixels, indices: Sequence[int]) -> None:
        self._pixels, self._indices = pixels, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Tensor:
        return self._pixels[self._indices[index]]

    @property
    def unreadable(self) -> dict[int, str]:
        """Number -> why, for the images of the subset that could not be read."""
        found = getattr(self._pixels, "unreadable", {})
        return {i: found[index] for i, index in enumerate(self._indices) if index in found}

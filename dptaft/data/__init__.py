"""Labelled images: named benchmarks, folders, tables, archives, Hugging Face and PyTorch datasets.

Pixels are read one image at a time, so that a data set larger than memory can stream. Nothing is estimated
from the images: size and normalisation are the backbone's own, the evaluation split is a fixed public rule.
"""

from dptaft.data.arrays import read_idx
from dptaft.data.images import HOLD_OUT_EVERY, ImageData, Split
from dptaft.data.load import load_data
from dptaft.data.pixels import (
    IMAGE_SUFFIXES,
    ArrayPixels,
    CheckedPixels,
    DataError,
    FilePixels,
    ItemPixels,
    Pixels,
    Subset,
    as_pixels,
    read_image,
)

__all__ = [
    "HOLD_OUT_EVERY",
    "IMAGE_SUFFIXES",
    "ArrayPixels",
    "CheckedPixels",
    "DataError",
    "FilePixels",
    "ImageData",
    "ItemPixels",
    "Pixels",
    "Split",
    "Subset",
    "as_pixels",
    "load_data",
    "read_idx",
    "read_image",
]

"""Small data sets on disk and in memory."""

import numpy as np
import torch
from PIL import Image

from dptaft.data import ArrayPixels, ImageData, Split


def small_images(count=60, classes=3, seed=0, size=28):
    """Images whose class shows as a bright band, with noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    images = rng.uniform(0, 0.3, (count, size, size)).astype(np.float32)
    band = size // classes
    for i, label in enumerate(labels):
        images[i, label * band : (label + 1) * band] += 0.6
    return images, labels


def small_data(count=60, classes=3):
    images, labels = small_images(count, classes)
    split = Split(ArrayPixels(images), torch.from_numpy(labels))
    names = tuple("abcdefghij"[:classes])
    return ImageData("small", names, split, evaluation_images(count, classes), True)


def evaluation_images(count=60, classes=3):
    """A quarter as many images as the records, none of which is among them."""
    images, labels = small_images(-(-count // 4), classes, seed=1001)
    return Split(ArrayPixels(images), torch.from_numpy(labels))


def write_folder(root, count=12, classes=("cat", "dog"), mode="L"):
    images, labels = small_images(count, len(classes))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = root / classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)).convert(mode)
        pixels.save(folder / f"{i:03}.png")
    return root

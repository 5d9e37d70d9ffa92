"""What all generators of synthetic images share: interface, random numbers, grids, the last coat of paint.

A generator is called as ``sampler(count, generator)`` and returns a :class:`Drawing`. It keeps no random
state of its own: equal seeds of the ``torch.Generator`` give equal drawings. Nothing is read from a data set.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

Columns = dict[str, Tensor]


class Drawing(NamedTuple):
    """A batch of synthetic images with all that is known about them.

    Attributes:
        images: (n, channels, size, size) in [0, 1].
        labels: (n,) class of the generator.
        parameters: (n, p) what the renderer was told, about -1 to 1; nan where a parameter does not apply.
    """

    images: Tensor
    labels: Tensor
    parameters: Tensor


class Sampler(Protocol):
    """Draws batches of images."""

    channels: int
    num_classes: int
    num_parameters: int

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` images."""
        ...


def uniform(generator: Generator, low: float, high: float, *shape: int) -> Tensor:
    """Independent uniform numbers."""
    return torch.rand(shape, generator=generator) * (high - low) + low


def whole(generator: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Independent whole numbers from ``low`` to ``high``, the latter included."""
    return torch.randint(low, high + 1, shape, generator=generator)


def coin(generator: Generator, probability: float, *shape: int) -> Tensor:
    """Independent biased coins, 0.0 or 1.0."""
    return (torch.rand(shape, generator=generator) < probability).float()


def mesh(size: int) -> tuple[Tensor, Tensor]:
    """Coordinates x (to the right) and y (upwards) of pixel centres in (-1, 1), each (1, size, size)."""
    steps = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(-steps, steps, indexing="ij")
    return x[None], y[None]


def image_like(values: Tensor) -> Tensor:
    """One number per image, shaped to multiply (n, size, size)."""
    return values[:, None, None]


def turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in a frame that is rotated by an angle per image."""
    cos, sin = image_like(torch.cos(angle)), image_like(torch.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def soft_step(signed: Tensor, size: int) -> Tensor:
    """1 inside (positive distance), 0 outside, with an edge about one pixel wide."""
    return (signed * size / 2 + 0.5).clamp(0, 1)


def smooth_noise(generator: Generator, count: int, size: int, cells: int) -> Tensor:
    """Noise (n, size, size) in [0, 1], interpolated from a grid of ``cells`` squared."""
    grid = torch.rand(count, 1, cells, cells, generator=generator)
    return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True)[:, 0].clamp(0, 1)


def scaled(values: Tensor, low: float, high: float) -> Tensor:
    """Map [low, high] to [-1, 1]: the common unit of all parameters."""
    return (values.float() - low) * (2 / (high - low)) - 1


def angle_columns(name: str, angle: Tensor, symmetry: int = 1) -> Columns:
    """Cosine and sine of an angle whose drawing repeats ``symmetry`` times a turn."""
    return {f"{name} cos": torch.cos(symmetry * angle), f"{name} sin": torch.sin(symmetry * angle)}


def hidden_unless(shown: Tensor, columns: Columns) -> Columns:
    """Replace by nan the parameters of what is not in the image."""
    return {name: torch.where(shown > 0.5, value, math.nan) for name, value in columns.items()}


def finish(grey: Tensor, generator: Generator, channels: int) -> tuple[Tensor, Columns]:
    """Ink on paper: levels, polarity, noise and, for three channels, two colours.

    Args:
        grey: (n, size, size) amount of ink in [0, 1].
        generator: of random numbers.
        channels: 1 or 3.

    Returns:
        Images (n, channels, size, size) in [0, 1], and the parameters of the paint.
    """
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, got {channels}")
    count = len(grey)
    paper = uniform(generator, 0.0, 0.4, count) * coin(generator, 0.4, count)
    ink = uniform(generator, 0.6, 1.0, count)
    flipped = coin(generator, 0.15, count)
    noise = uniform(generator, 0.0, 0.08, count) * coin(generator, 0.5, count)
    amounts = grey[:, None]
    low, high = paper[:, None], ink[:, None]
    if channels == 3:
        low = (low + 0.3 * torch.rand(count, 3, generator=generator) * low.sign()).clamp(0, 1)
        high = high * uniform(generator, 0.2, 1.0, count, 3)
    images = low[:, :, None, None] + (high - low)[:, :, None, None] * amounts
    images = images + noise[:, None, None, None] * torch.randn(images.shape, generator=generator)
    turn = flipped[:, None, None, None]
    images = (turn + (1 - 2 * turn) * images).clamp(0, 1)
    columns = {"paper": scaled(paper, 0, 0.4), "ink": scaled(ink, 0.6, 1), "flipped": scaled(flipped, 0, 1)}
    return images, columns


def table(*groups: Columns) -> Tensor:
    """Parameters (n, p) of all groups, in their order."""
    return torch.stack([column for group in groups for column in group.values()], 1)


def count_parameters(sampler: Sampler) -> int:
    """Number of parameters of a sampler, found by drawing one image."""
    return sampler(1, torch.Generator().manual_seed(0)).parameters.shape[1]

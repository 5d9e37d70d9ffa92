"""Dead leaves: shapes of random size, place and tone that cover one another until the image is full.

Follows Baradad et al. (2021, "Learning to see by looking at noise"), section on dead leaves: radii from a
power law, shapes that are discs, squares or triangles, optionally textured. The classes are shape, range of
sizes and texture.
"""

from __future__ import annotations

import math

import torch
from drawing import (
    Columns,
    Drawing,
    angle_columns,
    count_parameters,
    image_like,
    mesh,
    scaled,
    smooth_noise,
    soft_step,
    table,
    turned,
    uniform,
    whole,
)
from torch import Generator, Tensor

SHAPES = ("disc", "square", "triangle")
SIZES = ((0.15, 1.0), (0.1, 0.5), (0.08, 0.25))
TEXTURES = ("flat", "noise")
POWER = 3.0


class DeadLeaves:
    """Images of overlapping leaves; the parameters tell the law of all and the pose of the one on top."""

    num_classes = len(SHAPES) * len(SIZES) * len(TEXTURES)

    def __init__(self, size: int = 28, channels: int = 1, leaves: int = 40) -> None:
        self.size, self.channels, self.leaves = size, channels, leaves
        self.num_parameters = count_parameters(self)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` images, leaf by leaf from the bottom to the top."""
        labels = whole(generator, 0, self.num_classes - 1, count)
        shape, law, textured = labels % 3, labels // 3 % 3, labels // 9
        low = torch.tensor([s[0] for s in SIZES])[law]
        high = torch.tensor([s[1] for s in SIZES])[law]
        images = uniform(generator, 0, 1, count, self.channels, 1, 1).repeat(1, 1, self.size, self.size)
        x, y = mesh(self.size)
        for leaf in range(self.leaves):
            last = leaf == self.leaves - 1
            reach = 0.6 if last else 1.1  # the leaf on top is inside the image
            right, up = (uniform(generator, -reach, reach, count) for _ in range(2))
            radius = self._radii(generator, low, high)
            if last:
                radius = radius.clamp(min=0.15)
            angle = uniform(generator, 0, 2 * math.pi, count)
            mask = self._mask(x - image_like(right), y - image_like(up), radius, angle, shape)
            tone = uniform(generator, 0, 1, count, self.channels)
            paint = tone[:, :, None, None].expand_as(images)
            if leaf >= self.leaves // 2:
                grain = smooth_noise(generator, count, self.size, self.size // 2) - 0.5
                paint = (paint + 0.5 * image_like(textured.float())[:, None] * grain[:, None]).clamp(0, 1)
            images = images + mask[:, None] * (paint - images)
        top: Columns = {
            "right": scaled(right, -0.6, 0.6),
            "up": scaled(up, -0.6, 0.6),
            "radius": scaled(radius.log(), math.log(0.15), 0),
            "tone": scaled(tone.mean(1), 0, 1),
        }
        top |= {
            name: torch.where(shape == i + 1, value, math.nan)
            for i, symmetry in enumerate((4, 3))
            for name, value in angle_columns(SHAPES[i + 1], angle, symmetry).items()
        }
        kinds = {name: scaled(shape == i, 0, 1) for i, name in enumerate(SHAPES)}
        laws = {"law": scaled(law, 0, 2), "textured": scaled(textured, 0, 1)}
        return Drawing(images, labels, table(kinds, laws, top))

    @staticmethod
    def _radii(generator: Generator, low: Tensor, high: Tensor) -> Tensor:
        """Radii with density proportional to r^-POWER between two bounds, by inversion."""
        e = 1 - POWER
        return (low**e + torch.rand(len(low), generator=generator) * (high**e - low**e)) ** (1 / e)

    def _mask(self, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor, shape: Tensor) -> Tensor:
        x, y = turned(x, y, angle)
        disc = torch.hypot(x, y)
        square = 1.2 * torch.maximum(x.abs(), y.abs())
        triangle = 1.3 * torch.maximum(-y, 0.5 * y + math.sqrt(0.75) * x.abs())
        distance = torch.stack([disc, square, triangle])[shape, torch.arange(len(shape))]
        return soft_step(image_like(radius) - distance, self.size)

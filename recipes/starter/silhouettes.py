"""Textured silhouettes: closed outlines from a few Fourier terms, filled with patterns.

A part is star-shaped, ``r(t) = 1 + sum_k a_k cos(k t + p_k)`` with amplitudes that fall with k; it
is stretched and turned, may be mirrored in the vertical axis, may have a second part (one to each side where
it is mirrored), and a hole. The inside is flat, striped, shaded or noisy. Outlines by Fourier terms are in
the spirit of Zahn and Roskies (1972, "Fourier descriptors for plane closed curves"), pretraining on rendered
contours in that of Kataoka et al. (2022, "Replacing labeled real-image datasets with auto-generated
contours").
"""

from __future__ import annotations

import math

import torch
from drawing import (
    Columns,
    Drawing,
    angle_columns,
    coin,
    count_parameters,
    finish,
    hidden_unless,
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

TERMS = 5
TEXTURES = ("flat", "stripes", "gradient", "noise")


class Silhouettes:
    """Silhouettes in 4 textures, with and without symmetry, second part and hole: 32 classes."""

    num_classes = 8 * len(TEXTURES)

    def __init__(self, size: int = 28, channels: int = 1) -> None:
        self.size, self.channels = size, channels
        self.num_parameters = count_parameters(self)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` silhouettes."""
        x, y = mesh(self.size)
        mirrored = coin(generator, 0.6, count)
        second = coin(generator, 0.5, count)
        holed = coin(generator, 0.25, count)
        frame, pose = self._pose(generator, count, x, y)
        body, outline = self._part(generator, frame, mirrored, 0.35, 0.9)
        limb, limbs = self._limbs(generator, frame, mirrored)
        hole, holes = self._hole(generator, frame, mirrored)
        mask = torch.maximum(body, limb * image_like(second)) * (1 - hole * image_like(holed))
        texture = whole(generator, 0, len(TEXTURES) - 1, count)
        inside, pattern = self._inside(generator, frame, texture)
        seam = uniform(generator, 0.0, 0.6, count) * second  # the second part may have another shade
        inside = inside * (1 - image_like(seam) * limb * (1 - body))
        images, paint = finish(mask * inside, generator, self.channels)
        kinds = {"mirrored": mirrored, "second": second, "holed": holed}
        kinds |= {name: (texture == i).float() for i, name in enumerate(TEXTURES)}
        parameters = table(
            {name: scaled(kind, 0, 1) for name, kind in kinds.items()},
            pose,
            outline,
            hidden_unless(second, limbs | {"seam": scaled(seam, 0, 0.6)}),
            hidden_unless(holed, holes),
            pattern,
            paint,
            {"area": scaled(mask.mean((1, 2)), 0, 0.7)},
        )
        labels = texture + len(TEXTURES) * (mirrored + 2 * second + 4 * holed).long()
        return Drawing(images, labels, parameters)

    def _pose(
        self, generator: Generator, count: int, x: Tensor, y: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Columns]:
        angle = uniform(generator, -0.3, 0.3, count) + math.pi / 2 * whole(generator, 0, 3, count) * coin(
            generator, 0.25, count
        )
        right, up = uniform(generator, -0.15, 0.15, count), uniform(generator, -0.15, 0.15, count)
        frame = turned(x - image_like(right), y - image_like(up), angle)
        columns = {"right": scaled(right, -0.15, 0.15), "up": scaled(up, -0.15, 0.15)}
        return frame, columns | angle_columns("angle", angle)

    def _part(
        self,
        generator: Generator,
        frame: tuple[Tensor, Tensor],
        mirrored: Tensor,
        smallest: float,
        largest: float,
    ) -> tuple[Tensor, Columns]:
        """Mask (n, size, size) of one outline about the frame's origin, and its parameters."""
        count = len(mirrored)
        width = uniform(generator, smallest, largest, count)
        height = uniform(generator, smallest, largest, count)
        k = torch.arange(1, TERMS + 1)
        amplitude = torch.randn(count, TERMS, generator=generator).abs() * 0.3 / k
        phase = uniform(generator, -math.pi, math.pi, count, TERMS)
        # cos(k t) with t from the upward axis is symmetric; so are its negatives
        symmetric = math.pi * whole(generator, 0, 1, count, TERMS)
        phase = torch.where(mirrored[:, None] > 0.5, symmetric, phase)
        square = uniform(generator, 2.0, 6.0, count)
        x, y = frame[0] / image_like(width), frame[1] / image_like(height)
        angle = torch.atan2(x, y)
        waves = torch.cos(angle[:, None] * k[:, None, None] + phase[:, :, None, None])
        reach = (1 + (amplitude[:, :, None, None] * waves).sum(1)).clamp(min=0.15)
        power = image_like(square)
        radius = ((x.abs() + 1e-6) ** power + (y.abs() + 1e-6) ** power) ** (1 / power)
        mask = soft_step((reach - radius) * image_like(torch.minimum(width, height)), self.size)
        columns = {
            "width": scaled(width, smallest, largest),
            "height": scaled(height, smallest, largest),
            "square": scaled(square, 2, 6),
        }
        for i in range(TERMS):
            columns[f"cos {i + 1}"] = amplitude[:, i] * torch.cos(phase[:, i]) * 3 * (i + 1)
            columns[f"sin {i + 1}"] = amplitude[:, i] * torch.sin(phase[:, i]) * 3 * (i + 1)
        return mask, columns

    def _limbs(
        self, generator: Generator, frame: tuple[Tensor, Tensor], mirrored: Tensor
    ) -> tuple[Tensor, Columns]:
        """A long second part, repeated on the other side where the drawing is mirrored."""
        count = len(mirrored)
        right, up = uniform(generator, 0.1, 0.7, count), uniform(generator, -0.6, 0.6, count)
        angle = uniform(generator, -1.2, 1.2, count)
        length, thick = uniform(generator, 0.2, 0.8, count), uniform(generator, 0.06, 0.25, count)
        side = torch.where(mirrored[:, None, None] > 0.5, frame[0].abs(), frame[0])
        x, y = turned(side - image_like(right), frame[1] - image_like(up), angle)
        radius = torch.hypot(x / image_like(thick), y / image_like(length))
        mask = soft_step((1 - radius) * image_like(thick), self.size)
        columns = {
            "limb right": scaled(right, 0.1, 0.7),
            "limb up": scaled(up, -0.6, 0.6),
            "limb length": scaled(length, 0.2, 0.8),
            "limb thick": scaled(thick, 0.06, 0.25),
        }
        return mask, columns | angle_columns("limb angle", angle, 2)

    def _hole(
        self, generator: Generator, frame: tuple[Tensor, Tensor], mirrored: Tensor
    ) -> tuple[Tensor, Columns]:
        count = len(mirrored)
        right = uniform(generator, -0.4, 0.4, count) * (1 - mirrored)
        up = uniform(generator, -0.5, 0.5, count)
        width, height = uniform(generator, 0.08, 0.35, count), uniform(generator, 0.08, 0.35, count)
        radius = torch.hypot(
            (frame[0] - image_like(right)) / image_like(width),
            (frame[1] - image_like(up)) / image_like(height),
        )
        columns = {
            "hole right": scaled(right, -0.4, 0.4),
            "hole up": scaled(up, -0.5, 0.5),
            "hole width": scaled(width, 0.08, 0.35),
            "hole height": scaled(height, 0.08, 0.35),
        }
        return soft_step((1 - radius) * image_like(torch.minimum(width, height)), self.size), columns

    def _inside(
        self, generator: Generator, frame: tuple[Tensor, Tensor], texture: Tensor
    ) -> tuple[Tensor, Columns]:
        """Fill (n, size, size) in [0, 1] by texture number."""
        count = len(texture)
        depth = uniform(generator, 0.3, 0.9, count)
        angle = math.pi / 2 * whole(generator, 0, 1, count) + uniform(generator, -0.3, 0.3, count)
        frequency, phase = uniform(generator, 1.5, 6.0, count), uniform(generator, 0, 2 * math.pi, count)
        along = turned(*frame, angle)[0]
        wave = torch.cos(2 * math.pi * along * image_like(frequency) / 2 + image_like(phase))
        stripes = (0.5 + 1.5 * wave).clamp(0, 1)
        gradient = (0.5 + 0.7 * along).clamp(0, 1)
        cells = smooth_noise(generator, count, self.size, self.size // 3)
        patterns = torch.stack([torch.zeros_like(stripes), stripes, gradient, cells])
        chosen = patterns[texture, torch.arange(count)]
        columns = hidden_unless((texture > 0).float(), {"depth": scaled(depth, 0.3, 0.9)})
        oriented = angle_columns("texture angle", angle, 2)
        columns |= hidden_unless(((texture == 1) | (texture == 2)).float(), oriented)
        columns |= hidden_unless((texture == 1).float(), {"frequency": scaled(frequency, 1.5, 6)})
        return 1 - image_like(depth) * chosen, columns

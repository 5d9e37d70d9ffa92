"""Fractals of iterated function systems.

Follows Kataoka et al. (2020, "Pre-training without natural images", FractalDB): a class is a random system
of 2 to 8 affine maps with coefficients in [-1, 1], a map is chosen with probability proportional to its
determinant (Barnsley 1988, the chaos game), and instances of a class differ by weights on the coefficients,
rotation and reflection. Systems that fill too little of the image are rejected, as there; so are those that
fill too much.
"""

from __future__ import annotations

import math

import torch
from drawing import (
    Drawing,
    angle_columns,
    coin,
    count_parameters,
    finish,
    scaled,
    table,
    uniform,
    whole,
)
from torch import Generator, Tensor

MAPS = 8
WALKERS, BURN_IN, STEPS = 192, 10, 16
FILLED = (0.12, 0.6)


class Fractals:
    """Instances of ``classes`` fixed systems, which the public ``seed`` defines."""

    def __init__(self, size: int = 28, channels: int = 1, classes: int = 256, seed: int = 0) -> None:
        self.size, self.channels, self.num_classes = size, channels, classes
        self.systems, self.chances = self._choose(classes, torch.Generator().manual_seed(seed))
        self.num_parameters = count_parameters(self)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` fractals."""
        labels = whole(generator, 0, self.num_classes - 1, count)
        systems = self.systems[labels] * uniform(generator, 0.8, 1.2, count, 1, 6)
        angle, zoom = uniform(generator, -math.pi, math.pi, count), uniform(generator, 0.6, 0.95, count)
        mirrored = coin(generator, 0.5, count)
        points = self._play(systems, self.chances[labels], generator)
        density = self._plot(_posed(points, angle, zoom, mirrored))
        images, paint = finish(density, generator, self.channels)
        maps = (self.chances[labels] > 0).sum(1)
        shape = {
            "maps": scaled(maps, 2, MAPS),
            "filled": scaled((density > 0).float().mean((1, 2)), 0, 0.7),
            "zoom": scaled(zoom, 0.6, 0.95),
            "mirrored": scaled(mirrored, 0, 1),
        }
        averaged = systems * self.chances[labels][:, :, None]
        shape |= {f"mean coefficient {i}": 2 * averaged[:, :, i].sum(1) for i in range(6)}
        return Drawing(images, labels, table(shape, angle_columns("angle", angle), paint))

    def _choose(self, classes: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Systems (classes, MAPS, 6) and probabilities (classes, MAPS) that fill enough of an image."""
        kept: list[tuple[Tensor, Tensor]] = []
        while sum(len(s) for s, _ in kept) < classes:
            systems = uniform(generator, -1, 1, 512, MAPS, 6)
            used = torch.arange(MAPS) < whole(generator, 2, MAPS, 512)[:, None]
            a, b, _, c, d, _ = systems.unbind(2)
            weight = ((a * d - b * c).abs() + 1e-3) * used
            chances = weight / weight.sum(1, keepdim=True)
            points = self._play(systems, chances, generator)
            filled = (self._plot(points) > 0).float().mean((1, 2))
            good = (filled > FILLED[0]) & (filled < FILLED[1]) & points.isfinite().all(2).all(1)
            kept.append((systems[good], chances[good]))
        return torch.cat([s for s, _ in kept])[:classes], torch.cat([c for _, c in kept])[:classes]

    @staticmethod
    def _play(systems: Tensor, chances: Tensor, generator: Generator) -> Tensor:
        """Points (n, WALKERS * STEPS, 2) of the attractors, centred, most of them within the unit disc."""
        count = len(systems)
        point = torch.zeros(count, WALKERS, 2)
        found = []
        for step in range(BURN_IN + STEPS):
            pick = torch.multinomial(chances, WALKERS, replacement=True, generator=generator)
            a, b, e, c, d, f = systems.gather(1, pick[:, :, None].expand(-1, -1, 6)).unbind(2)
            x, y = point.unbind(2)
            point = torch.stack([a * x + b * y + e, c * x + d * y + f], 2)
            if step >= BURN_IN:
                found.append(point)
        points = torch.cat(found, 1)
        points = points - points.median(1, keepdim=True).values
        reach = points.norm(dim=2).nan_to_num(1e6, 1e6).clamp(max=1e6).quantile(0.97, 1).clamp(min=1e-6)
        return points / reach[:, None, None]

    def _plot(self, points: Tensor) -> Tensor:
        """Share of points per pixel, compressed to [0, 1]: (n, size, size)."""
        count, size = len(points), self.size
        place = (points.nan_to_num(9.0, 9.0, -9.0).clamp(-9, 9) + 1) * size / 2
        column, row = place.floor().long().unbind(2)
        inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
        index = (row.clamp(0, size - 1) * size + column.clamp(0, size - 1)) * inside
        hits = torch.zeros(count, size * size).scatter_add_(1, index, inside.float())
        return (
            (hits / (4 * hits.mean(1, keepdim=True).clamp(min=1e-6)))
            .sqrt()
            .clamp(max=1)
            .view(count, size, size)
        )


def _posed(points: Tensor, angle: Tensor, zoom: Tensor, mirrored: Tensor) -> Tensor:
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    x, y = points.unbind(2)
    x = x * (1 - 2 * mirrored)[:, None]
    return torch.stack([x * cos - y * sin, x * sin + y * cos], 2) * zoom[:, None, None]

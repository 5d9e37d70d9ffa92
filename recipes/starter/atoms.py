"""Visual atoms: nested closed curves whose radius is a sum of two waves.

Follows Takashima et al. (2023, "Visual atoms: pre-training vision transformers with sinusoidal waves"): an
image holds several orbits around a centre, ``r(t) = R + a_1 sin(n_1 t + p_1) + a_2 sin(n_2 t + p_2)``; the
class is the pair of frequencies, instances differ in amplitudes, phases, number of orbits, spacing and
thickness of lines.
"""

from __future__ import annotations

import math

import torch
from drawing import Drawing, count_parameters, finish, image_like, mesh, scaled, table, uniform, whole
from torch import Generator

ORBITS = 6


class VisualAtoms:
    """Orbits whose class is an unordered pair of frequencies below ``frequencies``: 78 classes of 12."""

    def __init__(self, size: int = 28, channels: int = 1, frequencies: int = 12) -> None:
        self.size, self.channels, self.frequencies = size, channels, frequencies
        self.pairs = torch.tensor([(i, j) for i in range(frequencies) for j in range(i + 1)])
        self.num_classes = len(self.pairs)
        self.num_parameters = count_parameters(self)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` atoms."""
        labels = whole(generator, 0, self.num_classes - 1, count)
        first, second = self.pairs[labels].unbind(1)
        right, up = uniform(generator, -0.2, 0.2, count), uniform(generator, -0.2, 0.2, count)
        stretch = uniform(generator, -0.4, 0.4, count)
        radius, spacing = uniform(generator, 0.5, 0.9, count), uniform(generator, 0.1, 0.3, count)
        orbits = whole(generator, 1, ORBITS, count)
        line = uniform(generator, 0.02, 0.08, count)
        amplitudes = uniform(generator, 0.03, 0.2, 2, count)
        phases = uniform(generator, -math.pi, math.pi, 2, count)
        x, y = mesh(self.size)
        x = (x - image_like(right)) * image_like(torch.exp(stretch / 2))
        y = (y - image_like(up)) * image_like(torch.exp(-stretch / 2))
        angle, distance = torch.atan2(y, x), torch.hypot(x, y)
        wave, slope = torch.zeros_like(angle), torch.zeros_like(angle)
        for n, a, p in zip((first, second), amplitudes, phases, strict=True):
            turn = image_like(n.float()) * angle + image_like(p)
            wave = wave + image_like(a) * torch.sin(turn)
            slope = slope + image_like(a * n) * torch.cos(turn)
        steep = torch.sqrt(1 + (slope / distance.clamp(min=0.1)) ** 2)
        ink = torch.zeros_like(angle)
        for orbit in range(ORBITS):
            scale = (radius - orbit * spacing) / radius
            gap = (distance - image_like(radius * scale) - image_like(scale) * wave).abs() / steep
            drawn = ((image_like(line) - gap) * self.size / 2 + 0.5).clamp(0, 1)
            ink = torch.maximum(ink, drawn * image_like(((orbit < orbits) & (scale > 0.1)).float()))
        images, paint = finish(ink, generator, self.channels)
        shape = {
            "right": scaled(right, -0.2, 0.2),
            "up": scaled(up, -0.2, 0.2),
            "stretch": scaled(stretch, -0.4, 0.4),
            "radius": scaled(radius, 0.5, 0.9),
            "spacing": scaled(spacing, 0.1, 0.3),
            "orbits": scaled(orbits, 1, ORBITS),
            "line": scaled(line, 0.02, 0.08),
        }
        for n in range(self.frequencies):  # amplitude by frequency: no order of the two waves to guess
            for name, wave_of in (("cos", torch.cos), ("sin", torch.sin)):
                parts = [
                    a * wave_of(p) * (f == n)
                    for f, a, p in zip((first, second), amplitudes, phases, strict=True)
                ]
                shape[f"{name} {n}"] = 5 * (parts[0] + parts[1])
        return Drawing(images, labels, table(shape, paint))

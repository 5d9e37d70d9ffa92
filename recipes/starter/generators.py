"""All generators by name, and mixtures of them."""

from __future__ import annotations

import math

import torch
from atoms import VisualAtoms
from dead_leaves import DeadLeaves
from drawing import Drawing, Sampler
from fractals import Fractals
from glyphs import CHARACTERS, GlyphSampler
from silhouettes import Silhouettes
from torch import Generator


class Characters:
    """The rendered characters of ``glyphs``; they have classes and no parameters."""

    num_classes = len(CHARACTERS)
    num_parameters = 0

    def __init__(self, size: int = 28, channels: int = 1) -> None:
        self.channels = channels
        self.glyphs = GlyphSampler(size, 0)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` characters, in grey whatever the number of channels."""
        self.glyphs.generator = generator
        images, labels = self.glyphs.batch(count)
        return Drawing(images.expand(-1, self.channels, -1, -1), labels, torch.empty(count, 0))


class Mixture:
    """Images of several generators in equal shares: classes one after the other, parameters side by side."""

    def __init__(self, samplers: list[Sampler]) -> None:
        self.samplers, self.channels = samplers, samplers[0].channels
        self.num_classes = sum(s.num_classes for s in samplers)
        self.num_parameters = sum(s.num_parameters for s in samplers)

    def __call__(self, count: int, generator: Generator) -> Drawing:
        """Draw ``count`` images, the generators one after the other within the batch."""
        images, labels = [], []
        parameters = torch.full((count, self.num_parameters), math.nan)
        done = first_class = first_column = 0
        for i, sampler in enumerate(self.samplers):
            share = count // len(self.samplers) + (i < count % len(self.samplers))
            if share > 0:
                part = sampler(share, generator)
                images.append(part.images)
                labels.append(part.labels + first_class)
                columns = slice(first_column, first_column + sampler.num_parameters)
                parameters[done : done + share, columns] = part.parameters
            done += share
            first_class += sampler.num_classes
            first_column += sampler.num_parameters
        return Drawing(torch.cat(images), torch.cat(labels), parameters)


GENERATORS = {
    "characters": Characters,
    "fractals": Fractals,
    "atoms": VisualAtoms,
    "leaves": DeadLeaves,
    "silhouettes": Silhouettes,
}


def make_sampler(name: str, size: int = 28, channels: int = 1) -> Sampler:
    """Return a generator by name; names joined by + give their mixture.

    Raises:
        ValueError: an unknown name.
    """
    names = name.split("+")
    unknown = [n for n in names if n not in GENERATORS]
    if unknown:
        raise ValueError(f"unknown generator {unknown[0]!r}; use {', '.join(GENERATORS)}, joined by + to mix")
    samplers = [GENERATORS[n](size, channels) for n in names]
    return samplers[0] if len(samplers) == 1 else Mixture(samplers)

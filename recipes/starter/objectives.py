"""What a backbone learns from synthetic images: one module per objective, each returning a mean loss.

The class token after the final norm is what later tasks read, so every objective sends gradients through it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from drawing import Drawing, Sampler, coin, uniform
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Generator, Tensor, nn

MEAN, STD = 0.25, 0.35


def normalise(images: Tensor) -> Tensor:
    """Apply the backbone's public preprocessing to images in [0, 1]."""
    return (images - MEAN) / STD


class Classes(nn.Module):
    """Cross-entropy on the generator's classes; the head is the model's own."""

    def __init__(self, model: VisionTransformer, sampler: Sampler) -> None:
        super().__init__()
        self.model = model
        if model.num_classes != sampler.num_classes:
            model.reset_classifier(sampler.num_classes)

    def forward(self, drawing: Drawing, generator: Generator) -> Tensor:
        """Mean loss of a batch."""
        logits = self.model(normalise(drawing.images))
        return F.cross_entropy(logits.float(), drawing.labels, label_smoothing=0.05)


class Parameters(nn.Module):
    """Squared error of those parameters of the renderer that apply, read off the class token."""

    def __init__(self, model: VisionTransformer, sampler: Sampler) -> None:
        super().__init__()
        if sampler.num_parameters == 0:
            raise ValueError("this generator has no parameters to regress; use another one or the classes")
        self.model = model
        width = model.embed_dim
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, sampler.num_parameters)
        )

    def forward(self, drawing: Drawing, generator: Generator) -> Tensor:
        """Mean squared error over applicable parameters, each limited to [-2, 2]."""
        found = self.head(self.model(normalise(drawing.images))).float()
        wanted = drawing.parameters.clamp(-2, 2)
        known = wanted.isfinite()
        return (found - wanted.nan_to_num(0))[known].square().mean()


class Masked(nn.Module):
    """Small masked autoencoder (He et al. 2022): most patches are dropped, one block fills them in.

    The class token takes part in the decoder, which is how it learns; the loss is on dropped patches.
    """

    def __init__(self, model: VisionTransformer, sampler: Sampler, dropped: float = 0.6) -> None:
        super().__init__()
        self.model, self.dropped = model, dropped
        self.patch = model.patch_embed.patch_size[0]
        width, narrow = model.embed_dim, model.embed_dim // 2
        tokens = model.patch_embed.num_patches
        channels = sampler.channels
        self.narrow = nn.Linear(width, narrow)
        self.absent = nn.Parameter(torch.zeros(1, 1, narrow))
        self.place = nn.Parameter(0.02 * torch.randn(1, tokens + 1, narrow))
        self.block = Block(narrow, num_heads=4)
        self.block.attn.fused_attn = False
        self.norm, self.out = nn.LayerNorm(narrow), nn.Linear(narrow, self.patch**2 * channels)

    def forward(self, drawing: Drawing, generator: Generator) -> Tensor:
        """Mean squared error of dropped pixels."""
        images = normalise(drawing.images)
        tokens = self.model._pos_embed(self.model.patch_embed(images))
        count, length = len(images), tokens.shape[1] - 1
        kept = length - round(self.dropped * length)
        order = torch.rand(count, length, generator=generator).argsort(1).to(tokens.device)
        seen = order[:, :kept, None]
        chosen = tokens[:, 1:].gather(1, seen.expand(-1, -1, tokens.shape[2]))
        inside = self.model.norm(self.model.blocks(torch.cat([tokens[:, :1], chosen], 1)))
        inside = self.narrow(inside)
        canvas = self.absent.to(inside.dtype).expand(count, length, -1)
        canvas = canvas.scatter(1, seen.expand(-1, -1, inside.shape[2]), inside[:, 1:])
        filled = self.block(torch.cat([inside[:, :1], canvas], 1) + self.place)
        found = self.out(self.norm(filled))[:, 1:].float()
        hidden = order[:, kept:, None].expand(-1, -1, found.shape[2])
        wanted = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        return (found.gather(1, hidden) - wanted.gather(1, hidden)).square().mean()


class Bottleneck(nn.Module):
    """The image, 30 % of its patches blanked, is drawn again from the class token alone.

    A denoising autoencoder (Vincent et al. 2008) whose code is what later tasks read.
    """

    def __init__(self, model: VisionTransformer, sampler: Sampler, blanked: float = 0.3) -> None:
        super().__init__()
        self.model, self.blanked = model, blanked
        size = model.patch_embed.img_size[0]
        channels = sampler.channels
        self.out = nn.Sequential(
            nn.Linear(model.embed_dim, 256), nn.GELU(), nn.Linear(256, channels * size**2)
        )

    def forward(self, drawing: Drawing, generator: Generator) -> Tensor:
        """Mean squared error of all pixels."""
        images = normalise(drawing.images)
        side = self.model.patch_embed.grid_size[0]
        blank = coin(generator, self.blanked, len(images), 1, side, side).to(images.device)
        blank = F.interpolate(blank, size=images.shape[2:], mode="nearest")
        found = self.out(self.model(images * (1 - blank))).float()
        return (found - images.flatten(1)).square().mean()


class Contrastive(nn.Module):
    """Two views of an image are to be closer than views of others (SimCLR, Chen et al. 2020)."""

    def __init__(self, model: VisionTransformer, sampler: Sampler, temperature: float = 0.2) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.head = nn.Sequential(nn.Linear(model.embed_dim, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, drawing: Drawing, generator: Generator) -> Tensor:
        """Mean cross-entropy of finding the other view among all images of the batch."""
        views = [normalise(view(drawing.images, generator)) for _ in range(2)]
        codes = F.normalize(self.head(self.model(torch.cat(views))).float(), dim=1)
        likeness = codes @ codes.T / self.temperature
        likeness = likeness.masked_fill(
            torch.eye(len(codes), dtype=torch.bool, device=codes.device), -math.inf
        )
        count = len(drawing.images)
        other = (torch.arange(2 * count, device=codes.device) + count) % (2 * count)
        return F.cross_entropy(likeness, other)


def view(images: Tensor, generator: Generator) -> Tensor:
    """Crop, stretch, shift, mirror, change contrast and add noise."""
    count = len(images)
    angle = uniform(generator, -0.2, 0.2, count)
    across, down = (uniform(generator, 0.6, 1.1, count) for _ in range(2))
    across = across * (1 - 2 * coin(generator, 0.5, count))
    right, up = (uniform(generator, -0.25, 0.25, count) for _ in range(2))
    cos, sin = torch.cos(angle), torch.sin(angle)
    maps = torch.stack([across * cos, -down * sin, right, across * sin, down * cos, up], 1).view(count, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False).to(images.device)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    power = torch.exp(uniform(generator, -0.5, 0.5, count, 1, 1, 1)).to(images.device)
    level = uniform(generator, 0.5, 1.0, count, 1, 1, 1).to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    amount = uniform(generator, 0, 0.1, count, 1, 1, 1).to(images.device)
    return (level * images.clamp(1e-4, 1) ** power + amount * noise).clamp(0, 1)


OBJECTIVES: dict[str, Any] = {
    "classes": Classes,
    "parameters": Parameters,
    "masked": Masked,
    "bottleneck": Bottleneck,
    "contrastive": Contrastive,
}

"""What turns pixels into tokens: choices of ``embed_layer`` for timm's VisionTransformer."""

from __future__ import annotations

from typing import Any

import torch
from objectives import MEAN, STD
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.scattering import CHANNELS, FLOOR, Scattering


class ConvolutionalStem(nn.Module):
    """Two convolutions of stride 2 in place of one of stride 4.

    Follows Xiao et al. (2021, "Early convolutions help transformers see better"). As many
    tokens as patches of 4 pixels. Group normalisation has no running statistics: images do not mix.
    """

    def __init__(
        self, img_size: int, patch_size: int = 4, in_chans: int = 1, embed_dim: int = 128, **_: object
    ) -> None:
        super().__init__()
        if patch_size != 4 or img_size % 4:
            raise ValueError(f"the stem has stride 4, got patches of {patch_size} in {img_size} pixels")
        self.img_size, self.patch_size = (img_size, img_size), (4, 4)
        self.grid_size = (img_size // 4, img_size // 4)
        self.num_patches = self.grid_size[0] ** 2
        hidden = embed_dim // 2
        self.layers = nn.Sequential(
            nn.Conv2d(in_chans, hidden, 5, 2, 2, bias=False),
            nn.GroupNorm(8, hidden),
            nn.GELU(),
            nn.Conv2d(hidden, embed_dim, 3, 2, 1, bias=False),
            nn.GroupNorm(8, embed_dim),
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (n, size / 4 squared, width) of images (n, c, size, size)."""
        return self.layers(images).flatten(2).transpose(1, 2)


class ScatteringStem(nn.Module):
    """Fixed log-scattering coefficients of cells of 4 pixels, and one learned linear map for all cells."""

    def __init__(
        self, img_size: int, patch_size: int = 4, in_chans: int = 1, embed_dim: int = 128, **_: object
    ) -> None:
        super().__init__()
        if patch_size != 4 or img_size % 4 or in_chans != 1:
            raise ValueError(
                f"the stem takes grey images in cells of 4, got {in_chans} channels, "
                f"{img_size} pixels and patches of {patch_size}"
            )
        self.img_size, self.patch_size = (img_size, img_size), (4, 4)
        self.grid_size = (img_size // 4, img_size // 4)
        self.num_patches = self.grid_size[0] ** 2
        self.scattering = Scattering()
        self.norm = nn.LayerNorm(CHANNELS)
        self.map = nn.Linear(CHANNELS, embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (n, size / 4 squared, width) of normalised images (n, 1, size, size)."""
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            coefficients = self.scattering(images.float() * STD + MEAN).clamp(min=0)
            logarithms = (coefficients + FLOOR).log().flatten(2).transpose(1, 2)
        return self.map(self.norm(logarithms))


STEMS: dict[str, Any] = {
    "patches": PatchEmbed,
    "convolutions": ConvolutionalStem,
    "scattering": ScatteringStem,
}


def build_model(architecture: dict[str, Any], stem: str, num_classes: int = 0) -> VisionTransformer:
    """Return a timm vision transformer with one of the stems.

    Raises:
        ValueError: an unknown stem.
    """
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; use {', '.join(STEMS)}")
    model = VisionTransformer(num_classes=num_classes, embed_layer=STEMS[stem], **architecture)
    for block in model.blocks:
        block.attn.fused_attn = False  # on CPUs the fused kernel's backward pass is the slower one
    return model

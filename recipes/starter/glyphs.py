"""Images of characters made by code alone, for pretraining the starter backbone.

Every image starts as a glyph of a font that matplotlib ships, as an outline or thinned to its skeleton (a pen
stroke), and is then distorted: affine maps, elastic fields, stroke thickness, resolution, contrast, shading
and noise. No photograph and no person's handwriting is used anywhere.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = (
    "0123456789"
    "ABCDEFGHJKLMNPQRSTUVWXYZ"
    "abdefghijmnqrty"
    "αβγδεζηθλμξπρστφχψωΓΔΘΛΞΠΣΦΨΩ"
    "БДЖИЛЦЧШЩЪЫЭЮЯ"
    "!#$%&*+-/<=>?@[]{}~^"
)
FONT_PREFIXES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmti10", "cmtt10")
CELL = 64
INNER = 46


def font_files() -> list[Path]:
    """Return the text fonts that matplotlib ships, in a fixed order."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(
        path
        for path in folder.glob("*.ttf")
        if path.name.startswith(FONT_PREFIXES) and "Display" not in path.name
    )


def render_glyph(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Return one character as a (CELL, CELL) array in [0, 1], its longer side INNER pixels long."""
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(canvas).text((-left, -top), character, fill=255, font=font)
    canvas = canvas.crop(canvas.getbbox() or (0, 0, 1, 1))
    scale = INNER / max(canvas.size)
    size = (max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale)))
    cell = Image.new("L", (CELL, CELL))
    cell.paste(canvas.resize(size, Image.Resampling.BOX), ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return np.asarray(cell, dtype=np.float32) / 255


def skeletons(images: np.ndarray) -> np.ndarray:
    """Thin binary images (n, h, w) to one-pixel strokes (Zhang and Suen 1984)."""
    ink = images > 0.5
    while True:
        before = ink.sum()
        for first in (True, False):
            ink = ink & ~_removable(ink, first)
        if ink.sum() == before:
            return ink.astype(np.float32)


def _removable(ink: np.ndarray, first: bool) -> np.ndarray:
    padded = np.pad(ink, ((0, 0), (1, 1), (1, 1)))
    height, width = ink.shape[1:]
    steps = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]
    ring = [padded[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in steps]
    north, east, south, west = ring[0], ring[2], ring[4], ring[6]
    neighbours = sum(r.astype(np.int8) for r in ring)
    rises = sum((~a & b).astype(np.int8) for a, b in zip(ring, ring[1:] + ring[:1], strict=True))
    if first:
        open_side = ~(north & east & south) & ~(east & south & west)
    else:
        open_side = ~(north & east & west) & ~(north & south & west)
    return ink & (neighbours >= 2) & (neighbours <= 6) & (rises == 1) & open_side


def build_atlas() -> tuple[torch.Tensor, torch.Tensor]:
    """Return glyph images (n, 1, CELL, CELL) in [0, 1] and their class indices (n,)."""
    images, labels = [], []
    for path in font_files():
        known = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 80)
        for label, character in enumerate(CHARACTERS):
            if ord(character) in known:
                images.append(render_glyph(font, character))
                labels.append(label)
    outlines = np.stack(images)
    strokes = F.max_pool2d(torch.from_numpy(skeletons(outlines))[:, None], 3, 1, 1)
    atlas = torch.cat([torch.from_numpy(outlines)[:, None], strokes])
    return atlas, torch.tensor(labels + labels)


class GlyphSampler:
    """Draws distorted characters in batches; equal seeds give equal images.

    `strength` in (0, 1] scales geometric distortion and noise; training may raise it over time.
    """

    def __init__(self, image_size: int, seed: int) -> None:
        self.image_size = image_size
        self.strength = 1.0
        self.generator = torch.Generator().manual_seed(seed)
        self.atlas, self.labels = build_atlas()
        self.by_class = [torch.nonzero(self.labels == c)[:, 0] for c in range(len(CHARACTERS))]

    def uniform(self, low: float, high: float, *shape: int) -> torch.Tensor:
        """Return independent uniform numbers."""
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def chance(self, probability: float, count: int) -> torch.Tensor:
        """Return `count` independent biased coins, shaped to multiply images."""
        return (torch.rand(count, 1, 1, 1, generator=self.generator) < probability).float()

    def batch(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (count, 1, s, s) in [0, 1] and class indices (count,), classes equally likely."""
        labels = torch.randint(len(CHARACTERS), (count,), generator=self.generator)
        picks = [int(self.by_class[c][self._index(len(self.by_class[c]))]) for c in labels.tolist()]
        images = self._warp(self.atlas[picks])
        images = self._thickness(images)
        images = self._resolution(images)
        return self._shade(images), labels

    def _index(self, size: int) -> int:
        return int(torch.randint(size, (1,), generator=self.generator))

    def _warp(self, images: torch.Tensor) -> torch.Tensor:
        count, side = len(images), 2 * self.image_size
        angle = self.strength * self.uniform(-0.35, 0.35, count)
        shear = self.strength * self.uniform(-0.45, 0.45, count)
        zoom = 1 + self.strength * self.uniform(-0.28, 0.25, count)
        stretch = torch.exp(self.strength * self.uniform(-0.3, 0.3, count))
        cos, sin = torch.cos(angle), torch.sin(angle)
        across, down = zoom * stretch, zoom / stretch
        rows = [
            torch.stack(
                [
                    across * cos,
                    across * (shear * cos - sin),
                    self.strength * self.uniform(-0.18, 0.18, count),
                ],
                1,
            ),
            torch.stack(
                [down * sin, down * (shear * sin + cos), self.strength * self.uniform(-0.18, 0.18, count)], 1
            ),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, side, side], align_corners=False)
        for cells, most in ((4, 0.22), (7, 0.08)):
            field = torch.randn(count, 2, cells, cells, generator=self.generator)
            field = field * self.strength * self.uniform(0.0, most, count)[:, None, None, None]
            smooth = F.interpolate(field, size=(side, side), mode="bicubic", align_corners=True)
            grid = grid + smooth.permute(0, 2, 3, 1)
        return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)

    def _thickness(self, images: torch.Tensor) -> torch.Tensor:
        thin = -F.max_pool2d(-images, 3, 1, 1)
        wide = F.max_pool2d(images, 3, 1, 1)
        wider = F.max_pool2d(wide, 3, 1, 1)
        widest = F.max_pool2d(wider, 3, 1, 1)
        levels = torch.stack([0.5 * images + 0.5 * thin, images, wide, wider, widest])
        position = self.uniform(0, 3.999, len(images))
        low = position.long()
        part = (position - low)[:, None, None, None]
        rows = torch.arange(len(images))
        return (1 - part) * levels[low, rows] + part * levels[low + 1, rows]

    def _resolution(self, images: torch.Tensor) -> torch.Tensor:
        out = F.avg_pool2d(images, 2)
        for coarse in (7, 8, 10, 14, 18):
            chosen = self.chance(0.14, len(out))[:, 0, 0, 0].bool()
            if chosen.any():
                small = F.interpolate(images[chosen], size=(coarse, coarse), mode="area")
                out[chosen] = F.interpolate(
                    small, size=(self.image_size, self.image_size), mode="bilinear", align_corners=False
                )
        return out

    def _shade(self, images: torch.Tensor) -> torch.Tensor:
        count = len(images)
        images = images / images.amax((2, 3), keepdim=True).clamp(min=0.2)
        images = images ** torch.exp(self.uniform(-0.6, 0.6, count))[:, None, None, None]
        ink = self.uniform(0.55, 1.0, count)[:, None, None, None]
        paper = self.uniform(0.0, 0.35, count)[:, None, None, None] * self.chance(0.4, count)
        tilt = F.interpolate(
            torch.rand(count, 1, 2, 2, generator=self.generator), size=images.shape[2:], mode="bilinear"
        )
        paper = paper * (0.5 + tilt)
        images = paper + (ink - paper) * images
        noise = self.strength * self.uniform(0.0, 0.12, count)[:, None, None, None] * self.chance(0.6, count)
        images = images + noise * torch.randn(images.shape, generator=self.generator)
        flip = self.chance(0.25, count)
        return (flip + (1 - 2 * flip) * images).clamp(0, 1)

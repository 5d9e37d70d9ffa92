"""A fixed scattering stem for small grey images, as the patch embedding of a timm vision transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORIENTATIONS = 8
CHANNELS = 1 + 2 * ORIENTATIONS + ORIENTATIONS**2
STRIDE = 4
FLOOR = 1e-2
"""Added to scattering coefficients of images in [0, 1] before the logarithm."""


def morlet(size: int, deviation: float, frequency: float, angle: float) -> tuple[Tensor, Tensor]:
    """Real and imaginary part (size, size) of a Morlet wavelet of zero mean.

    ``exp(-|S u|^2 / (2 deviation^2)) (exp(i frequency u_1) - c) / Z`` in coordinates u turned by the angle.
    S stretches the envelope by ORIENTATIONS/4 across the wave, c makes the mean zero, Z is the envelope's
    integral. Bruna and Mallat, "Invariant Scattering Convolution Networks" (2013), section 2.1.

    Args:
        size: odd number of taps.
        deviation: standard deviation of the envelope along the wave, in pixels.
        frequency: of the wave, in radians per pixel.
        angle: of the wave, in radians.

    >>> real, imaginary = morlet(7, 0.8, 3 * math.pi / 4, 0.0)
    >>> abs(float(real.sum())) < 1e-12, abs(float(imaginary.sum())) < 1e-12
    (True, True)
    """
    half, slant = size // 2, 4 / ORIENTATIONS
    steps = torch.arange(-half, half + 1, dtype=torch.float64)
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * deviation**2))
    real, imaginary = envelope * torch.cos(frequency * along), envelope * torch.sin(frequency * along)
    real = real - envelope * (real.sum() / envelope.sum())
    integral = 2 * math.pi * deviation**2 / slant
    return real / integral, imaginary / integral


def gaussian(size: int, deviation: float) -> Tensor:
    """A Gaussian low-pass filter (size, size) with sum one."""
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    values = torch.exp(-(steps[:, None].square() + steps.square()) / (2 * deviation**2))
    return values / values.sum()


class Scattering(nn.Module):
    """Scattering coefficients of orders 0, 1 and 2 at two scales: (n, 1, h, w) to (n, 81, h/4, w/4).

    ``S = [x, |x * a_i|, |x * b_i|, ||x * a_i| * b_j|] * g`` at every fourth pixel, with fine wavelets a,
    coarse wavelets b and a Gaussian g. No weight is learned. Wavelets and scales are those usual for J = 2
    and eight orientations (Andreux et al., "Kymatio: Scattering Transforms in Python", 2020).

    >>> Scattering()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 81, 7, 7])
    """

    def __init__(self) -> None:
        super().__init__()
        angles = [math.pi * i / ORIENTATIONS for i in range(ORIENTATIONS)]
        fine = [part for angle in angles for part in morlet(7, 0.8, 3 * math.pi / 4, angle)]
        coarse = [part for angle in angles for part in morlet(15, 1.6, 3 * math.pi / 8, angle)]
        for name, filters in (("fine", fine), ("coarse", coarse), ("low", [gaussian(15, 1.6)])):
            self.register_buffer(name, torch.stack(filters)[:, None].float(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Coefficients of images (n, 1, h, w) with sides that 4 divides."""
        first, second = self._modulus(images, self.fine), self._modulus(images, self.coarse)
        both = self._modulus(first, self.coarse)
        return self._filter(torch.cat([images, first, second, both], 1), self.low, STRIDE)

    def _modulus(self, x: Tensor, filters: Tensor) -> Tensor:
        """Absolute value of complex filters: (n, c, h, w) to (n, c * ORIENTATIONS, h, w)."""
        waves = self._filter(x, filters).unflatten(1, (-1, 2))
        return (waves.square().sum(2) + 1e-12).sqrt()

    @staticmethod
    def _filter(x: Tensor, filters: Tensor, stride: int = 1) -> Tensor:
        """Every filter on every channel, images continued by reflection: (n, c * filters, h', w')."""
        border = filters.shape[-1] // 2
        planes = F.pad(x.flatten(0, 1)[:, None], (border,) * 4, mode="reflect")
        return F.conv2d(planes, filters, stride=stride).unflatten(0, x.shape[:2]).flatten(1, 2)


class ScatteringEmbed(nn.Module):
    """Tokens of a transformer: log-scattering of a cell, normalised, through a linear map of its own.

    ``token_t = W_t (LayerNorm(log(S_t + FLOOR)) - m_t) + c``: the sum of the tokens is one linear map of all
    coefficients. Cells are 4 x 4 pixels. For timm's ``VisionTransformer(embed_layer=ScatteringEmbed)``.

    Args:
        img_size: side of the images, a multiple of 4 of at least 8.
        patch_size: 4.
        in_chans: 1.
        embed_dim: width D of the tokens.
        others: what timm passes to other stems (``bias``), of no effect here.

    Raises:
        ValueError: a size that the stem does not have.
    """

    def __init__(
        self,
        img_size: int = 28,
        patch_size: int = STRIDE,
        in_chans: int = 1,
        embed_dim: int = 512,
        **others: Any,
    ) -> None:
        super().__init__()
        if patch_size != STRIDE or in_chans != 1 or img_size % STRIDE or img_size < 8:
            raise ValueError(
                f"the scattering stem has cells of {STRIDE} pixels and one channel, for sides of 8, 12, ...; "
                f"got img_size {img_size}, patch_size {patch_size}, in_chans {in_chans}"
            )
        side = img_size // STRIDE
        self.img_size, self.grid_size = (img_size, img_size), (side, side)
        self.patch_size, self.num_patches = (STRIDE, STRIDE), side**2
        self.scattering = Scattering()
        self.centre = nn.Parameter(torch.zeros(self.num_patches, CHANNELS))
        self.weight = nn.Parameter(torch.empty(self.num_patches, CHANNELS, embed_dim))
        self.shift = nn.Parameter(torch.zeros(embed_dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def coefficients(self, images: Tensor) -> Tensor:
        """Normalised log-scattering (n, cells, 81) of images in [0, 1]."""
        logarithms = (self.scattering(images).clamp(min=0) + FLOOR).log()
        return F.layer_norm(logarithms.flatten(2).transpose(1, 2), (CHANNELS,))

    def forward(self, images: Tensor) -> Tensor:
        """Tokens (n, cells, D) of images (n, 1, h, w) in [0, 1]."""
        centred = self.coefficients(images) - self.centre
        return torch.bmm(centred.transpose(0, 1), self.weight).transpose(0, 1) + self.shift

"""Per-example gradients of the tangent layers that Opacus does not know; importing this registers them."""

from __future__ import annotations

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor, nn

from dptaft.tangent.dual_layers import TangentConstant, TangentScale


@register_grad_sampler(TangentScale)
def scale_grad_sample(
    layer: TangentScale, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Gradient of each example: the sum of x * db over all axes but the first and the last, shape (n, D)."""
    return {layer.weight: torch.einsum("n...d,n...d->nd", activations[0], backprops)}


@register_grad_sampler(TangentConstant)
def constant_grad_sample(
    layer: TangentConstant, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Gradient of each example: db itself, shape (n, ...) with the parameter's own axes."""
    return {layer.weight: backprops.reshape(len(backprops), *layer.weight.shape)}

"""Weights that are set before linearisation: the classification head, and blocks that start afresh.

Everything random here comes from a public seed: it is part of the model's description, independent of the
data.
"""

from __future__ import annotations

import torch
from timm.layers import Attention, DropPath, GluMlp, LayerNorm, LayerScale, Mlp, RmsNorm, SwiGLU
from torch import Tensor, nn

_BLOCK_STD = 0.02
_PLAIN = (Attention, DropPath, GluMlp, Mlp, SwiGLU, nn.Identity, nn.Dropout)


def random_normal(shape: tuple[int, ...], std: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Normal values of standard deviation ``std``, drawn on the CPU so that every device sees the same."""
    values = torch.randn(shape, generator=generator, dtype=torch.float32) * std
    return values.to(device=like.device, dtype=like.dtype)


@torch.no_grad()
def initialise_head(
    model: nn.Module,
    num_classes: int,
    *,
    seed: int | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> nn.Linear:
    """Give a timm model a new classification head, random from a public seed or with given weights.

    The random head has weights N(0, 1/D) and zero bias, so that logits of normalised features have unit size.
    A zero head would make the Jacobian of every block zero.

    Args:
        model: a timm model with one ``nn.Linear`` head; changed in place.
        num_classes: number of outputs C.
        seed: public seed of a random head; exactly one of ``seed`` and ``weight`` is given.
        weight: given weights (C, D).
        bias: given bias (C,), zero if left out; only with ``weight``.

    Returns:
        The new head, which is now part of the model.

    Raises:
        ValueError: if neither or both of seed and weight are given, for fewer than one class, for weights of
            another shape, or for a model whose head is not one linear layer.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    >>> initialise_head(model, 5, seed=0).weight.shape
    torch.Size([5, 192])
    """
    if (seed is None) == (weight is None) or (weight is None and bias is not None):
        raise ValueError("give the head either a public seed, or a weight (and a bias)")
    if num_classes < 1:
        raise ValueError(f"a head needs at least one class, got {num_classes}")
    if not hasattr(model, "reset_classifier"):
        raise ValueError(f"{type(model).__name__} has no reset_classifier; use a timm model")
    training = model.training
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no single linear head")
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        weight = random_normal(tuple(head.weight.shape), head.in_features**-0.5, generator, head.weight)
    if weight.shape != head.weight.shape:
        raise ValueError(f"head weight has shape {tuple(weight.shape)}, expected {tuple(head.weight.shape)}")
    if bias is not None and bias.shape != head.bias.shape:
        raise ValueError(f"head bias has shape {tuple(bias.shape)}, expected {tuple(head.bias.shape)}")
    head.weight.copy_(weight)
    head.bias.copy_(torch.zeros_like(head.bias) if bias is None else bias)
    head.train(training)
    return head


@torch.no_grad()
def reinitialise_blocks(model: nn.Module, count: int, seed: int) -> None:
    """Re-initialise the last ``count`` blocks in place: linear weights N(0, 0.02^2), zero biases, unit norms.

    The option of the TAFT paper (ICLR 2024) for backbones whose late features are biased to their source
    data. LayerScale returns to its initial value. Random values come from the public seed.

    Raises:
        ValueError: if the model has fewer blocks, or a block holds a layer this function does not know.
    """
    blocks = getattr(model, "blocks", ())
    if not 1 <= count <= len(blocks):
        raise ValueError(f"cannot re-initialise {count} blocks of a model with {len(blocks)}")
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for block in blocks[-count:] for layer in block.modules() if layer is not block]
    for layer in layers:
        if type(layer) not in (nn.Linear, LayerNorm, nn.LayerNorm, RmsNorm, LayerScale, *_PLAIN) and any(
            True for _ in layer.parameters(recurse=False)
        ):
            raise ValueError(f"no initialisation is known for {type(layer).__name__}")
    for layer in layers:
        _reset(layer, generator)


def _reset(layer: nn.Module, generator: torch.Generator) -> None:
    if isinstance(layer, LayerScale):
        layer.gamma.fill_(layer.init_values)
        return
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if weight is not None:
        if isinstance(layer, nn.Linear):
            weight.copy_(random_normal(tuple(weight.shape), _BLOCK_STD, generator, weight))
        else:
            weight.fill_(1.0)
    if bias is not None:
        bias.zero_()


def fresh_class_token(width: int, seed: int, like: Tensor) -> Tensor:
    """A class token (1, 1, D) with values N(0, 0.02^2) from a public seed."""
    return random_normal((1, 1, width), _BLOCK_STD, torch.Generator().manual_seed(seed), like)

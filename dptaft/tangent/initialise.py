"""Weights that are set before linearisation: the classification head, and blocks that start afresh.

Everything random here comes from a public seed: it is part of the model's description, independent of the
data.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, RmsNorm
from torch import Tensor, nn

_STD = 0.02
_NORMS = (LayerNorm, nn.LayerNorm, RmsNorm, nn.RMSNorm)
_ZERO = ("bias", "q_bias", "v_bias", "relative_position_bias_table")
_SCALES = ("gamma", "gamma_1", "gamma_2")


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
) -> None:
    """Give a timm model a new classification head, random from a public seed or with given weights.

    The random head has weights N(0, 1/D) and zero bias, so that logits of normalised features have unit size.
    A zero head would make the Jacobian of every block zero. A distilled model gets two random heads. Rows are
    drawn one after the other: with more classes, one head keeps the rows that it had.

    Args:
        model: a timm model with linear heads; changed in place, unless the arguments are refused.
        num_classes: number of outputs C.
        seed: public seed of a random head; exactly one of ``seed`` and ``weight`` is given.
        weight: given weights (C, D).
        bias: given bias (C,), zero if left out; only with ``weight``.

    Raises:
        ValueError: if neither or both of seed and weight are given, for fewer than one class, for weights of
            another shape, given weights for two heads, or a model without linear timm classifiers.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    >>> initialise_head(model, 5, seed=0)
    >>> model.head.weight.shape
    torch.Size([5, 192])
    """
    if (seed is None) == (weight is None) or (weight is None and bias is not None):
        raise ValueError("give the head either a public seed, or a weight (and a bias)")
    if num_classes < 1:
        raise ValueError(f"a head needs at least one class, got {num_classes}")
    if not hasattr(model, "reset_classifier") or not hasattr(model, "head_hidden_size"):
        raise ValueError(f"{type(model).__name__} has no timm classifier to replace; use a timm model")
    _check_linear(model)
    if weight is not None:
        _check_given(model, num_classes, weight, bias)
    model.reset_classifier(num_classes)
    heads = _check_linear(model)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for head in heads:
        if generator is not None:
            std = head.in_features**-0.5
            rows = [
                random_normal((head.in_features,), std, generator, head.weight) for _ in range(num_classes)
            ]
            weight = torch.stack(rows)
        head.weight.copy_(weight)
        head.bias.copy_(torch.zeros_like(head.bias) if bias is None else bias)


def _check_linear(model: nn.Module) -> tuple[nn.Module, ...]:
    """The heads of a model: linear layers, or none yet."""
    found = model.get_classifier()
    heads = found if isinstance(found, tuple) else (found,)
    for head in heads:
        if not isinstance(head, nn.Linear | nn.Identity):
            raise ValueError(
                f"{type(model).__name__} has no single linear classification head (it is a "
                f"{type(head).__name__}); choose another model"
            )
    return heads


def _check_given(model: nn.Module, num_classes: int, weight: Tensor, bias: Tensor | None) -> None:
    if isinstance(model.get_classifier(), tuple):
        raise ValueError(f"{type(model).__name__} has two heads; give a seed instead of weights")
    expected = (num_classes, model.head_hidden_size)
    if tuple(weight.shape) != expected:
        raise ValueError(f"head weight has shape {tuple(weight.shape)}, expected {expected}")
    if bias is not None and tuple(bias.shape) != (num_classes,):
        raise ValueError(f"head bias has shape {tuple(bias.shape)}, expected {(num_classes,)}")


@torch.no_grad()
def reinitialise_blocks(model: nn.Module, count: int, seed: int) -> None:
    """Re-initialise the last ``count`` blocks in place: linear weights N(0, 0.02^2), zero biases, unit norms.

    The option of the TAFT paper (ICLR 2024) for backbones whose late features are biased to their source
    data. LayerScale returns to its initial value. Random values come from the public seed.

    Raises:
        ValueError: if the model has fewer blocks, or a block holds a parameter of an unknown kind; nothing is
            changed then.
    """
    blocks = getattr(model, "blocks", ())
    if not 1 <= count <= len(blocks):
        raise ValueError(f"cannot re-initialise {count} blocks of a model with {len(blocks)}")
    generator = torch.Generator().manual_seed(seed)
    initial = [
        (parameter, _initial(layer, name, parameter, generator))
        for block in blocks[-count:]
        for layer in block.modules()
        for name, parameter in layer.named_parameters(recurse=False)
    ]
    for parameter, value in initial:
        parameter.copy_(value)


def _initial(layer: nn.Module, name: str, parameter: Tensor, generator: torch.Generator) -> Tensor:
    if name in _ZERO:
        return torch.zeros_like(parameter)
    if name in _SCALES and hasattr(layer, "init_values"):
        return torch.full_like(parameter, layer.init_values)
    if name == "weight" and type(layer) in _NORMS:
        return torch.ones_like(parameter)
    if name == "weight" and type(layer) is nn.Linear:
        return random_normal(tuple(parameter.shape), _STD, generator, parameter)
    raise ValueError(f"no initialisation is known for {name} of {type(layer).__name__}")


def fresh_class_token(width: int, seed: int, like: Tensor) -> Tensor:
    """A class token (1, 1, D) with values N(0, 0.02^2) from a public seed."""
    return random_normal((1, 1, width), _STD, torch.Generator().manual_seed(seed), like)

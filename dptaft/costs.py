"""What a model costs in a scope: trained weights, cached bytes and time per image, kind of tangent."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

import timm
import torch
from torch import nn

from dptaft.backbones import BackboneError, load_backbone
from dptaft.bundled import STARTERS
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.initialise import initialise_head
from dptaft.tangent.model import TangentModel
from dptaft.training.opacus_engine import check_private_modules

COMMON_MODELS = (
    *STARTERS,
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
)


@dataclass(frozen=True)
class ModelCost:
    """Measured on this machine with blank images and weights: the numbers depend on shapes alone.

    Attributes:
        name: model.
        image_size: side of the input in pixels.
        parameters: of the whole model.
        trained: tangent weights in scope.
        path: ``head``, ``compiled`` or ``dual`` (single pass), ``reference`` (forward-mode fallback), or why
            the scope is not supported.
        feature_bytes: cached constants per image, 0 where unsupported.
        feature_seconds: time per image to compute them.
    """

    name: str
    image_size: int
    parameters: int
    trained: int
    path: str
    feature_bytes: int
    feature_seconds: float


def find_models(pattern: str) -> list[str]:
    """Names that match a shell pattern, of timm models that have transformer blocks by their name.

    Raises:
        BackboneError: none matches.
    """
    names = [pattern] if pattern in STARTERS else timm.list_models(pattern or "-")
    if not names:
        raise BackboneError(f"no model matches {pattern!r}; try 'vit_small*'")
    return names


@torch.no_grad()
def model_cost(name: str, scope: str, num_classes: int = 10) -> ModelCost:
    """Measure one model; weights are blank, nothing is downloaded."""
    model = _blank(name, num_classes)
    parameters = sum(p.numel() for p in model.parameters())
    channels, size, _ = _input_size(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            tangent = TangentModel(model, scope)
        operator = tangent_operator(tangent)
        check_private_modules(model)
    except ValueError as error:
        return ModelCost(name, size, parameters, 0, f"not supported: {error}", 0, 0.0)
    images = torch.zeros(1, channels, size, size)
    operator.extract(tangent.boundary(images))
    started = time.perf_counter()
    features = operator.extract(tangent.boundary(images))
    elapsed = time.perf_counter() - started
    trained = sum(shape.numel() for shape in operator.parameter_shapes.values())
    path = operator.kind if tangent.is_dual else "reference"
    return ModelCost(name, size, parameters, trained, path, features.nbytes, elapsed)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        return timm.data.resolve_model_data_config(model)["input_size"]
    return (getattr(model, "in_chans", 3), *size)


def _blank(name: str, num_classes: int) -> nn.Module:
    if name in STARTERS:
        return load_backbone(name, num_classes=num_classes).model
    with torch.device("meta"):
        model = timm.create_model(name)
    model = model.to_empty(device="cpu").eval()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.zero_()
    try:
        initialise_head(model, num_classes, seed=0)
    except ValueError as error:
        raise BackboneError(f"{name}: {error}") from None
    return model

"""Where a model is cut in two: the frozen part below the linearised weights, and the part above them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.tangent.dual_layers import is_changed
from dptaft.tangent.scope import Scope, first_block

TOKEN_MODELS = (VisionTransformer, VisionTransformerDistilled, Beit, Eva)


@dataclass(frozen=True)
class Cut:
    """The boundary of the linearised part.

    Attributes:
        kind: ``images`` (everything is above), ``tokens`` (activations that enter a block) or ``features``
            (pooled activations that enter the head).
        block: index of the first block above the cut; for ``tokens`` only.
    """

    kind: Literal["images", "tokens", "features"]
    block: int | None = None


def find_cut(model: nn.Module, scope: Scope) -> Cut:
    """The highest cut that leaves all weights of the scope above it; ``images`` for an unknown model.

    Raises:
        ValueError: if the scope is deeper than the model, or counts blocks that the model does not have.
    """
    block = first_block(model, scope) if scope.depth is not None else None
    known = type(model) in TOKEN_MODELS and not is_changed(model) and not is_changed(model.blocks)
    if not known or scope.kind == "all":
        return Cut("images")
    return Cut("features") if scope.kind == "head" else Cut("tokens", block)


def rotary_embedding(model: nn.Module) -> list[Tensor | None]:
    """The rotary embedding of each block at the model's own image size, ``None`` where the model has none."""
    rope = getattr(model, "rope", None)
    if rope is None:
        return [None] * len(model.blocks)
    fixed = not model.dynamic_img_size and hasattr(rope, "feat_shape")
    embedding = rope.get_embed() if fixed else rope.get_embed(shape=model.patch_embed.grid_size)
    if getattr(model, "rope_mixed", False):
        return list(embedding)
    return [embedding] * len(model.blocks)


def _block_arguments(model: nn.Module) -> list[dict[str, Any]]:
    """What each block takes beside the tokens."""
    if type(model) is Eva:
        return [{"rope": rope} for rope in rotary_embedding(model)]
    shared = getattr(model, "rel_pos_bias", None)
    arguments = {} if shared is None else {"shared_rel_pos_bias": shared()}
    return [arguments] * len(model.blocks)


def _embed(model: nn.Module, images: Tensor) -> Tensor:
    x = model.patch_embed(images)
    if type(model) is Beit:
        x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1)
        return x if model.pos_embed is None else x + model.pos_embed
    if type(model) is Eva:
        return model.norm_pre(model._pos_embed(x)[0])
    return model.norm_pre(model.patch_drop(model._pos_embed(x)))


def _run_blocks(model: nn.Module, x: Tensor, first: int, end: int) -> Tensor:
    arguments = _block_arguments(model)
    for index in range(first, end):
        x = model.blocks[index](x, **arguments[index])
    return x


def below(model: nn.Module, cut: Cut, images: Tensor) -> Tensor:
    """Activations at the cut for a batch of images, through the model's own layers.

    Returns:
        The images themselves, tokens (n, T, D), or pooled features (n, D); for a distilled model the features
        are the class and the distillation token (n, 2, D).
    """
    if cut.kind == "images":
        return images
    if cut.kind == "tokens":
        return _run_blocks(model, _embed(model, images), 0, cut.block)
    x = model.forward_features(images)
    return x[:, :2] if type(model) is VisionTransformerDistilled else model.forward_head(x, pre_logits=True)


def boundary_axes(model: nn.Module, cut: Cut) -> int:
    """Number of axes of the boundary activations: images 4, tokens 3, pooled features 2 (distilled 3)."""
    if cut.kind == "images":
        return 4
    return 2 if cut.kind == "features" and type(model) is not VisionTransformerDistilled else 3


class Above(nn.Module):
    """The part of a model above a cut, as a function of the boundary activations.

    It runs the model's own layers. Its parameters are those of the model under the prefix ``model.``, and
    ``fresh_cls_token`` where there is one.

    Args:
        model: the whole model.
        cut: where it is cut.
        fresh_cls_token: value (1, 1, D) of a class token that replaces the first token at the cut.
    """

    def __init__(self, model: nn.Module, cut: Cut, fresh_cls_token: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.cut = cut
        value = fresh_cls_token
        self.fresh_cls_token = None if value is None else nn.Parameter(value.clone(), requires_grad=False)

    def forward(self, boundary: Tensor) -> Tensor:
        """Map boundary activations to logits (n, C)."""
        if self.cut.kind == "images":
            return self.model(boundary)
        if self.cut.kind == "features":
            distilled = type(self.model) is VisionTransformerDistilled
            return self.model.forward_head(boundary) if distilled else self.model.head(boundary)
        if self.fresh_cls_token is not None:
            fresh = self.fresh_cls_token.expand(len(boundary), -1, -1)
            boundary = torch.cat([fresh, boundary[:, 1:]], 1)
        tokens = _run_blocks(self.model, boundary, self.cut.block, len(self.model.blocks))
        return self.model.forward_head(self.model.norm(tokens))

"""Where a model is cut in two: the frozen part below the linearised weights, and the part above them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.tangent.scope import Scope, first_block

_TOKEN_MODELS = (VisionTransformer, VisionTransformerDistilled)


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
    """The highest cut that leaves all weights of the scope above it; ``images`` for an unknown kind of model.

    Raises:
        ValueError: if the scope is deeper than the model, or counts blocks that the model does not have.
    """
    block = first_block(model, scope) if scope.depth is not None else None
    if type(model) not in _TOKEN_MODELS or scope.kind == "all":
        return Cut("images")
    if scope.kind == "head":
        return Cut("features") if type(model) is VisionTransformer else Cut("tokens", len(model.blocks))
    return Cut("tokens", block)


def below(model: nn.Module, cut: Cut, images: Tensor) -> Tensor:
    """Activations at the cut for a batch of images, through the model's own layers.

    Returns:
        The images themselves, tokens (n, T, D), or pooled features (n, D).
    """
    if cut.kind == "images":
        return images
    if cut.kind == "features":
        return model.forward_head(model.forward_features(images), pre_logits=True)
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for block in model.blocks[: cut.block]:
        x = block(x)
    return x


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
            return self.model.head(boundary)
        if self.fresh_cls_token is not None:
            boundary = torch.cat([self.fresh_cls_token.expand(len(boundary), -1, -1), boundary[:, 1:]], 1)
        for block in self.model.blocks[self.cut.block :]:
            boundary = block(boundary)
        return self.model.forward_head(self.model.norm(boundary))

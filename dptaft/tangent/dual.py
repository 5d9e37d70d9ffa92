"""The single-pass tangent of a timm vision transformer: f(x; w0) and J(x) theta from one forward pass."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from dptaft.tangent.cut import TOKEN_MODELS, Cut, rotary_embedding
from dptaft.tangent.dual_attention import DualRelativeBias
from dptaft.tangent.dual_blocks import DualBlock
from dptaft.tangent.dual_layers import (
    Dual,
    DualConv2d,
    Pair,
    Tangents,
    UncoveredPartError,
    dual_norm,
    require_inactive,
    require_type,
)
from dptaft.tangent.dual_pool import DualDistilledHead, DualHead, DualReadout

_TOKENS = ("cls_token", "dist_token", "reg_token")


def dual_above(model: nn.Module, cut: Cut, tangents: Tangents) -> nn.Module:
    """The dual of everything above a cut; it maps boundary activations to logits (n, C) and J theta (n, C).

    Raises:
        UncoveredPartError: naming a part without a dual form.
    """
    require_type(model, TOKEN_MODELS, "model")
    if cut.kind != "features":
        above = DualTransformer(model, cut.block, tangents)
    elif type(model) is VisionTransformerDistilled:
        above = DualDistilledHead(model, tangents)
    else:
        above = DualHead(model, tangents)
    missing = [name for name in tangents.names if name not in tangents.parameters]
    if missing:
        raise UncoveredPartError(missing[0])
    return above


class DualEmbedding(Dual):
    """Patch embedding, class and other prefix tokens, position embedding and the norm before the blocks."""

    def __init__(self, model: nn.Module, tangents: Tangents) -> None:
        super().__init__(model)
        patches = model.patch_embed
        require_type(patches, (PatchEmbed,), "patch_embed")
        require_inactive(model, ("pos_drop", "patch_drop"), "")
        if patches.dynamic_img_pad:
            raise UncoveredPartError("patch_embed (padding to whole patches)")
        self.proj = DualConv2d(patches.proj, "patch_embed.proj", tangents)
        self.norm = dual_norm(patches.norm, "patch_embed.norm", tangents)
        self.norm_pre = dual_norm(getattr(model, "norm_pre", nn.Identity()), "norm_pre", tangents)
        self.token_names = [name for name in _TOKENS if getattr(model, name, None) is not None]
        tokens = {name: tangents.constant(getattr(model, name), name) for name in self.token_names}
        self.tokens = nn.ModuleDict(tokens)
        self.pos_embed = tangents.constant(model.pos_embed, "pos_embed")

    def forward(self, images: Tensor) -> Pair:
        """Map images (n, channels, height, width) to tokens (n, T, D) and their tangent."""
        x, dx = self.norm(*(part.flatten(2).transpose(1, 2) for part in self.proj(images)))
        if getattr(self.primal, "no_embed_class", False):
            x, dx = self._prepend(*self._positions(x, dx))
        else:
            x, dx = self._positions(*self._prepend(x, dx))
        return self.norm_pre(x, dx)

    def _positions(self, x: Tensor, dx: Tensor) -> Pair:
        if self.pos_embed is None:
            return x, dx
        return x + self.primal.pos_embed, dx + self.pos_embed(x)

    def _prepend(self, x: Tensor, dx: Tensor) -> Pair:
        tokens = [getattr(self.primal, name).expand(len(x), -1, -1) for name in self.token_names]
        moved = [self.tokens[name](x) for name in self.token_names]
        return torch.cat([*tokens, x], 1), torch.cat([*moved, dx], 1)


class DualTransformer(Dual):
    """Blocks from ``start`` on, final norm, pooling and head of a vision transformer.

    Args:
        model: the frozen model.
        start: index of the first block, or ``None`` to start from the images.
        tangents: the parameters in scope.

    Raises:
        UncoveredPartError: naming a part without a dual form.
    """

    def __init__(self, model: nn.Module, start: int | None, tangents: Tangents) -> None:
        super().__init__(model)
        self.start = start or 0
        self.embedding = DualEmbedding(model, tangents) if start is None else None
        shared = getattr(model, "rel_pos_bias", None)
        self.bias = None if shared is None else DualRelativeBias(shared, "rel_pos_bias", tangents)
        indices = range(self.start, len(model.blocks))
        self.blocks = nn.ModuleList(DualBlock(model.blocks[i], f"blocks.{i}", tangents) for i in indices)
        self.norm = dual_norm(model.norm, "norm", tangents)
        distilled = type(model) is VisionTransformerDistilled
        self.readout = DualDistilledHead(model, tangents) if distilled else DualReadout(model, tangents)

    def forward(self, boundary: Tensor) -> Pair:
        """Map boundary activations (or images) to logits (n, C) and J theta (n, C)."""
        return self.tail(boundary, None) if self.embedding is None else self.tail(*self.embedding(boundary))

    def tail(self, x: Tensor, dx: Tensor | None) -> Pair:
        """Map tokens (n, T, D) that enter the first block, and their tangent, to logits and J theta."""
        ropes = rotary_embedding(self.primal)[self.start :]
        bias = None if self.bias is None else self.bias(x)
        last = len(self.blocks) - 1
        for index, (block, rope) in enumerate(zip(self.blocks, ropes, strict=True)):
            x, dx = block(x, dx, self.readout.rows if index == last else None, rope, bias)
        return self.readout(*self.norm(x, dx))

"""The single-pass tangent of a timm vision transformer: f(x; w0) and J(x) theta from one forward pass."""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.tangent.dual_blocks import DualBlock
from dptaft.tangent.dual_layers import (
    Dual,
    DualConv2d,
    DualLinear,
    Pair,
    Tangents,
    UncoveredPartError,
    dual_norm,
    require_type,
)


class DualEmbedding(Dual):
    """Patch embedding, class and register tokens, position embedding and the norm before the blocks."""

    def __init__(self, model: VisionTransformer, tangents: Tangents) -> None:
        super().__init__(model)
        patches = model.patch_embed
        require_type(patches, (PatchEmbed,), "patch_embed")
        if not patches.flatten or patches.dynamic_img_pad or model.dynamic_img_size:
            raise UncoveredPartError("patch_embed (dynamic image size)")
        self.proj = DualConv2d(patches.proj, "patch_embed.proj", tangents)
        self.norm = dual_norm(patches.norm, "patch_embed.norm", tangents)
        self.norm_pre = dual_norm(model.norm_pre, "norm_pre", tangents)
        self.cls_token = tangents.constant(model.cls_token, "cls_token")
        self.reg_token = tangents.constant(model.reg_token, "reg_token")
        self.pos_embed = tangents.constant(model.pos_embed, "pos_embed")

    def forward(self, images: Tensor) -> Pair:
        """Map images (n, channels, height, width) to tokens (n, T, D) and their tangent."""
        x, dx = self.norm(*(part.flatten(2).transpose(1, 2) for part in self.proj(images)))
        if self.primal.no_embed_class:
            x, dx = self._prepend(*self._positions(x, dx))
        else:
            x, dx = self._positions(*self._prepend(x, dx))
        return self.norm_pre(x, dx)

    def _positions(self, x: Tensor, dx: Tensor) -> Pair:
        if self.pos_embed is None:
            return x, dx
        return x + self.primal.pos_embed, dx + self.pos_embed(x)

    def _prepend(self, x: Tensor, dx: Tensor) -> Pair:
        pairs = [(self.primal.cls_token, self.cls_token), (self.primal.reg_token, self.reg_token)]
        pairs = [(token, tangent) for token, tangent in pairs if token is not None]
        tokens = [token.expand(len(x), -1, -1) for token, _ in pairs]
        moved = [tangent(x) for _, tangent in pairs]
        return torch.cat([*tokens, x], 1), torch.cat([*moved, dx], 1)


class DualTransformer(Dual):
    """Blocks from ``start`` on, final norm, pooling and head of a ``VisionTransformer``.

    Args:
        model: the frozen model.
        start: index of the first block, or ``None`` to start from the images.
        tangents: the parameters in scope.

    Raises:
        UncoveredPartError: naming a part without a dual form.
    """

    def __init__(self, model: nn.Module, start: int | None, tangents: Tangents) -> None:
        super().__init__(model)
        require_type(model, (VisionTransformer,), "model")
        self.embedding = DualEmbedding(model, tangents) if start is None else None
        indices = range(start or 0, len(model.blocks))
        self.blocks = nn.ModuleList(DualBlock(model.blocks[i], f"blocks.{i}", tangents) for i in indices)
        if model.attn_pool is not None or model.global_pool not in ("token", "avg"):
            raise UncoveredPartError(f"pooling {model.global_pool!r}")
        self.norm = dual_norm(model.norm, "norm", tangents)
        self.fc_norm = dual_norm(model.fc_norm, "fc_norm", tangents)
        self.head = DualLinear(model.head, "head", tangents)

    def forward(self, boundary: Tensor) -> Pair:
        """Map boundary activations (or images) to logits (n, C) and J theta (n, C)."""
        return self.tail(boundary, None) if self.embedding is None else self.tail(*self.embedding(boundary))

    def tail(self, x: Tensor, dx: Tensor | None) -> Pair:
        """Map tokens (n, T, D) and their tangent to logits and J theta."""
        rows = 1 if self.primal.global_pool == "token" else None
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x, dx = block(x, dx, rows if index == last else None)
        x, dx = self.norm(x, dx)
        return self.head(*self.fc_norm(self._pool(x), None if dx is None else self._pool(dx)))

    def _pool(self, x: Tensor) -> Tensor:
        model = self.primal
        if model.global_pool == "token":
            return x[:, 0]
        return (x if model.pool_include_prefix else x[:, model.num_prefix_tokens :]).mean(1)


class DualHead(Dual):
    """The classification head alone, on pooled features: J theta = dW u + dc."""

    def __init__(self, model: nn.Module, tangents: Tangents) -> None:
        super().__init__(model)
        require_type(model, (VisionTransformer,), "model")
        self.head = DualLinear(model.head, "head", tangents)

    def forward(self, features: Tensor) -> Pair:
        """Map pooled features (n, D) to logits (n, C) and J theta (n, C)."""
        return self.head(features, None)

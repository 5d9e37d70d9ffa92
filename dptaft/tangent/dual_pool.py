"""Dual readout: from the tokens after the final norm to the logits."""

from __future__ import annotations

from timm.layers import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from torch import Tensor, nn

from dptaft.tangent.dual_attention import Rows, attend, merge_heads, split_heads
from dptaft.tangent.dual_blocks import dual_mlp
from dptaft.tangent.dual_layers import (
    Dual,
    DualLinear,
    Pair,
    Tangents,
    UncoveredPartError,
    add_pairs,
    dual_norm,
    require_inactive,
    require_type,
)


class DualAttentionPool(Dual):
    """timm's ``AttentionPoolLatent``: a learned query attends to the tokens, then a feed-forward network."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (AttentionPoolLatent,), name)
        plain = primal.pos_embed is None and primal.mlp is not None and type(primal.q) is nn.Linear
        if not plain or primal.pool != "token":
            raise UncoveredPartError(f"{name} (attention pooling with other than its usual parts)")
        require_inactive(primal, ("proj_drop",), name)
        super().__init__(primal)
        self.latent = tangents.constant(primal.latent, f"{name}.latent")
        self.q = DualLinear(primal.q, f"{name}.q", tangents)
        self.kv = DualLinear(primal.kv, f"{name}.kv", tangents)
        self.q_norm = dual_norm(primal.q_norm, f"{name}.q_norm", tangents)
        self.k_norm = dual_norm(primal.k_norm, f"{name}.k_norm", tangents)
        self.proj = DualLinear(primal.proj, f"{name}.proj", tangents)
        self.norm = dual_norm(primal.norm, f"{name}.norm", tangents)
        self.mlp = dual_mlp(primal.mlp, f"{name}.mlp", tangents)

    def forward(self, x: Tensor, dx: Tensor | None) -> Pair:
        """Map tokens (n, T, D) to pooled features (n, D)."""
        pool = self.primal
        latent = pool.latent.expand(len(x), -1, -1)
        q, dq = self.q(latent, None if self.latent is None else self.latent(x))
        kv, dkv = self.kv(x, dx)
        k, v = (split_heads(part, pool.num_heads) for part in kv.chunk(2, -1))
        dk, dv = (None, None) if dkv is None else dkv.chunk(2, -1)
        query = self.q_norm(split_heads(q, pool.num_heads), split_heads(dq, pool.num_heads))
        key = self.k_norm(k, split_heads(dk, pool.num_heads))
        value = (v, split_heads(dv, pool.num_heads))
        out, dout = attend(query, key, value, k.shape[-1] ** -0.5)
        x, dx = self.proj(merge_heads(out), merge_heads(dout))
        x, dx = add_pairs((x, dx), self.mlp(*self.norm(x, dx)))
        return x[:, 0], None if dx is None else dx[:, 0]


class DualReadout(Dual):
    """Pooling (class token, average, attention), the norm after it, and the classification head."""

    def __init__(self, model: nn.Module, tangents: Tangents) -> None:
        super().__init__(model)
        if model.global_pool not in ("token", "avg", "map"):
            raise UncoveredPartError(f"pooling {model.global_pool!r}")
        pool = getattr(model, "attn_pool", None)
        if (pool is None) == (model.global_pool == "map"):
            raise UncoveredPartError(
                f"pooling {model.global_pool!r} with attention pool {type(pool).__name__}"
            )
        self.attn_pool = None if pool is None else DualAttentionPool(pool, "attn_pool", tangents)
        self.fc_norm = dual_norm(model.fc_norm, "fc_norm", tangents)
        self.head = DualHead(model, tangents)

    @property
    def rows(self) -> Rows:
        """How many leading tokens the readout needs, ``None`` for all."""
        return 1 if self.primal.global_pool == "token" else None

    def forward(self, x: Tensor, dx: Tensor | None) -> Pair:
        """Map tokens (n, T, D) to logits (n, C) and J theta (n, C)."""
        if self.attn_pool is None:
            pooled = self._pool(x), None if dx is None else self._pool(dx)
        else:
            pooled = self.attn_pool(self._patches(x), None if dx is None else self._patches(dx))
        return self.head(*self.fc_norm(*pooled))

    def _pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.primal.global_pool == "token" else self._patches(x).mean(1)

    def _patches(self, x: Tensor) -> Tensor:
        model = self.primal
        everything = getattr(model, "pool_include_prefix", False)
        if everything or (self.attn_pool is not None and type(model) is Eva):
            return x
        return x[:, model.num_prefix_tokens :]


class DualHead(Dual):
    """The classification head on pooled features; J theta is dW u + dc plus the moved features, W u'."""

    def __init__(self, model: nn.Module, tangents: Tangents) -> None:
        super().__init__(model)
        require_inactive(model, ("head_drop",), "")
        self.head = DualLinear(model.head, "head", tangents)

    def forward(self, features: Tensor, moved: Tensor | None = None) -> Pair:
        """Map pooled features (n, D) to logits (n, C) and J theta (n, C)."""
        return self.head(features, moved)


class DualDistilledHead(Dual):
    """The mean of two heads, one on the class token and one on the distillation token."""

    rows = 2

    def __init__(self, model: VisionTransformerDistilled, tangents: Tangents) -> None:
        super().__init__(model)
        require_inactive(model, ("head_drop",), "")
        self.head = DualLinear(model.head, "head", tangents)
        self.head_dist = DualLinear(model.head_dist, "head_dist", tangents)

    def forward(self, x: Tensor, dx: Tensor | None = None) -> Pair:
        """Map class and distillation tokens, (n, 2, D), to logits (n, C) and J theta (n, C)."""
        first = self.head(x[:, 0], None if dx is None else dx[:, 0])
        second = self.head_dist(x[:, 1], None if dx is None else dx[:, 1])
        total, moved = add_pairs(first, second)
        return total / 2, None if moved is None else moved / 2

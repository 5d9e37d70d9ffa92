"""Dual self-attention of timm vision transformers: plain, rotary, with relative position bias, gated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from dptaft.tangent.dual_layers import (
    Dual,
    DualLinear,
    Pair,
    TangentConstant,
    Tangents,
    UncoveredPartError,
    add,
    add_pairs,
    dual_norm,
    dual_sigmoid,
    product,
    require_inactive,
    require_type,
)

Rows = int | None


def attend(query: Pair, key: Pair, value: Pair, scale: float, bias: Pair | None = None) -> Pair:
    """Softmax attention and its tangent.

    S = softmax(s Q K^T + B), G = s (Q' K^T + Q K'^T) + B', out = S V,
    out' = [S * G - rowsum(S * G) * S] V + S V', with * elementwise.

    Args:
        query: Q and Q', each (n, H, rows, d).
        key: K and K', each (n, H, T, d).
        value: V and V', each (n, H, T, d).
        scale: s.
        bias: B and B', broadcastable to (n, H, rows, T).

    Returns:
        out and out', each (n, H, rows, d).
    """
    (q, dq), (k, dk), (v, dv) = query, key, value
    b, db = (None, None) if bias is None else bias
    q, dq = q * scale, None if dq is None else dq * scale
    if dq is None and dk is None and dv is None and db is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=b, scale=1.0), None
    scores = q @ k.mT if b is None else q @ k.mT + b
    weights = scores.softmax(-1)
    shift = add(_score_tangent(q, dq, k, dk), db)
    moved = None
    if shift is not None:
        shift = weights * shift
        moved = (shift - weights * shift.sum(-1, keepdim=True)) @ v
    return weights @ v, add(moved, None if dv is None else weights @ dv)


def _score_tangent(q: Tensor, dq: Tensor | None, k: Tensor, dk: Tensor | None) -> Tensor | None:
    if dq is not None and dk is not None:
        return torch.cat([dq, q], -1) @ torch.cat([k, dk], -1).mT
    if dq is not None:
        return dq @ k.mT
    return None if dk is None else q @ dk.mT


def keep(a: Tensor | None, rows: Rows, axis: int = 1) -> Tensor | None:
    """The first rows along an axis, or everything where ``rows`` is ``None``."""
    return a if a is None or rows is None else a.narrow(axis, 0, rows)


def split_heads(a: Tensor | None, heads: int) -> Tensor | None:
    """Split (n, T, H d) into (n, H, T, d)."""
    return None if a is None else a.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(a: Tensor | None) -> Tensor | None:
    """Join (n, H, T, d) to (n, T, H d)."""
    return None if a is None else a.transpose(1, 2).flatten(2)


class DualFusedProjection(Dual):
    """Query, key and value from one linear layer, whose bias may be held apart (as in BEiT and EVA)."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.qkv = DualLinear(primal.qkv, f"{name}.qkv", tangents)
        self.has_bias = getattr(primal, "q_bias", None) is not None
        self.q_bias = tangents.constant(getattr(primal, "q_bias", None), f"{name}.q_bias")
        self.v_bias = tangents.constant(getattr(primal, "v_bias", None), f"{name}.v_bias")

    def forward(self, a: Tensor, da: Tensor | None) -> tuple[Pair, Pair, Pair]:
        """Map (n, T, D) to query, key and value pairs, each (n, H, T, d)."""
        out, moved = self.qkv(a, da)
        attn = self.primal
        if self.has_bias:
            out = out + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = (split_heads(part, attn.num_heads) for part in out.chunk(3, -1))
        dq, dk, dv = (None, None, None) if moved is None else moved.chunk(3, -1)
        dq, dv = self._shifted(self.q_bias, dq, a), self._shifted(self.v_bias, dv, a)
        dq, dk, dv = (split_heads(part, attn.num_heads) for part in (dq, dk, dv))
        return (q, dq), (k, dk), (v, dv)

    @staticmethod
    def _shifted(shift: TangentConstant | None, moved: Tensor | None, a: Tensor) -> Tensor | None:
        return moved if shift is None else add(moved, shift(a).expand(-1, a.shape[1], -1))


class DualSplitProjection(Dual):
    """Query, key and value from three linear layers; keys and values may have fewer heads."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.q_proj = DualLinear(primal.q_proj, f"{name}.q_proj", tangents)
        self.k_proj = DualLinear(primal.k_proj, f"{name}.k_proj", tangents)
        self.v_proj = DualLinear(primal.v_proj, f"{name}.v_proj", tangents)

    def forward(self, a: Tensor, da: Tensor | None) -> tuple[Pair, Pair, Pair]:
        """Map (n, T, D) to query (n, H, T, d), key and value pairs (n, H', T, d)."""
        heads = self.primal.num_heads
        key_heads = getattr(self.primal, "num_kv_heads", heads)
        q, dq = self.q_proj(a, da)
        k, dk = self.k_proj(a, da)
        v, dv = self.v_proj(a, da)
        return (
            (split_heads(q, heads), split_heads(dq, heads)),
            (split_heads(k, key_heads), split_heads(dk, key_heads)),
            (split_heads(v, key_heads), split_heads(dv, key_heads)),
        )


class DualRelativeBias(nn.Module):
    """BEiT's relative position bias: entries of a table (R, H), arranged as (H, T, T)."""

    def __init__(self, owner: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__()
        self._owner = (owner,)
        self.tangent = tangents.constant(
            owner.relative_position_bias_table, f"{name}.relative_position_bias_table"
        )

    def forward(self, x: Tensor) -> Pair:
        """Bias (1, H, T, T) and its tangent (n, H, T, T) for a batch of n examples."""
        index = self._owner[0].relative_position_index
        bias = self._owner[0].relative_position_bias_table[index].permute(2, 0, 1).unsqueeze(0)
        return bias, None if self.tangent is None else self.tangent(x)[:, index].permute(0, 3, 1, 2)


class DualAttention(Dual):
    """timm's self-attention: projections, optional query, key and output norms, rotation, bias and gate."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (Attention, AttentionRope, EvaAttention, BeitAttention), name)
        require_inactive(primal, ("attn_drop", "proj_drop"), name)
        if primal.scale != (primal.proj.in_features // primal.num_heads) ** -0.5:
            raise UncoveredPartError(f"{name} (attention scale {primal.scale})")
        super().__init__(primal)
        fused = getattr(primal, "qkv", None) is not None
        projection = DualFusedProjection if fused else DualSplitProjection
        self.projection = projection(primal, name, tangents)
        self.q_norm = self._norm("q_norm", name, tangents)
        self.k_norm = self._norm("k_norm", name, tangents)
        self.norm = self._norm("norm", name, tangents)
        self.proj = DualLinear(primal.proj, f"{name}.proj", tangents)
        gate = getattr(primal, "gate", None)
        self.gate = None if gate is None else DualLinear(gate, f"{name}.gate", tangents)
        has_table = getattr(primal, "relative_position_bias_table", None) is not None
        self.relative = DualRelativeBias(primal, name, tangents) if has_table else None

    def _norm(self, part: str, name: str, tangents: Tangents) -> nn.Module:
        return dual_norm(getattr(self.primal, part, nn.Identity()), f"{name}.{part}", tangents)

    def forward(
        self,
        a: Tensor,
        da: Tensor | None,
        rows: Rows = None,
        rope: Tensor | None = None,
        bias: Pair | None = None,
    ) -> Pair:
        """Map (n, T, D) to (n, T, D), or to the first ``rows`` tokens of the result.

        Args:
            a: normalised tokens.
            da: their tangent.
            rows: number of leading tokens wanted; they are prefix tokens, which rotary embeddings leave
                alone.
            rope: rotary embedding of the patch tokens.
            bias: bias of the attention scores that all blocks share, and its tangent.
        """
        (q, dq), (k, dk), (v, dv) = self.projection(a, da)
        q, dq = self.q_norm(keep(q, rows, 2), keep(dq, rows, 2))
        k, dk = self.k_norm(k, dk)
        if rope is not None:
            k, dk = self._rotate(k, rope), self._rotate(dk, rope)
        if rope is not None and rows is None:
            q, dq = self._rotate(q, rope), self._rotate(dq, rope)
        key, value = self._repeat((k, dk)), self._repeat((v, dv))
        out, dout = attend((q, dq), key, value, q.shape[-1] ** -0.5, self._bias(a, rows, bias))
        merged = self.norm(merge_heads(out), merge_heads(dout))
        if self.gate is not None:
            merged = product(merged, dual_sigmoid(*self.gate(keep(a, rows), keep(da, rows))))
        return self.proj(*merged)

    def _bias(self, a: Tensor, rows: Rows, shared: Pair | None) -> Pair | None:
        if self.relative is not None:
            own = self.relative(a)
            shared = own if shared is None else add_pairs(own, shared)
        return None if shared is None else (keep(shared[0], rows, 2), keep(shared[1], rows, 2))

    def _rotate(self, a: Tensor | None, rope: Tensor) -> Tensor | None:
        """Apply the rotation, a linear map, to all but the prefix tokens."""
        if a is None:
            return None
        prefix, half = self.primal.num_prefix_tokens, getattr(self.primal, "rotate_half", False)
        rotated = apply_rot_embed_cat(a[:, :, prefix:], rope, half=half)
        return torch.cat([a[:, :, :prefix], rotated], 2).to(a.dtype)

    def _repeat(self, pair: Pair) -> Pair:
        groups = getattr(self.primal, "num_kv_groups", 1)
        if groups == 1:
            return pair
        a, da = pair
        return a.repeat_interleave(groups, 1), None if da is None else da.repeat_interleave(groups, 1)

"""Dual attention, feed-forward networks and transformer blocks of timm vision transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dptaft.tangent.dual_layers import (
    Dual,
    DualActivation,
    DualLinear,
    Pair,
    Tangents,
    UncoveredPartError,
    add,
    dual_layer_scale,
    dual_norm,
    require_type,
)

Rows = int | None


def attend(query: Pair, key: Pair, value: Pair, scale: float, bias: Pair | None = None) -> Pair:
    """Softmax attention and its tangent.

    S = softmax(s Q K^T + B), G = s (Q' K^T + Q K'^T) + B', out = S V,
    out' = [S * (G - rowsum(S * G))] V + S V', with * elementwise.

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
    shift = _score_tangent(q, dq, k, dk)
    shift = shift if db is None else add(shift, db)
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


def split_heads(projected: Tensor | None, heads: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Split (n, T, 3 H d) into query, key and value, each (n, H, T, d)."""
    if projected is None:
        return None, None, None
    n, tokens, _ = projected.shape
    query, key, value = projected.reshape(n, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def merge_heads(attended: Tensor | None) -> Tensor | None:
    """Join (n, H, rows, d) to (n, rows, H d)."""
    return None if attended is None else attended.transpose(1, 2).flatten(2)


def keep(a: Tensor | None, rows: Rows, axis: int = 1) -> Tensor | None:
    """The first rows along an axis, or everything where ``rows`` is ``None``."""
    return a if a is None or rows is None else a.narrow(axis, 0, rows)


class DualAttention(Dual):
    """timm's ``Attention``: fused qkv projection, optional query, key and output norms, output projection."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (Attention,), name)
        if getattr(primal, "gate", None) is not None:
            raise UncoveredPartError(f"{name}.gate (gated attention)")
        super().__init__(primal)
        self.qkv = DualLinear(primal.qkv, f"{name}.qkv", tangents)
        self.q_norm = dual_norm(primal.q_norm, f"{name}.q_norm", tangents)
        self.k_norm = dual_norm(primal.k_norm, f"{name}.k_norm", tangents)
        self.norm = dual_norm(getattr(primal, "norm", nn.Identity()), f"{name}.norm", tangents)
        self.proj = DualLinear(primal.proj, f"{name}.proj", tangents)

    def forward(self, a: Tensor, da: Tensor | None, rows: Rows = None) -> Pair:
        """Map (n, T, D) to (n, T, D), or to the first ``rows`` tokens of the result."""
        projected, moved = self.qkv(a, da)
        heads = self.primal.num_heads
        (q, k, v), (dq, dk, dv) = split_heads(projected, heads), split_heads(moved, heads)
        query = self.q_norm(keep(q, rows, 2), keep(dq, rows, 2))
        out, dout = attend(query, self.k_norm(k, dk), (v, dv), self.primal.scale)
        return self.proj(*self.norm(merge_heads(out), merge_heads(dout)))


class DualMlp(Dual):
    """timm's ``Mlp``: fc1, activation, optional norm, fc2."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.fc1 = DualLinear(primal.fc1, f"{name}.fc1", tangents)
        self.act = DualActivation(primal.act, f"{name}.act")
        self.norm = dual_norm(primal.norm, f"{name}.norm", tangents)
        self.fc2 = DualLinear(primal.fc2, f"{name}.fc2", tangents)

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, T, D) to (n, T, D)."""
        return self.fc2(*self.norm(*self.act(*self.fc1(a, da))))


def product(left: Pair, right: Pair) -> Pair:
    """Elementwise product: (x y, x' y + x y')."""
    (x, dx), (y, dy) = left, right
    return x * y, add(None if dx is None else dx * y, None if dy is None else x * dy)


class DualGluMlp(Dual):
    """timm's ``GluMlp`` (packed SwiGLU): one projection whose halves are value and gate."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.fc1 = DualLinear(primal.fc1, f"{name}.fc1", tangents)
        self.act = DualActivation(primal.act, f"{name}.act")
        self.norm = dual_norm(primal.norm, f"{name}.norm", tangents)
        self.fc2 = DualLinear(primal.fc2, f"{name}.fc2", tangents)

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, T, D) to (n, T, D)."""
        hidden, moved = self.fc1(a, da)
        first, second = hidden.chunk(2, -1)
        dfirst, dsecond = (None, None) if moved is None else moved.chunk(2, -1)
        if self.primal.gate_last:
            gated = product((first, dfirst), self.act(second, dsecond))
        else:
            gated = product(self.act(first, dfirst), (second, dsecond))
        return self.fc2(*self.norm(*gated))


class DualSwiGLU(Dual):
    """timm's ``SwiGLU``: separate projections for gate and value."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.fc1_g = DualLinear(primal.fc1_g, f"{name}.fc1_g", tangents)
        self.fc1_x = DualLinear(primal.fc1_x, f"{name}.fc1_x", tangents)
        self.act = DualActivation(primal.act, f"{name}.act")
        self.norm = dual_norm(primal.norm, f"{name}.norm", tangents)
        self.fc2 = DualLinear(primal.fc2, f"{name}.fc2", tangents)

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, T, D) to (n, T, D)."""
        gated = product(self.act(*self.fc1_g(a, da)), self.fc1_x(a, da))
        return self.fc2(*self.norm(*gated))


_MLPS: dict[type, Callable[[nn.Module, str, Tangents], nn.Module]] = {
    Mlp: DualMlp,
    GluMlp: DualGluMlp,
    SwiGLU: DualSwiGLU,
}


def dual_mlp(primal: nn.Module, name: str, tangents: Tangents) -> nn.Module:
    """Dual of a feed-forward network.

    Raises:
        UncoveredPartError: for an unknown kind.
    """
    require_type(primal, tuple(_MLPS), name)
    return _MLPS[type(primal)](primal, name, tangents)


class DualBlock(Dual):
    """timm's pre-norm ``Block``: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    Where only the first ``rows`` tokens of the output are wanted (class-token pooling after the last block),
    the queries, the projection and the feed-forward network run for these rows alone.
    """

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (Block,), name)
        for part in ("drop_path1", "drop_path2"):
            require_type(getattr(primal, part), (nn.Identity, DropPath), f"{name}.{part}")
        super().__init__(primal)
        self.norm1 = dual_norm(primal.norm1, f"{name}.norm1", tangents)
        self.attn = DualAttention(primal.attn, f"{name}.attn", tangents)
        self.ls1 = dual_layer_scale(primal.ls1, f"{name}.ls1", tangents)
        self.norm2 = dual_norm(primal.norm2, f"{name}.norm2", tangents)
        self.mlp = dual_mlp(primal.mlp, f"{name}.mlp", tangents)
        self.ls2 = dual_layer_scale(primal.ls2, f"{name}.ls2", tangents)

    def forward(self, x: Tensor, dx: Tensor | None, rows: Rows = None) -> Pair:
        """Map (n, T, D) to (n, T, D), or to (n, rows, D)."""
        branch, dbranch = self.ls1(*self.attn(*self.norm1(x, dx), rows))
        x, dx = keep(x, rows) + branch, add(keep(dx, rows), dbranch)
        branch, dbranch = self.ls2(*self.mlp(*self.norm2(x, dx)))
        return x + branch, add(dx, dbranch)

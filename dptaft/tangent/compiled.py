"""Compiled tangent of the last block of a class-token transformer (scope ``last:1``).

Only the class token of the last block reaches the head, so per image everything but the normalised tokens
is a handful of vectors. The tangent of one head's attention is a product with the attention-weighted
covariance

    Cov_h = sum_j p_hj xh_j xh_j^T - m_h m_h^T,   m_h = sum_j p_hj xh_j,

applied in 2 T D multiply-adds without forming it; being symmetric it serves the transposed product too.
Linearisation as in "Tangent Transformers for Composition, Privacy and Removal" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptaft.tangent.last_block import (
    LastBlock,
    Norm,
    last_block_parameter_shapes,
    project_norm,
    read_last_block,
)
from dptaft.tangent.operator import Features, mark_finite, members_cotangents, pieces, with_members
from dptaft.tangent.rank_one import (
    Diagonal,
    Factor,
    Outer,
    gradient_grams,
    squared_gradient_norms,
    total_gradients,
)

_CHUNK_BYTES = 8 << 20
_HALF = (torch.float16, torch.bfloat16)


def covariance_product(v: Tensor, tokens: Tensor, attention: Tensor, scale: float) -> Tensor:
    """Scaled attention-weighted token covariance of each head times a vector: scale * Cov_h v_h.

    Args:
        v: (n, m, H, D) vectors.
        tokens: (n, T, D) in any floating precision; products are taken in that of ``v``.
        attention: (n, H, T), rows sum to one.
        scale: the softmax scale d^-1/2.

    Returns:
        (n, m, H, D). The map v -> result is symmetric.
    """
    n, m, heads, width = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    per_example = tokens[0].numel() * v.element_size()
    size = n if v.is_cuda else max(1, _CHUNK_BYTES // per_example)
    for start in range(0, n, size):
        part = slice(start, start + size)
        x, p = tokens[part].to(v.dtype), attention[part].to(v.dtype)[:, None]
        s = torch.bmm(v[part].reshape(-1, m * heads, width), x.transpose(1, 2)).view(len(x), m, heads, -1)
        ps = s.mul_(p)
        ps -= p * ps.sum(-1, keepdim=True)
        result = torch.bmm(ps.mul_(scale).view(len(x), m * heads, -1), x)
        out[part] = result.view(-1, m, heads, width)
    return out


def _shared(inputs: Tensor, weights: Tensor) -> Tensor:
    """(n, in) times members' (m, out, in) transposed: (n, m, out) in one product."""
    m, out, width = weights.shape
    return (inputs @ weights.reshape(m * out, width).T).view(len(inputs), m, out)


class CompiledLastBlock:
    """Exact tangent of the last block, final norm and head of a class-token timm VisionTransformer.

    The memory of one example hardly depends on the number of classes. For few classes
    :class:`~dptaft.tangent.factored.FactoredLastBlock` takes about as much memory and several times less
    time. Covers LayerScale, register tokens, a final norm before or after pooling, missing biases and the
    usual activations.

    Args:
        base: the pretrained model; its weights are read once and never modified.

    Raises:
        ValueError: naming the part of the model that is not covered; the dual operator covers it.
    """

    kind = "compiled"
    layout = "tokens"

    def __init__(self, base: nn.Module) -> None:
        self._w: LastBlock = read_last_block(base)
        self.parameter_shapes = last_block_parameter_shapes(base)
        self.num_classes = self._w.wh.shape[0]
        self.dtype = self._w.wh.dtype

    @torch.no_grad()
    def extract(self, boundary: Tensor) -> Features:
        """Per-example constants of the block input (n, T, D), the class token first.

        A half-precision boundary keeps the normalised tokens in that precision; every other constant is
        computed from the rounded tokens in float32, so that the result is the exact tangent of the network
        with those tokens.

        Raises:
            ValueError: a boundary of the wrong shape.
        """
        w = self._w
        if boundary.ndim != 3 or boundary.shape[2] != w.wq.shape[1]:
            raise ValueError(
                f"the boundary has shape {tuple(boundary.shape)}; expected (n, tokens, {w.wq.shape[1]})"
            )
        x = boundary.to(self.dtype)
        tokens = F.layer_norm(x, x.shape[-1:], eps=w.norm1.eps)
        tokens = tokens.to(boundary.dtype) if boundary.dtype in _HALF else tokens
        f = self._attention_constants(tokens)
        a1 = F.linear(f["o"], w.wp, w.bp)
        x1 = x[:, 0] + (a1 if w.ls1 is None else w.ls1 * a1)
        f |= self._tail_constants(x1) | ({} if w.ls1 is None else {"a1": a1})
        return mark_finite(f)

    def _attention_constants(self, tokens: Tensor) -> dict[str, Tensor]:
        w, xh = self._w, tokens.to(self.dtype)
        q = F.linear(w.norm1.affine(xh[:, 0]), w.wq, w.bq).unflatten(1, (w.heads, w.head_dim))
        kq = torch.einsum("nhd,hde->nhe", q, w.wk).contiguous()
        p = torch.bmm(w.norm1.gain * kq, xh.transpose(1, 2)).mul_(w.scale).softmax(-1)
        m = torch.bmm(p, xh)
        o = torch.einsum("nhe,hde->nhd", w.norm1.affine(m), w.wv).flatten(1)
        o = o if w.bv is None else o + w.bv
        return {"tokens": tokens, "q": q, "kq": kq, "p": p, "m": m, "o": o}

    def _tail_constants(self, x1: Tensor) -> dict[str, Tensor]:
        w, f = self._w, {}
        f["xh2"], f["r2"] = w.norm2.normalise(x1)
        h = F.linear(w.norm2.affine(f["xh2"]), w.w1, w.b1)
        f["act"], f["slope"] = _value_and_slope(w.act, h)
        a2 = F.linear(f["act"], w.w2, w.b2)
        u = x1 + (a2 if w.ls2 is None else w.ls2 * a2)
        if w.ls2 is not None:
            f["a2"] = a2
        if w.final is not None:
            f["xhf"], f["rf"] = w.final.normalise(u)
            u = w.final.affine(f["xhf"])
        return f | {"u": u, "logits": F.linear(u, w.wh, w.bh)}

    def constants(self, features: Features) -> dict[str, Tensor]:
        """Everything but the tokens in the compute precision."""
        kept = ("tokens", "finite")
        return {k: t if k in kept else t.to(self.dtype) for k, t in features.tensors.items()}

    def offset(self, features: Features) -> Tensor:
        """f(x_i; w0), shape (n, C)."""
        return features["logits"].to(self.dtype)

    def scalars_per_example(self, tokens: int) -> int:
        """Numbers that the constants of one example hold, for a block input of that many tokens."""
        empty = torch.zeros(1, tokens, self._w.wq.shape[1], dtype=self.dtype, device=self._w.wq.device)
        return sum(t.numel() for t in self.extract(empty).tensors.values())

    # ------------------------------------------------------------------ J theta

    @torch.no_grad()
    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """J_i theta, shape (n, C), or (m, n, C) for theta with a members axis."""
        t, batched = with_members(theta, self.parameter_shapes, self.dtype)
        f = self.constants(features)
        out = self._tail_jvp(f, t, self._attention_jvp(f, t)) * f["finite"][:, None, None]
        return out.transpose(0, 1) if batched else out[:, 0]

    def _linear_jvp(self, t: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        """The layer's own tangent dW a + db."""
        out = _shared(inputs, t[f"{name}.weight"])
        return out + t[f"{name}.bias"] if f"{name}.bias" in t else out

    def _attention_jvp(self, f: Mapping[str, Tensor], t: Mapping[str, Tensor]) -> Tensor:
        """Tangent (n, m, A) of the class token's attention output, before the projection."""
        w, name = self._w, self._w.prefix
        dgain, dshift = t[f"{name}norm1.weight"], t[f"{name}norm1.bias"]
        dwq, dwk, dwv = (
            d.unflatten(1, (w.heads, w.head_dim)) for d in t[f"{name}attn.qkv.weight"].chunk(3, 1)
        )
        xh0 = f["tokens"][:, 0].to(self.dtype)
        dq = _shared(w.norm1.affine(xh0), dwq.flatten(1, 2)) + F.linear(dgain * xh0[:, None] + dshift, w.wq)
        db = t.get(f"{name}attn.qkv.bias")
        dq = dq if db is None else dq + db.chunk(3, 1)[0]
        c = torch.einsum("nmhd,hde->nmhe", dq.unflatten(2, (w.heads, w.head_dim)), w.wk)
        c = c + torch.einsum("nhd,mhde->nmhe", f["q"], dwk)
        c = w.norm1.gain * c + dgain[:, None] * f["kq"][:, None]
        dm = covariance_product(c, f["tokens"], f["p"], w.scale)
        e = w.norm1.gain * dm + dgain[:, None] * f["m"][:, None] + dshift[:, None]
        do = torch.einsum("nmhe,hde->nmhd", e, w.wv)
        do = (do + torch.einsum("nhe,mhde->nmhd", w.norm1.affine(f["m"]), dwv)).flatten(2)
        return do if db is None else do + db.chunk(3, 1)[2]

    def _tail_jvp(self, f: Mapping[str, Tensor], t: Mapping[str, Tensor], do: Tensor) -> Tensor:
        """From the attention output's tangent to that of the logits, (n, m, C)."""
        w, name = self._w, self._w.prefix
        x = self._scaled_jvp(F.linear(do, w.wp) + self._linear_jvp(t, f"{name}attn.proj", f["o"]), f, t, 1)
        y = _norm_jvp(x, w.norm2, f["xh2"], f["r2"], t)
        h = F.linear(y, w.w1) + self._linear_jvp(t, f"{name}mlp.fc1", w.norm2.affine(f["xh2"]))
        b = F.linear(h * f["slope"][:, None], w.w2) + self._linear_jvp(t, f"{name}mlp.fc2", f["act"])
        x = x + self._scaled_jvp(b, f, t, 2)
        if w.final is not None:
            x = _norm_jvp(x, w.final, f["xhf"], f["rf"], t)
        return F.linear(x, w.wh) + self._linear_jvp(t, "head", f["u"])

    def _scaled_jvp(self, a: Tensor, f: Mapping[str, Tensor], t: Mapping[str, Tensor], which: int) -> Tensor:
        gamma = self._w.ls1 if which == 1 else self._w.ls2
        if gamma is None:
            return a
        return gamma * a + t[f"{self._w.prefix}ls{which}.gamma"] * f[f"a{which}"][:, None]

    # ------------------------------------------------------------------ J^T r

    @torch.no_grad()
    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i J_i^T r_i per parameter (a sum), with a members axis if the cotangents have one."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        totals = total_gradients(self.factors(self.constants(features), r), self.parameter_shapes)
        return totals if batched else {name: total[0] for name, total in totals.items()}

    @torch.no_grad()
    def gram(self, features: Features) -> Tensor:
        """K_i = J_i J_i^T, shape (n, C, C), from rank-one factors, in float64."""
        eye = torch.eye(self.num_classes, dtype=self.dtype, device=features["logits"].device)
        grams = []
        for part in pieces(len(features), self.num_classes * self._w.heads * self._w.wq.shape[1]):
            f = self.constants(features.index(part))
            grams.append(gradient_grams(self.factors(f, eye * f["finite"][:, None, None])))
        return torch.cat(grams)

    @torch.no_grad()
    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|J_i^T r_i|_2, shape (n,) or (m, n), from one backward pass to the layer outputs."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        norms = squared_gradient_norms(self.factors(self.constants(features), r)).sqrt()
        return norms.T if batched else norms[:, 0]

    def factors(self, f: Mapping[str, Tensor], r: Tensor) -> list[Factor]:
        """Rank-one factors of every example's gradient J_i^T r_i, for cotangents (n, m, C)."""
        factors: list[Factor] = []
        do = self._tail_factors(f, r, factors)
        self._attention_factors(f, do, factors)
        return factors

    def _linear_factors(self, name: str, inputs: Tensor, g: Tensor, out: list[Factor]) -> None:
        out.append(Outer(f"{name}.weight", self._bias(name), 0, inputs[:, None], g[:, :, None]))

    def _bias(self, name: str) -> str | None:
        return f"{name}.bias" if f"{name}.bias" in self.parameter_shapes else None

    def _tail_factors(self, f: Mapping[str, Tensor], r: Tensor, out: list[Factor]) -> Tensor:
        """Cotangent (n, m, A) of the attention output, and the factors of every layer above it."""
        w, name = self._w, self._w.prefix
        self._linear_factors("head", f["u"], r, out)
        g = r @ w.wh
        if w.final is not None:
            g = _norm_factors(g, w.final, f["xhf"], f["rf"], out)
        gb = self._scaled_factors(g, f, 2, out)
        self._linear_factors(f"{name}mlp.fc2", f["act"], gb, out)
        gh = (gb @ w.w2) * f["slope"][:, None]
        self._linear_factors(f"{name}mlp.fc1", w.norm2.affine(f["xh2"]), gh, out)
        g = g + _norm_factors(gh @ w.w1, w.norm2, f["xh2"], f["r2"], out)
        ga = self._scaled_factors(g, f, 1, out)
        self._linear_factors(f"{name}attn.proj", f["o"], ga, out)
        return ga @ w.wp

    def _scaled_factors(self, g: Tensor, f: Mapping[str, Tensor], which: int, out: list[Factor]) -> Tensor:
        gamma = self._w.ls1 if which == 1 else self._w.ls2
        if gamma is None:
            return g
        out.append(Diagonal(f"{self._w.prefix}ls{which}.gamma", None, f[f"a{which}"], g))
        return g * gamma

    def _attention_factors(self, f: Mapping[str, Tensor], do: Tensor, out: list[Factor]) -> None:
        """Factors of qkv and the first norm, for the attention output's cotangent (n, m, A)."""
        w, name = self._w, self._w.prefix
        do = do.unflatten(2, (w.heads, w.head_dim))
        xh0 = f["tokens"][:, 0].to(self.dtype)
        ge = torch.einsum("nmhd,hde->nmhe", do, w.wv)
        gc = covariance_product(w.norm1.gain * ge, f["tokens"], f["p"], w.scale)
        gk = w.norm1.gain * gc
        gq = torch.einsum("nmhe,hde->nmhd", gk, w.wk).flatten(2)
        gz = gq @ w.wq
        qkv = f"{name}attn.qkv"
        size = w.heads * w.head_dim
        out.append(Outer(f"{qkv}.weight", self._bias(qkv), 0, w.norm1.affine(xh0)[:, None], gq[:, :, None]))
        out.append(Outer(f"{qkv}.weight", None, size, f["q"], gk, constant_is_input=False))
        out.append(Outer(f"{qkv}.weight", self._bias(qkv), 2 * size, w.norm1.affine(f["m"]), do))
        gain = gz * xh0[:, None] + (gc * f["kq"][:, None] + ge * f["m"][:, None]).sum(2)
        out.append(Diagonal(f"{name}norm1.weight", None, None, gain))
        out.append(Diagonal(f"{name}norm1.bias", None, None, gz + ge.sum(2)))


def _value_and_slope(activation: nn.Module, h: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative."""
    with torch.enable_grad():
        h = h.detach().requires_grad_()
        value = activation(h)
        (slope,) = torch.autograd.grad(value.sum(), h)
    return value.detach(), slope


def _norm_jvp(x: Tensor, norm: Norm, xh: Tensor, inverse: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    """Tangent of a LayerNorm for the input's tangent ``x`` (n, m, D)."""
    moved = norm.gain * project_norm(x, xh[:, None], inverse[:, None])
    return moved + t[f"{norm.name}.weight"] * xh[:, None] + t[f"{norm.name}.bias"]


def _norm_factors(g: Tensor, norm: Norm, xh: Tensor, inverse: Tensor, out: list[Factor]) -> Tensor:
    """Cotangent of a LayerNorm's input for that of its output ``g`` (n, m, D)."""
    out.append(Diagonal(f"{norm.name}.weight", f"{norm.name}.bias", xh, g))
    return project_norm(g * norm.gain, xh[:, None], inverse[:, None])

"""Dual feed-forward networks and pre-norm transformer blocks of timm vision transformers."""

from __future__ import annotations

from collections.abc import Callable

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dptaft.tangent.dual_attention import DualAttention, Rows, keep
from dptaft.tangent.dual_layers import (
    Dual,
    DualActivation,
    DualIdentity,
    DualLinear,
    DualScale,
    Pair,
    Tangents,
    add_pairs,
    dual_layer_scale,
    dual_norm,
    product,
    require_inactive,
    require_type,
)


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
    require_inactive(primal, ("drop1", "drop2"), name)
    return _MLPS[type(primal)](primal, name, tangents)


def _branch_scale(block: nn.Module, number: int, name: str, tangents: Tangents) -> nn.Module:
    """The scale of a residual branch: a LayerScale layer in a ViT block, a bare parameter in BEiT and EVA."""
    layer, parameter = f"ls{number}", f"gamma_{number}"
    if hasattr(block, layer):
        return dual_layer_scale(getattr(block, layer), f"{name}.{layer}", tangents)
    if getattr(block, parameter) is None:
        return DualIdentity()
    return DualScale(block, parameter, f"{name}.{parameter}", tangents)


class DualBlock(Dual):
    """A pre-norm block: x + scale1(attn(norm1(x))), then x + scale2(mlp(norm2(x))).

    Where only the first ``rows`` tokens of the output are wanted (class-token pooling after the last block),
    attention has queries for these rows alone, and what follows runs on them alone.
    """

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (Block, BeitBlock, EvaBlock), name)
        require_inactive(primal, ("drop_path1", "drop_path2"), name)
        super().__init__(primal)
        self.norm1 = dual_norm(primal.norm1, f"{name}.norm1", tangents)
        self.attn = DualAttention(primal.attn, f"{name}.attn", tangents)
        self.scale1 = _branch_scale(primal, 1, name, tangents)
        self.norm2 = dual_norm(primal.norm2, f"{name}.norm2", tangents)
        self.mlp = dual_mlp(primal.mlp, f"{name}.mlp", tangents)
        self.scale2 = _branch_scale(primal, 2, name, tangents)

    def forward(
        self,
        x: Tensor,
        dx: Tensor | None,
        rows: Rows = None,
        rope: Tensor | None = None,
        bias: Pair | None = None,
    ) -> Pair:
        """Map (n, T, D) to (n, T, D), or to (n, rows, D); ``rope`` and ``bias`` go to the attention."""
        branch = self.scale1(*self.attn(*self.norm1(x, dx), rows, rope, bias))
        x, dx = add_pairs((keep(x, rows), keep(dx, rows)), branch)
        return add_pairs((x, dx), self.scale2(*self.mlp(*self.norm2(x, dx))))

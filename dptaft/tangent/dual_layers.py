"""Dual layers: each maps an activation and its tangent (a, a') to (b, b') in one pass.

The primal weights stay frozen in the layers of the original model. The trainable tangents of a layer's
parameters are an ordinary layer of the same kind, applied to the primal activation: for b = W a + c the
tangent is b' = W a' + (dW a + dc), and dW a + dc is an ``nn.Linear``. Per-example gradient hooks therefore
see every tangent.

A tangent that is zero for every input is ``None`` and costs nothing. The formulas are those of forward-mode
differentiation of the layers; tests compare each with ``torch.func.jvp``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import isfunction

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, PatchDropout, PatchDropoutWithIndices, RmsNorm
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from torch import Tensor, nn
from torch.nn.utils import skip_init

Pair = tuple[Tensor, Tensor | None]

_INACTIVE = (nn.Identity, nn.Dropout, DropPath, PatchDropout, PatchDropoutWithIndices)


class UncoveredPartError(Exception):
    """A part of the model has no dual form; the message names it."""


def add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Sum of two tangents, where ``None`` is zero."""
    if left is None or right is None:
        return right if left is None else left
    return left + right


def add_pairs(left: Pair, right: Pair) -> Pair:
    """Sum of two activations and of their tangents."""
    return left[0] + right[0], add(left[1], right[1])


def product(left: Pair, right: Pair) -> Pair:
    """Elementwise product: (x y, x' y + x y')."""
    (x, dx), (y, dy) = left, right
    return x * y, add(None if dx is None else dx * y, None if dy is None else x * dy)


def is_changed(module: nn.Module) -> bool:
    """Whether a module has hooks, or methods of its own that replace those of its class."""
    replaced = any(isfunction(getattr(type(module), name, None)) for name in vars(module))
    return replaced or bool(module._forward_hooks) or bool(module._forward_pre_hooks)


def require_type(module: nn.Module, allowed: tuple[type, ...], name: str) -> None:
    """Refuse a module whose exact type is not known, or that was changed on the instance.

    Raises:
        UncoveredPartError: naming the module and its type.
    """
    if type(module) not in allowed:
        raise UncoveredPartError(f"{name} ({type(module).__name__})")
    if is_changed(module):
        raise UncoveredPartError(f"{name} ({type(module).__name__} with a changed forward)")


def require_inactive(owner: nn.Module, parts: Iterable[str], name: str) -> None:
    """Refuse an owner with parts that are not the identity in eval mode (dropout in its forms, the identity).

    Raises:
        UncoveredPartError: naming the part and its type.
    """
    for part in parts:
        module = getattr(owner, part, None)
        if module is not None:
            require_type(module, _INACTIVE, f"{name}.{part}".lstrip("."))


class TangentScale(nn.Module):
    """x * weight along the last axis: the tangent of a scale, such as LayerScale, on its unscaled input x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x of shape (n, ..., D)."""
        return x * self.weight


class TangentConstant(nn.Module):
    """The tangent of an additive parameter (token, position embedding, bias), repeated for every example."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(weight, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Rows of the parameter, shape (n, rows, D), for a batch x of n examples (values unused)."""
        return self.weight.reshape(-1, self.weight.shape[-1]).expand(len(x), -1, -1)


class Tangents:
    """Creates the trainable tangents of the parameters in scope and remembers them by name."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.parameters: dict[str, nn.Parameter] = {}

    def wanted(self, module: nn.Module, name: str) -> bool:
        """Whether the module's own parameters are in scope.

        Raises:
            UncoveredPartError: if only some of them are.
        """
        own = [f"{name}.{local}" for local, _ in module.named_parameters(recurse=False)]
        chosen = [full in self.names for full in own]
        if any(chosen) and not all(chosen):
            raise UncoveredPartError(f"{name} (only some of its parameters are in scope)")
        return any(chosen)

    def like(self, primal: nn.Module, name: str, create: Callable[[], nn.Module]) -> nn.Module | None:
        """A layer of zero tangents with the primal layer's parameter names, or ``None`` out of scope."""
        if not self.wanted(primal, name):
            return None
        tangent = create()
        for local, parameter in tangent.named_parameters():
            nn.init.zeros_(parameter)
            self.parameters[f"{name}.{local}"] = parameter
        return tangent

    def constant(self, parameter: Tensor | None, name: str) -> TangentConstant | None:
        """Zero tangent of an additive parameter, or ``None`` when it is absent or out of scope."""
        if parameter is None or name not in self.names:
            return None
        tangent = TangentConstant(parameter)
        self.parameters[name] = tangent.weight
        return tangent

    def scale(self, parameter: Tensor | None, name: str) -> TangentScale | None:
        """Zero tangent of a scale parameter, or ``None`` when it is absent or out of scope."""
        if parameter is None or name not in self.names:
            return None
        tangent = TangentScale(parameter)
        self.parameters[name] = tangent.weight
        return tangent


class Dual(nn.Module):
    """A dual layer; it refers to the primal layer without owning it, so weights are stored once."""

    def __init__(self, primal: nn.Module) -> None:
        super().__init__()
        self._primal = (primal,)

    @property
    def primal(self) -> nn.Module:
        """The frozen layer of the original model."""
        return self._primal[0]

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map an activation and its tangent to those of the layer's output."""
        raise NotImplementedError


class DualIdentity(nn.Module):
    """The identity, and layers that are the identity in eval mode (dropout, drop-path)."""

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Return the pair unchanged."""
        return a, da


class DualLinear(Dual):
    """b = W a + c and b' = W a' + dW a + dc, for inputs of shape (n, ..., in) with at most 3 axes."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (nn.Linear,), name)
        super().__init__(primal)
        self.tangent = tangents.like(primal, name, lambda: _linear_like(primal))

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, ..., in) to (n, ..., out)."""
        moved = None if da is None else F.linear(da, self.primal.weight)
        trained = None if self.tangent is None else self.tangent(a)
        return F.linear(a, self.primal.weight, self.primal.bias), add(trained, moved)


def _linear_like(primal: nn.Linear) -> nn.Linear:
    weight = primal.weight
    bias = primal.bias is not None
    return skip_init(
        nn.Linear,
        primal.in_features,
        primal.out_features,
        bias=bias,
        device=weight.device,
        dtype=weight.dtype,
    )


class DualConv2d(Dual):
    """A convolution of the input images, which carry no tangent: b' = dW x + dc."""

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        require_type(primal, (nn.Conv2d,), name)
        super().__init__(primal)
        self.tangent = tangents.like(primal, name, lambda: _conv_like(primal))

    def forward(self, a: Tensor, da: Tensor | None = None) -> Pair:
        """Map images (n, channels, height, width) to the feature map and its tangent."""
        return self.primal(a), None if self.tangent is None else self.tangent(a)


def _conv_like(primal: nn.Conv2d) -> nn.Conv2d:
    shape = (primal.in_channels, primal.out_channels, primal.kernel_size, primal.stride, primal.padding)
    return skip_init(
        nn.Conv2d,
        *shape,
        dilation=primal.dilation,
        groups=primal.groups,
        padding_mode=primal.padding_mode,
        bias=primal.bias is not None,
        device=primal.weight.device,
        dtype=primal.weight.dtype,
    )


class DualLayerNorm(Dual):
    """LayerNorm over the last axis.

    With r = 1/sqrt(var + eps) and xh = (x - mean) r:
    out' = dgamma * xh + dbeta + gamma * r * (x' - mean(x') - xh * mean(xh * x')).
    """

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.tangent = tangents.like(primal, name, lambda: _layer_norm_like(primal))

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, ..., D) to the same shape."""
        norm = self.primal
        out, mean, r = torch.native_layer_norm(a, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        if da is None and self.tangent is None:
            return out, None
        trained = None
        if isinstance(self.tangent, nn.LayerNorm):
            trained = self.tangent(a)
        if da is None and trained is not None:
            return out, trained
        xh = (a - mean) * r
        if isinstance(self.tangent, TangentScale):
            trained = self.tangent(xh)
        moved = None
        if da is not None:
            moved = (da - da.mean(-1, keepdim=True) - xh * (xh * da).mean(-1, keepdim=True)) * r
            moved = moved if norm.weight is None else moved * norm.weight
        return out, add(trained, moved)


def _layer_norm_like(primal: nn.LayerNorm) -> nn.Module:
    if primal.bias is None:  # per-example gradient hooks of nn.LayerNorm need a bias
        return TangentScale(primal.weight)
    weight = primal.weight
    return nn.LayerNorm(primal.normalized_shape, eps=primal.eps, device=weight.device, dtype=weight.dtype)


class DualRmsNorm(Dual):
    """RMSNorm over the last axis.

    With r = 1/sqrt(mean(x^2) + eps) and xh = x r:
    out' = dgamma * xh + gamma * r * (x' - xh * mean(xh * x')).
    """

    def __init__(self, primal: nn.Module, name: str, tangents: Tangents) -> None:
        super().__init__(primal)
        self.tangent = tangents.like(primal, name, lambda: TangentScale(primal.weight))

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, ..., D) to the same shape."""
        norm = self.primal
        eps = torch.finfo(a.dtype).eps if norm.eps is None else norm.eps
        r = torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)
        xh = a * r
        trained = None if self.tangent is None else self.tangent(xh)
        moved = None
        if da is not None:
            moved = (da - xh * (xh * da).mean(-1, keepdim=True)) * r
            moved = moved if norm.weight is None else moved * norm.weight
        return xh if norm.weight is None else xh * norm.weight, add(trained, moved)


def dual_norm(primal: nn.Module, name: str, tangents: Tangents) -> nn.Module:
    """Dual of a normalisation layer over the last axis, or of the identity.

    Raises:
        UncoveredPartError: for another kind of normalisation.
    """
    require_type(primal, (nn.Identity, nn.LayerNorm, TimmLayerNorm, RmsNorm, nn.RMSNorm), name)
    if type(primal) is nn.Identity:
        return DualIdentity()
    if len(primal.normalized_shape) != 1:
        raise UncoveredPartError(f"{name} (normalises over several axes)")
    if type(primal) in (RmsNorm, nn.RMSNorm):
        return DualRmsNorm(primal, name, tangents)
    return DualLayerNorm(primal, name, tangents)


class DualScale(nn.Module):
    """b = gamma * a and b' = gamma * a' + dgamma * a; ``owner`` holds gamma under the name ``attribute``."""

    def __init__(self, owner: nn.Module, attribute: str, name: str, tangents: Tangents) -> None:
        super().__init__()
        self._owner = (owner, attribute)
        self.tangent = tangents.scale(getattr(owner, attribute), name)

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Map (n, ..., D) to the same shape."""
        gamma = getattr(*self._owner)
        trained = None if self.tangent is None else self.tangent(a)
        return a * gamma, add(trained, None if da is None else da * gamma)


def dual_layer_scale(primal: nn.Module, name: str, tangents: Tangents) -> nn.Module:
    """Dual of timm's LayerScale, or of the identity.

    Raises:
        UncoveredPartError: for another layer.
    """
    require_type(primal, (nn.Identity, LayerScale), name)
    if type(primal) is nn.Identity:
        return DualIdentity()
    return DualScale(primal, "gamma", f"{name}.gamma", tangents)


def _gelu(a: Tensor, da: Tensor | None, approximate: str) -> Pair:
    slope = None if da is None else torch.ops.aten.gelu_backward(da, a, approximate=approximate)
    return F.gelu(a, approximate=approximate), slope


def _quick_gelu(a: Tensor, da: Tensor | None) -> Pair:
    gate = torch.sigmoid(1.702 * a)
    return a * gate, None if da is None else da * (gate + 1.702 * a * gate * (1 - gate))


def _silu(a: Tensor, da: Tensor | None) -> Pair:
    gate = torch.sigmoid(a)
    return a * gate, None if da is None else da * (gate + a * gate * (1 - gate))


def dual_sigmoid(a: Tensor, da: Tensor | None) -> Pair:
    """The logistic function and its tangent."""
    out = torch.sigmoid(a)
    return out, None if da is None else da * (out * (1 - out))


class DualActivation(nn.Module):
    """phi(a) and phi'(a) * a' for GELU (exact, tanh, quick), SiLU and the sigmoid.

    The derivative of GELU is Phi(x) + x phi(x); gelu(x)/x is another function.

    Raises:
        UncoveredPartError: at construction, for another activation.
    """

    def __init__(self, primal: nn.Module, name: str) -> None:
        super().__init__()
        require_type(primal, (nn.GELU, GELU, GELUTanh, QuickGELU, nn.SiLU, nn.Sigmoid), name)
        self.kind = type(primal)
        self.approximate = "tanh" if self.kind is GELUTanh else getattr(primal, "approximate", "none")

    def forward(self, a: Tensor, da: Tensor | None) -> Pair:
        """Apply elementwise."""
        if self.kind is QuickGELU:
            return _quick_gelu(a, da)
        if self.kind is nn.SiLU:
            return _silu(a, da)
        if self.kind is nn.Sigmoid:
            return dual_sigmoid(a, da)
        return _gelu(a, da, self.approximate)

"""Jacobians of unit norm: the bound that keeps a multi-class loss convex where clipping gradients would not.

Clipping the gradient of a loss with several outputs makes the training step expansive. Here the model itself
is bounded instead: the Jacobian J_i of every example is divided by its own largest singular value,

    logits_i(theta) = f0_i + s_i J_i theta,    s_i = 1/|J_i|,    |J_i|^2 = largest eigenvalue of J_i J_i^T.

This is a fixed rescaling of each input, like normalising a feature vector: the logits stay affine in theta,
no gradient exceeds the loss' own constants, and no bound has to be chosen. It belongs to the model, so it is
applied in training and in prediction alike, and to each example by itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dptaft.tangent.operator import Features, TangentOperator

SCALE = "unit_scale"
ROUNDING = 2.0**-12
"""Allowance for float32 rounding: no rescaled Jacobian, as it is computed, has a norm above 1 + ROUNDING."""


_SMALLEST = 2.0**-200
"""Least squared norm that is scaled: float32 holds products with smaller Jacobians to a few bits only."""


def unit_scales(grams: Tensor) -> Tensor:
    """``1/sqrt(largest eigenvalue)`` of each Gram matrix; 0 where it is zero (nearly) or not finite.

    Args:
        grams: K_i = J_i J_i^T, (n, C, C), symmetric.

    Returns:
        (n,) in float64.

    Example:
        >>> unit_scales(torch.diag_embed(torch.tensor([[4.0, 1.0], [0.0, 0.0]]))).tolist()
        [0.5, 0.0]
    """
    wide = grams.double()
    finite = torch.isfinite(wide).flatten(1).all(1)
    safe = torch.where(finite[:, None, None], wide, torch.zeros_like(wide))
    largest = torch.linalg.eigvalsh(safe)[:, -1].clamp(min=0.0)
    return torch.where(largest > _SMALLEST, largest.rsqrt(), 0.0)


class BoundedOperator:
    """A tangent operator whose example Jacobians all have operator norm 1 (0 where the inner one is 0).

    Args:
        inner: operator of the unbounded model; offsets are left as they are.

    Formal guarantees:
        The norm of every J_i, as jvp and vjp apply it, is at most ``1 + ROUNDING``: the scale comes from the
        exact largest eigenvalue of the constant Gram in float64, and the products are within a few float32
        roundings of that Jacobian. For a loss whose cotangents have norm at most G and whose Hessian by the
        logits has eigenvalues at most H, each example's gradient has norm at most ``G (1 + ROUNDING)`` and
        its smoothness is at most ``H (1 + ROUNDING)^2``.
    """

    def __init__(self, inner: TangentOperator) -> None:
        self.inner = inner
        self.kind, self.num_classes = inner.kind, inner.num_classes
        self.parameter_shapes = inner.parameter_shapes
        self.layout = f"unit {getattr(inner, 'layout', '')}"

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the products."""
        return self.inner.dtype

    @torch.no_grad()
    def extract(self, boundary: Tensor) -> Features:
        """The inner operator's constants, and the scale of each example."""
        features = self.inner.extract(boundary)
        scales = unit_scales(self.inner.gram(features))
        return Features(dict(features.tensors) | {SCALE: scales.to(self.dtype)})

    def offset(self, features: Features) -> Tensor:
        """f(x_i; w0), shape (n, C), not rescaled."""
        return self.inner.offset(features)

    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """s_i J_i theta, shape (n, C) or (m, n, C)."""
        return self.inner.jvp(features, theta) * features[SCALE].unsqueeze(-1)

    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i s_i J_i^T r_i (a sum, not a mean)."""
        return self.inner.vjp(features, self._scaled(features, cotangents))

    def gram(self, features: Features) -> Tensor:
        """s_i^2 J_i J_i^T, shape (n, C, C), in float64: eigenvalues at most 1."""
        return self.inner.gram(features) * features[SCALE].double().square()[:, None, None]

    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|s_i J_i^T r_i|, shape (n,) or (m, n)."""
        return self.inner.gradient_norms(features, self._scaled(features, cotangents))

    def _scaled(self, features: Features, cotangents: Tensor) -> Tensor:
        return cotangents * features[SCALE].unsqueeze(-1)

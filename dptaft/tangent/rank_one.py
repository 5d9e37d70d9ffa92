"""Per-example gradients kept as rank-one factors, and the three contractions that training needs.

In the compiled tangent path the gradient of one example with respect to a weight matrix is an outer product
(per head for the attention projections), so its squared norm is a product of two squared vector norms and a
weighted sum over examples is one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Gradient of some rows of a weight matrix: for group g the outer product of a constant and a cotangent.

    Args:
        parameter: name of the parameter.
        constant: (n, G, a), independent of the cotangents.
        cotangent: (n, m, G, b), linear in the cotangents.
        constant_is_input: whether the constant belongs to the columns (the layer's input) or to the
            rows (its output).
    """

    parameter: str
    constant: Tensor
    cotangent: Tensor
    constant_is_input: bool = True

    def total(self) -> Tensor:
        """Sum over examples, (m, G * out, in)."""
        n, m, groups, b = self.cotangent.shape
        a = self.constant.shape[-1]
        rows = self.cotangent.permute(2, 1, 3, 0).reshape(groups, m * b, n)
        product = torch.bmm(rows, self.constant.transpose(0, 1)).view(groups, m, b, a)
        if self.constant_is_input:
            return product.transpose(0, 1).reshape(m, groups * b, a)
        return product.permute(1, 0, 3, 2).reshape(m, groups * a, b)

    def gram(self) -> Tensor:
        """Inner products of the gradients of one example under its m cotangents, (n, m, m)."""
        weight = self.constant.square().sum(-1)
        scaled = self.cotangent * weight[:, None, :, None]
        return torch.bmm(scaled.flatten(2), self.cotangent.flatten(2).transpose(1, 2))

    def squared_norms(self) -> Tensor:
        """Squared gradient norm of every example and member, (n, m)."""
        return torch.einsum("ng,nmg->nm", self.constant.square().sum(-1), self.cotangent.square().sum(-1))


@dataclass(frozen=True)
class Direct:
    """Gradient of (rows of) a vector parameter, itself: (n, m, size)."""

    parameter: str
    value: Tensor

    def total(self) -> Tensor:
        """Sum over examples, (m, size)."""
        return self.value.sum(0)

    def gram(self) -> Tensor:
        """Inner products of the gradients of one example under its m cotangents, (n, m, m)."""
        return torch.bmm(self.value, self.value.transpose(1, 2))

    def squared_norms(self) -> Tensor:
        """Squared gradient norm of every example and member, (n, m)."""
        return self.value.square().sum(-1)


Factor = Outer | Direct


def total_gradients(factors: Sequence[Factor]) -> dict[str, Tensor]:
    """Sum over examples per parameter, (m, *shape); the factors of one parameter are its rows in order."""
    rows: dict[str, list[Tensor]] = {}
    for factor in factors:
        rows.setdefault(factor.parameter, []).append(factor.total())
    return {name: torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for name, parts in rows.items()}


def gradient_grams(factors: Sequence[Factor]) -> Tensor:
    """Gram matrices (n, m, m) of the full gradients: the sum over parameters."""
    return torch.stack([factor.gram() for factor in factors]).sum(0)


def squared_gradient_norms(factors: Sequence[Factor]) -> Tensor:
    """Squared norms (n, m) of the full gradients: the sum over parameters."""
    return torch.stack([factor.squared_norms() for factor in factors]).sum(0)

"""Per-example gradients kept as rank-one factors, and the contractions that training needs.

In the compiled tangent path the gradient of one example with respect to a weight matrix is an outer product
(per head for the attention projections): a constant of the example times a cotangent that is linear in the
loss gradient. So its squared norm is a product of two squared vector norms, a weighted sum over examples is
one matrix product, and the tangent of the logits is one matrix product followed by inner products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Gradient of rows of a weight matrix: for group g the outer product of a constant and a cotangent.

    Groups are consecutive rows. With ``constant_is_input`` the constant belongs to the columns (it is the
    layer's input) and the cotangent to the rows, whose bias, if any, has the cotangent itself as gradient.
    Otherwise the constant belongs to the rows and there is no bias gradient.

    Args:
        weight: name of the parameter.
        bias: name of the bias parameter, or None.
        start: first row of the block.
        constant: (n, G, a), independent of the cotangents.
        cotangent: (n, m, G, b), linear in the cotangents.
        constant_is_input: see above.
    """

    weight: str
    bias: str | None
    start: int
    constant: Tensor
    cotangent: Tensor
    constant_is_input: bool = True

    @property
    def rows(self) -> slice:
        """The rows of the weight (and entries of the bias) that the block covers."""
        vectors = self.cotangent if self.constant_is_input else self.constant
        return slice(self.start, self.start + vectors.shape[-2] * vectors.shape[-1])

    def push(self, theta: Mapping[str, Tensor], out: Tensor) -> None:
        """Write what pairs with the cotangent to give theta's tangent to ``out`` (n, m, G, b)."""
        groups = self.constant.shape[1]
        block = theta[self.weight][:, self.rows].unflatten(1, (groups, -1))
        if groups == 1 and len(block) == 1 and self.constant_is_input:
            torch.mm(self.constant[:, 0], block[0, 0].T, out=out[:, 0, 0])
        else:
            if self.constant_is_input:
                columns = block.transpose(0, 1).flatten(1, 2).transpose(1, 2)
            else:
                columns = block.permute(1, 2, 0, 3).flatten(2)
            product = torch.bmm(self.constant.transpose(0, 1), columns)
            out.copy_(product.unflatten(2, (len(block), -1)).permute(1, 2, 0, 3))
        if self.bias is not None:
            out += theta[self.bias][:, self.rows].unflatten(1, (groups, -1))

    def add_total(self, out: Mapping[str, Tensor]) -> None:
        """Write the sum over examples into the rows of ``out`` (m, *shape)."""
        groups = self.constant.shape[1]
        constant = self.constant.transpose(0, 1)
        for i, target in enumerate(out[self.weight][:, self.rows]):
            cotangent = self.cotangent[:, i].transpose(0, 1)
            left, right = (cotangent, constant) if self.constant_is_input else (constant, cotangent)
            if groups == 1:
                torch.mm(left[0].T, right[0], out=target)
            else:
                torch.bmm(left.transpose(1, 2), right, out=target.unflatten(0, (groups, -1)))
        if self.bias is not None:
            torch.sum(self.cotangent.flatten(2), 0, out=out[self.bias][:, self.rows])

    def _weights(self) -> Tensor:
        """What a squared cotangent of each group counts, (n, G)."""
        squared = self.constant.square().sum(-1)
        return squared if self.bias is None else squared + 1

    def gram(self) -> Tensor:
        """Inner products of the gradients of one example under its m cotangents, (n, m, m), in float64."""
        cotangent = self.cotangent.double()
        scaled = cotangent * self._weights().double()[:, None, :, None]
        return torch.bmm(scaled.flatten(2), cotangent.flatten(2).transpose(1, 2))

    def squared_norms(self) -> Tensor:
        """Squared gradient norm of every example and member, (n, m)."""
        return torch.einsum("ng,nmg->nm", self._weights(), self.cotangent.square().sum(-1))


@dataclass(frozen=True)
class Diagonal:
    """Gradient of a vector parameter: the elementwise product of a constant and a cotangent.

    Args:
        weight: name of the parameter.
        bias: name of a vector parameter whose gradient is the cotangent itself, or None.
        constant: (n, size), or None for ones.
        cotangent: (n, m, size).
    """

    weight: str
    bias: str | None
    constant: Tensor | None
    cotangent: Tensor

    def push(self, theta: Mapping[str, Tensor], out: Tensor) -> None:
        """Write what pairs with the cotangent to give theta's tangent to ``out`` (n, m, size)."""
        out.copy_(theta[self.weight])
        if self.constant is not None:
            out *= self.constant[:, None]
        if self.bias is not None:
            out += theta[self.bias]

    def add_total(self, out: Mapping[str, Tensor]) -> None:
        """Write the sum over examples into ``out`` (m, size)."""
        if self.constant is None:
            torch.sum(self.cotangent, 0, out=out[self.weight])
        else:
            torch.sum(self.cotangent * self.constant[:, None], 0, out=out[self.weight])
        if self.bias is not None:
            torch.sum(self.cotangent, 0, out=out[self.bias])

    def _weights(self) -> Tensor:
        """What a squared cotangent entry counts, broadcast against (n, m, size)."""
        weights = self.cotangent.new_ones(1) if self.constant is None else self.constant.square()[:, None]
        return weights if self.bias is None else weights + 1

    def gram(self) -> Tensor:
        """Inner products of the gradients of one example under its m cotangents, (n, m, m), in float64."""
        cotangent = self.cotangent.double()
        return torch.bmm(cotangent * self._weights().double(), cotangent.transpose(1, 2))

    def squared_norms(self) -> Tensor:
        """Squared gradient norm of every example and member, (n, m)."""
        return (self._weights() * self.cotangent.square()).sum(-1)


Factor = Outer | Diagonal


def total_gradients(factors: Sequence[Factor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Sum over examples per parameter, (m, *shape); factors must cover every row of every matrix."""
    like = factors[0].cotangent
    m = like.shape[1]
    # a bias may have rows without a factor (keys): their gradient is exactly zero
    out = {
        name: like.new_zeros(m, *shape) if len(shape) == 1 else like.new_empty(m, *shape)
        for name, shape in shapes.items()
    }
    for factor in factors:
        factor.add_total(out)
    return out


def gradient_grams(factors: Iterable[Factor]) -> Tensor:
    """Gram matrices (n, m, m) of the full gradients, the sum over parameters, in float64.

    Loss gradients sum to nearly zero over the classes, so that quadratic forms of a Gram cancel; rounding at
    the precision of float32 could make a large gradient look small and escape clipping.
    """
    return torch.stack([factor.gram() for factor in factors]).sum(0)


def squared_gradient_norms(factors: Iterable[Factor]) -> Tensor:
    """Squared norms (n, m) of the full gradients: the sum over parameters."""
    return torch.stack([factor.squared_norms() for factor in factors]).sum(0)

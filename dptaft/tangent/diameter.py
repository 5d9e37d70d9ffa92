"""Jacobians of diameter one: what a softmax loss needs for a gradient of known size.

A softmax loss sees differences of logits only. Its gradient by theta is a convex combination of differences
J_c - J_y of rows of the example's Jacobian J, at most the diameter D = max_{c,d} |J_c - J_d|, which the
constant Gram K = J J^T contains: D^2 = max K_cc + K_dd - 2 K_cd. Every Jacobian is divided by its own
diameter, in training and in prediction; the model stays linear in theta and there is no bound to choose.
The diameter is at most sqrt(2) times the operator norm, so that more of an example is kept than with a
norm of one.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dptaft.tangent.bounded import SCALE, BoundedOperator
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features, TangentOperator

_CANCELLED = 2.0**-42
"""Of the largest squared row: what rounding may take from a squared distance when rows are almost equal."""
_EQUAL = 2.0**-38
"""Of the largest squared row: rows whose squared distances are at most this count as equal."""


def inverse_diameters(grams: Tensor) -> Tensor:
    """1/D of every example, rounded down; 0 where the rows are all (almost) equal or anything is not finite.

    Args:
        grams: K_i = J_i J_i^T, (n, C, C), symmetric.

    Returns:
        (n,) in float64.

    Example:
        >>> inverse_diameters(torch.diag_embed(torch.tensor([[9.0, 16.0], [0.0, 0.0]])))
        tensor([0.2000, 0.0000], dtype=torch.float64)
    """
    wide = grams.double()
    squared = torch.diagonal(wide, dim1=1, dim2=2)
    distances = squared[:, :, None] + squared[:, None] - 2.0 * wide
    finite = torch.isfinite(distances).flatten(1).all(1)
    largest, row = distances.flatten(1).amax(1), squared.amax(1)
    usable = finite & (largest > _EQUAL * row) & (largest > 0.0)
    return torch.where(usable, (largest + _CANCELLED * row).rsqrt(), 0.0)


class DiameterOperator(BoundedOperator):
    """A tangent operator whose example Jacobians all have diameter 1 (0 where the rows of J are all equal).

    Args:
        inner: operator of the unbounded model; offsets are left as they are.
    """

    def __init__(self, inner: TangentOperator) -> None:
        super().__init__(inner)
        self.layout = f"diameter {getattr(inner, 'layout', '')}"

    @torch.no_grad()
    def extract(self, boundary: Tensor) -> Features:
        """The inner operator's constants, and the scale of each example."""
        features = self.inner.extract(boundary)
        scales = inverse_diameters(self.inner.gram(features))
        return Features(dict(features.tensors) | {SCALE: scales.to(self.dtype)})


def double_operator(operator: TangentOperator, tangent: TangentModel) -> TangentOperator:
    """The unbounded operator on the same cached constants, with all products in float64.

    In float64 `jvp` and `vjp` are transposes of each other to about 1e-14 whatever constants are stored, so
    that rounded constants define one exact linear model.

    Args:
        operator: made from `tangent`; a bounded operator is looked through.
        tangent: the tangent model; it is copied.
    """
    inner = operator.inner if isinstance(operator, BoundedOperator) else operator
    wide = copy.deepcopy(tangent).double()
    return DualOperator(wide) if isinstance(inner, DualOperator) else type(inner)(wide.base)  # type: ignore[call-arg]

"""Losses on logits with their derivative per example.

Every loss is a sum over examples; `cotangent` is the derivative of one example's loss by its own logits,
never divided by a batch size. Logits are (n, C) or (members, n, C), labels (n,), int64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Loss(ABC):
    """A convex function of the logits of one example and its label."""

    name: str

    @abstractmethod
    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Loss per example: (n,) or (members, n)."""

    @abstractmethod
    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Derivative of each example's loss by its own logits, shape of `logits`."""

    @abstractmethod
    def cotangent_bound(self, num_classes: int) -> float:
        """Largest L2 norm of a cotangent over all logits; ``inf`` where there is none."""

    @abstractmethod
    def smoothness(self, num_classes: int) -> float:
        """Upper bound on the largest eigenvalue of the Hessian with respect to the logits."""


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    return F.one_hot(labels, logits.shape[-1]).to(logits.dtype)


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy ``log sum_k exp z_k - z_y``; cotangent ``softmax(z) - e_y``.

    The cotangent's norm is at most sqrt(2) and the Hessian's largest eigenvalue at most 1/2.

    Example:
        >>> CrossEntropy().cotangent(torch.zeros(1, 2), torch.tensor([1]))
        tensor([[ 0.5000, -0.5000]])
    """

    name = "cross-entropy"

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        picked = torch.gather(logits, -1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return torch.logsumexp(logits, -1) - picked

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        return torch.softmax(logits, -1) - _one_hot(logits, labels)

    def cotangent_bound(self, num_classes: int) -> float:  # noqa: D102
        return math.sqrt(2.0)

    def smoothness(self, num_classes: int) -> float:  # noqa: D102
        return 0.5


def _check_square(alpha: float, kappa: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be finite and positive, got {alpha}")
    if not math.isfinite(kappa):
        raise ValueError(f"kappa must be finite, got {kappa}")


@dataclass(frozen=True)
class RescaledSquareLoss(Loss):
    """``(1/C) (alpha (z_y - kappa)^2 + sum_{i != y} z_i^2)`` (Hui and Belkin 2021, equation 2).

    The cotangent is unbounded; the Hessian's largest eigenvalue is ``2 max(alpha, 1)/C``.

    Example:
        >>> RescaledSquareLoss(kappa=1.0).value(torch.tensor([[3.0, 1.0]]), torch.tensor([0]))
        tensor([2.5000])
    """

    alpha: float = 1.0
    kappa: float = 15.0
    name = "rescaled-square"

    def __post_init__(self) -> None:
        _check_square(self.alpha, self.kappa)

    def _residual(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(weight) * (z - kappa e_y), and sqrt(weight) with weight = alpha on the label, 1 elsewhere."""
        hot = _one_hot(logits, labels)
        root = 1.0 + (math.sqrt(self.alpha) - 1.0) * hot
        return root * (logits - self.kappa * hot), root

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        residual, _ = self._residual(logits, labels)
        return residual.square().mean(-1)

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        residual, root = self._residual(logits, labels)
        return residual * root * (2.0 / logits.shape[-1])

    def cotangent_bound(self, num_classes: int) -> float:  # noqa: D102
        return math.inf

    def smoothness(self, num_classes: int) -> float:  # noqa: D102
        return 2.0 * max(self.alpha, 1.0) / num_classes


@dataclass(frozen=True)
class HuberSquareLoss(RescaledSquareLoss):
    """Rescaled square loss, linear once the weighted residual e is longer than `residual_norm` = G.

    ``(1/C) h(|e|)`` with ``h(t) = t^2`` for t <= G and ``2 G t - G^2`` beyond (multivariate Huber);
    convex. The cotangent is ``(2/C) sqrt(weight) * e * min(1, G/|e|)``, of norm at most
    ``(2/C) sqrt(max(alpha, 1)) G``; the Hessian's largest eigenvalue is at most ``2 max(alpha, 1)/C``.

    Example:
        >>> HuberSquareLoss(kappa=3.0, residual_norm=1.0).cotangent(torch.zeros(1, 2), torch.tensor([0]))
        tensor([[-1.,  0.]])
    """

    residual_norm: float = 15.0
    name = "huber-square"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.residual_norm) and self.residual_norm > 0):
            raise ValueError(f"residual_norm must be finite and positive, got {self.residual_norm}")

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        residual, _ = self._residual(logits, labels)
        length, G = torch.linalg.vector_norm(residual, dim=-1), self.residual_norm
        return torch.where(length <= G, length.square(), 2.0 * G * length - G * G) / logits.shape[-1]

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        residual, root = self._residual(logits, labels)
        length = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        shrink = (self.residual_norm / length).clamp(max=1.0)
        return residual * shrink * root * (2.0 / logits.shape[-1])

    def cotangent_bound(self, num_classes: int) -> float:  # noqa: D102
        return 2.0 * math.sqrt(max(self.alpha, 1.0)) * self.residual_norm / num_classes


LOSSES = {loss.name: loss for loss in (CrossEntropy, RescaledSquareLoss, HuberSquareLoss)}
"""Loss classes by name."""

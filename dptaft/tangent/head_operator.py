"""Tangent operator of the classification head (scope ``head``): the linear probe."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dptaft.tangent.operator import Features, mark_finite, members_cotangents, with_members


class HeadOperator:
    """J_i theta = dW u_i + db for the pooled feature u_i that enters the head.

    Args:
        base: a model whose ``get_classifier()`` (timm) or ``head`` is one ``nn.Linear``.

    Raises:
        ValueError: the classifier is not one linear layer that ends the model.
    """

    kind = "head"

    def __init__(self, base: nn.Module) -> None:
        head = base.get_classifier() if hasattr(base, "get_classifier") else getattr(base, "head", None)
        names = [name for name, module in base.named_modules() if module is head]
        if type(head) is not nn.Linear or not names:
            raise ValueError(
                f"the head operator needs one linear classifier, found {type(head).__name__}; "
                "use the dual operator"
            )
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.dtype = dtype
        self._name = names[0]
        self._weight = head.weight.detach().to(dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(dtype)
        self.num_classes = head.out_features
        self.parameter_shapes = {f"{self._name}.{k}": p.shape for k, p in head.named_parameters()}

    def extract(self, boundary: Tensor) -> Features:
        """The pooled features (n, D) themselves.

        Raises:
            ValueError: a wrong shape.
        """
        if boundary.ndim != 2 or boundary.shape[1] != self._weight.shape[1]:
            raise ValueError(
                f"the boundary has shape {tuple(boundary.shape)}; expected (n, {self._weight.shape[1]})"
            )
        return mark_finite({"u": boundary.detach()})

    def offset(self, features: Features) -> Tensor:
        """f(x_i; w0), shape (n, C)."""
        out = F.linear(features["u"].to(self.dtype), self._weight, self._bias)
        return out * features["finite"][:, None]

    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """J_i theta, shape (n, C), or (m, n, C) for theta with a members axis."""
        t, batched = with_members(theta, self.parameter_shapes, self.dtype)
        out = features["u"].to(self.dtype) @ t[f"{self._name}.weight"].transpose(1, 2)
        if self._bias is not None:
            out = out + t[f"{self._name}.bias"][:, None]
        out = out * features["finite"][:, None]
        return out if batched else out[0]

    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i J_i^T r_i per parameter (a sum), with a members axis if the cotangents have one."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        gradients = {f"{self._name}.weight": r.permute(1, 2, 0) @ features["u"].to(self.dtype)}
        if self._bias is not None:
            gradients[f"{self._name}.bias"] = r.sum(0)
        return {k: g if batched else g[0] for k, g in gradients.items()}

    def gram(self, features: Features) -> Tensor:
        """K_i = (|u_i|^2 + 1) I (without + 1 where the head has no bias), shape (n, C, C), in float64."""
        eye = torch.eye(self.num_classes, dtype=torch.float64, device=features["u"].device)
        return self._squared_lengths(features)[:, None, None] * eye

    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|J_i^T r_i|_2 = |r_i| sqrt(|u_i|^2 + 1), shape (n,) or (m, n)."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        norms = (r.norm(dim=2) * self._squared_lengths(features).sqrt()[:, None]).T
        return norms if batched else norms[0]

    def _squared_lengths(self, features: Features) -> Tensor:
        squared = features["u"].to(self.dtype).square().sum(-1)
        return squared if self._bias is None else squared + features["finite"]

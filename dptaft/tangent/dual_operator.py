"""Tangent operator of any scope, through the tangent model and ordinary backpropagation: exact, not compiled.

J theta comes from the tangent model. J^T r does not need the linearisation: at the frozen weights it is the
ordinary gradient of ``sum_i r_i . f(x_i; w)``, one backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dptaft.tangent.cut import Above
from dptaft.tangent.model import FRESH_TOKEN, TangentModel
from dptaft.tangent.operator import Features, mark_finite, members_cotangents, with_members

_GRAM_BYTES = 1 << 30


class _Moved(nn.Module):
    """J theta alone, as a module whose parameters are the tangent weights."""

    def __init__(self, model: TangentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, boundary: Tensor) -> Tensor:
        return self.model._pair(boundary)[1]


class DualOperator:
    """Jacobian products for every scope and model that :class:`TangentModel` takes.

    Features are the boundary activations. Per-example quantities loop over the examples, one backward pass
    per class, so Grams cost about C training steps of one example each.

    Args:
        model: the tangent model; its tangent weights are neither read nor changed.
        batch_size: examples in one pass; bounds memory, changes nothing else.

    Raises:
        ValueError: a batch size below 1.
    """

    kind = "dual"

    def __init__(self, model: TangentModel, batch_size: int = 64) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._moved = _Moved(model)
        self._above = Above(model.base, model.cut, model.fresh_token)
        self._batch_size = batch_size
        paths = {id(parameter): path for path, parameter in self._moved.named_parameters()}
        self._paths = {name: paths[id(parameter)] for name, parameter in model.theta().items()}
        self.parameter_shapes = {name: parameter.shape for name, parameter in model.theta().items()}
        self.dtype = next(model.base.parameters()).dtype
        self.num_classes = model.base.num_classes

    @torch.no_grad()
    def extract(self, boundary: Tensor) -> Features:
        """The boundary activations (n, ...) in the given precision, and the base model's logits."""
        logits = self._above(boundary.to(self.dtype))
        return mark_finite({"boundary": boundary.detach(), "logits": logits})

    def offset(self, features: Features) -> Tensor:
        """f(x_i; w0), shape (n, C)."""
        return features["logits"].to(self.dtype)

    @torch.no_grad()
    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """J_i theta, shape (n, C), or (m, n, C) for theta with a members axis (one pass per member)."""
        t, batched = with_members(theta, self.parameter_shapes, self.dtype)
        members = [{name: value[i] for name, value in t.items()} for i in range(len(next(iter(t.values()))))]
        out = torch.stack([torch.cat(list(self._jvp_batches(features, member))) for member in members])
        out = torch.where(features["finite"][:, None], out, 0)
        return out if batched else out[0]

    def _jvp_batches(self, features: Features, theta: Mapping[str, Tensor]) -> Iterator[Tensor]:
        weights = {self._paths[name]: value for name, value in theta.items()}
        for boundary in features["boundary"].split(self._batch_size):
            yield torch.func.functional_call(self._moved, weights, (boundary.to(self.dtype),))

    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i J_i^T r_i per parameter (a sum), with a members axis if the cotangents have one."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        totals = [
            torch.zeros(r.shape[1], *shape, dtype=r.dtype, device=r.device)
            for shape in self.parameter_shapes.values()
        ]
        size = self._batch_size
        for boundary, rows in zip(features["boundary"].split(size), r.split(size), strict=True):
            for total, gradient in zip(totals, self._gradients(boundary, rows), strict=True):
                total += gradient
        return {
            name: total if batched else total[0]
            for name, total in zip(self.parameter_shapes, totals, strict=True)
        }

    def _gradients(self, boundary: Tensor, r: Tensor) -> list[Tensor]:
        """Per parameter (m, *shape): gradients of sum_i r_im . f(x_i; w) for cotangents (n, m, C)."""
        targets = {name: name if name == FRESH_TOKEN else f"model.{name}" for name in self.parameter_shapes}
        weights = {path: self._above.get_parameter(path) for path in targets.values()}
        weights = {path: value.detach().requires_grad_() for path, value in weights.items()}
        with torch.enable_grad():
            out = torch.func.functional_call(self._above, weights, (boundary.to(self.dtype),))
        rows = []
        for i in range(r.shape[1]):
            keep = i + 1 < r.shape[1]
            rows.append(
                torch.autograd.grad(out, list(weights.values()), r[:, i], keep, materialize_grads=True)
            )
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def gram(self, features: Features) -> Tensor:
        """K_i = J_i J_i^T, shape (n, C, C), in float64, from one backward pass per class and example.

        Blocks of classes keep the explicit rows of one example's Jacobian below about 2 GiB.
        """
        parameters = sum(shape.numel() for shape in self.parameter_shapes.values())
        size = max(1, _GRAM_BYTES // (parameters * torch.finfo(self.dtype).bits // 8))
        eye = torch.eye(self.num_classes, dtype=self.dtype, device=features["logits"].device)
        blocks = list(eye.split(size))
        grams = []
        for boundary in features["boundary"].split(1):
            gram = torch.zeros_like(eye, dtype=torch.float64)
            for a, left in enumerate(blocks):
                rows = self._gradients(boundary, left[None])
                for b, right in list(enumerate(blocks))[a:]:
                    others = rows if b == a else self._gradients(boundary, right[None])
                    pairs = zip(rows, others, strict=True)
                    product = sum(x.flatten(1).double() @ y.flatten(1).double().T for x, y in pairs)
                    block = left.double().T @ product @ right.double()
                    gram += block + block.T if b > a else block
            grams.append(gram)
        return torch.stack(grams) * features["finite"][:, None, None]

    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|J_i^T r_i|_2, shape (n,) or (m, n), from one backward pass per example and member."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        norms = torch.zeros(r.shape[1], len(r), dtype=r.dtype, device=r.device)
        for i, boundary in enumerate(features["boundary"].split(1)):
            for m in range(r.shape[1]):
                gradients = self._gradients(boundary, r[i : i + 1, m : m + 1])
                norms[m, i] = torch.stack([g.norm() for g in gradients]).norm()
        return norms if batched else norms[0]

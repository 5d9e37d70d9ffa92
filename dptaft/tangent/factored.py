"""The compiled last block with one set of rank-one factors per class: no tokens, no frozen weights in a step.

The Jacobian row of class a of one example is a fixed set of rank-one factors: layer inputs, shared by the
classes, and one cotangent per layer and class. Stored once, they reduce a training step to one product per
trained matrix, an inner product with the cotangents forward and a weighted sum of them backward. Memory
grows with the number of classes, so this layout is for few classes;
:class:`~dptaft.tangent.compiled.CompiledLastBlock` serves any number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.operator import Features, mark_finite, members_cotangents, pieces, with_members
from dptaft.tangent.rank_one import Factor, gradient_grams, squared_gradient_norms, total_gradients

_HALF = (torch.float16, torch.bfloat16)


class FactoredLastBlock:
    """Exact tangent of the last block, final norm and head, from rank-one factors of every class.

    Args:
        base: the pretrained model; its weights are read once and never modified.

    Raises:
        ValueError: naming the part of the model that is not covered; the dual operator covers it.
    """

    kind = "compiled"
    layout = "classes"

    def __init__(self, base: nn.Module) -> None:
        self._source = CompiledLastBlock(base)
        self.parameter_shapes = self._source.parameter_shapes
        self.num_classes = self._source.num_classes
        self.dtype = self._source.dtype
        width, device = self.parameter_shapes["head.weight"][1], next(base.parameters()).device
        empty = self._source.extract(torch.zeros(1, 2, width, dtype=self.dtype, device=device))
        one_class = torch.zeros(1, 1, self.num_classes, dtype=self.dtype, device=device)
        self._template = self._source.factors(self._source.constants(empty), one_class)

    @property
    def scalars_per_example(self) -> int:
        """Numbers that one example's inputs and cotangents hold."""
        inputs = sum(f.constant.numel() for f in self._template if f.constant is not None)
        return inputs + self.num_classes * sum(f.cotangent.numel() for f in self._template)

    @torch.no_grad()
    def extract(self, boundary: Tensor) -> Features:
        """Layer inputs (n, I) and cotangents (n, C, S) of every class from the block input (n, T, D).

        For a half-precision boundary both are stored as bfloat16, which has the range of float32
        (cotangents span many orders of magnitude); products are taken in float32, so that the rounded
        factors define one linear model.

        Raises:
            ValueError: a boundary of the wrong shape.
        """
        parts = pieces(len(boundary), self.scalars_per_example)
        return Features.concat([self._extract(boundary[part]) for part in parts])

    def _extract(self, boundary: Tensor) -> Features:
        features = self._source.extract(boundary)
        eye = torch.eye(self.num_classes, dtype=self.dtype, device=boundary.device)
        constants = self._source.constants(features)
        factors = self._source.factors(constants, eye.expand(len(features), -1, -1))
        stored = torch.bfloat16 if boundary.dtype in _HALF else self.dtype
        inputs = torch.cat([f.constant.flatten(1).to(stored) for f in factors if f.constant is not None], 1)
        cotangents = torch.cat([f.cotangent.flatten(2).to(stored) for f in factors], 2)
        # an example that the source found not finite must stay so
        logits = torch.where(features["finite"][:, None], features["logits"], torch.nan)
        return mark_finite({"inputs": inputs, "cotangents": cotangents, "logits": logits})

    def offset(self, features: Features) -> Tensor:
        """f(x_i; w0), shape (n, C)."""
        return features["logits"].to(self.dtype)

    def _factors(self, features: Features, cotangents: Tensor) -> list[Factor]:
        """The factors of all layers for cotangents (n, m, S) of their outputs."""
        inputs, factors, at, start = features["inputs"].to(self.dtype), [], 0, 0
        for factor in self._template:
            shape = factor.cotangent.shape[2:]
            part = cotangents[:, :, start : start + shape.numel()].unflatten(2, shape)
            start += shape.numel()
            constant = factor.constant
            if constant is not None:
                shape = constant.shape[1:]
                constant = inputs[:, at : at + shape.numel()].unflatten(1, shape)
                at += shape.numel()
            factors.append(replace(factor, constant=constant, cotangent=part))
        return factors

    def _class_cotangents(self, features: Features) -> Tensor:
        return features["cotangents"].to(self.dtype)

    @torch.no_grad()
    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """J_i theta, shape (n, C), or (m, n, C) for theta with a members axis."""
        t, batched = with_members(theta, self.parameter_shapes, self.dtype)
        cotangents = self._class_cotangents(features)
        n, m = len(features), len(next(iter(t.values())))
        pushed = cotangents.new_empty(n, m, cotangents.shape[2])
        start = 0
        for factor in self._factors(features, cotangents):
            size = factor.cotangent[0, 0].numel()
            factor.push(t, pushed[:, :, start : start + size].unflatten(2, factor.cotangent.shape[2:]))
            start += size
        out = torch.bmm(cotangents, pushed.transpose(1, 2))
        return out.permute(2, 0, 1) if batched else out[:, :, 0]

    @torch.no_grad()
    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i J_i^T r_i per parameter (a sum), with a members axis if the cotangents have one."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        totals = total_gradients(self._combined(features, r), self.parameter_shapes)
        return totals if batched else {name: total[0] for name, total in totals.items()}

    def _combined(self, features: Features, r: Tensor) -> list[Factor]:
        """Factors of the gradients J_i^T r_i for cotangents (n, m, C)."""
        return self._factors(features, torch.bmm(r, self._class_cotangents(features)))

    @torch.no_grad()
    def gram(self, features: Features) -> Tensor:
        """K_i = J_i J_i^T, shape (n, C, C), from rank-one factors, in float64."""
        grams = []
        for part in pieces(len(features), features["cotangents"][0].numel()):
            few = features.index(part)
            grams.append(gradient_grams(self._factors(few, self._class_cotangents(few))))
        return torch.cat(grams)

    @torch.no_grad()
    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|J_i^T r_i|_2, shape (n,) or (m, n), from the weighted sum of the class factors."""
        r, batched = members_cotangents(cotangents, features["finite"], self.num_classes, self.dtype)
        norms = squared_gradient_norms(self._combined(features, r)).sqrt()
        return norms.T if batched else norms[:, 0]

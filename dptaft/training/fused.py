"""Clipped sums of a tangent model, exact and without per-example gradients.

The Jacobian J_i of an example is constant, so its gradient is ``g_i = J_i^T r_i`` with r_i the derivative of
the loss by the logits. The norm comes from constants, the clipped sum from one transposed product:

    |g_i|^2 = r_i^T (J_i J_i^T) r_i,    sum_i c_i g_i = sum_i J_i^T (c_i r_i),    c_i = min(1, clip / |g_i|).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dptaft.precision import full_float32
from dptaft.training.clipping import (
    FLOAT_SLACK,
    Adjacency,
    ClippedSum,
    PhysicalBatches,
    RunningSum,
    check_clip_norm,
    clipped_cotangents,
    l2_sensitivity,
)

if TYPE_CHECKING:
    from dptaft.tangent.operator import Features, TangentOperator
    from dptaft.training.losses import Loss

GRAM_BYTES = 1 << 30
"""Grams of features in memory are kept for the whole data set while they need at most this many bytes."""
_COMPARED = 1 << 20


def check_labels(labels: Tensor, num_examples: int, num_classes: int) -> None:
    """Raise ValueError unless labels are (num_examples,) int64 in [0, num_classes)."""
    if labels.shape != (num_examples,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be {num_examples} int64 values, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if num_examples and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise ValueError(
            f"labels must be in [0, {num_classes}), got {int(labels.min())} to {int(labels.max())}"
        )


def check_unique(indices: Tensor) -> None:
    """Raise ValueError where an example is named twice (it would count twice in the sum)."""
    pieces = range(0, len(indices), _COMPARED)  # ascending numbers need no sorted copy of all of them
    if all(bool((part[1:] > part[:-1]).all()) for part in (indices[i : i + _COMPARED + 1] for i in pieces)):
        return
    if len(torch.unique(indices)) != len(indices):
        raise ValueError("a batch names the same example more than once; sample without replacement")


class FusedEngine:
    """Exact per-example clipping for a tangent operator on cached features.

    Args:
        operator: the constant Jacobians.
        features: cached constants of all examples.
        labels: (n,) int64.
        loss: loss on logits.
        l2_clip_norm: clip norm of one example's gradient over all parameters jointly.
        centered: logits are J theta; otherwise the base model's logits are added.
        adjacency: relation for which the sums state their sensitivity.
        norms: ``gram`` (constant C x C Grams: those kept with the features, else computed here once and
            held in memory), ``factors`` (one more backward pass per step) or ``auto`` (Grams that are kept,
            or need at most `GRAM_BYTES` for features that are in memory themselves).
        physical_batch_size: examples in memory at once; halved when memory runs out.

    Raises:
        ValueError: labels that do not fit, an unknown option, or Grams that disagree with the gradients.

    Formal guarantees:
        The result of `clipped_sum` is a sum of one vector per example in the batch, of L2 norm at most
        `l2_clip_norm` up to rounding, for which the declared sensitivity has an allowance
        (`dptaft.training.clipping.FLOAT_SLACK`); under add-remove for operators in float64 only
        (`dptaft.training.clipping.needs_double`). Examples whose gradient is not finite contribute zero.
    """

    @full_float32()
    def __init__(
        self,
        operator: TangentOperator,
        features: Features,
        labels: Tensor,
        *,
        loss: Loss,
        l2_clip_norm: float,
        centered: bool = True,
        adjacency: Adjacency = "zero-out",
        norms: Literal["auto", "gram", "factors"] = "auto",
        physical_batch_size: int = 512,
    ) -> None:
        check_clip_norm(l2_clip_norm)
        l2_sensitivity(l2_clip_norm, adjacency)
        check_labels(labels, len(features), operator.num_classes)
        if norms not in ("auto", "gram", "factors"):
            raise ValueError(f"norms must be 'auto', 'gram' or 'factors', got {norms!r}")
        self.operator, self.loss = operator, loss
        self.l2_clip_norm, self.adjacency, self.centered = l2_clip_norm, adjacency, centered
        self.parameter_shapes = operator.parameter_shapes
        self.num_examples = len(features)
        self._features, self._labels = features, labels
        self._physical = PhysicalBatches(physical_batch_size)
        self._kept_grams = norms != "factors" and features.grams is not None
        gram_bytes = 8 * len(features) * operator.num_classes**2
        small = features.in_memory and gram_bytes <= GRAM_BYTES
        use_grams = not self._kept_grams and (norms == "gram" or (norms == "auto" and small))
        self._grams = self._compute_grams() if use_grams else None
        self._check_norms()

    @property
    def holds_grams(self) -> bool:
        """Whether the Grams of all examples are in memory."""
        return self._grams is not None

    def initial_theta(self, members: int | None = None) -> dict[str, Tensor]:
        """Zero tangent weights, with a leading axis for `members` weight vectors if given."""
        lead = () if members is None else (members,)
        like = self.operator.offset(self._features.index(slice(0, 1)))
        return {name: like.new_zeros((*lead, *shape)) for name, shape in self.parameter_shapes.items()}

    @full_float32()
    @torch.no_grad()
    def clipped_sum(
        self, theta: Mapping[str, Tensor], indices: Tensor, l2_clip_norms: Sequence[float] | None = None
    ) -> ClippedSum:
        """Sum over the batch of clipped gradients at `theta`, in float64.

        Products are taken in the operator's precision, one physical batch at a time, and added in float64.

        Args:
            theta: tangent weights, each with an optional leading members axis.
            indices: (b,) int64 example numbers, each at most once; possibly none.
            l2_clip_norms: a clip norm for each member, in place of the one of the engine.

        Raises:
            ValueError: an example is named twice, or the number of clip norms is not that of the members.
        """
        check_unique(indices)
        name, shape = next(iter(self.parameter_shapes.items()))
        members = len(theta[name]) if theta[name].ndim > len(shape) else None
        if l2_clip_norms is not None and len(l2_clip_norms) != members:
            raise ValueError(
                f"there are {len(l2_clip_norms)} clip norms for {members} members; give one for each"
            )
        clip = self.l2_clip_norm if l2_clip_norms is None else tuple(l2_clip_norms)
        total = RunningSum({name: theta[name] for name in self.parameter_shapes})
        bad = torch.zeros(members or 1, dtype=torch.int64)

        def compute(start: int, stop: int) -> tuple[dict[str, Tensor], Tensor]:
            part, part_bad = self._piece(theta, clip, self._select(indices, start, stop))
            return part, part_bad.cpu()

        def keep(found: tuple[dict[str, Tensor], Tensor]) -> None:
            total.add(found[0])
            bad.add_(found[1])

        self._physical.run(len(indices), compute, keep)
        counts = () if members is None else tuple(int(count) for count in bad)
        return ClippedSum(total.value(), clip, self.adjacency, members, int(bad.sum()), counts)

    def _select(self, indices: Tensor, start: int, stop: int) -> slice | Tensor:
        """A slice (no copy) where the batch is the whole data set."""
        return slice(start, stop) if len(indices) == self.num_examples else indices[start:stop]

    def _piece(
        self, theta: Mapping[str, Tensor], clip: float | tuple[float, ...], chosen: slice | Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Clipped sums of a piece, and the number of non-finite examples of every member."""
        features = self._features.index(chosen)
        logits = self.operator.jvp(features, theta)
        if not self.centered:
            logits = logits + self.operator.offset(features)
        cotangents = self.loss.cotangent(logits, self._labels[chosen])
        norms = self._norms(features, cotangents, chosen)
        clipped = clipped_cotangents(norms, cotangents, clip)
        finite = torch.isfinite(norms)
        bad = (~finite).sum(-1).reshape(-1)
        if bool(bad.any()):  # 0 * inf is not 0: leave such examples out of the product altogether
            clipped = torch.where(finite.unsqueeze(-1), clipped, torch.zeros_like(clipped))
            kept = finite.reshape(-1, len(features)).any(0).nonzero().squeeze(1)
            features, clipped = features.index(kept), clipped.index_select(-2, kept)
        return self.operator.vjp(features, clipped), bad

    def _norms(self, features: Features, cotangents: Tensor, chosen: slice | Tensor) -> Tensor:
        grams = features.grams if self._kept_grams else self._grams
        if grams is None:
            return self.operator.gradient_norms(features, cotangents)
        return gram_norms(grams if self._kept_grams else grams[chosen], cotangents)

    @torch.no_grad()
    def _compute_grams(self) -> Tensor:
        grams: list[Tensor] = []

        def compute(start: int, stop: int) -> tuple[slice, Tensor]:
            part = self.operator.gram(self._features.index(slice(start, stop)))
            if not grams:  # once for all: parts and their concatenation would take twice the memory
                grams.append(part.new_empty(self.num_examples, *part.shape[1:]))
            return slice(start, stop), part

        def keep(found: tuple[slice, Tensor]) -> None:
            grams[0][found[0]] = found[1]

        self._physical.run(self.num_examples, compute, keep)
        return grams[0]

    @torch.no_grad()
    def _check_norms(self) -> None:
        """Compare the norms used for clipping with explicit gradients of the first examples."""
        generator = torch.Generator().manual_seed(0)
        for i in range(min(2, self.num_examples)):
            features = self._features.index(slice(i, i + 1))
            offset = self.operator.offset(features)
            r = torch.randn(offset.shape, generator=generator, dtype=offset.dtype).to(offset.device)
            r = r - r.mean()
            gradient = self.operator.vjp(features, r)
            explicit = torch.stack([g.double().square().sum() for g in gradient.values()]).sum().sqrt()
            used = self._norms(features, r, slice(i, i + 1)).double()
            if torch.isfinite(explicit) and abs(float(used - explicit)) > FLOAT_SLACK * float(explicit):
                raise ValueError(
                    "gradient norms from the cached constants disagree with explicit gradients; "
                    "use norms='factors'"
                )


def gram_norms(grams: Tensor, cotangents: Tensor) -> Tensor:
    """``sqrt(r_i^T K_i r_i)``, summed in float64.

    Args:
        grams: K, (n, C, C).
        cotangents: r, (n, C) or (members, n, C).

    Returns:
        (n,) or (members, n), in the dtype of the cotangents.

    Example:
        >>> gram_norms(torch.eye(2)[None], torch.tensor([[3.0, 4.0]]))
        tensor([5.])
    """
    r = cotangents.double()
    squared = (torch.einsum("...nc,ncd->...nd", r, grams.double()) * r).sum(-1)
    return squared.clamp(min=0.0).sqrt().to(cotangents.dtype)

"""Tangent operators: the constant Jacobian of each cached example, applied but never materialised.

The linearised model is ``f(x_i; w0) + J_i theta``. Because J_i does not depend on theta, everything that
training needs is a function of constants cached once per example (:class:`Features`): forward products J_i
theta, sums of transposed products, and the Grams J_i J_i^T that give exact per-example gradient norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

_PIECE = 1 << 24  # numbers in the largest temporary of per-class work


@dataclass(frozen=True)
class Features:
    """Named constants of n examples; the leading axis of every tensor is the example.

    Args:
        tensors: name -> tensor of shape (n, ...). The container is a view: it never copies at construction.
        grams: K_i = J_i J_i^T of the operator that made the features, (n, C, C) in float64, where they are
            kept with them.

    Attributes:
        in_memory: whether all of it is in memory (`dptaft.stored_features.StoredFeatures` is not).

    Raises:
        ValueError: no tensors, or tensors that disagree on n.

    >>> f = Features({"u": torch.arange(6.0).reshape(3, 2)})
    >>> len(f), f.index(slice(1, 3))["u"].tolist()
    (3, [[2.0, 3.0], [4.0, 5.0]])
    """

    tensors: Mapping[str, Tensor]
    grams: Tensor | None = None
    in_memory: ClassVar[bool] = True

    def __post_init__(self) -> None:
        grams = {} if self.grams is None else {"grams": self.grams}
        lengths = {name: (t.shape[0] if t.ndim else None) for name, t in (dict(self.tensors) | grams).items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise ValueError(
                f"every feature tensor needs the same leading example axis, got lengths {lengths}; "
                "pass tensors of the same examples"
            )
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors occupy."""
        grams = 0 if self.grams is None else self.grams.nbytes
        return sum(t.numel() * t.element_size() for t in self.tensors.values()) + grams

    def index(self, selection: slice | Tensor) -> Features:
        """The examples of a slice (a view) or of a vector of indices (a copy), in that order."""
        grams = None if self.grams is None else self.grams[selection]
        return Features({name: t[selection] for name, t in self.tensors.items()}, grams)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Features:
        """Move, or round the floating-point tensors; rounded features define another (still linear) model."""
        moved = {}
        for name, t in self.tensors.items():
            moved[name] = t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        return Features(moved, None if self.grams is None or dtype is not None else self.grams.to(device))

    @staticmethod
    def concat(parts: Sequence[Features]) -> Features:
        """The examples of all parts in order, without Grams.

        Raises:
            ValueError: no parts, or parts with different tensor names.
        """
        if not parts:
            raise ValueError("cannot concatenate zero feature parts; pass at least one")
        names = set(parts[0].tensors)
        if any(set(part.tensors) != names for part in parts):
            raise ValueError("feature parts hold different tensors; build them with the same operator")
        return Features({name: torch.cat([part[name] for part in parts]) for name in parts[0].tensors})


def pieces(n: int, scalars_per_example: int) -> list[slice]:
    """Slices of n examples in order, each of bounded size, so that temporaries stay small; at least one.

    >>> pieces(5, _PIECE // 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    size = max(1, _PIECE // max(1, scalars_per_example))
    return [slice(start, start + size) for start in range(0, max(n, 1), size)]


def mark_finite(tensors: Mapping[str, Tensor]) -> Features:
    """Features with a boolean tensor ``finite``; the constants of an example that is not finite become zero.

    Operators give such an example a zero Jacobian and a zero offset, so that it contributes nothing to any
    sum, whatever its cotangent: one broken record can neither stop a private run nor enter it. (A sum over a
    tensor is finite only if every entry is, and costs one fast pass; entries near the end of the range of
    float32 count as broken too.)

    >>> f = mark_finite({"u": torch.tensor([[1.0, 2.0], [float("nan"), 3.0]])})
    >>> f["finite"].tolist(), f["u"].tolist()
    ([True, False], [[1.0, 2.0], [0.0, 0.0]])
    """
    sums = [
        t.flatten(1).sum(1, dtype=torch.promote_types(t.dtype, torch.float32))
        for t in tensors.values()
        if t.is_floating_point()
    ]
    finite = torch.stack([torch.isfinite(total) for total in sums]).all(0)
    if not finite.all():
        tensors = {k: torch.where(finite.view(-1, *[1] * (t.ndim - 1)), t, 0) for k, t in tensors.items()}
    return Features(dict(tensors) | {"finite": finite})


@runtime_checkable
class TangentOperator(Protocol):
    """The constant Jacobian J_i (num_classes x P) of each cached example i, never materialised.

    ``theta`` and gradients are dictionaries keyed by the base model's parameter names with the shapes of
    ``parameter_shapes``, optionally with one leading *members* axis m shared by all of them: one pass over
    the features then serves m weight vectors and results gain a leading m axis. Examples that were not finite
    at extraction (``features["finite"]`` is False) have a zero Jacobian and a zero offset.
    """

    kind: str
    num_classes: int
    parameter_shapes: Mapping[str, torch.Size]

    def extract(self, boundary: Tensor) -> Features:
        """Per-example constants from the activations that enter the linearised part."""
        ...

    def offset(self, features: Features) -> Tensor:
        """The base model's logits f(x_i; w0), shape (n, C)."""
        ...

    def jvp(self, features: Features, theta: Mapping[str, Tensor]) -> Tensor:
        """J_i theta, shape (n, C) or (m, n, C)."""
        ...

    def vjp(self, features: Features, cotangents: Tensor) -> dict[str, Tensor]:
        """sum_i J_i^T r_i (a sum, not a mean) for cotangents r of shape (n, C) or (m, n, C)."""
        ...

    def gram(self, features: Features) -> Tensor:
        """K_i = J_i J_i^T, shape (n, C, C), in float64: quadratic forms of it cancel."""
        ...

    def gradient_norms(self, features: Features, cotangents: Tensor) -> Tensor:
        """|J_i^T r_i|_2, exact, shape (n,) or (m, n); no per-example gradient is materialised."""
        ...


def with_members(
    theta: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> tuple[dict[str, Tensor], bool]:
    """Give every tensor of ``theta`` a members axis; also says whether it had one.

    Raises:
        ValueError: missing or unknown names, a wrong shape, or members axes of different lengths.

    >>> with_members({"b": torch.zeros(3)}, {"b": torch.Size([3])}, torch.float32)[0]["b"].shape
    torch.Size([1, 3])
    """
    if set(theta) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(theta)), sorted(set(theta) - set(shapes))
        raise ValueError(
            f"tangent weights do not match the scope: missing {missing}, unknown {unknown}; "
            "use exactly the names in parameter_shapes"
        )
    leading = {tuple(theta[name].shape[: theta[name].ndim - len(shape)]) for name, shape in shapes.items()}
    wrong = [
        name for name, shape in shapes.items() if theta[name].shape[theta[name].ndim - len(shape) :] != shape
    ]
    if wrong or len(leading) != 1 or len(next(iter(leading))) > 1:
        raise ValueError(
            f"tangent weights {wrong or sorted(theta)} have the wrong shape; give each the shape in "
            "parameter_shapes, with at most one leading members axis of one length"
        )
    batched = len(next(iter(leading))) == 1
    cast = {name: t.to(dtype) for name, t in theta.items()}
    return (cast if batched else {name: t[None] for name, t in cast.items()}), batched


def members_cotangents(
    cotangents: Tensor, finite: Tensor, num_classes: int, dtype: torch.dtype
) -> tuple[Tensor, bool]:
    """Bring cotangents (n, C) or (m, n, C) to (n, m, C); also says whether they had a members axis.

    Cotangents of examples that are not ``finite`` (n,) become zero.

    Raises:
        ValueError: any other shape.
    """
    n = len(finite)
    if cotangents.ndim not in (2, 3) or tuple(cotangents.shape[-2:]) != (n, num_classes):
        raise ValueError(
            f"cotangents have shape {tuple(cotangents.shape)}; expected ({n}, {num_classes}) or "
            f"(members, {n}, {num_classes}), one row per cached example"
        )
    batched = cotangents.ndim == 3
    r = torch.where(finite[:, None], cotangents.to(dtype), 0)
    return (r.transpose(0, 1) if batched else r[:, None]), batched

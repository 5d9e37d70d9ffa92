"""Per-example clipping: factors, and sums that carry their own sensitivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from torch import Tensor

Adjacency = Literal["zero-out", "add-remove", "replace-one"]
T = TypeVar("T")

FLOAT_SLACK = 2.0**-13
"""Relative allowance for the rounding of norms, factors and sums; enlarges the declared sensitivity.

Records of zero-out and replace-one neighbours keep their places, so that all sums but that of one piece are
the same to the last bit; float32 is enough for one piece of at most `LARGEST_PIECE` records. Under add-remove
every later record moves, and rounding could differ in all pieces: there `needs_double` asks for float64.
"""


def check_clip_norm(l2_clip_norm: float) -> None:
    """Raise ValueError unless the clip norm is finite and positive."""
    if not (math.isfinite(l2_clip_norm) and l2_clip_norm > 0):
        raise ValueError(f"l2_clip_norm must be finite and positive, got {l2_clip_norm}")


def l2_sensitivity(l2_clip_norm: float, adjacency: Adjacency) -> float:
    """L2 sensitivity of a sum of vectors of norm at most `l2_clip_norm`, float32 allowance included.

    Zeroing, adding or removing one record changes the sum by one vector, replacing one by two.

    Example:
        >>> 1.0 < l2_sensitivity(1.0, "zero-out") < 1.001 and 2.0 < l2_sensitivity(1.0, "replace-one") < 2.001
        True
    """
    check_clip_norm(l2_clip_norm)
    if adjacency not in ("zero-out", "add-remove", "replace-one"):
        raise ValueError(f"unknown adjacency {adjacency!r}; use 'zero-out', 'add-remove' or 'replace-one'")
    return l2_clip_norm * (2.0 if adjacency == "replace-one" else 1.0) * (1.0 + FLOAT_SLACK)


def clip_factors(norms: Tensor, l2_clip_norm: float | Sequence[float]) -> Tensor:
    """``min(1, l2_clip_norm / norm)`` per example; exactly 0 where the norm is not finite.

    Args:
        norms: gradient norms, any shape; (members, ...) where there is one clip norm per member.
        l2_clip_norm: clip norm, finite and positive; or one for each member.

    Example:
        >>> clip_factors(torch.tensor([0.0, 4.0, float("nan"), float("inf")]), 2.0)
        tensor([1.0000, 0.5000, 0.0000, 0.0000])
    """
    if isinstance(l2_clip_norm, Sequence):
        return torch.stack([clip_factors(row, c) for row, c in zip(norms, l2_clip_norm, strict=True)])
    check_clip_norm(l2_clip_norm)
    factors = (l2_clip_norm / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def clipped_cotangents(norms: Tensor, cotangents: Tensor, l2_clip_norm: float | Sequence[float]) -> Tensor:
    """``min(1, l2_clip_norm / norm) r`` per example, in the dtype of the cotangents.

    Factors are float64: a float32 below 2^-126 keeps few bits, though the product may be an ordinary number.

    Args:
        norms: gradient norms, (n,) or (members, n).
        cotangents: r, (n, C) or (members, n, C).
        l2_clip_norm: clip norm; or one for each member.

    Example:
        >>> clipped_cotangents(torch.tensor([2.0e33]), torch.tensor([[2.0e27]]), 1e-6)
        tensor([[1.0000e-12]])
    """
    factors = clip_factors(norms.double(), l2_clip_norm)
    return (factors.unsqueeze(-1) * cotangents).to(cotangents.dtype)


def needs_double(adjacency: Adjacency, *, contracts: bool) -> bool:
    """Whether products over the records must be taken in float64.

    A float32 addition is off by up to 2^-24 of its result. That concerns one piece where all other records
    keep their places. It adds up over all n records where they move (add-remove), and in a certified step,
    whose proof compares two chains at different weights (`contracts`). In float64, n terms of norm at most C
    in pieces of m = `LARGEST_PIECE`, added one after the other, are off by at most ``(m + n/m) n 2^-53 C``
    (Higham 2002, section 4.2), and the terms, each within 2^-41 of the exact gradient for fewer than 2^12
    additions behind any of its numbers, by ``2^-41 n C``: together below ``2^-15 C`` up to n = 2^23.

    Example:
        >>> needs_double("zero-out", contracts=False), needs_double("add-remove", contracts=False)
        (False, True)
    """
    return contracts or adjacency == "add-remove"


@dataclass(frozen=True)
class ClippedSum:
    """Sum over a batch of clipped per-example gradients, with what a noise mechanism must know about it.

    Attributes:
        value: name -> sum (not mean) over the examples, with a leading members axis where `members` is given.
        l2_clip_norm: bound on the joint L2 norm of one example's contribution; a tuple where every member has
            a bound of its own.
        adjacency: relation for which `sensitivity` holds.
        sensitivity: L2 sensitivity of `value` (of each member).
        members: number of weight vectors on the leading axis, None without that axis.
        num_nonfinite: examples (times members) that contributed zero because their gradient was not finite.
            A function of private data: for local warnings, never published.
        nonfinite_by_member: the same for every member.

    Raises:
        ValueError: a clip norm or adjacency out of range, or a tuple that does not fit the members.
    """

    value: Mapping[str, Tensor]
    l2_clip_norm: float | tuple[float, ...]
    adjacency: Adjacency = "zero-out"
    members: int | None = None
    num_nonfinite: int = field(default=0, repr=False)
    nonfinite_by_member: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        norms = self.l2_clip_norm
        if isinstance(norms, tuple) and len(norms) != self.members:
            raise ValueError(
                f"there are {len(norms)} clip norms for {self.members} members; give one for each"
            )
        for norm in norms if isinstance(norms, tuple) else (norms,):
            l2_sensitivity(norm, self.adjacency)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of `value` under `adjacency`.

        Raises:
            ValueError: members with clip norms of their own; take one `member`.
        """
        if isinstance(self.l2_clip_norm, tuple):
            raise ValueError("every member has a sensitivity of its own; take one member of the clipped sum")
        return l2_sensitivity(self.l2_clip_norm, self.adjacency)

    def member(self, index: int) -> ClippedSum:
        """The sum that belongs to one weight vector of the members axis.

        Raises:
            ValueError: there is no members axis.
        """
        if self.members is None:
            raise ValueError("this clipped sum has no members axis")
        value = {name: tensor[index] for name, tensor in self.value.items()}
        norm, bad = self.l2_clip_norm, self.nonfinite_by_member
        return ClippedSum(
            value,
            norm[index] if isinstance(norm, tuple) else norm,
            self.adjacency,
            num_nonfinite=bad[index] if bad else 0,
        )

    def merged(self, other: ClippedSum) -> ClippedSum:
        """Sum over the union of two disjoint sets of examples; the sensitivity does not change.

        Raises:
            ValueError: the two sums were clipped differently or hold different tensors.
        """
        mine = (self.l2_clip_norm, self.adjacency, self.members, self.value.keys())
        if mine != (other.l2_clip_norm, other.adjacency, other.members, other.value.keys()):
            raise ValueError("only sums with the same clip norm, adjacency, members and names can be merged")
        return ClippedSum(
            value={name: tensor + other.value[name] for name, tensor in self.value.items()},
            l2_clip_norm=self.l2_clip_norm,
            adjacency=self.adjacency,
            members=self.members,
            num_nonfinite=self.num_nonfinite + other.num_nonfinite,
            nonfinite_by_member=tuple(
                a + b for a, b in zip(self.nonfinite_by_member, other.nonfinite_by_member, strict=True)
            ),
        )


def require_finite_start(clipped: ClippedSum, batch_size: int) -> None:
    """Refuse to train where no example of the first non-empty batch has a finite gradient.

    Whether this error appears depends on the data; it stops the run before anything is released.

    Raises:
        ValueError: every gradient of the batch was left out.

    Example:
        >>> require_finite_start(ClippedSum({}, 1.0, num_nonfinite=1), batch_size=2)
    """
    if batch_size and clipped.num_nonfinite >= batch_size * (clipped.members or 1):
        raise ValueError(
            "the gradient of every example is not finite before the first step; check the images, the "
            "backbone's weights and the loss"
        )


LARGEST_PIECE = 512
"""Sums over one piece may be float32: longer ones would outgrow `FLOAT_SLACK`, whatever fits in memory."""


class PhysicalBatches:
    """Works through a batch in pieces that fit in memory; the pieces never change what is computed.

    After an out-of-memory error the piece size is halved, and the failed piece is computed again. What a
    piece found is kept once: an error while it is kept, of whatever kind, ends the work.

    Args:
        size: largest number of examples in memory at once; at most `LARGEST_PIECE` are taken.

    Example:
        >>> PhysicalBatches(2).run(5, lambda start, stop: (start, stop), print)
        (0, 2)
        (2, 4)
        (4, 5)
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"physical_batch_size must be at least 1, got {size}")
        self.size = min(size, LARGEST_PIECE)

    def run(self, count: int, compute: Callable[[int, int], T], keep: Callable[[T], None]) -> None:
        """Call ``keep(compute(start, stop))`` over 0..count.

        Args:
            count: number of examples.
            compute: changes nothing; called again with less when memory runs out.
            keep: called once for every example, and never again after an error.

        Raises:
            RuntimeError: a single example does not fit in memory.
        """
        start = 0
        while start < count:
            stop = min(count, start + self.size)
            try:
                found = compute(start, stop)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or stop - start == 1:
                    raise
                self.size = (stop - start) // 2
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            keep(found)
            start = stop


class RunningSum:
    """Float64 totals by name, to which whole parts are added without taking memory.

    Args:
        like: tensors of the names, shapes and device of the totals.

    Example:
        >>> total = RunningSum({"w": torch.zeros(2)})
        >>> total.add({"w": torch.ones(2)})
        >>> total.add({"w": torch.ones(2)})
        >>> total.value()["w"].tolist()
        [2.0, 2.0]
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self._totals = {
            name: torch.empty(t.shape, dtype=torch.float64, device=t.device) for name, t in like.items()
        }
        largest = max(self._totals.values(), key=Tensor.numel)
        self._wide = torch.empty_like(largest).view(-1)
        self._empty = True

    def add(self, part: Mapping[str, Tensor]) -> None:
        """Add a part; after an error the totals are not to be used."""
        for name, total in self._totals.items():
            if self._empty:
                total.copy_(part[name])
            elif part[name].dtype == total.dtype:
                total.add_(part[name])
            else:  # adding float32 to float64 would make a copy first, after other totals have changed
                total.add_(self._wide[: total.numel()].view(total.shape).copy_(part[name]))
        self._empty = False

    def value(self) -> dict[str, Tensor]:
        """The totals; zeros where nothing was added."""
        if self._empty:
            for total in self._totals.values():
                total.zero_()
        return self._totals


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)

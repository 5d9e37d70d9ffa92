"""What processes that work together can do with each other; a process alone does it with itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class RankLostError(RuntimeError):
    """Another process of the run is gone; nothing more can be computed together."""


class RunEndedError(RuntimeError):
    """Another process ended the run, and says why."""


class Ranks(ABC):
    """A group of processes. All of them call the same methods in the same order.

    Attributes:
        rank: number of this process; number 0 is the first one.
        world_size: number of processes.
    """

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    @abstractmethod
    def broadcast(self, message: Any) -> Any:
        """JSON values of the first process, on all."""

    @abstractmethod
    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Overwrite a tensor with that of the first process."""

    @abstractmethod
    def sum_to_first(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place on the first (its content is lost on the others)."""

    @abstractmethod
    def collect(self, rows: Tensor) -> Tensor:
        """Rows (n_r, ...) of all processes in their order, on the CPU of the first; no rows on the others."""

    @abstractmethod
    def deal(self, parts: Sequence[Tensor] | None, mine: Tensor) -> None:
        """Write to `mine` the part that the first process (which alone gives `parts`) has for this one."""

    @abstractmethod
    def agree(self, work: Callable[[], T]) -> T:
        """Do `work` on every process; where it fails on one, all end.

        Raises:
            ValueError: on the first process, what went wrong on any, in one line.
            RunEndedError: on the others, unless their own work failed: then its error.
        """


class OneProcess(Ranks):
    """A process that works alone.

    >>> OneProcess().broadcast("hello"), OneProcess().agree(lambda: 3)
    ('hello', 3)
    """

    rank, world_size = 0, 1

    def broadcast(self, message: Any) -> Any:
        """The message."""
        return message

    def broadcast_tensor(self, tensor: Tensor) -> None:
        """Nothing to do."""

    def sum_to_first(self, tensor: Tensor) -> None:
        """Nothing to add."""

    def collect(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows.cpu()

    def deal(self, parts: Sequence[Tensor] | None, mine: Tensor) -> None:
        """The only part is its own."""
        if parts is None:
            raise ValueError("a process alone deals to itself; give its part")
        mine.copy_(parts[0])

    def agree(self, work: Callable[[], T]) -> T:
        """Do it."""
        return work()


def flattened(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """One vector of all entries in order, so that they travel together."""
    return torch.cat([tensor.detach().reshape(-1).to(dtype or tensor.dtype) for tensor in tensors])


def unflattened(flat: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Views of a vector in the given shapes, in order.

    >>> [part.tolist() for part in unflattened(torch.arange(5), [torch.Size([2, 2]), torch.Size([1])])]
    [[[0, 1], [2, 3]], [4]]
    """
    sizes = [shape.numel() for shape in shapes]
    parts = flat[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

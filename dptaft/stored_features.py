"""Features that stay on disk: a slice is a mapping of its pages, a sample is read; nothing else is in memory.

A slice of consecutive examples is mapped on its own and unmapped with its last tensor, so that the resident
set of a process is that of one piece and not of every page it ever touched. Large examples picked by number
are read, each with one call; small ones are copied from a mapping, a few at a time, which is quicker.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dptaft.tangent.operator import Features

_LARGE = 1 << 15
"""Bytes of an example from which one call for it costs less than the faults of its pages."""
_MAPPED = 128


class StoredTensor:
    """A raw file of n examples of one type and shape.

    Args:
        path: file of exactly these bytes; it stays open, so that it may be deleted meanwhile.
        dtype: type of the numbers.
        shape: (n, ...).
    """

    def __init__(self, path: Path, dtype: torch.dtype, shape: torch.Size) -> None:
        self.dtype, self.shape = dtype, shape
        self._row = shape[1:].numel() * dtype.itemsize
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.shape[0] * self._row

    def rows(self, start: int, stop: int) -> Tensor:
        """Consecutive examples, mapped privately: changes to the result stay in this process."""
        shape = (max(0, stop - start), *self.shape[1:])
        if self._row == 0 or stop <= start:
            return torch.empty(shape, dtype=self.dtype)
        first, end = start * self._row, stop * self._row
        page = first - first % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self._file, end - page, access=mmap.ACCESS_COPY, offset=page)
        count = (end - first) // self.dtype.itemsize
        return torch.frombuffer(pages, dtype=self.dtype, count=count, offset=first - page).view(shape)

    def pick(self, indices: Tensor) -> Tensor:
        """The examples of these numbers, in that order; ascending numbers are read forwards.

        Raises:
            IndexError: a number outside 0..n-1, or a mask in place of numbers.
            OSError: the file has become shorter.
        """
        numbers = indices.cpu()
        if numbers.ndim != 1 or numbers.dtype != torch.int64:
            raise IndexError(f"example numbers must be a vector of int64, got {numbers.dtype}; no mask")
        if len(numbers) and bool((numbers.min() < 0) | (numbers.max() >= self.shape[0])):
            raise IndexError(f"example numbers must be from 0 to {self.shape[0] - 1}")
        out = torch.empty(len(numbers), *self.shape[1:], dtype=self.dtype)
        if out.numel() == 0:
            return out
        if self._row < _LARGE:
            self._copy(out, numbers)
        else:
            self._read_all(out, numbers)
        return out

    def _copy(self, out: Tensor, numbers: Tensor) -> None:
        for start in range(0, len(numbers), _MAPPED):  # every example makes pages around it resident
            few = numbers[start : start + _MAPPED]
            first, last = int(few.min()), int(few.max())
            torch.index_select(self.rows(first, last + 1), 0, few - first, out=out[start : start + len(few)])

    def _read_all(self, out: Tensor, numbers: Tensor) -> None:
        view = memoryview(out.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        gaps = (torch.nonzero(numbers[1:] != numbers[:-1] + 1).squeeze(1) + 1).tolist()
        for begin, end in pairwise([0, *gaps, len(numbers)]):
            self._read(view[begin * self._row : end * self._row], int(numbers[begin]) * self._row)

    def _read(self, into: memoryview, offset: int) -> None:
        while into:
            count = os.preadv(self._file, [into], offset)
            if count == 0:
                raise OSError("a file of cached features became shorter while it was read; build it again")
            into, offset = into[count:], offset + count


class _Mapped(Mapping[str, Tensor]):
    """All examples of every tensor, mapped when they are asked for."""

    def __init__(self, files: Mapping[str, StoredTensor], device: torch.device | None) -> None:
        self._files, self._device = files, device

    def __getitem__(self, name: str) -> Tensor:
        file = self._files[name]
        return _placed(file.rows(0, file.shape[0]), self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class StoredFeatures(Features):
    """Features in files; `index` brings a part of them into memory, on the device of choice.

    Args:
        files: one for every tensor, all with the same number of examples.
        grams: file of the Grams, where they are stored.
        device: of everything that is returned; None for the CPU.

    Raises:
        ValueError: no files, or files that disagree on the number of examples.
    """

    in_memory = False
    _files: dict[str, StoredTensor]
    _stored_grams: StoredTensor | None
    _device: torch.device | None
    _count: int

    def __init__(
        self,
        files: Mapping[str, StoredTensor],
        grams: StoredTensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        counts = {file.shape[0] for file in (*files.values(), *([grams] if grams else []))}
        if len(counts) != 1 or not files:
            raise ValueError(f"files of features hold different numbers of examples: {sorted(counts)}")
        self.__dict__.update(  # the base class is frozen
            tensors=_Mapped(files, device),
            _files=dict(files),
            _stored_grams=grams,
            _device=device,
            _count=counts.pop(),
        )

    @property
    def grams(self) -> Tensor | None:
        """All Grams, mapped; None where they are not stored."""
        stored = self._stored_grams
        return None if stored is None else _placed(stored.rows(0, self._count), self._device)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        grams = 0 if self._stored_grams is None else self._stored_grams.nbytes
        return sum(file.nbytes for file in self._files.values()) + grams

    def index(self, selection: slice | Tensor) -> Features:
        """The examples of a slice (mapped) or of a vector of numbers (read), in that order."""
        tensors = {name: self._take(file, selection) for name, file in self._files.items()}
        stored = self._stored_grams
        return Features(tensors, None if stored is None else self._take(stored, selection))

    def _take(self, file: StoredTensor, selection: slice | Tensor) -> Tensor:
        if isinstance(selection, Tensor):
            return _placed(file.pick(selection), self._device)
        start, stop, step = selection.indices(self._count)
        if step != 1:
            raise ValueError(f"stored features are sliced with step 1, not {step}; pass example numbers")
        return _placed(file.rows(start, stop), self._device)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Features:
        """Parts go to `device` when they are asked for; with `dtype` everything is brought into memory."""
        if dtype is not None:
            return super().to(device, dtype)
        return StoredFeatures(
            self._files, self._stored_grams, self._device if device is None else torch.device(device)
        )


def _placed(tensor: Tensor, device: torch.device | None) -> Tensor:
    return tensor if device is None else tensor.to(device)

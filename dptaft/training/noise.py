"""Gaussian noise and secret random choices from a cryptographic generator.

The stream is AES-256 in counter mode under a key of 32 bytes from the operating system. Nothing about it can
be read back: no seed, no state, no pickling; a forked process draws a new key.

Floating-point mitigation. Noise added in floating point leaves traces of the un-noised sum in the low-order
bits of the result (Mironov 2012; Jin, McMurtry, Rubinstein, Ohrimenko 2022). Here the sum and the noise are
first rounded to one public grid with spacing ``noise_std * 2**-26`` and added as exact integers:

    release = spacing * (round(sum / spacing) + round(2**26 * G)),   G standard normal in float64,

which is a post-processing of the continuous Gaussian mechanism applied to the rounded sum, because
``round(k + g) = k + round(g)`` for integer ``k``. What rounding adds to the sensitivity is charged:
`noise_std` is enlarged accordingly (0.005 % per unit of noise multiplier for 10 million parameters).

What this gives: every release lies on a grid that does not depend on the data, so low-order bits say nothing.
What it does not give: a proof that every grid point has exactly its ideal probability. G comes from the
Box-Muller map of two 63-bit uniforms in float64: errors are about 2**-50, larger (up to the value itself)
only for pairs within 2**-4 of zero; |G| is at most 9.42, a larger value has probability below 5e-21 per
coordinate. The time spent drawing does not depend on the data.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

GRID_BITS = 26
"""The grid spacing is ``noise_std * 2**-GRID_BITS``."""

FLOAT_MITIGATION = (
    f"sum and noise rounded to a public grid of noise_std * 2^-{GRID_BITS}, added as exact integers; "
    "Box-Muller in float64 from 63-bit uniforms"
)
"""One line for reports."""

_CHUNK = 1 << 16
_MASK = 0x7FFFFFFFFFFFFFFF
_LARGEST_CELL = 2.0**48
_ROUNDING_ALLOWANCE = 1.125
"""Two roundings of at most 1/2 + 2**-4 spacings each (scaling in float64 costs at most 2**-4 below 2**48)."""


class _Stream:
    """AES-256-CTR key stream, read as 63-bit integers or as standard normals on the grid."""

    is_secure: bool = False
    description: str = ""

    def __init__(self, key: bytes) -> None:
        self._lock = threading.RLock()
        self._worker: threading.Thread | None = None
        self._start(key)

    def _start(self, key: bytes) -> None:
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._zeros = bytes(8 * _CHUNK)
        self._buffer = bytearray(8 * _CHUNK + 16)
        self._bits = np.frombuffer(self._buffer, dtype=np.int64, count=_CHUNK)
        self._floats = np.empty(_CHUNK)
        self._scratch = np.empty(_CHUNK // 2)
        self._pool = np.empty(0, dtype=np.int32)
        self._next = self._end = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied, pickled or stored; make a new one")

    def _refill(self) -> None:
        self._encryptor.update_into(self._zeros, self._buffer)
        np.bitwise_and(self._bits, _MASK, out=self._bits)

    def _guard_fork(self) -> None:
        """A hook for sources whose key must not be shared with a copy of the process."""

    def integers(self, count: int) -> Tensor:
        """Independent uniform integers in [0, 2**63), int64, shape (count,)."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        out = np.empty(count, dtype=np.int64)
        with self._lock:
            self._guard_fork()
            self._join()
            for start in range(0, count, _CHUNK):
                self._refill()
                part = out[start : start + _CHUNK]
                part[:] = self._bits[: len(part)]
        return torch.from_numpy(out)

    def permutation(self, count: int) -> Tensor:
        """A uniformly random order of 0..count-1 (sorted 63-bit keys, drawn again while two are equal)."""
        while True:
            keys, order = torch.sort(self.integers(count))
            if count < 2 or bool((keys[1:] != keys[:-1]).all()):
                return order

    def _fill(self, count: int) -> None:
        """Put ``round(2**GRID_BITS * G)`` for `count` (or one more) standard normals G in the pool.

        Box and Muller 1958: for uniform u and a uniform angle a, ``r = sqrt(-2 log u)`` gives
        independent normals ``r cos a`` and ``r sin a``; with t = tan(a/2) and w = 2 r/(1 + t^2) these are
        ``w - r`` and ``t w``.
        """
        count += count % 2
        if count > len(self._pool):
            self._pool = np.empty(count, dtype=np.int32)
        half = _CHUNK // 2
        radius, tangent, weight = self._floats[:half], self._floats[half:], self._scratch
        for start in range(0, count, _CHUNK):
            self._refill()
            np.copyto(self._floats, self._bits)
            radius += 0.5
            radius *= 2.0**-63
            np.log(radius, out=radius)
            radius *= -2.0 * 4.0**GRID_BITS
            np.sqrt(radius, out=radius)
            tangent *= math.pi * 2.0**-63
            tangent -= math.pi / 2.0
            np.tan(tangent, out=tangent)
            np.square(tangent, out=weight)
            weight += 1.0
            np.divide(radius, weight, out=weight)
            weight *= 2.0
            tangent *= weight
            np.subtract(weight, radius, out=radius)
            np.rint(self._floats, out=self._floats)
            part = self._pool[start : min(start + _CHUNK, count)]
            pairs = len(part) // 2
            np.copyto(part[:pairs], radius[:pairs], casting="unsafe")
            np.copyto(part[pairs:], tangent[:pairs], casting="unsafe")
        self._next, self._end = 0, count

    def prefetch(self, count: int) -> None:
        """Draw `count` normals in a background thread, for the next call of `normal` or `gaussian_mechanism`.

        Every other draw from this source waits for it: give a sampler a source of its own.
        """
        with self._lock:
            self._guard_fork()
            if self._worker is None and self._end - self._next < count:
                self._next = self._end  # a rest is dropped, never used twice
                self._worker = threading.Thread(target=self._fill, args=(count,))
                self._worker.start()

    def _join(self) -> None:
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _chunks(self, count: int) -> Iterator[tuple[slice, Tensor]]:
        """`count` units in pieces, each used once: place in 0..count, int32 values valid until the next."""
        done = 0
        with self._lock:
            self._guard_fork()
            self._join()
            while done < count:
                if self._next == self._end:
                    self._fill(_CHUNK)
                size = min(count - done, self._end - self._next, _CHUNK)
                piece = torch.from_numpy(self._pool[self._next : self._next + size])
                self._next += size
                yield slice(done, done + size), piece
                done += size

    def units(self, count: int) -> Tensor:
        """`count` independent standard normals in units of 2**-GRID_BITS, rounded to integers, int32, CPU."""
        out = torch.empty(count, dtype=torch.int32)
        for where, piece in self._chunks(count):
            out[where] = piece
        return out

    def normal(self, shape: Iterable[int], std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Independent N(0, std^2) values of the given shape on the CPU (std: standard deviation, >= 0)."""
        if not (math.isfinite(std) and std >= 0):
            raise ValueError(f"std must be finite and not negative, got {std}")
        size = torch.Size(shape)
        return (self.units(size.numel()).double() * (std * 2.0**-GRID_BITS)).to(dtype).reshape(size)

    def normal_(self, tensor: Tensor, std: float = 1.0) -> Tensor:
        """Fill `tensor` in place with independent N(0, std^2) values."""
        return tensor.copy_(self.normal(tensor.shape, std, dtype=tensor.dtype))


class NoiseSource(_Stream):
    """Cryptographic randomness: operating-system entropy, AES-256 in counter mode.

    Formal guarantees:
        Draws are computationally indistinguishable from independent ones as long as AES-256 is a pseudorandom
        permutation. The key exists in this process only: a forked child replaces it before it runs anything
        (``os.register_at_fork``), and one that was made without Python's knowledge before its first draw, by
        its process number.

    Example:
        >>> source = NoiseSource()
        >>> source.normal((2, 3), std=4.0).shape
        torch.Size([2, 3])
        >>> source
        NoiseSource()
    """

    is_secure = True
    description = "AES-256-CTR, key from operating-system entropy"

    def __init__(self) -> None:
        self._pid = os.getpid()
        super().__init__(os.urandom(32))
        _SECRET.add(self)

    def _guard_fork(self) -> None:
        if self._pid != os.getpid():
            self._renew()

    def _renew(self) -> None:
        """Another key, and nothing left that was drawn from the old one."""
        self._pid, self._worker = os.getpid(), None
        self._start(os.urandom(32))


_SECRET: weakref.WeakSet[NoiseSource] = weakref.WeakSet()


def _after_fork() -> None:
    for source in list(_SECRET):
        source._lock = threading.RLock()  # another thread of the parent may have held it
        source._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class InsecureSeededNoise(_Stream):
    """Reproducible noise for debugging: whoever knows the seed can remove the noise. No privacy claim holds.

    Example:
        >>> a, b = InsecureSeededNoise(7), InsecureSeededNoise(7)
        >>> bool((a.normal((5,)) == b.normal((5,))).all()), a.is_secure
        (True, False)
    """

    is_secure = False
    description = "seeded and reproducible: INSECURE, no privacy claim"

    def __init__(self, seed: int) -> None:
        super().__init__(hashlib.sha256(f"dptaft insecure seed {int(seed)}".encode()).digest())


def noise_std(*, sensitivity: float, noise_multiplier: float, dimension: int) -> float:
    """Standard deviation of the noise that makes the grid release at least as private as the exact mechanism.

    ``std = z * (S + a * sqrt(d) * std * 2**-26)``: the sum rounded to the grid has L2 sensitivity at most
    ``S + a * sqrt(d) * spacing`` (a = 1.125), and the noise is `noise_multiplier` times that.

    Args:
        sensitivity: L2 sensitivity S of the sum.
        noise_multiplier: z, ratio of standard deviation to sensitivity; 0 gives 0 (no privacy).
        dimension: number d of released coordinates.

    Raises:
        ValueError: an argument out of range, or a dimension so large that the grid would dominate the noise.

    Example:
        >>> std = noise_std(sensitivity=2.0, noise_multiplier=3.0, dimension=10_000_000)
        >>> 6.0 < std < 6.001
        True
    """
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ValueError(f"sensitivity must be finite and positive, got {sensitivity}")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"noise_multiplier must be finite and not negative, got {noise_multiplier}")
    if dimension < 0:
        raise ValueError(f"dimension must not be negative, got {dimension}")
    share = noise_multiplier * _ROUNDING_ALLOWANCE * math.sqrt(dimension) * 2.0**-GRID_BITS
    if share > 0.1:
        raise ValueError(
            f"{dimension} coordinates at noise_multiplier {noise_multiplier} need a grid finer than "
            f"2^-{GRID_BITS}; train fewer parameters or take fewer steps"
        )
    return noise_multiplier * sensitivity / (1.0 - share)


def gaussian_mechanism(
    values: Mapping[str, Tensor],
    *,
    sensitivity: float,
    noise_multiplier: float,
    source: _Stream,
    out: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Release sums with Gaussian noise on a public grid (see the module text).

    Args:
        values: name -> sum of clipped gradients; one vector together, of joint L2 sensitivity `sensitivity`.
        sensitivity: L2 sensitivity of the joint vector.
        noise_multiplier: standard deviation divided by the sensitivity; 0 returns copies (no privacy).
        source: where the noise comes from.
        out: contiguous tensors for the results, to be used again from step to step (default: new ones).

    Returns:
        Noised tensors of the same shapes, dtypes and devices.

    Raises:
        ValueError: a value is not finite (a non-finite example must have been left out before).

    Formal guarantees:
        One call is (1/noise_multiplier)-GDP (Dong, Roth, Su 2022, Theorem 1) with respect to the
        adjacency for which `sensitivity` holds, up to the limits stated in the module text.
    """
    dimension = sum(v.numel() for v in values.values())
    std = noise_std(sensitivity=sensitivity, noise_multiplier=noise_multiplier, dimension=dimension)
    for name, value in values.items():
        if not _is_finite(value):
            raise ValueError(
                f"the sum for {name!r} is not finite; non-finite examples must be left out first"
            )
    if out is None:
        out = {name: torch.empty_like(value.detach().contiguous()) for name, value in values.items()}
    for name, value in values.items():
        if std == 0:
            out[name].copy_(value.detach())
        else:
            _release(value.detach(), std * 2.0**-GRID_BITS, source, out[name])
    return dict(out)


def _is_finite(value: Tensor) -> bool:
    """Whether all entries are finite; one sum in the usual case, a closer look where it overflows."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _release(value: Tensor, spacing: float, source: _Stream, out: Tensor) -> None:
    flat, result = value.reshape(-1), out.view(-1)
    on_cpu = value.device.type == "cpu"
    pieces = source._chunks(len(flat)) if on_cpu else [(slice(None), source.units(len(flat)))]
    size = min(len(flat), _CHUNK) if on_cpu else len(flat)
    cells, noise = (torch.empty(size, dtype=torch.float64, device=value.device) for _ in range(2))
    for where, piece in pieces:
        count = len(piece)
        sums, units = cells[:count].copy_(flat[where]), noise[:count].copy_(piece)
        sums.mul_(1.0 / spacing).clamp_(-_LARGEST_CELL, _LARGEST_CELL).round_()
        result[where] = sums.add_(units).mul_(spacing)

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
Box-Muller map of two 63-bit uniforms in float64 (relative error about 2**-50; |G| is at most 9.42, a larger
value has probability below 5e-21 per coordinate). The time spent drawing does not depend on the data.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterable, Mapping
from typing import NoReturn

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

_CHUNK = 1 << 15
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
        self._bits = torch.frombuffer(self._buffer, dtype=torch.int64, count=_CHUNK)
        self._floats = torch.empty(_CHUNK, dtype=torch.float64)
        self._sines = torch.empty(_CHUNK // 2, dtype=torch.float64)
        self._ready = torch.empty(0, dtype=torch.int32)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied, pickled or stored; make a new one")

    def _refill(self) -> None:
        self._encryptor.update_into(self._zeros, self._buffer)
        self._bits.bitwise_and_(_MASK)

    def _guard_fork(self) -> None:
        """A hook for sources whose key must not be shared with a forked process."""

    def integers(self, count: int) -> Tensor:
        """Independent uniform integers in [0, 2**63), int64, shape (count,)."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        out = torch.empty(count, dtype=torch.int64)
        with self._lock:
            self._guard_fork()
            self._join()
            for start in range(0, count, _CHUNK):
                self._refill()
                part = out[start : start + _CHUNK]
                part.copy_(self._bits[: len(part)])
        return out

    def permutation(self, count: int) -> Tensor:
        """A uniformly random order of 0..count-1 (sorted 63-bit keys, drawn again while two are equal)."""
        while True:
            keys, order = torch.sort(self.integers(count))
            if count < 2 or bool((keys[1:] != keys[:-1]).all()):
                return order

    def _draw_units(self, count: int) -> Tensor:
        """round(2**GRID_BITS * G) for `count` independent standard normals G, int32 (Box and Muller 1958)."""
        out = torch.empty(count + count % 2, dtype=torch.int32)
        half = _CHUNK // 2
        radius, cosines, sines = self._floats[:half], self._floats[half:], self._sines
        for start in range(0, len(out), _CHUNK):
            self._refill()
            self._floats.copy_(self._bits)
            radius.add_(0.5).mul_(2.0**-63).log_().mul_(-2.0 * 4.0**GRID_BITS).sqrt_()
            cosines.mul_(2.0 * math.pi * 2.0**-63)
            torch.sin(cosines, out=sines)
            cosines.cos_().mul_(radius).round_()
            sines.mul_(radius).round_()
            part = out[start : start + _CHUNK]
            pairs = len(part) // 2
            part[:pairs].copy_(cosines[:pairs])
            part[pairs:].copy_(sines[:pairs])
        return out[:count]

    def _fill(self, count: int) -> None:
        drawn = self._draw_units(count)
        self._ready = torch.cat([self._ready, drawn]) if len(self._ready) else drawn

    def prefetch(self, count: int) -> None:
        """Draw `count` normals in a background thread, for the next call of `normal` or `gaussian_mechanism`.

        Every other draw from this source waits for it: give a sampler a source of its own.
        """
        with self._lock:
            self._guard_fork()
            if self._worker is None and count > len(self._ready):
                self._worker = threading.Thread(target=self._fill, args=(count - len(self._ready),))
                self._worker.start()

    def _join(self) -> None:
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def units(self, count: int) -> Tensor:
        """`count` independent standard normals in units of 2**-GRID_BITS, rounded to integers, int32, CPU."""
        with self._lock:
            self._guard_fork()
            self._join()
            if len(self._ready) < count:
                self._fill(count - len(self._ready))
            taken, self._ready = self._ready[:count], self._ready[count:]
            return taken

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
        permutation. The key exists in this process only and is replaced in a forked child.

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

    def _guard_fork(self) -> None:
        if self._pid != os.getpid():
            self._pid, self._worker = os.getpid(), None
            self._start(os.urandom(32))


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
) -> dict[str, Tensor]:
    """Release sums with Gaussian noise on a public grid (see the module text).

    Args:
        values: name -> sum of clipped gradients; one vector together, of joint L2 sensitivity `sensitivity`.
        sensitivity: L2 sensitivity of the joint vector.
        noise_multiplier: standard deviation divided by the sensitivity; 0 returns copies (no privacy).
        source: where the noise comes from.

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
    if std == 0:
        return {name: value.clone() for name, value in values.items()}
    return {name: _release(value, std * 2.0**-GRID_BITS, source) for name, value in values.items()}


def _is_finite(value: Tensor) -> bool:
    """Whether all entries are finite; one sum in the usual case, a closer look where it overflows."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _release(value: Tensor, spacing: float, source: _Stream) -> Tensor:
    units = source.units(value.numel())
    flat = value.detach().reshape(-1)
    out = torch.empty_like(flat)
    step = _CHUNK if value.device.type == "cpu" else max(len(flat), 1)
    buffer = torch.empty(min(step, len(flat)), dtype=torch.float64, device=value.device)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        cells = buffer[: len(flat[part])].copy_(flat[part])
        cells.mul_(1.0 / spacing).clamp_(-_LARGEST_CELL, _LARGEST_CELL).round_()
        out[part] = cells.add_(units[part].to(cells.device)).mul_(spacing)
    return out.reshape(value.shape)

"""Float32 means float32: no TF32, no bfloat16 products, no autocast while privacy depends on the result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_PRODUCTS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")
_DEVICES = ("cpu", "cuda")


@contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 tensors keep all 24 bits inside; the caller's settings return afterwards.

    TF32 keeps 11 bits of every factor, bfloat16 8: norms and contributions would be off by up to 2^-11 and
    2^-8 of themselves, beyond what clip norms allow for (`dptaft.training.clipping.FLOAT_SLACK`). Covers
    ``torch.set_float32_matmul_precision``, ``allow_tf32``, ``fp32_precision`` of all backends, and autocast.
    The settings belong to the process, so other threads see them too. Also a decorator.

    Example:
        >>> with full_float32():
        ...     torch.get_float32_matmul_precision()
        'highest'
    """
    with ExitStack() as stack:
        for device in filter(torch.is_autocast_enabled, _DEVICES):
            stack.enter_context(torch.autocast(device, enabled=False))
        if hasattr(torch.backends, "fp32_precision"):
            backends = [_backend(name) for name in _PRODUCTS]
            backends = [backend for backend in backends if backend.fp32_precision != "ieee"]
            for backend in backends:
                stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
        else:
            backends = []
            stack.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        # restored before the others: it sets some of them
        if (before := _matmul_precision()) != "highest":
            stack.callback(torch.set_float32_matmul_precision, before)
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield


def _matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # not kept apart from the settings of the backends, which are restored after it
        return "highest"


def _backend(name: str) -> Any:
    found: Any = torch.backends
    for part in name.split("."):
        found = getattr(found, part)
    return found

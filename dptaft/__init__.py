"""Differentially private fine-tuning of tangent vision transformers.

    import dptaft
    run = dptaft.train("digits", epsilon=3)
    run.accuracy, run.statement.claim["epsilon"]

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptaft.api import train
    from dptaft.auditing.report import audit
    from dptaft.data import ImageData, Split, load_data
    from dptaft.runs import Run, load_run
    from dptaft.shards import compose, train_shards

_HOMES = {
    "train": "dptaft.api",
    "audit": "dptaft.auditing.report",
    "ImageData": "dptaft.data",
    "Split": "dptaft.data",
    "load_data": "dptaft.data",
    "Run": "dptaft.runs",
    "load_run": "dptaft.runs",
    "compose": "dptaft.shards",
    "train_shards": "dptaft.shards",
}

__all__ = ["ImageData", "Run", "Split", "audit", "compose", "load_data", "load_run", "train", "train_shards"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})

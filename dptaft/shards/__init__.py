"""Models trained on disjoint shards, composed by addition of their weights, and taken apart again.

`train_shards` and `add_shard` train; `compose` averages or adds runs; `remove_shard` and `remove_record` give
the run that would have been composed without them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptaft.shards.collection import Collection, ShardError, load_collection
    from dptaft.shards.composition import compose
    from dptaft.shards.removal import remove_record, remove_shard
    from dptaft.shards.training import add_shard, train_shards

_HOMES = {
    "Collection": "collection",
    "ShardError": "collection",
    "add_shard": "training",
    "compose": "composition",
    "load_collection": "collection",
    "remove_record": "removal",
    "remove_shard": "removal",
    "train_shards": "training",
}

__all__ = [
    "Collection",
    "ShardError",
    "add_shard",
    "compose",
    "load_collection",
    "remove_record",
    "remove_shard",
    "train_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""What shards are asked for and where their data comes from, so that a shard can be trained again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptaft.data import ImageData, load_data
from dptaft.shards.collection import Collection, Shard, ShardError
from dptaft.training.optimizers import Schedule
from dptaft.training.plan import (
    ONE_SHOT,
    ModelConfig,
    PerformanceConfig,
    PlanError,
    PrivacyConfig,
    Request,
    default_delta,
    plain,
)


@dataclass(frozen=True)
class Source:
    """Data, and how to load it again."""

    images: ImageData
    name: str
    arguments: Mapping[str, Any]

    @classmethod
    def of(
        cls, data: str | ImageData, classes: Sequence[str] | None, public: bool, skip_corrupt: bool
    ) -> Source:
        """Load data, or take images that are loaded already."""
        if not isinstance(data, str):
            return cls(data, data.name, {"name": data.name})
        given: dict[str, Any] = {"public": public, "skip_corrupt": skip_corrupt}
        if classes is not None:
            given["classes"] = list(classes)
        return cls(load_data(data, **given), data, {"spec": data, **given})

    @classmethod
    def again(cls, shard: Shard, data: ImageData | None) -> Source:
        """The data that a shard came from, or what is given in its place.

        Raises:
            ShardError: it was given as images, which only the caller has.
        """
        if data is not None:
            return cls(data, str(shard.source.get("spec", data.name)), shard.source)
        if "spec" not in shard.source:
            raise ShardError(f"shard {shard.name} was trained on images in memory; give them again as data")
        options = {key: value for key, value in shard.source.items() if key != "spec"}
        return cls(load_data(shard.source["spec"], **options), shard.source["spec"], shard.source)


def make_request(
    name: str, epsilon: float, optimizer: Mapping[str, Any] | None, options: Mapping[str, Any]
) -> Request:
    """The request of one shard, from arguments named as those of `dptaft.train`.

    Raises:
        PlanError: an unknown argument, seeded noise, or an adjacency other than zero-out.
    """
    given = dict(options)
    if "model" in given:
        given["name"] = given.pop("model")
    if given.get("certified"):
        given["unit_jacobian"] = True
    parts: list[dict[str, Any]] = []
    for kind in (PrivacyConfig, ModelConfig, PerformanceConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        parts.append({name: given.pop(name) for name in list(given) if name in names})
    if given:
        raise PlanError(f"shards know no option {sorted(given)[0]!r}; leave it out")
    privacy = PrivacyConfig(epsilon=epsilon, **parts[0])
    if privacy.adjacency != "zero-out":
        raise PlanError(
            f"shards need the adjacency zero-out, not {privacy.adjacency}: their sizes are public, and a "
            "record stays in its shard"
        )
    if privacy.insecure_seed is not None:
        raise PlanError("seeded noise would be the same in every shard; leave --insecure-seed out")
    model = ModelConfig(**parts[1])
    if model.method in ONE_SHOT:
        raise PlanError(f"shards are trained by gradient steps, which {model.method} does not; use tangent")
    return Request(privacy, model, dict(optimizer or {}), PerformanceConfig(**parts[2]), name)


def with_delta(request: Request, records: int) -> Request:
    """The request with the default delta for the whole data, where none was asked for."""
    if request.privacy.delta is not None:
        return request
    privacy = dataclasses.replace(request.privacy, delta=default_delta(records))
    return dataclasses.replace(request, privacy=privacy)


def described(request: Request) -> dict[str, Any]:
    """The request as tables of ``shards.toml``."""
    optimizer = {k: plain(v) if isinstance(v, Schedule) else v for k, v in request.optimizer.items()}
    return {
        "privacy": plain(request.privacy),
        "model": plain(request.model),
        "optimizer": optimizer,
    }


def stored_request(collection: Collection, data: str) -> Request:
    """What the shards of a parent folder were asked for, for data of the given name."""
    stored = collection.request
    optimizer = stored.get("optimizer", {})
    return Request(
        PrivacyConfig(**stored["privacy"]),
        ModelConfig(**stored["model"]),
        {k: Schedule(**v) if isinstance(v, Mapping) else v for k, v in optimizer.items()},
        PerformanceConfig(),
        data,
    )

"""The points of a recipe: every combination of data, method, grid, budget and seed."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dptaft.data import ImageData, load_data
from dptaft.sweep.recipe import DataSet, Method, Recipe, train_options
from dptaft.training.optimizers import Schedule
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request

_RENAMED = {"name": "model"}
_SCHEDULES = ("learning_rate_schedule", "noise_schedule")
_LONGEST = 80


@dataclass(frozen=True)
class SweepPoint:
    """One run of a sweep.

    Attributes:
        id: name of its folder: readable, and different for different options.
        data: its data set.
        method: name of its method.
        setting: the grid values of the point.
        epsilon: budget; ``inf`` for the reference without privacy.
        seed: public seed of the model.
        options: all further options of `dptaft.train`.
    """

    id: str
    data: DataSet
    method: str
    setting: Mapping[str, Any]
    epsilon: float
    seed: int
    options: Mapping[str, Any]

    def train_options(self) -> dict[str, Any]:
        """Keyword arguments of `dptaft.train` but data, output and ledger."""
        options = dict(self.options)
        given = dict(options.get("optimizer", {}))
        for name in _SCHEDULES:
            if isinstance(given.get(name), str):
                given[name] = Schedule.parse(given[name])
        return options | {"optimizer": given, "epsilon": self.epsilon, "seed": self.seed}

    def request(self) -> Request | None:
        """What `dptaft.train` would be asked for; None where the point uses options of another procedure."""
        options = self.train_options()
        configs = {}
        known = {"optimizer"}
        for kind in (PrivacyConfig, ModelConfig, PerformanceConfig):
            names = {_RENAMED.get(f.name, f.name): f.name for f in fields(kind)}
            known |= set(names)
            configs[kind] = {names[key]: value for key, value in options.items() if key in names}
        configs[ModelConfig]["unit_jacobian"] = bool(options.get("certified", False))
        defaults = {name: option.default for name, option in train_options().items()}
        for name, value in options.items():
            if name not in known and (name not in defaults or value != defaults[name]):
                return None
        return Request(
            PrivacyConfig(**configs[PrivacyConfig]),
            ModelConfig(**configs[ModelConfig]),
            options["optimizer"],
            PerformanceConfig(**configs[PerformanceConfig]),
            self.data.source,
        )


def expand(recipe: Recipe) -> list[SweepPoint]:
    """All points: data sets, then methods, then seeds, then grid values, then budgets.

    Raises:
        ValueError: options that no run can have (their configuration is built here).
    """
    budgets = [*sorted(recipe.budget.epsilons), *([math.inf] if recipe.budget.reference else [])]
    points = []
    for data, method, seed in itertools.product(recipe.data, recipe.methods, recipe.seeds):
        for setting in _settings(method):
            for epsilon in budgets:
                points.append(_point(recipe, data, method, setting, epsilon, seed))
    for point in points:
        point.request()
    return points


def _settings(method: Method) -> list[dict[str, Any]]:
    names = list(method.grid)
    return [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*(method.grid[n] for n in names))
    ]


def _point(
    recipe: Recipe, data: DataSet, method: Method, setting: Mapping[str, Any], epsilon: float, seed: int
) -> SweepPoint:
    optimizer: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for layer in (recipe.options, method.options, setting):
        for key, value in layer.items():
            if key == "optimizer":
                optimizer |= value
            elif key.startswith("optimizer."):
                optimizer[key.removeprefix("optimizer.")] = value
            else:
                options[key] = value
    own = {key: value for key, value in data.options.items() if key == "public_size"}
    options |= own | ({"optimizer": optimizer} if optimizer else {})
    if recipe.budget.delta is not None:
        options["delta"] = recipe.budget.delta
    facts = [data.source, dict(data.options), options, "inf" if math.isinf(epsilon) else epsilon, seed]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    shown = "".join(f"-{value}" for value in setting.values())
    text = f"{data.name}-{method.name}{shown}-eps{epsilon:g}-seed{seed}"
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:_LONGEST]
    return SweepPoint(f"{slug}-{digest}", data, method.name, setting, epsilon, seed, options)


def load_source(data: DataSet, public: bool) -> ImageData:
    """The images of a data set of a recipe.

    Args:
        data: its source and options.
        public: the treatment of the budget declares the images public.

    Raises:
        DataError: they cannot be had.
    """
    options = dict(data.options)
    options.pop("public_size", None)
    public = bool(options.pop("public_data", False)) or public
    return load_data(data.source, classes=options.pop("classes", None), public=public, **options)


@dataclass(frozen=True)
class Task:
    """Points that are trained together or one after the other in one process, with one model where possible.

    Attributes:
        points: of one data set.
        shared: whether they have the same model, so that their steps may be batched.
    """

    points: tuple[SweepPoint, ...]
    shared: bool


def group(points: Sequence[SweepPoint]) -> list[Task]:
    """Tasks in order: points of the same model, data, adjacency and performance settings go together."""
    together: dict[object, list[SweepPoint]] = {}
    for point in points:
        request = point.request()
        shared = request is not None and request.model.method == "tangent"
        key: object = ("alone", point.data.name, _model_key(point))
        if shared and request is not None:
            adjacency = request.privacy.adjacency
            key = (point.data.name, request.model, request.performance, adjacency)
        together.setdefault(key, []).append(point)
    return [
        Task(tuple(found), not (isinstance(key, tuple) and key[0] == "alone"))
        for key, found in together.items()
    ]


def _model_key(point: SweepPoint) -> str:
    """Settings that decide which features a point needs, so that points that share them are neighbours."""
    names = {_RENAMED.get(f.name, f.name) for f in fields(ModelConfig)}
    return json.dumps(
        {k: v for k, v in point.options.items() if k in names} | {"seed": point.seed}, sort_keys=True
    )

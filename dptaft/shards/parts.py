"""The runs that a composition consists of: found, checked against their hashes, and comparable."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dptaft.algebra import AlgebraError, TangentWeights, coefficients, read_weights
from dptaft.runs import WEIGHTS, Run, RunError, load_run

_NOT_IN_THE_JACOBIAN = ("loss", "method", "head", "weights")
"""Settings that may differ: loss and method train only; head and backbone are compared by content."""


class ComposeError(ValueError):
    """Runs that cannot be composed, or not as asked; the message names the run and the reason."""


@dataclass(frozen=True)
class Part:
    """One trained run within a composition.

    Attributes:
        run: the run, loaded and checked.
        factor: what its weights are multiplied by.
    """

    run: Run
    factor: float

    @property
    def partition(self) -> str | None:
        """Public id of the set of disjoint shards it belongs to; None for a run of its own."""
        found: str | None = self.run.config.get("shard", {}).get("partition")
        return found

    @property
    def shard(self) -> str | None:
        """Name of its shard in the partition."""
        found: str | None = self.run.config.get("shard", {}).get("name")
        return found

    @property
    def label(self) -> str:
        """The shard's or the run's name, for messages."""
        return f"shard {self.shard}" if self.shard is not None else str(self.run.path)

    def weights(self) -> TangentWeights:
        """The run's tangent weights and head."""
        return read_weights(self.run.path / WEIGHTS)


def is_composed(run: Run) -> bool:
    """Whether a run was made by adding others."""
    return "composition" in run.config


def parts_of(run: Run, entries: Sequence[Mapping[str, Any]] | None = None) -> tuple[Part, ...]:
    """The trained runs that a run consists of, with their factors: itself, unless it was composed.

    Args:
        run: trained or composed.
        entries: some of the parts of a composed run, as its configuration lists them; None takes all.

    Raises:
        ComposeError: a part that is not where the run says, or is another run now.
    """
    if not is_composed(run):
        return (Part(run, 1.0),)
    listed = run.config["composition"]["parts"] if entries is None else entries
    return tuple(_load_part(run, entry) for entry in listed)


def part_path(run: Run, entry: Mapping[str, Any]) -> Path:
    """Where a composed run found one of its parts."""
    return Path(os.path.normpath(run.path / entry["path"]))


def _load_part(run: Run, entry: Mapping[str, Any]) -> Part:
    path = part_path(run, entry)
    try:
        part = load_run(path)
    except RunError as error:
        raise ComposeError(
            f"part {entry['run']} of {run.path} is not at {path} ({error}); put it back: a composition is "
            "made anew from its parts"
        ) from None
    if part.id != entry["id"]:
        raise ComposeError(f"{path} is not the run that {run.path} was composed of; restore {entry['id']}")
    return Part(part, float(entry["factor"]))


def gather(runs: Sequence[Run], how: str, weights: Sequence[float] | None) -> tuple[Part, ...]:
    """All trained runs below `runs` with their factors; runs that occur twice are merged.

    An average counts every trained run the same, whichever composition brought it.

    Raises:
        ComposeError: no run, or an average over a composition with other weights.
        AlgebraError: weights that do not fit.
    """
    if not runs:
        raise ComposeError("there is no run to compose; give at least one")
    check_compatible(runs)
    centered = bool(runs[0].config["model"].get("centered", True))
    leaves = [parts_of(run) for run in runs]
    if how == "average":
        _check_plain_averages(runs)
        merged = _merged([part for parts in leaves for part in parts])
        factors = coefficients(how, len(merged), weights, centered=centered)
        return tuple(dataclasses.replace(p, factor=f) for p, f in zip(merged, factors, strict=True))
    outer = coefficients(how, len(runs), weights, centered=centered)
    scaled = [
        dataclasses.replace(part, factor=factor * part.factor)
        for factor, parts in zip(outer, leaves, strict=True)
        for part in parts
    ]
    merged = tuple(part for part in _merged(scaled, add=True) if part.factor != 0)
    if not merged:
        raise AlgebraError("the weights cancel each other: nothing would be left; give others")
    return merged


def _merged(parts: Sequence[Part], *, add: bool = False) -> tuple[Part, ...]:
    found: dict[str, Part] = {}
    for part in parts:
        before = found.get(part.run.id)
        if before is not None and add:
            part = dataclasses.replace(part, factor=before.factor + part.factor)
        found[part.run.id] = part
    return tuple(found.values())


def _check_plain_averages(runs: Sequence[Run]) -> None:
    for run in runs:
        if is_composed(run) and run.config["composition"]["how"] != "average" and len(runs) > 1:
            raise ComposeError(
                f"{run.path} is no average (it was composed by {run.config['composition']['how']}), so an "
                "average over its parts would not contain it; give --weights, one per run"
            )


def check_compatible(runs: Sequence[Run]) -> None:
    """Refuse runs whose weights do not multiply the same Jacobian.

    Backbone, preprocessing and every setting of the model but the loss must agree, and the classes of one run
    begin those of the others.

    Raises:
        ComposeError: naming both runs, the setting and its two values.
    """
    first = runs[0]
    for run in runs:
        if run.config["model"].get("method") == "non-linear":
            raise ComposeError(
                f"{run.path} was trained with method non-linear: its outputs are "
                "not linear in its weights, so a sum of weights is no ensemble; compose tangent models"
            )
        for name, one, two in _settings(first, run):
            if one != two:
                raise ComposeError(
                    f"{first.path} and {run.path} differ in {name}: {_short(one)} against {_short(two)}; "
                    "only runs of one base model can be added"
                )
        few, many = sorted((first.classes, run.classes), key=len)
        if few != many and run.config["model"].get("unit_jacobian"):
            raise ComposeError(
                f"{first.path} and {run.path} have {len(few)} and {len(many)} classes, and their Jacobians "
                "are divided by norms over all classes, which new classes change; train them with one list "
                "of classes"
            )
        if many[: len(few)] != few:
            raise ComposeError(
                f"the classes {', '.join(few)} of one run do not begin the classes {', '.join(many)} of "
                "another; declare one list of classes, and add new ones at its end"
            )


def _settings(one: Run, two: Run) -> Iterator[tuple[str, Any, Any]]:
    yield "backbone", one.config["backbone"].get("sha256"), two.config["backbone"].get("sha256")
    yield "preprocessing", _frozen(one.config.get("preprocessing")), _frozen(two.config.get("preprocessing"))
    models = one.config["model"], two.config["model"]
    for name in sorted(set(models[0]) | set(models[1])):
        if name not in _NOT_IN_THE_JACOBIAN:
            yield name, _frozen(models[0].get(name)), _frozen(models[1].get(name))


def _frozen(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

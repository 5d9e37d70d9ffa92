"""What a statement says and what its run says, under dotted names, for `dptaft.assumptions`. Needs no torch.

Some names are derived: numbers that the two write in different units, and how a composed run nests its parts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptaft.bundled import has_public_weights
from dptaft_accounting import best_bound, mechanism_from_dict
from dptaft_accounting.errors import AccountingError

STEPS, ONE_SHOT, SELECTED, COMPOSED = "steps", "one-shot", "selected", "composed"
UNSAID: Any = type("Unsaid", (), {"__repr__": lambda self: "nothing"})()
"""Neither the statement nor the run holds a value under a name."""

_GAUSSIAN = ("full-batch-gaussian", "poisson-gaussian", "cyclic-gaussian")
_KINDS_OF_SAMPLING = {
    "full-batch": ("full-batch-gaussian",),
    "poisson": ("poisson-gaussian",),
    "cyclic-partition": ("cyclic-gaussian", "full-batch-gaussian"),
}
_KINDS_OF_METHOD = {
    "objective-perturbation": ("softmax-objective-perturbation",),
    "output-perturbation": ("output-perturbation",),
}
_NESTED = ("sequence", "parallel")
_FROM_TRAINING = ("derived.given", "derived.mu")
_ENTRY = ("factor", "partition", "shard", "epsilon", "delta")


def _look_up(tree: Any, name: str) -> Any:
    for key in name.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return UNSAID
        tree = tree[key]
    return tree


class StatementSays:
    """Values of a statement.

    Besides its groups: `record` (the mechanism record), `details` (the mechanism group; of the best of
    several candidates that of the candidate), `certificate`, and the derived `steps`, `regularization`,
    `gradient_tolerance` (both of the sum objective), `objective_noise_std`, `output_noise_std`,
    `candidate_epsilon`, `candidate_mu`, `parts`, `removed`, `shape`.

    Args:
        groups: of the statement.
    """

    def __init__(self, groups: Mapping[str, Any]) -> None:
        mechanism = groups["mechanism"]
        self._groups = groups
        self._record = _whole(mechanism["record"])
        certificate = groups["accounting"].get("certificate")
        self.certified = certificate is not None
        self._tree = {
            **groups,
            "record": self._record,
            "details": mechanism.get("candidate", mechanism),
            "certificate": UNSAID if certificate is None else certificate,
        }

    def value(self, name: str) -> Any:
        """The value under a dotted name, or UNSAID."""
        derived = getattr(self, f"_{name}", None)
        return _look_up(self._tree, name) if derived is None else derived()

    def _steps(self) -> Any:
        if self._record.get("kind") == "cyclic-gaussian":
            return self._record["batches_per_epoch"] * self._record["epochs"]
        return self._record.get("steps", UNSAID)

    def _is_output(self) -> bool:
        return bool(self._record.get("kind") == "output-perturbation")

    def _scaled(self, name: str) -> Any:
        """Output perturbation is recorded for the mean objective, which is the sum over `records`."""
        found = self._record.get(name, UNSAID)
        return found * self._record["records"] if self._is_output() else found

    def _regularization(self) -> Any:
        return self._scaled("regularization")

    def _gradient_tolerance(self) -> Any:
        return self._scaled("gradient_tolerance")

    def _objective_noise_std(self) -> Any:
        return 0.0 if self._is_output() else self._record.get("noise_std", UNSAID)

    def _output_noise_std(self) -> Any:
        return self._record.get("noise_std" if self._is_output() else "output_noise_std", UNSAID)

    def _candidate_epsilon(self) -> Any:
        """Epsilon of one candidate as the record has it; a larger one assumes less."""
        if "base" not in self._record:
            return UNSAID
        try:
            base = mechanism_from_dict(self._record["base"])
            return best_bound(base, delta=self._groups["claim"]["delta"]).epsilon * (1 + 1e-6)
        except AccountingError:
            return 0.0

    def _candidate_mu(self) -> Any:
        base = self._record.get("base", {})
        return UNSAID if "noise_multiplier" not in base else _mu(base["noise_multiplier"], base["steps"])

    def _parts(self) -> Any:
        listed = _look_up(self._tree, "composition.parts")
        return UNSAID if listed is UNSAID else [_entry(item, "statement") for item in listed]

    def _removed(self) -> Any:
        listed = _look_up(self._tree, "composition.removed")
        return UNSAID if listed is UNSAID else [_removal(item) for item in listed]

    def _shape(self) -> Any:
        return Shape.of_record(self._record)


def _whole(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A record with the fields that it leaves to their defaults; one that cannot be accounted as it is."""
    try:
        return mechanism_from_dict(record).to_dict()
    except AccountingError:
        return record


class RunSays:
    """Values of ``run.toml``, with `metrics` (lists over its lines) and `derived` ones.

    Args:
        config: content of ``run.toml``.
        metrics: lines of ``metrics.jsonl``.

    Attributes:
        kind: how the weights were made: `steps`, `one-shot`, `selected` or `composed`.
    """

    def __init__(self, config: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
        self._config = config
        self._method = _look_up(config, "model.method")
        self.kind = (
            COMPOSED
            if "composition" in config
            else SELECTED
            if "selection" in config
            else ONE_SHOT
            if self._method in _KINDS_OF_METHOD
            else STEPS
        )
        derived: dict[str, Any] = {
            "kinds": self._kinds(),
            "given": self._given(),
            "classes": len(config["data"].get("classes", ())),
            "public_backbone": self._public_backbone(),
        }
        derived |= self._of_training() | self._of_parts()
        self._tree = {**config, "derived": derived, "metrics": _columns(metrics)}

    def value(self, name: str) -> Any:
        """The value under a dotted name, or UNSAID."""
        return _look_up(self._tree, name)

    def owes(self, name: str) -> bool:
        """Whether a value comes from the table `training` and the run has one: then it says all of it."""
        return "training" in self._config and (name.startswith("training.") or name in _FROM_TRAINING)

    def _kinds(self) -> tuple[str, ...]:
        """Kinds of mechanism records that this run can have."""
        if self.kind == COMPOSED:
            trained = (*_GAUSSIAN, *(kind for kinds in _KINDS_OF_METHOD.values() for kind in kinds))
            return (*trained, "certified-last-iterate", "repeat-and-select", *_NESTED)
        if self.kind == SELECTED:
            return ("repeat-and-select",)
        if self.kind == ONE_SHOT:
            return _KINDS_OF_METHOD[self._method]
        sampling = _look_up(self._config, "training.sampling")
        if sampling is UNSAID:
            sampling = _look_up(self._config, "privacy.sampling")
        return _KINDS_OF_SAMPLING.get(sampling, _GAUSSIAN)

    def _given(self) -> Any:
        """Names of settings that the user gave and no choice is accounted for."""
        if self.kind == SELECTED:
            return []
        given = _look_up(self._config, "training.given")
        if self.kind == COMPOSED or given is not UNSAID or "training" in self._config:
            return given
        privacy = self._config["privacy"]
        return [name for name in ("steps", "l2_clip_norm", "expected_batch_size") if name in privacy]

    def _public_backbone(self) -> bool:
        model = self._config["model"]
        return has_public_weights(model.get("name"), model.get("weights"))

    def _of_training(self) -> dict[str, Any]:
        found = self._config.get("training", {})
        noise, steps = found.get("noise_multiplier"), found.get("steps_executed")
        return {} if not noise or not steps else {"mu": _mu(noise, steps) * (1 - 1e-6)}

    def _of_parts(self) -> dict[str, Any]:
        if self.kind != COMPOSED:
            return {}
        made = self._config["composition"]
        entries = made["parts"]
        deltas = [entry["delta"] for entry in entries if "delta" in entry]
        return {
            "parts": len(entries),
            "entries": [_entry(item, "id") for item in entries],
            "removed": [_removal(item) for item in made.get("removed", ())],
            "disjointness": _disjointness(entries, bool(made.get("disjoint"))),
            "shape": Shape.of_entries(
                entries,
                disjoint=bool(made.get("disjoint")),
                replaced=_look_up(self._config, "privacy.adjacency") == "replace-one",
            ),
            **({"delta": min(deltas)} if deltas else {}),
        }


def _columns(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = ("accuracy", "images")
    return {name: [line[name] for line in lines if name in line] for name in names}


def _mu(noise: float | Sequence[float], steps: int) -> float:
    """Parameter of Gaussian differential privacy of full-batch steps: sqrt(sum 1/z^2)."""
    if isinstance(noise, (int, float)):
        return math.sqrt(steps) / noise
    return math.sqrt(math.fsum(z**-2 for z in noise))


def _entry(item: Mapping[str, Any], identity: str) -> dict[str, Any]:
    return {"id": item.get(identity)} | {name: item[name] for name in _ENTRY if name in item}


def _removal(item: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "record"}


def _disjointness(entries: Sequence[Mapping[str, Any]], declared: bool) -> str:
    """Who vouches for disjoint parts, as `dptaft.shards.claim.disjointness` has it."""
    origins = {entry.get("partition") or entry["id"] for entry in entries}
    if len(origins) > 1 and declared:
        return "declared by the user"
    shards = {(entry.get("partition"), entry.get("shard")) for entry in entries}
    several = len(shards) > 1 and any(entry.get("partition") for entry in entries)
    return "checked" if several else "not used"


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a mechanism record, by which a composed run names those of its parts.

    >>> record_digest({"steps": 1, "kind": "x"}) == record_digest({"kind": "x", "steps": 1})
    True
    """
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shape:
    """How a composed record nests the records of its parts.

    Attributes:
        kind: `one` (a part), `sequence` or `parallel`.
        parts: of a composition.
        digest: of a part's record; None where the run does not name it (older versions).
    """

    kind: str
    parts: tuple[Shape, ...] = ()
    digest: str | None = None

    def __repr__(self) -> str:
        if self.kind == "one":
            return "record" if self.digest is None else self.digest[:8]
        return f"{self.kind}({', '.join(map(repr, self.parts))})"

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Shape:
        """The shape of a mechanism record."""
        if record.get("kind") in _NESTED:
            return cls(record["kind"], tuple(cls.of_record(part) for part in record["parts"]))
        return cls("one", digest=record_digest(record))

    @classmethod
    def of_entries(cls, entries: Sequence[Mapping[str, Any]], *, disjoint: bool, replaced: bool) -> Shape:
        """The shape that the parts of a run give: parallel over disjoint shards, in sequence otherwise.

        The rule is that of `dptaft.shards.claim.together`.
        """
        groups: dict[str, dict[str, list[Shape]]] = {}
        for entry in entries:
            own = cls("one", digest=entry.get("record_sha256"))
            shards = groups.setdefault(entry.get("partition") or entry["id"], {})
            shards.setdefault(entry.get("shard", ""), []).append(own)
        across = "sequence" if replaced else "parallel"
        within = [_joined(across, [_joined("sequence", r) for r in s.values()]) for s in groups.values()]
        return _joined(across if disjoint else "sequence", within)

    def covers(self, other: Shape) -> bool:
        """Whether `other`, a record's shape, is this one; unnamed parts stand for any record."""
        if not self._named():
            return "parallel" not in other._kinds() or "parallel" in self._kinds()
        return self._normal() == other._normal()

    def _named(self) -> bool:
        return self.digest is not None if self.kind == "one" else all(part._named() for part in self.parts)

    def _kinds(self) -> set[str]:
        return {self.kind}.union(*(part._kinds() for part in self.parts))

    def _normal(self) -> Any:
        """Equal for shapes that cost the same: order does not matter, equal parallel parts count once."""
        inner = sorted((part._normal() for part in self.parts), key=repr)
        if self.kind == "parallel":
            inner = [part for n, part in enumerate(inner) if n == 0 or part != inner[n - 1]]
            if len(inner) == 1:
                return inner[0]
        return (self.kind, self.digest, tuple(inner))


def _joined(kind: str, shapes: Iterable[Shape]) -> Shape:
    """Composition of shapes; one is itself, and compositions of one kind are written flat."""
    flat: list[Shape] = []
    for shape in shapes:
        flat += shape.parts if shape.kind == kind else [shape]
    return flat[0] if len(flat) == 1 else Shape(kind, tuple(flat))

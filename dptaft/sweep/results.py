"""Results of a sweep as numbers: mean and spread over seeds, beside the run without privacy."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dptaft.runs import load_run
from dptaft.sweep.points import SweepPoint
from dptaft.sweep.recipe import Recipe
from dptaft.sweep.treatment import Whole
from dptaft.sweep.work import Outcome

_PACKAGES = ("dptaft", "torch", "timm", "opacus")


@dataclass(frozen=True)
class Row:
    """One method with one setting at one budget, over all seeds.

    Attributes:
        data: name of the data set.
        method: name of the method.
        setting: grid values, as text; empty without a grid.
        epsilon: asked for; ``inf`` for the reference.
        claimed_epsilon: the largest that a statement of these runs claims; None without a claim.
        delta: of the claims.
        accuracies: on the evaluation images, one per finished seed.
        mean: of the accuracies.
        spread: their standard deviation; None for fewer than two.
        reference: mean accuracy of the same method and setting without privacy, where it was run.
        failed: number of seeds without a run.
    """

    data: str
    method: str
    setting: str
    epsilon: float
    claimed_epsilon: float | None
    delta: float | None
    accuracies: tuple[float, ...]
    mean: float | None
    spread: float | None
    reference: float | None
    failed: int

    @property
    def label(self) -> str:
        """Method and setting."""
        return f"{self.method} ({self.setting})" if self.setting else self.method


def collect(points: Sequence[SweepPoint], outcomes: Sequence[Outcome], runs: Path) -> list[Row]:
    """One row per data set, method, setting and budget, in the order of the points."""
    found: dict[tuple[str, str, str, float], list[tuple[SweepPoint, Outcome]]] = {}
    for point, outcome in zip(points, outcomes, strict=True):
        setting = ", ".join(
            f"{name.removeprefix('optimizer.')} {value}" for name, value in point.setting.items()
        )
        found.setdefault((point.data.name, point.method, setting, point.epsilon), []).append((point, outcome))
    means = {key: _mean(pairs) for key, pairs in found.items()}
    return [_row(key, pairs, means.get((*key[:3], math.inf)), runs) for key, pairs in found.items()]


def _mean(pairs: Sequence[tuple[SweepPoint, Outcome]]) -> float | None:
    values = [outcome.accuracy for _, outcome in pairs if outcome.accuracy is not None]
    return statistics.fmean(values) if values else None


def _row(
    key: tuple[str, str, str, float],
    pairs: Sequence[tuple[SweepPoint, Outcome]],
    reference: float | None,
    runs: Path,
) -> Row:
    finished = [(point, outcome) for point, outcome in pairs if outcome.error is None]
    accuracies = tuple(outcome.accuracy for _, outcome in finished if outcome.accuracy is not None)
    statements = [load_run(runs / point.id).statement for point, _ in finished]
    claims = [statement.claim for statement in statements if statement is not None]
    return Row(
        *key,
        claimed_epsilon=max((float(claim["epsilon"]) for claim in claims), default=None),
        delta=max((float(claim["delta"]) for claim in claims), default=None),
        accuracies=accuracies,
        mean=_mean(pairs),
        spread=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        reference=reference,
        failed=len(pairs) - len(finished),
    )


def document(
    recipe: Recipe,
    rows: Sequence[Row],
    failed: Sequence[Outcome],
    wholes: Mapping[str, Whole],
    chosen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole result as JSON values.

    Args:
        recipe: that was run.
        rows: from `collect`.
        failed: points without a run.
        wholes: what each data set paid.
        chosen: the winner of ``select-best`` and what the choice cost.
    """
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "shows": recipe.shows,
        "treatment": recipe.budget.treatment,
        "privacy": privacy_note(recipe, len(rows), wholes, chosen),
        "total": {
            name: {"epsilon": whole.epsilon, "delta": whole.delta, "points": whole.points}
            for name, whole in wholes.items()
        },
        "chosen": dict(chosen or {}),
        "rows": [_plain(row) for row in rows],
        "failed": {outcome.point: outcome.error for outcome in failed},
        "seeds": list(recipe.seeds),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def privacy_note(
    recipe: Recipe, count: int, wholes: Mapping[str, Whole], chosen: Mapping[str, Any] | None
) -> str:
    """What the sweep as a whole cost, in words."""
    treatment = recipe.budget.treatment
    if treatment == "public-benchmark":
        return (
            "The data are public. The epsilon of a row is what one run of it would claim on private data; "
            "choosing among rows by accuracy would cost more. No claim is made for the sweep as a whole."
        )
    if treatment == "publish-all":
        parts = [
            f"{name}: all {whole.points} runs together cost epsilon {whole.epsilon} at delta {whole.delta} "
            f"(one run alone at most {max(recipe.budget.epsilons):g})"
            for name, whole in wholes.items()
        ]
        return f"All points are published, so their costs compose. {'; '.join(parts)}."
    if chosen is None:
        return "No candidate gave a result, and nothing is released; the cost is charged all the same."
    return str(chosen["privacy"])


def _plain(row: Row) -> dict[str, Any]:
    values = asdict(row) | {"accuracies": list(row.accuracies)}
    return values | {"epsilon": "inf" if math.isinf(row.epsilon) else row.epsilon}


def as_json(content: Mapping[str, Any]) -> str:
    """The document as JSON text."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """One line per row; accuracies separated by blanks."""
    out = io.StringIO()
    names = list(Row.__dataclass_fields__)
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = _plain(row)
        writer.writerow(plain | {"accuracies": " ".join(str(a) for a in row.accuracies)})
    return out.getvalue()

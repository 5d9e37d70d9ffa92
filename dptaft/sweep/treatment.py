"""What a sweep as a whole costs, who is charged, and what every point's statement says about it.

``public-benchmark``: the data are public; every point states the claim that private data would get, and no
claim is made for the sweep. ``publish-all``: all points are released, so they compose
(`SequenceComposition`); the whole is charged to the ledger once, before the first image is read for
training (`dptaft.prepaid`), and a resumed sweep finds that entry again. ``select-best``: see
`dptaft.sweep.select`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dptaft.data import ImageData
from dptaft.identity import content_digest, record_marks
from dptaft.prepaid import Bill
from dptaft.sweep.recipe import RecipeError
from dptaft.training.account import Spending
from dptaft_accounting import Mechanism, SequenceComposition, best_bound


@dataclass(frozen=True)
class Whole:
    """What one data set pays for a sweep.

    Attributes:
        mechanism: everything that is released.
        delta: of the claim.
        epsilon: by the smallest valid bound.
        points: number of released runs.
    """

    mechanism: Mechanism
    delta: float
    epsilon: float
    points: int

    def bill(self, data: ImageData, run: str) -> Bill:
        """What the ledger is charged for it."""
        spending = Spending(self.mechanism, None, self.delta)
        content = content_digest(data.train)
        return Bill(spending, content, data.name, run, records=lambda: record_marks(data))


def compose(spendings: Sequence[Spending], most_epsilon: float | None = None) -> Whole:
    """The cost of publishing all points of one data set: their composition.

    The delta is the smallest that a point claims. Last-iterate bounds of single points do not enter: the
    composition of what each point may spend at most is valid whatever is released of it.

    Raises:
        RecipeError: a point without noise, or more than `most_epsilon` in total.
    """
    mechanisms = [s.mechanism for s in spendings]
    parts = tuple(m for m in mechanisms if m is not None)
    if len(parts) < len(mechanisms) or not parts:
        raise RecipeError("publish-all cannot hold a point without noise; remove infinite epsilons")
    delta = min(s.delta for s in spendings)
    mechanism = parts[0] if len(parts) == 1 else SequenceComposition(parts)
    epsilon = best_bound(mechanism, delta=delta).epsilon
    if most_epsilon is not None and epsilon > most_epsilon:
        raise RecipeError(
            f"publishing all {len(parts)} points costs epsilon {epsilon} at delta {delta:g}, more than "
            f"most_epsilon {most_epsilon:g}; take fewer points or smaller epsilons"
        )
    return Whole(mechanism, delta, epsilon, len(parts))


def public_fields(points: int) -> dict[str, Any]:
    """What a point of a public benchmark says about its sweep."""
    return {
        "ledger": "none: a public benchmark keeps no budget",
        "hyperparameter_choice": f"one of {points} points of a sweep over public data",
        "hyperparameter_cost": "not accounted: no claim is made for the sweep as a whole",
    }


def published_fields(whole: Whole, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a point of a published sweep says about its sweep."""
    entry, ledger = fields["ledger_entry"], fields["ledger"]
    return {
        "ledger": f"charged as a whole before the start: entry {entry} of {ledger}",
        "hyperparameter_choice": f"one of {whole.points} points that are all published",
        "hyperparameter_cost": f"all points together: epsilon {whole.epsilon} at delta {whole.delta}",
        "sweep": {
            "points": whole.points,
            "epsilon": whole.epsilon,
            "delta": whole.delta,
            "ledger_entry": fields["ledger_entry"],
        },
    }

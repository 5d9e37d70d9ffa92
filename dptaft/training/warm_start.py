"""Training that starts from the head of an earlier private run: its record, and what both stages cost.

The first run trains the head alone. The second one puts that head onto the backbone, linearises around it
and trains on. What it releases depends on the records twice, so its claim covers the sequence of both
mechanisms (adaptive composition): the second may depend on the result of the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dptaft.algebra import HEAD, TRAINED
from dptaft.backbones import Backbone, describe_preprocessing
from dptaft.runs import WEIGHTS, load_run
from dptaft.training.plan import PlanError, PrivacyConfig, Request
from dptaft_accounting import (
    CertifiedLastIterate,
    ConvexityCertificate,
    Mechanism,
    PrivacyStatement,
    SequenceComposition,
    epsilon_to_mu,
    mechanism_from_dict,
)
from dptaft_accounting.tradeoff import GaussianProfile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dptaft.runs import Run

UNIT = "one training record"
LEAST_SHARE = 1e-3
"""A first stage that leaves less of mu^2 than this leaves nothing to train with."""
_SAME_MODEL = ("name", "fresh_class_token", "reinitialised_blocks")


@dataclass(frozen=True)
class FirstStage:
    """A finished private run whose head a second one starts from.

    Attributes:
        name: of the run.
        statement: what it claims; its record is part of the second run's.
    """

    name: str
    statement: PrivacyStatement

    @property
    def mechanism(self) -> Mechanism:
        """Record of everything the first run did."""
        return mechanism_from_dict(self.statement.mechanism["record"])

    def described(self) -> dict[str, Any]:
        """What the second statement says of it."""
        claim = self.statement.claim
        return {
            "run": self.name,
            "id": self.statement.id,
            "epsilon": claim["epsilon"],
            "delta": claim["delta"],
        }


def is_run(head: str) -> bool:
    """Whether the option names the folder of a run, not a file or a random head.

    >>> is_run("random")
    False
    """
    return head != "random" and Path(head).is_dir()


def head_of_run(path: str) -> dict[str, Tensor]:
    """The head that a run of scope head defines: its weights, plus the frozen head where it kept the offset.

    Returns:
        `weight` (C, D) and `bias` (C,).

    Raises:
        PlanError: the run trained something else, or is not linear in plain features.
        RunError: no run, or a changed one.
    """
    run = load_run(path)
    _check_kind(run)
    from safetensors.torch import load_file

    tensors = load_file(run.path / WEIGHTS)
    found = {}
    for part in ("weight", "bias"):
        (trained,) = (v for k, v in tensors.items() if k.startswith(TRAINED) and k.endswith(f".{part}"))
        found[part] = (
            trained if run.config["model"].get("centered", True) else trained + tensors[f"{HEAD}{part}"]
        )
    return found


def _check_kind(run: Run) -> None:
    model = run.config["model"]
    if model["scope"] != "head" or model["method"] != "tangent":
        raise PlanError(
            f"{run.path} trained scope {model['scope']} with method {model['method']}; "
            "a warm start needs a run of scope head with method tangent"
        )
    if model.get("unit_jacobian"):
        raise PlanError(
            f"{run.path} divides the features of every image by their norm, which no head does; "
            "train the head without --certified"
        )
    if model.get("head", "random") != "random":
        raise PlanError(f"{run.path} started from the head {model['head']}; train its head from random")


def first_stage(request: Request, classes: Sequence[str], backbone: Backbone) -> FirstStage | None:
    """The run that the request starts from; None where there is none, or nothing will be claimed.

    Raises:
        PlanError: it has no claim, does not verify, or has another backbone, preprocessing, classes, unit or
            adjacency.
        RunError: no run, or a changed one.
    """
    model = request.model
    if not is_run(model.head) or not request.privacy.is_private:
        return None
    run = load_run(model.head)
    statement = run.statement
    if statement is None:
        raise PlanError(f"{run.path} makes no privacy claim ({run.no_claim}); train its head privately")
    if not statement.recompute().holds:
        raise PlanError(f"the claim of {run.path} does not follow from its record; train its head again")
    mine: dict[str, Any] = {name: getattr(model, name) for name in _SAME_MODEL}
    if model.reinitialised_blocks:
        mine["seed"] = model.seed
    compared = [
        ("backbone", run.config["backbone"]["sha256"], backbone.digest),
        ("preprocessing", run.config.get("preprocessing"), describe_preprocessing(backbone.preprocessing)),
        ("classes", list(run.classes), list(classes)),
        ("adjacency", statement.claim["adjacency"], request.privacy.adjacency),
        ("unit", (statement.claim["unit"], statement.claim["records_per_unit"]), (UNIT, 1)),
        *((name, run.config["model"].get(name), value) for name, value in mine.items()),
    ]
    for name, first, second in compared:
        if first != second:
            raise PlanError(
                f"{run.path} has {name} {first}, this run {second}; both stages must agree: "
                "train the head with the same options"
            )
    return FirstStage(run.path.name, statement)


def both_stages(
    first: Mechanism, second: Mechanism, certificate: ConvexityCertificate | None, delta: float
) -> SequenceComposition:
    """Record of a warm-started run: the first run, then the second one with its own certificate.

    >>> from dptaft_accounting import FullBatchGaussian, best_bound
    >>> whole = both_stages(FullBatchGaussian(4.0, 9), FullBatchGaussian(2.0, 4), None, 1e-5)
    >>> round(best_bound(whole, delta=1e-5).best.mu, 9)  # sqrt(0.75^2 + 1)
    1.25
    """
    own = second if certificate is None else CertifiedLastIterate(second, certificate, delta)
    return SequenceComposition((first, own))


def remaining(privacy: PrivacyConfig, first: FirstStage | None, delta: float) -> PrivacyConfig:
    """The request with the epsilon that the first stage leaves, for choosing public hyperparameters.

    Noise is not calibrated from it, but against the sequence of both mechanisms.

    Raises:
        PlanError: the first stage leaves nothing.
    """
    if first is None or math.isinf(privacy.epsilon):
        return privacy
    spent = first.statement.epsilon_at(delta)
    mu = epsilon_to_mu(privacy.epsilon, delta)
    left = mu**2 - epsilon_to_mu(spent, delta) ** 2
    if left <= LEAST_SHARE * mu**2:
        raise PlanError(
            f"the run {first.name} alone has epsilon {spent:.6g} at delta {delta:g}, which leaves nothing of "
            f"{privacy.epsilon:g}; raise --epsilon"
        )
    return replace(privacy, epsilon=GaussianProfile(math.sqrt(left)).epsilon(delta))


def share(epsilon: float, delta: float, fraction: float) -> float:
    """The epsilon of a first stage that takes a fraction of mu^2.

    Raises:
        PlanError: a fraction that is not strictly between 0 and 1.

    >>> 1.9 < share(3.0, 1e-5, 0.5) < 2.1
    True
    """
    if not 0 < fraction < 1:
        raise PlanError(f"the fraction of a warm start must lie strictly between 0 and 1, got {fraction}")
    return GaussianProfile(epsilon_to_mu(epsilon, delta) * math.sqrt(fraction)).epsilon(delta)

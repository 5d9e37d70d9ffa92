"""Every public decision of a run, made before any private image is read: model, plan, step sizes, noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dptaft.backbones import load_backbone
from dptaft.data import ImageData
from dptaft.learner import Learner
from dptaft.training.account import Spending
from dptaft.training.defaults import automatic_rate, default_hyperparameters, jacobian_scale
from dptaft.training.losses import LOSSES
from dptaft.training.optimizers import OptimizerConfig
from dptaft.training.plan import (
    Plan,
    PlanError,
    Request,
    default_delta,
    make_plan,
    resolve_sampling,
    whole_epochs,
)
from dptaft_accounting import ConvexityCertificate


@dataclass(frozen=True)
class Prepared:
    """A run ready to read private images: model, plan, public hyperparameters."""

    learner: Learner
    plan: Plan
    optimizer: OptimizerConfig
    l2_clip_norm: float
    head: Mapping[str, Tensor]
    certificate: ConvexityCertificate | None = None

    def spending(self, executed: tuple[int, ...] | None = None) -> Spending:
        """Cost of the planned steps, or of the steps that were executed (numbers, repeated ones again)."""
        noisy = self.plan.noise_multiplier > 0
        return Spending(self.plan.mechanism(executed) if noisy else None, self.certificate, self.plan.delta)


def build_learner(data: ImageData, request: Request) -> Learner:
    """Backbone, head and tangent model; several runs of the same model may share one."""
    model = request.model
    if model.loss not in LOSSES:
        raise PlanError(f"unknown loss {model.loss!r}; use {', '.join(LOSSES)}")
    backbone = load_backbone(
        model.name, num_classes=len(data.classes), seed=model.seed, weights=model.weights, head=model.head
    )
    return Learner(backbone, model, request.performance)


def prepare(data: ImageData, request: Request, learner: Learner | None = None) -> Prepared:
    """Build the model and fix every number of the plan; no private image is read here.

    Args:
        data: its public facts: number of records and classes.
        request: what the run is asked for.
        learner: from `build_learner` for the same data and model; None builds it.

    Raises:
        PlanError: a request that cannot be met, or a learner of another model.
    """
    privacy = request.privacy
    learner = build_learner(data, request) if learner is None else learner
    if learner.config != request.model:
        raise PlanError("the shared learner was built for another model; build one for this request")
    classifier = learner.backbone.model.get_classifier()
    head = {"weight": classifier.weight.detach().clone(), "bias": classifier.bias.detach().clone()}
    records = privacy.public_size or len(data.train)
    delta = privacy.delta if privacy.delta is not None else default_delta(records)
    defaults = default_hyperparameters(records, privacy.epsilon, delta)
    scale = jacobian_scale(learner)
    settings: dict[str, Any] = {
        "kind": "momentum",
        "momentum": defaults.momentum,
        "learning_rate": defaults.relative_learning_rate / scale**2,
    }
    optimizer = OptimizerConfig(**(settings | dict(request.optimizer)))
    if "momentum" in request.optimizer and optimizer.kind != "momentum":
        raise PlanError(f"momentum has no meaning for the optimizer {optimizer.kind}; leave it out")
    steps = privacy.steps or defaults.steps
    rate = automatic_rate(learner, privacy, records, steps)
    sampling = resolve_sampling(privacy, len(data.train), rate)
    steps = whole_epochs(steps, sampling)
    plan = make_plan(
        privacy,
        num_records=len(data.train),
        steps=steps,
        sampling=sampling,
        noise_factors=tuple(optimizer.noise_multipliers(1.0, steps)),
    )
    clip = privacy.l2_clip_norm or defaults.relative_clip_norm * scale
    return Prepared(learner, plan, optimizer, clip, head)

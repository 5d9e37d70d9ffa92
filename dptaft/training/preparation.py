"""Every public decision of a run, made before any private image is read: model, plan, step sizes, noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dptaft.backbones import load_backbone
from dptaft.data import ImageData
from dptaft.learner import Learner
from dptaft.tangent.bounded import BoundedOperator
from dptaft.training.account import Spending
from dptaft.training.certified import Design, design
from dptaft.training.defaults import (
    automatic_rate,
    balance_head,
    default_hyperparameters,
    jacobian_scale,
)
from dptaft.training.losses import LOSSES
from dptaft.training.one_shot_plan import OneShotPlan, check_settings, plan_one_shot
from dptaft.training.optimizers import OptimizerConfig
from dptaft.training.plan import (
    Plan,
    PlanError,
    PrivacyConfig,
    Request,
    Sampling,
    default_delta,
    make_plan,
    resolve_sampling,
    whole_epochs,
)
from dptaft_accounting import ConvexityCertificate


@dataclass(frozen=True)
class Prepared:
    """A run ready to read private images: model, plan, public hyperparameters.

    `design` is what a certified run enforces; None for other runs.
    """

    learner: Learner
    plan: Plan
    optimizer: OptimizerConfig
    l2_clip_norm: float
    head: Mapping[str, Tensor]
    design: Design | None = None

    @property
    def certificate(self) -> ConvexityCertificate | None:
        """Of the planned steps; None for a run that is not certified, or has no noise."""
        return self.spending().certificate

    def spending(self, executed: tuple[int, ...] | None = None) -> Spending:
        """Cost of the planned steps, or of the steps that were executed (numbers, repeated ones again).

        For a certified run an execution whose result was lost counts as one more step of the chain: the bound
        of a longer chain is never smaller, and the lost iterate stays in the private folder.
        """
        if self.plan.noise_multiplier == 0:
            return Spending(None, None, self.plan.delta)
        mechanism = self.plan.mechanism(executed)
        certificate = None if self.design is None else self.design.certify(mechanism)
        return Spending(mechanism, certificate, self.plan.delta)


@dataclass(frozen=True)
class PreparedOneShot:
    """A run without steps, ready to read private images."""

    learner: Learner
    plan: OneShotPlan
    head: Mapping[str, Tensor]

    def spending(self) -> Spending:
        """Cost of the run: all of it at once."""
        return Spending(self.plan.mechanism() if self.plan.is_noisy else None, None, self.plan.delta)


def prepare_one_shot(data: ImageData, request: Request) -> PreparedOneShot:
    """Build the model and choose regularisation and noise; no private image is read here.

    Raises:
        PlanError: a setting that only stepwise training has, or a target that cannot be met.
    """
    method = request.model.method
    if request.optimizer:
        raise PlanError(f"{method} takes no steps: leave out {', '.join(sorted(request.optimizer))}")
    check_settings(method, request.privacy)
    learner = build_learner(data, request)
    plan = plan_one_shot(
        method,
        request.privacy,
        num_records=len(data.train),
        num_classes=len(data.classes),
        dimension=sum(shape.numel() for shape in learner.operator.parameter_shapes.values()),
    )
    return PreparedOneShot(learner, plan, frozen_head(learner))


def build_learner(data: ImageData, request: Request) -> Learner:
    """Backbone, head and tangent model; several runs of the same model may share one."""
    model = request.model
    if model.loss not in LOSSES:
        raise PlanError(f"unknown loss {model.loss!r}; use {', '.join(LOSSES)}")
    backbone = load_backbone(
        model.name, num_classes=len(data.classes), seed=model.seed, weights=model.weights, head=model.head
    )
    bounded = model.unit_jacobian or model.is_one_shot
    if bounded and model.head == "random" and model.scope != "head":
        balance_head(backbone, model)
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
    if request.model.is_one_shot:
        raise PlanError(
            f"{request.model.method} takes no steps; it is trained on its own, with `dptaft train`"
        )
    learner = build_learner(data, request) if learner is None else learner
    if learner.config != request.model:
        raise PlanError("the shared learner was built for another model; build one for this request")
    if privacy.certified:
        return _prepare_certified(data, request, learner)
    head = frozen_head(learner)
    records = privacy.public_size or len(data.train)
    delta = privacy.delta if privacy.delta is not None else default_delta(records)
    defaults = default_hyperparameters(records, privacy.epsilon, delta, linear=request.model.is_linear)
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


def frozen_head(learner: Learner) -> dict[str, Tensor]:
    """The head of the frozen network, which is a part of the run."""
    classifier = learner.backbone.model.get_classifier()
    return {"weight": classifier.weight.detach().clone(), "bias": classifier.bias.detach().clone()}


def _prepare_certified(data: ImageData, request: Request, learner: Learner) -> Prepared:
    """A plan inside a convexity certificate; the noise is calibrated against the best bound that holds.

    Solvers without steps start from the same bounded learner and loss constants, in place of `design`.
    """
    privacy = request.privacy
    if not isinstance(learner.operator, BoundedOperator):
        raise PlanError("certified training needs unit Jacobians; set unit_jacobian in the model")
    records = privacy.public_size or len(data.train)
    if len(data.train) > records:
        raise PlanError(
            f"the certificate covers at most the public size {records}, which the data exceed; raise it to a "
            "number that no data of this kind can exceed (this refusal is not covered by any claim)"
        )
    delta = privacy.delta if privacy.delta is not None else default_delta(records)
    found = design_for(
        privacy, request.model.loss, len(data.classes), records, delta, request.optimizer, learner
    )
    optimizer = OptimizerConfig(
        kind="sgd", learning_rate=found.step_size, l2_regularization=found.regularization
    )
    plan = make_plan(
        privacy,
        num_records=len(data.train),
        steps=found.steps,
        sampling=found.sampling,
        certify=found.certify,
    )
    return Prepared(learner, plan, optimizer, found.l2_clip_norm, frozen_head(learner), found)


def design_for(
    privacy: PrivacyConfig,
    loss: str,
    num_classes: int,
    records: int,
    delta: float,
    optimizer: Mapping[str, Any],
    learner: Learner,
) -> Design:
    """The design of a certified run; a full batch too slow for this model becomes Poisson sampling."""
    made = LOSSES[loss]()

    def with_sampling(sampling: Sampling) -> Design:
        return design(
            privacy,
            made,
            num_classes,
            num_records=records,
            delta=delta,
            sampling=sampling,
            optimizer=optimizer,
        )

    if privacy.sampling != "auto":
        return with_sampling(resolve_sampling(privacy, records))
    whole = with_sampling(Sampling("full-batch"))
    rate = automatic_rate(learner, privacy, records, whole.steps)
    sampling = resolve_sampling(privacy, records, rate)
    return whole if sampling.kind == "full-batch" else with_sampling(sampling)

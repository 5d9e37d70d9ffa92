"""Certified training: regularisation, step size, number of steps and noise from public numbers alone.

In units where every Jacobian has norm 1 the last iterate of plain noisy gradient descent, run until it has
forgotten its start, is (to first order) the regularised minimiser plus noise whose standard deviation on a
logit is at most

    nu = G s/(n mu lambda),    G = largest gradient norm, s = 1 (2 for replace-one), mu = privacy parameter,

whatever the step size and however many more steps follow. The public proxy of the excess loss is

    bias + noise = (lambda/2) |theta*|^2 + (a/lambda) (G s/(n mu))^2,

(noise is damped by the curvature of the loss, so it costs 1/lambda, not 1/lambda^2). Its minimum has a
constant nu: `LOGIT_NOISE` for the cross-entropy, found on public benchmarks (docs/certified.md). From it,

    lambda    = G s/(n mu nu)
    step size = 2/(2 lambda + M B/b), the largest for which one step contracts by c = 1 - eta lambda,
    steps     = 4/(eta lambda): the bound is then within 2 % of its limit, so that more steps cost next to
                nothing; at most `MOST_STEPS`.

Nothing here reads private data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dptaft.tangent.bounded import ROUNDING
from dptaft.training.defaults import MOST_MU
from dptaft.training.losses import Loss
from dptaft.training.plan import (
    PlanError,
    PrivacyConfig,
    Sampling,
    largest_batch,
    normaliser_of,
    whole_epochs,
)
from dptaft_accounting import (
    ConvexityCertificate,
    Mechanism,
    epsilon_to_mu,
)
from dptaft_accounting.convexity import LossConstants, certified_name, trained_constants
from dptaft_accounting.errors import CertificateError

LOGIT_NOISE = 0.35
"""nu for the cross-entropy: standard deviation of the noise on a logit at the minimum of the proxy."""

MOST_STEPS = 3000
"""Large data ask for more steps; training then stops early, which costs less than a larger lambda."""

FORGETTING = 4.0
"""Steps are planned so that eta lambda steps is this number: the start is forgotten up to exp(-4)."""

CLIP_MARGIN = 2.0**-8
"""The noise is scaled to a norm this much above the gradient bound: an allowance for float32 rounding."""


@dataclass(frozen=True)
class Design:
    """Every number of certified training but the noise.

    Attributes:
        loss: name of the loss.
        constants: of the loss as a function of the logits.
        regularization: lambda.
        step_size: eta, on the mean gradient.
        steps: planned number of steps.
        sampling: how batches are drawn.
        max_batch_size: B, the largest number of records that one step may sum.
        normaliser: b, the public divisor of the sum.
        records: public number of records (an upper bound under add-remove).
        l2_clip_norm: C, to which the noise is scaled; no gradient reaches it.
        adjacency: of the claim.
        reasons: one line for each choice.
    """

    loss: str
    constants: LossConstants
    regularization: float
    step_size: float
    steps: int
    sampling: Sampling
    max_batch_size: int
    normaliser: float
    records: int
    l2_clip_norm: float
    adjacency: str
    reasons: tuple[str, ...] = ()

    @property
    def certificate(self) -> ConvexityCertificate:
        """Of the planned steps."""
        kind = self.sampling.kind.removesuffix("-partition")
        if kind == "poisson":
            return self._issue(kind, self.steps, sampling_rate=self.sampling.rate)
        if kind == "cyclic" and self.sampling.parts > 1:
            return self._issue(kind, self.steps, batches_per_epoch=self.sampling.parts)
        return self._issue("full-batch", self.steps)

    @property
    def contraction(self) -> float:
        """c, the factor by which a step shrinks distances."""
        return self.certificate.contractions[0]

    def certify(self, mechanism: Mechanism) -> ConvexityCertificate:
        """The certificate for the mechanism of this design, with any number of steps.

        Raises:
            CertificateError: an assumption that fails.
        """
        return replace(self.certificate, steps=int(getattr(mechanism, "steps", self.steps)))

    def _issue(self, sampling: str, steps: int, **extra: Any) -> ConvexityCertificate:
        return ConvexityCertificate.issue(
            loss=self.loss,
            constants=self.constants,
            feature_bound=1.0 + ROUNDING,
            l2_clip_norm=self.l2_clip_norm,
            regularization=self.regularization,
            step_size=self.step_size,
            normaliser=self.normaliser,
            sampling=sampling,
            steps=steps,
            records=self.records,
            max_batch_size=self.max_batch_size,
            adjacency=self.adjacency,
            origin={"jacobian": f"scaled to norm 1, float32 allowance {ROUNDING:g}"},
            **extra,
        )


def loss_constants(loss: Loss, num_classes: int) -> LossConstants:
    """Constants of a loss on logits, as `verify` knows them without its formula.

    Raises:
        CertificateError: the loss has no constants, or others than its own bounds.

    Example:
        >>> from dptaft.training.losses import CrossEntropy
        >>> loss_constants(CrossEntropy(), 10).curvature
        0.5
    """
    found = trained_constants(loss.name, num_classes)
    if found is None:
        raise CertificateError(f"the loss {loss.name} has the name of another one; rename it")
    for name, own, known in (
        ("gradient", loss.cotangent_bound(num_classes), found.gradient),
        ("curvature", loss.smoothness(num_classes), found.curvature),
    ):
        if own > known * (1.0 + 2.0**-40):
            raise CertificateError(
                f"the {name} of the loss {loss.name} may reach {own:g}, its certificates say {known:g}"
            )
    return found


def design(
    privacy: PrivacyConfig,
    loss: Loss,
    num_classes: int,
    *,
    num_records: int,
    delta: float,
    sampling: Sampling,
    optimizer: Mapping[str, Any] | None = None,
) -> Design:
    """Choose every number that was not given.

    Args:
        privacy: epsilon, adjacency, steps and clip norm, where the user set them.
        loss: convex, with bounded gradients.
        num_classes: number of logits.
        num_records: public number of records (an upper bound of it under add-remove).
        delta: of the claim.
        sampling: how batches are drawn.
        optimizer: fields of the optimiser that the user set.

    Raises:
        CertificateError: a choice that breaks an assumption of the last-iterate bound, naming it.
        PlanError: an option that certified training does not have.

    Example:
        >>> from dptaft.training.losses import CrossEntropy
        >>> plan = design(PrivacyConfig(epsilon=3.0), CrossEntropy(), 10, num_records=1437, delta=1e-5,
        ...     sampling=Sampling("full-batch"))
        >>> plan.steps, round(plan.regularization, 5)
        (260, 0.00391)
    """
    given = dict(optimizer or {})
    _refuse_other_algorithms(given)
    constants = loss_constants(loss, num_classes)
    share = constants.gradient * (2.0 if privacy.adjacency == "replace-one" else 1.0) / num_records
    most_steps = privacy.steps or 10 * MOST_STEPS
    largest = largest_batch(
        num_records, sampling, delta=delta, adjacency=privacy.adjacency, most_steps=most_steps
    )
    normaliser = normaliser_of(sampling, num_records)
    smoothness = constants.curvature * (1.0 + ROUNDING) ** 2 * largest / normaliser
    reasons: list[str] = []

    lam = given.get("l2_regularization")
    if lam is None:
        lam = _regularization(privacy, delta, share, loss, reasons)
    elif lam <= 0:
        raise CertificateError(
            f"strong convexity: l2_regularization {lam:g} gives no contraction without a projection; "
            "use a positive value, or leave it out"
        )
    eta = given.get("learning_rate")
    if eta is None:
        eta = 2.0 / (2.0 * lam + smoothness)
        reasons.append(
            f"step size {eta:.4g} = 2/(2 lambda + M), smoothness M = {smoothness:.4g}: "
            "the largest with contraction 1 - eta lambda"
        )
    steps = privacy.steps
    if steps is None:
        steps, needed = MOST_STEPS, math.ceil(FORGETTING / (eta * lam))
        if needed <= MOST_STEPS:
            steps = needed
            reasons.append(
                f"steps {steps} = {FORGETTING:g}/(eta lambda): the bound has saturated, "
                "the start is forgotten"
            )
        else:
            reasons.append(f"steps {steps}: {needed} until convergence, training stops early")
    steps = whole_epochs(steps, sampling)
    bound = constants.gradient * (1.0 + ROUNDING)
    least = bound * (1.0 + CLIP_MARGIN)
    clip = least if privacy.l2_clip_norm is None else privacy.l2_clip_norm
    if bound <= clip < least:
        raise CertificateError(
            f"l2_clip_norm {clip:g} leaves no room for float32 rounding above the gradient bound; "
            f"use at least {least:.6g}, or leave it out"
        )
    found = Design(
        loss=certified_name(loss.name),
        constants=constants,
        regularization=lam,
        step_size=eta,
        steps=steps,
        sampling=sampling,
        max_batch_size=largest,
        normaliser=normaliser,
        records=num_records,
        l2_clip_norm=clip,
        adjacency=privacy.adjacency,
    )
    reasons.append(f"contraction {found.contraction:.6g} per step, gradient bound {bound:.4g}")
    return replace(found, reasons=tuple(reasons))


def _refuse_other_algorithms(given: Mapping[str, Any]) -> None:
    """Refuse what no last-iterate bound covers, before anything is read."""
    kind = given.get("kind", "sgd")
    if kind == "momentum" or given.get("momentum"):
        raise CertificateError(
            f"plain gradient steps: momentum {given.get('momentum', 0.9):g} is no contraction; "
            "leave --optimizer and --momentum out"
        )
    if kind != "sgd":
        raise CertificateError(f"plain gradient steps: {kind} is not covered; leave --optimizer out")
    averaging = given.get("averaging", "last")
    if averaging != "last":
        raise CertificateError(
            f"only the last iterate is released: averaging {averaging} depends on hidden iterates; "
            "leave --averaging out"
        )
    for name in ("learning_rate_schedule", "noise_schedule"):
        if name in given and given[name].kind != "constant":
            raise PlanError(f"certified training keeps step size and noise constant; leave {name} out")


def _regularization(
    privacy: PrivacyConfig, delta: float, share: float, loss: Loss, reasons: list[str]
) -> float:
    """Lambda at the minimum of the proxy; without noise as for mu = `MOST_MU`."""
    mu = MOST_MU if math.isinf(privacy.epsilon) else epsilon_to_mu(privacy.epsilon, delta)
    noise = LOGIT_NOISE * getattr(loss, "kappa", 1.0)
    best = share / (mu * noise)
    reasons.append(
        f"lambda {best:.4g}: bias against noise; noise on a logit at most {share / (mu * best):.3g} "
        f"(standard deviation) at mu {mu:.4g}"
    )
    return best

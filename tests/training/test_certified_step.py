"""Adversaries against one certified step: pairs of weights, Jacobians and labels that expand it most."""

import math
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from torch import Tensor

from dptaft.tangent.bounded import BoundedOperator
from dptaft.tangent.operator import Features
from dptaft.training.certified import design
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy, HuberSquareLoss
from dptaft.training.noise import NoiseSource
from dptaft.training.optimizers import OptimizerConfig, build_optimizer
from dptaft.training.plan import PrivacyConfig, Sampling
from dptaft_accounting import FullBatchGaussian, best_bound, convexity
from dptaft_accounting.convexity import LossConstants
from dptaft_accounting.errors import CertificateError

CLASSES, WEIGHTS = 3, 4


class DenseOperator:
    """Jacobians that are given as tensors (n, C, P)."""

    kind, num_classes, dtype = "dense", CLASSES, torch.float64
    parameter_shapes = MappingProxyType({"w": torch.Size([WEIGHTS])})

    def extract(self, boundary: Tensor) -> Features:
        return Features({"J": boundary, "finite": torch.ones(len(boundary), dtype=torch.bool)})

    def offset(self, features):
        return torch.zeros(len(features), CLASSES, dtype=self.dtype)

    def jvp(self, features, theta):
        return torch.einsum("ncp,...p->...nc", features["J"], theta["w"].to(self.dtype))

    def vjp(self, features, cotangents):
        return {"w": torch.einsum("ncp,...nc->...p", features["J"], cotangents)}

    def gram(self, features):
        return features["J"] @ features["J"].transpose(1, 2)

    def gradient_norms(self, features, cotangents):
        return torch.einsum("ncp,...nc->...np", features["J"], cotangents).norm(dim=-1)


STEPS = 40


def with_own_constants(monkeypatch, loss):
    """Certificates know a loss by its name; these tests try it with other parameters than training has."""
    own = LossConstants(loss.cotangent_bound(CLASSES), loss.smoothness(CLASSES), scalar=False)
    monkeypatch.setitem(convexity.TRAINED_LOSSES, loss.name, lambda classes: own)


def planned(loss, records, **optimizer):
    """Weak regularisation, so that the smoothness decides how far a step contracts."""
    return design(
        PrivacyConfig(epsilon=3.0, steps=STEPS),
        loss,
        CLASSES,
        num_records=records,
        delta=1e-5,
        sampling=Sampling("full-batch"),
        optimizer={"l2_regularization": 0.01} | optimizer,
    )


def trained_step(plan, loss, jacobians, labels, weights, *, clip=None, bounded=True):
    """One noiseless step of the code that trains, from each of the given weights (m, P)."""
    operator = BoundedOperator(DenseOperator()) if bounded else DenseOperator()
    clip = plan.l2_clip_norm if clip is None else clip
    engine = FusedEngine(operator, operator.extract(jacobians), labels, loss=loss, l2_clip_norm=clip)
    config = OptimizerConfig(learning_rate=plan.step_size, l2_regularization=plan.regularization)
    moved = []
    for start in weights:
        theta = {"w": torch.nn.Parameter(start.clone())}
        optimizer = build_optimizer(
            theta,
            config,
            noise_multiplier=0.0,
            l2_clip_norm=clip,
            expected_batch_size=plan.normaliser,
            source=NoiseSource(),
        )
        optimizer.private_step(engine.clipped_sum(theta, torch.arange(len(labels))))
        moved.append(theta["w"].detach())
    return torch.stack(moved)


def expansion(before, after):
    return float((after[1] - after[0]).norm() / (before[1] - before[0]).norm())


def attack(plan, loss, records, *, clip=None, restarts=24, steps=150, seed=0):
    """Gradient ascent over data and pairs of weights; returns the worst case found, by restart.

    The differentiable copy of the step is only the searcher: what it finds is judged by `trained_step`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    jacobians = draw(restarts, records, CLASSES, WEIGHTS).requires_grad_()
    centre = (5 * draw(restarts, 1, WEIGHTS)).requires_grad_()
    direction = draw(restarts, 1, WEIGHTS).requires_grad_()
    log_distance = (2 * draw(restarts, 1, 1)).requires_grad_()
    labels = torch.randint(CLASSES, (restarts, records), generator=generator)
    optimizer = torch.optim.Adam([jacobians, centre, direction, log_distance], lr=0.05)

    def pair():
        half = torch.nn.functional.normalize(direction, dim=-1) * log_distance.exp() / 2
        return torch.cat([centre - half, centre + half], 1)

    def unit():
        return jacobians / torch.linalg.matrix_norm(jacobians, ord=2)[..., None, None]

    for _ in range(steps):
        used, theta = unit(), pair()
        logits = torch.einsum("rncp,rmp->rmnc", used, theta)
        hot = torch.nn.functional.one_hot(labels, CLASSES)[:, None]
        if isinstance(loss, CrossEntropy):
            cotangents = torch.softmax(logits, -1) - hot
        else:
            cotangents = loss.cotangent(logits, labels[:, None].expand(-1, 2, -1))
        gradients = torch.einsum("rncp,rmnc->rmnp", used, cotangents)
        if clip is not None:
            gradients = gradients * (clip / gradients.norm(dim=-1, keepdim=True)).clamp(max=1.0)
        after = theta * (1 - plan.step_size * plan.regularization)
        after = after - plan.step_size / plan.normaliser * gradients.sum(2)
        ratio = (after[:, 1] - after[:, 0]).norm(dim=-1) / (theta[:, 1] - theta[:, 0]).norm(dim=-1)
        optimizer.zero_grad()
        (-ratio.sum()).backward()
        optimizer.step()
    return [
        (j.detach(), y, t.detach()) for j, y, t in zip(unit().unbind(), labels.unbind(), pair(), strict=True)
    ]


class RowHuber(HuberSquareLoss):
    """The loss for labels that have one row per pair, as the attack batches them."""

    def _residual(self, logits, labels):
        hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        return logits - self.kappa * hot, torch.ones_like(logits)


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize(
    ("loss", "search"),
    [(CrossEntropy(), CrossEntropy()), (HuberSquareLoss(kappa=2.0, residual_norm=2.0), None)],
)
def test_no_step_expands_more_than_the_certificate_says(records, loss, search, monkeypatch):
    with_own_constants(monkeypatch, loss)
    plan = planned(loss, records)
    c = plan.certify(FullBatchGaussian(5.0, steps=STEPS, released="last-iterate")).contractions[0]
    assert c == pytest.approx(plan.contraction)
    search = search or RowHuber(kappa=2.0, residual_norm=2.0)
    found = attack(plan, search, records)
    worst = max(expansion(t, trained_step(plan, loss, j, y, t)) for j, y, t in found)
    assert worst <= c * (1 + 1e-9)
    assert worst >= 0.98 * c  # the search works: it comes close to what is allowed


def test_clipping_gradients_instead_expands_beyond_it():
    loss, records = CrossEntropy(), 1
    plan = planned(loss, records)
    clip = 0.2
    found = attack(plan, loss, records, clip=clip)
    ratios = [expansion(t, trained_step(plan, loss, j, y, t, clip=clip, bounded=False)) for j, y, t in found]
    assert max(ratios) > 1.02 > plan.contraction


def test_a_step_size_beyond_the_certificate_is_refused_and_does_expand():
    loss = CrossEntropy()
    plan = planned(loss, 1)
    limit = 2 / (plan.regularization + 0.5)
    assert plan.step_size < limit
    with pytest.raises(CertificateError, match="the step expands distances"):
        planned(loss, 1, learning_rate=1.01 * limit)
    long = replace(plan, step_size=1.1 * limit)
    found = attack(long, loss, 1)
    assert max(expansion(t, trained_step(long, loss, j, y, t)) for j, y, t in found) > 1


@pytest.mark.parametrize(
    "loss", [CrossEntropy(), HuberSquareLoss(), HuberSquareLoss(alpha=3.0, kappa=2.0, residual_norm=1.5)]
)
def test_no_gradient_reaches_the_clip_norm(loss, monkeypatch):
    """Clipping never acts, so that the trained loss is the convex one."""
    with_own_constants(monkeypatch, loss)
    plan = planned(loss, 10)
    generator = torch.Generator().manual_seed(1)
    jacobians = torch.randn(200, CLASSES, WEIGHTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (200,), generator=generator)
    operator = BoundedOperator(DenseOperator())
    features = operator.extract(jacobians)
    worst = 0.0
    for size in (0.0, 1.0, 30.0, 1e4):
        theta = {"w": size * torch.randn(WEIGHTS, generator=generator, dtype=torch.float64)}
        norms = operator.gradient_norms(features, loss.cotangent(operator.jvp(features, theta), labels))
        worst = max(worst, float(norms.max()))
    assert worst <= plan.l2_clip_norm / (1 + 2.0**-9)
    assert worst >= 0.6 * plan.l2_clip_norm


@pytest.mark.parametrize("steps", [1, 7, 60])
def test_the_bound_is_attained_by_a_linear_loss(steps, monkeypatch):
    """Far in the linear part of the loss a record shifts every step equally: the exact privacy is known.

    The shift is measured on the code that trains, and the noise of the chain follows from the noise of a
    step; the bound must lie above, and here (a tight case) only by the allowance for rounding.
    """
    loss = HuberSquareLoss(kappa=1e6, residual_norm=1.0)
    with_own_constants(monkeypatch, loss)
    plan = design(
        PrivacyConfig(epsilon=3.0, steps=steps),
        loss,
        CLASSES,
        num_records=5,
        delta=1e-5,
        sampling=Sampling("full-batch"),
        optimizer={"l2_regularization": 0.05},
    )
    jacobians = torch.randn(5, CLASSES, WEIGHTS, generator=torch.Generator().manual_seed(2)).double()
    jacobians[0] = torch.eye(CLASSES, WEIGHTS).double()
    labels = torch.zeros(5, dtype=torch.int64)
    without = jacobians.clone()
    without[0] = 0.0
    ends = []
    for data in (jacobians, without):
        theta = torch.zeros(1, WEIGHTS, dtype=torch.float64)
        for _ in range(steps):
            theta = trained_step(plan, loss, data, labels, theta)
        ends.append(theta[0])
    z = 2.0
    noise = plan.step_size * z * plan.l2_clip_norm / plan.normaliser
    c = 1 - plan.step_size * plan.regularization
    spread = noise * math.sqrt(sum(c ** (2 * k) for k in range(steps)))
    exact = float((ends[0] - ends[1]).norm()) / spread
    mechanism = FullBatchGaussian(z, steps=steps, released="last-iterate")
    bound = best_bound(mechanism, plan.certify(mechanism), delta=1e-5).named(
        "last-iterate noisy gradient descent"
    )
    assert exact <= bound.mu
    assert bound.mu <= exact * (1 + 2.0**-7)

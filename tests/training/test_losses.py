"""Losses: cotangents against automatic differentiation, stated bounds, convexity."""

import math

import pytest
import torch

from dptaft.training.losses import LOSSES, CrossEntropy, HuberSquareLoss, RescaledSquareLoss

CASES = [
    CrossEntropy(),
    RescaledSquareLoss(),
    RescaledSquareLoss(alpha=3.0, kappa=2.0),
    HuberSquareLoss(residual_norm=4.0),
    HuberSquareLoss(alpha=0.25, kappa=2.0, residual_norm=1.5),
    HuberSquareLoss(alpha=4.0, kappa=2.0, residual_norm=1.5),
]
by_name = {"ids": lambda loss: f"{loss.name}"}


def draw(classes, scale=3.0, count=64):
    generator = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(count, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize("loss", CASES, **by_name)
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_cotangent_is_the_derivative_of_the_sum(loss, classes):
    logits, labels = draw(classes)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(loss.value(logits, labels).sum(), logits)
    torch.testing.assert_close(loss.cotangent(logits.detach(), labels), expected, rtol=1e-10, atol=1e-12)


def test_values_against_other_formulas():
    logits, labels = draw(5)
    torch.testing.assert_close(
        CrossEntropy().value(logits, labels),
        torch.nn.functional.cross_entropy(logits, labels, reduction="none"),
    )
    for z, y, value in zip(logits, labels, RescaledSquareLoss(alpha=2.0).value(logits, labels), strict=True):
        others = sum(float(z[k]) ** 2 for k in range(5) if k != y)
        assert float(value) == pytest.approx((2.0 * (float(z[y]) - 15.0) ** 2 + others) / 5)


@pytest.mark.parametrize("loss", CASES, **by_name)
@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("scale", [0.1, 3.0, 1e4])
def test_bounds_hold(loss, classes, scale):
    logits, labels = draw(classes, scale)
    assert loss.cotangent(logits, labels).norm(dim=-1).max() <= loss.cotangent_bound(classes) * (1 + 1e-12)
    other, _ = draw(classes + 1, scale)
    other = other[:, :classes]
    gap = (loss.cotangent(logits, labels) - loss.cotangent(other, labels)).norm(dim=-1)
    assert (gap <= loss.smoothness(classes) * (logits - other).norm(dim=-1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("loss", CASES, **by_name)
def test_bounds_are_attained(loss):
    far = torch.zeros(4, 2, dtype=torch.float64)
    far[:, 1] = 1e6
    far[:, 0] = -1e6 if not isinstance(loss, RescaledSquareLoss) else torch.tensor([0.0, -1e6, 1e6, 15.0])
    labels = torch.zeros(4, dtype=torch.int64)
    bound = loss.cotangent_bound(2)
    largest = max(
        float(loss.cotangent(far, labels).norm(dim=-1).max()),
        float(loss.cotangent(far * torch.tensor([1e3, 1e-3]), labels).norm(dim=-1).max()),
    )
    assert bound == math.inf or largest == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("loss", CASES, **by_name)
def test_losses_are_convex(loss):
    a, labels = draw(4, 6.0)
    b = draw(5, 6.0)[0][:, :4]
    middle = loss.value((a + b) / 2, labels)
    assert (middle <= (loss.value(a, labels) + loss.value(b, labels)) / 2 + 1e-9).all()


@pytest.mark.parametrize("loss", CASES, **by_name)
def test_members_are_independent(loss):
    first, labels = draw(3)
    both = torch.stack([first, first.flip(0) * 2])
    for member in range(2):
        torch.testing.assert_close(loss.cotangent(both, labels)[member], loss.cotangent(both[member], labels))
        torch.testing.assert_close(loss.value(both, labels)[member], loss.value(both[member], labels))


def test_huber_is_the_square_loss_near_the_target_and_finite_at_it():
    z = torch.tensor([[15.0, 0.0], [14.0, 1.0]])
    y = torch.tensor([0, 0])
    torch.testing.assert_close(HuberSquareLoss().cotangent(z, y), RescaledSquareLoss().cotangent(z, y))
    torch.testing.assert_close(HuberSquareLoss().value(z, y), RescaledSquareLoss().value(z, y))


@pytest.mark.parametrize(
    "bad", [{"alpha": 0.0}, {"alpha": math.inf}, {"kappa": math.nan}, {"residual_norm": 0.0}]
)
def test_bad_parameters(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be finite"):
        HuberSquareLoss(**bad)


def test_names():
    assert set(LOSSES) == {"cross-entropy", "rescaled-square", "huber-square"}

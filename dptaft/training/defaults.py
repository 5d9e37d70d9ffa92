"""Public default hyperparameters, and the public scale of a Jacobian that they are relative to.

Gradients of different backbones differ in size by orders of magnitude. The scale s is the root mean square
of ``|J^T r|`` over unit cotangents r and *synthetic* images, so no private image takes part. Clip norm and
learning rate are stated for the rescaled model J/s, whose natural units are logits:

    l2_clip_norm = s * relative_clip_norm,    learning_rate = relative_learning_rate / s^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dptaft.backbones import Backbone, Preprocessing
from dptaft.learner import Learner
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig
from dptaft.training.sampling import automatic_sampling_rate
from dptaft_accounting import epsilon_to_mu

PUBLIC_IMAGES = 32
TIME_BUDGET_S = 600.0
OPERATIONS_PER_WEIGHT = 6
OPERATIONS_PER_SECOND = 2e10
MOST_MU = 2.0
"""Gaussian parameter above which noise no longer decides the hyperparameters."""
FURTHEST_LINEAR, FURTHEST_NON_LINEAR = 200.0, 8.0
"""Largest travel of the logits in one step."""
BLOCK_RATIO = 0.5
"""Norm of the blocks' Jacobian over the head's, where Jacobians are bounded."""


@dataclass(frozen=True)
class Defaults:
    """Hyperparameters for one data size and budget."""

    steps: int
    relative_clip_norm: float
    relative_learning_rate: float
    momentum: float


def default_hyperparameters(
    num_records: int, epsilon: float, delta: float, *, linear: bool = True
) -> Defaults:
    """Choose steps, clip norm, learning rate and momentum from public facts alone.

    Gradients are clipped so far below their size that each record contributes a direction, which needs no
    knowledge of the private gradients. The travel per step, learning rate times clip norm in logits, is
    proportional to ``mu n / sqrt(steps)``: the noise that reaches the logits then has the same size for every
    budget and data size. The constants were chosen on digits and on training images of Fashion-MNIST
    (1,000 to 50,000 of them, judged by others; docs/starter.md).

    Args:
        num_records: public number of records n.
        epsilon: budget; infinite without noise, then chosen as for mu = `MOST_MU`.
        delta: of the budget.
        linear: whether the logits are linear in the trained weights; others must not travel as far.

    Example:
        >>> [default_hyperparameters(n, 3.0, 1e-5).steps for n in (1437, 10_000, 60_000)]
        [50, 100, 200]
    """
    mu = MOST_MU if math.isinf(epsilon) else min(MOST_MU, epsilon_to_mu(epsilon, delta))
    signal = mu * num_records
    steps = 50 if signal < 2500 else 100 if signal < 20_000 else 200
    furthest = FURTHEST_LINEAR if linear else FURTHEST_NON_LINEAR
    travel = min(max(0.021 * signal / math.sqrt(steps), 0.2), furthest)
    clip = 0.02
    return Defaults(steps, relative_clip_norm=clip, relative_learning_rate=travel / clip, momentum=0.9)


def synthetic_images(count: int, preprocessing: Preprocessing, seed: int = 0) -> Tensor:
    """Smooth random images with a 1/f spectrum, prepared for the model: (count, channels, size, size).

    Example:
        >>> synthetic_images(2, Preprocessing(28, (0.5,), (0.5,))).shape
        torch.Size([2, 1, 28, 28])
    """
    generator = torch.Generator().manual_seed(seed)
    size = preprocessing.size
    noise = torch.randn(count, preprocessing.channels, size, size, generator=generator, dtype=torch.float64)
    rows, columns = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]
    frequency = (rows.square() + columns.square()).sqrt().clamp(min=1.0 / size)
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(size, size))
    low, high = smooth.amin((1, 2, 3), keepdim=True), smooth.amax((1, 2, 3), keepdim=True)
    return torch.stack([preprocessing(image) for image in ((smooth - low) / (high - low)).float()])


@torch.no_grad()
def jacobian_scale(learner: Learner) -> float:
    """Root mean square of ``|J_i^T r|`` over synthetic images and random unit cotangents (public seed).

    Rounded to four digits, so that every machine finds the same number.

    Raises:
        ValueError: a scale that is zero or not finite: nothing could be learned in this scope.
    """
    images = synthetic_images(PUBLIC_IMAGES, learner.backbone.preprocessing).to(learner.device)
    features = learner.operator.extract(learner.tangent.boundary(images))
    generator = torch.Generator().manual_seed(1)
    r = torch.randn(PUBLIC_IMAGES, learner.operator.num_classes, generator=generator)
    r = (r / r.norm(dim=1, keepdim=True)).to(learner.device)
    norms = learner.operator.gradient_norms(features, r).double()
    scale = math.sqrt(float(norms.square().mean()))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"the Jacobian of {learner.backbone.name} in scope {learner.config.scope} has scale {scale}; "
            "choose another scope or other weights"
        )
    return float(f"{scale:.4g}")


@torch.no_grad()
def balance_head(backbone: Backbone, model: ModelConfig) -> None:
    """Scale a random head so that the Jacobian of the blocks has half the norm of the head's own.

    The Jacobian of the blocks is proportional to the head's weights, that of the head itself does not depend
    on them, so one factor decides how the unit norm of a bounded Jacobian is shared. The ratio of the root
    mean squares of the two operator norms on synthetic images becomes `BLOCK_RATIO`; the factor is rounded to
    four digits, so that every machine finds the same one.

    Args:
        backbone: with its random head, which is scaled in place.
        model: whose scope has blocks below the head.
    """
    squares = []
    for scope in ("head", model.scope):
        learner = Learner(
            backbone,
            replace(model, scope=scope, method="tangent", unit_jacobian=False),
            PerformanceConfig("cpu"),
        )
        images = synthetic_images(PUBLIC_IMAGES, backbone.preprocessing)
        grams = learner.operator.gram(learner.operator.extract(learner.tangent.boundary(images))).double()
        squares.append(grams)
    head, both = squares
    share = [torch.linalg.eigvalsh(part)[:, -1].mean() for part in (head, both - head)]
    factor = BLOCK_RATIO * math.sqrt(float(share[0] / share[1]))
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(
            f"the Jacobian of {backbone.name} cannot be balanced (factor {factor}); use scope head"
        )
    classifier = backbone.model.get_classifier()
    for layer in classifier if isinstance(classifier, tuple) else (classifier,):
        layer.weight.mul_(float(f"{factor:.4g}"))


def automatic_rate(learner: Learner, privacy: PrivacyConfig, num_records: int, steps: int) -> float:
    """Sampling rate for ``auto``: 1 (full batch) while training should take at most ten minutes on a CPU.

    Time is taken from the operations of a step at a fixed speed, not measured: the mechanism depends on
    public facts alone, and is the same on every machine and when a run is resumed.
    """
    if privacy.sampling != "auto" or privacy.expected_batch_size is not None:
        return 1.0
    weights = sum(parameter.numel() for parameter in learner.parameters.values())
    tokens = 1 if learner.operator.kind in ("head", "compiled") else learner.tokens
    return automatic_sampling_rate(
        num_examples=num_records,
        seconds_per_example=OPERATIONS_PER_WEIGHT * weights * tokens / OPERATIONS_PER_SECOND,
        steps=steps,
        time_budget_s=TIME_BUDGET_S,
    )

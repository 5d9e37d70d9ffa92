"""Judge a backbone without privacy: linear probe, and kernel ridge regression with its last block's tangent.

The tangent kernel of two images is the inner product of the gradients of one output with respect to the last
block, final norm and head, averaged over a few random outputs: what training at scope ``last:1`` can reach
with a square loss. It is computed from the rank-one factors of the compiled tangent. Each image's gradient is
divided by its norm.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from objectives import normalise
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.features import gather
from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.initialise import initialise_head
from dptaft.tangent.rank_one import Factor, Outer

HEADS = 2
ROWS = 500
RIDGES = (1e-4, 1e-3)
DECAYS = (1e-4, 1e-3, 1e-2)


class Task(NamedTuple):
    """Images (n, c, s, s) in [0, 1] and labels, the first ``train`` of them for training."""

    images: Tensor
    labels: Tensor
    train: int


def fashion_mnist(folder: Path, train: int = 10_000, held_out: int = 4_000) -> Task:
    """The first training images of Fashion-MNIST; its test images are never read."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"train-{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    count = train + held_out
    images = read("images-idx3", 16).reshape(-1, 1, 28, 28)[:count]
    labels = read("labels-idx1", 8)[:count]
    return Task(torch.from_numpy(images.copy()).float() / 255, torch.from_numpy(labels.copy()).long(), train)


def digits(train: int = 1_000, held_out: int = 437) -> Task:
    """The first of scikit-learn's 8 x 8 digits, enlarged; the last 360 are left to other uses."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images[: train + held_out]).float()[:, None] / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False)
    return Task(images, torch.from_numpy(bunch.target[: train + held_out]).long(), train)


@torch.no_grad()
def constants_of(
    model: VisionTransformer, images: Tensor, seed: int = 0
) -> tuple[CompiledLastBlock, dict[str, Tensor]]:
    """The compiled tangent of the last block under a random head, and its constants of every image."""
    initialise_head(model, HEADS, seed=seed)
    operator, parts = CompiledLastBlock(model), []
    for batch in images.split(250):
        tokens = model.norm_pre(model._pos_embed(model.patch_embed(normalise(batch))))
        parts.append(operator.extract(model.blocks[:-1](tokens)))
    model.reset_classifier(0)
    return operator, operator.constants(gather(iter(parts), len(images)))


def linear_probe(features: Tensor, task: Task) -> float:
    """Best held-out accuracy of multinomial logistic regression over three strengths of L2 decay."""
    x, y = features, task.labels
    mean, std = x[: task.train].mean(0), x[: task.train].std(0).clamp(min=1e-8)
    x = (x - mean) / std
    best = 0.0
    for decay in DECAYS:
        layer = nn.Linear(x.shape[1], int(y.max()) + 1)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        solver = torch.optim.LBFGS(
            layer.parameters(), max_iter=80, history_size=10, line_search_fn="strong_wolfe"
        )

        def closure(
            layer: nn.Linear = layer, decay: float = decay, solver: torch.optim.LBFGS = solver
        ) -> Tensor:
            solver.zero_grad()
            loss = F.cross_entropy(layer(x[: task.train]), y[: task.train])
            loss = loss + decay * layer.weight.square().sum()
            loss.backward()
            return loss

        solver.step(closure)
        right = layer(x[task.train :]).argmax(1) == y[task.train :]
        best = max(best, right.double().mean().item())
    return best


def _add_kernel(kernel: Tensor, factor: Factor, rows: slice) -> None:
    """Add inner products of one factor's gradients, summed over outputs, of some rows with training rows."""
    train = kernel.shape[1]
    if not isinstance(factor, Outer):
        g = factor.cotangent if factor.constant is None else factor.cotangent * factor.constant[:, None]
        for part in (g, factor.cotangent) if factor.bias is not None else (g,):
            flat = part.flatten(1)
            kernel.addmm_(flat[rows], flat[:train].T)
        return
    for group in range(factor.constant.shape[1]):
        constant, cotangent = factor.constant[:, group], factor.cotangent[:, :, group].flatten(1)
        inputs = constant[rows] @ constant[:train].T
        if factor.bias is not None:
            inputs += 1
        kernel.addcmul_(inputs, cotangent[rows] @ cotangent[:train].T)


@torch.no_grad()
def tangent_kernel(operator: CompiledLastBlock, constants: dict[str, Tensor], train: int) -> Tensor:
    """Kernel (n, train) between all images and the training images, with ones on its diagonal."""
    count = len(constants["u"])
    factors = operator.factors(constants, torch.eye(HEADS).expand(count, -1, -1))
    scale = torch.stack([factor.squared_norms().sum(1) for factor in factors]).sum(0).rsqrt()
    kernel = torch.zeros(count, train)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        for factor in factors:
            _add_kernel(kernel[rows], factor, rows)
        kernel[rows].mul_(scale[rows, None]).mul_(scale[:train])
    return kernel


def kernel_ridge(kernel: Tensor, task: Task) -> float:
    """Best held-out accuracy over two ridges, on centred one-hot targets."""
    targets = F.one_hot(task.labels[: task.train]).float()
    targets = targets - targets.mean(0)
    best = 0.0
    for ridge in RIDGES:
        shifted = kernel[: task.train].clone()
        shifted.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):
            continue
        found = kernel[task.train :] @ torch.cholesky_solve(targets, factor)
        right = found.argmax(1) == task.labels[task.train :]
        best = max(best, right.double().mean().item())
    return best


def judge_pixels(tasks: dict[str, Task]) -> dict[str, float]:
    """The same without a backbone: probe of the pixels, and kernel ridge with a Gaussian of their distance.

    The width of the Gaussian is the mean distance of two training images divided by sqrt(8).
    """
    found = {}
    for name, task in tasks.items():
        pixels = task.images.flatten(1)
        found[f"{name} probe"] = linear_probe(pixels, task)
        squared = torch.cdist(pixels, pixels[: task.train]).square_()
        kernel = squared.mul_(-4 / squared[: task.train].mean()).exp_()
        found[f"{name} tangent"] = kernel_ridge(kernel, task)
    return found


def judge(model: VisionTransformer, tasks: dict[str, Task]) -> dict[str, float]:
    """Held-out accuracies by task: probe of the class token, and tangent."""
    model.eval()
    found = {}
    for name, task in tasks.items():
        operator, constants = constants_of(model, task.images)
        found[f"{name} probe"] = linear_probe(constants["u"], task)  # class tokens after the final norm
        kernel = tangent_kernel(operator, constants, task.train)
        found[f"{name} tangent"] = kernel_ridge(kernel, task)
    return found

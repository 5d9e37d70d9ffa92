"""Study behind the default hyperparameters: steps and travel for data sizes and budgets, head of a starter.

    python benchmarks/defaults.py --output benchmarks/results/defaults.json

Training images of Fashion-MNIST only: the first n train, the last 5,000 of 60,000 judge; its test set is not
read. Noise here is ordinary pseudo-random noise of the right size, so no row is a private run.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from dptaft import load_data
from dptaft.backbones import load_backbone
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features
from dptaft.training.clipping import ClippedSum
from dptaft.training.defaults import default_hyperparameters
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import LOSSES
from dptaft.training.plan import default_delta
from dptaft_accounting import epsilon_to_mu

CLIP, MOMENTUM = 0.02, 0.9
FACTORS = (0.01, 0.021, 0.04)
GRID = [(n, epsilon, steps) for n in (1000, 10_000) for epsilon in (1.0, 3.0) for steps in (50, 100, 200)]
LARGE = [(50_000, 1.0, 100), (50_000, 1.0, 200), (50_000, 3.0, 100), (50_000, 3.0, 200)]


class Study:
    """Features of the images, once, and one accuracy per setting."""

    def __init__(self, model: str) -> None:
        backbone = load_backbone(model, num_classes=10)
        tangent = TangentModel(backbone.model, "head")
        self.operator = tangent_operator(tangent)
        split = load_data("fashion-mnist").train
        batches = split.batches(500, backbone.preprocessing)
        with torch.no_grad():
            self.features = Features.concat([self.operator.extract(tangent.boundary(b)) for b in batches])
        self.labels = split.labels
        count = len(self.labels)
        self.judge = self.features.index(slice(count - 5000, count))
        self.scale = self._scale()

    def _scale(self) -> float:
        generator = torch.Generator().manual_seed(1)
        r = torch.randn(256, 10, generator=generator)
        norms = self.operator.gradient_norms(
            self.features.index(slice(0, 256)), r / r.norm(dim=1, keepdim=True)
        )
        return math.sqrt(float(norms.square().mean()))

    def accuracy(self, n: int, mu: float, steps: int, travel: float) -> float:
        """Accuracy on the judging images after full-batch training on the first n."""
        clip = CLIP * self.scale
        engine = FusedEngine(
            self.operator,
            self.features.index(slice(0, n)),
            self.labels[:n],
            loss=LOSSES["cross-entropy"](),
            l2_clip_norm=clip,
        )
        theta, indices = engine.initial_theta(), torch.arange(n)
        speed = {name: torch.zeros_like(value) for name, value in theta.items()}
        generator = torch.Generator().manual_seed(0)
        for _ in range(steps):
            found: ClippedSum = engine.clipped_sum(theta, indices)
            for name, value in theta.items():
                noise = torch.randn(value.shape, generator=generator) * clip * math.sqrt(steps) / mu
                speed[name].mul_(MOMENTUM).add_((found.value[name].float() + noise) / n)
                value -= travel / (CLIP * self.scale**2) * speed[name]
        return self._judge(theta)

    def _judge(self, theta: dict[str, Tensor]) -> float:
        right = self.operator.jvp(self.judge, theta).argmax(1) == self.labels[-5000:]
        return round(100 * float(right.double().mean()), 2)


def main() -> None:
    """Run the grid; the row with the factor 0.021 and the rule's steps is what the product does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="starter-scattering")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    study, rows = Study(args.model), []
    for n, epsilon, steps in [*GRID, *LARGE]:
        delta = default_delta(n)
        mu = epsilon_to_mu(epsilon, delta)
        for factor in FACTORS:
            started = time.perf_counter()
            travel = factor * mu * n / math.sqrt(steps)
            row = {"records": n, "epsilon": epsilon, "steps": steps, "factor": factor}
            row["travel"] = round(travel, 2)
            row["accuracy"] = study.accuracy(n, mu, steps, travel)
            row["default_steps"] = default_hyperparameters(n, epsilon, delta).steps == steps
            row["seconds"] = round(time.perf_counter() - started, 1)
            rows.append(row)
            print(row, flush=True)
        if args.output is not None:
            versions = {name: version(name) for name in ("dptaft", "torch", "timm")}
            body = {"model": args.model, "machine": platform.machine(), "versions": versions, "rows": rows}
            args.output.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()

r"""Baseline: a linear softmax classifier on fixed ScatterNet features, trained privately by this engine.

    python benchmarks/scatternet.py --kymatio FOLDER --output benchmarks/results/scatternet.json

Features: scattering with J = 2 and L = 8 of 28 x 28 images (81 x 7 x 7 = 3,969), group normalisation with 27
groups, which looks at one image at a time and so needs no budget; Tramer and Boneh, "Differentially Private
Learning Needs Better Features (or Much More Data)", ICLR 2021.
Clip norm 0.1 and momentum 0.9 as there; full batches instead of sampled ones, so that the privacy is exactly
Gaussian. Noise, calibration, clipping and generator are those of `dptaft train`. Steps and learning rate are
chosen per budget on every fifth training image held out, among `STEPS` and `RATES`; this choice is not paid
for (the images are public), which favours the baseline: `dptaft` uses its public defaults.

kymatio is needed by this benchmark alone: `pip install --no-deps --target FOLDER kymatio appdirs configparser
packaging`. Features are stored in `--cache`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dptaft
from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.operator import Features
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.noise import NoiseSource
from dptaft.training.optimizers import OptimizerConfig, build_optimizer, member_parameters
from dptaft_accounting import FullBatchGaussian, Target, best_bound, calibrate_noise_multiplier

SIZE, GROUPS, DIMENSION = 28, 27, 81 * 7 * 7
CLIP, MOMENTUM, DELTA = 0.1, 0.9, 1e-5
EPSILONS = (1.0, 3.0, 8.0)
STEPS = {"digits": (50, 150), "fashion-mnist": (120,)}
RATES = {"digits": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), "fashion-mnist": (16.0, 32.0, 64.0)}
RUNS = 5
PHYSICAL = 2048


@dataclass(frozen=True)
class Setting:
    """One budget with its public hyperparameters."""

    epsilon: float
    steps: int
    rate: float


def noise_multiplier(epsilon: float, steps: int) -> tuple[float, float]:
    """Noise multiplier of full batches, and the epsilon that is claimed."""

    def mechanism(noise: float) -> FullBatchGaussian:
        return FullBatchGaussian(noise, steps)

    noise = calibrate_noise_multiplier(mechanism, Target(epsilon=epsilon, delta=DELTA))
    return noise, best_bound(mechanism(noise), delta=DELTA).epsilon


class Table:
    """Normalised features and labels of one data set, training and evaluation."""

    def __init__(self, name: str, cache: Path, kymatio: Path) -> None:
        data = dptaft.load_data(name)
        if data.evaluation is None:
            raise ValueError(f"{name} has no evaluation images; name another data set")
        self.name, self.seconds = name, {}
        self.train = self._features(data.train, cache / f"{name}-train.npy", kymatio)
        self.evaluation = self._features(data.evaluation, cache / f"{name}-evaluation.npy", kymatio)
        self.train_labels, self.evaluation_labels = data.train.labels, data.evaluation.labels

    def _features(self, split: dptaft.Split, path: Path, kymatio: Path) -> Tensor:
        if not path.exists():
            started = time.perf_counter()
            values = scattering(split, kymatio)
            self.seconds[path.stem] = round(time.perf_counter() - started, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".part.npy")
            np.save(draft, values.numpy())
            os.replace(draft, path)
        return torch.from_numpy(np.load(path))


@torch.no_grad()
def scattering(split: dptaft.Split, kymatio: Path) -> Tensor:
    """Scattering features (n, 3969) of all images, group-normalised image by image."""
    import scipy.special

    if not hasattr(scipy.special, "sph_harm"):  # kymatio imports its 3-D part, which is not used here
        scipy.special.sph_harm = None
    if str(kymatio) not in sys.path:
        sys.path.insert(0, str(kymatio))
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    transform = ScatteringTorch2D(J=2, shape=(SIZE, SIZE), L=8)
    out = torch.empty(len(split), DIMENSION)
    for start in range(0, len(split), 250):
        stop = min(start + 250, len(split))
        images = torch.stack([split.pixels[i] for i in range(start, stop)])
        if images.shape[-1] != SIZE:
            images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        values = transform(images.contiguous())[:, 0]
        out[start:stop] = F.group_norm(values, GROUPS).flatten(1)
    return out


def linear_features(values: Tensor) -> Features:
    """Rows as constants of the head operator."""
    return Features({"u": values, "finite": torch.ones(len(values), dtype=torch.bool)})


class Linear(nn.Module):
    """A softmax classifier, zero at the start."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(DIMENSION, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


def train(
    values: Tensor, labels: Tensor, settings: Sequence[Setting]
) -> tuple[HeadOperator, dict[str, Tensor]]:
    """Weights of all settings (of equal steps) on a leading axis, from full batches that they share."""
    (steps,) = {setting.steps for setting in settings}
    operator = HeadOperator(Linear(10))
    engine = FusedEngine(
        operator,
        linear_features(values),
        labels,
        loss=CrossEntropy(),
        l2_clip_norm=CLIP,
        norms="factors",
        physical_batch_size=PHYSICAL,
    )
    theta = engine.initial_theta(len(settings))
    optimizers = [
        build_optimizer(
            member_parameters(theta, number),
            OptimizerConfig("momentum", setting.rate, MOMENTUM),
            noise_multiplier=noise_multiplier(setting.epsilon, steps)[0],
            l2_clip_norm=CLIP,
            expected_batch_size=len(values),
            source=NoiseSource(),
        )
        for number, setting in enumerate(settings)
    ]
    everything = torch.arange(len(values))
    for _ in range(steps):
        clipped = engine.clipped_sum(theta, everything)
        for number, optimizer in enumerate(optimizers):
            optimizer.private_step(clipped.member(number))
    return operator, theta


def accuracies(
    operator: HeadOperator, theta: dict[str, Tensor], values: Tensor, labels: Tensor
) -> list[float]:
    """Accuracy of every member."""
    logits = operator.jvp(linear_features(values), theta)
    return [round(float(right), 6) for right in (logits.argmax(-1) == labels).double().mean(1)]


def choose(table: Table) -> tuple[list[Setting], list[dict[str, Any]]]:
    """Steps and learning rate of every budget, by accuracy on every fifth training image held out."""
    held = torch.arange(len(table.train_labels)) % 5 == 0
    kept, kept_labels = table.train[~held], table.train_labels[~held]
    tried = []
    for steps in STEPS[table.name]:
        settings = [Setting(epsilon, steps, rate) for epsilon in EPSILONS for rate in RATES[table.name]]
        operator, theta = train(kept, kept_labels, settings)
        found = accuracies(operator, theta, table.train[held], table.train_labels[held])
        tried += [{**vars(s), "held_out": value} for s, value in zip(settings, found, strict=True)]
        print(json.dumps(tried[-len(settings) :]), flush=True)
    chosen = []
    for epsilon in EPSILONS:
        best = max((row for row in tried if row["epsilon"] == epsilon), key=lambda row: row["held_out"])
        chosen.append(Setting(epsilon, best["steps"], best["rate"]))
    return chosen, tried


def rows(table: Table, chosen: Sequence[Setting]) -> list[dict[str, Any]]:
    """Accuracy of `RUNS` runs with fresh noise per budget; those of equal steps share their passes."""
    found: dict[Setting, list[float]] = {}
    for steps in sorted({setting.steps for setting in chosen}):
        members = [setting for setting in chosen if setting.steps == steps for _ in range(RUNS)]
        operator, theta = train(table.train, table.train_labels, members)
        values = accuracies(operator, theta, table.evaluation, table.evaluation_labels)
        for setting, value in zip(members, values, strict=True):
            found.setdefault(setting, []).append(value)
    return [
        {
            "data": table.name,
            "epsilon": setting.epsilon,
            "claimed_epsilon": noise_multiplier(setting.epsilon, setting.steps)[1],
            "delta": DELTA,
            "steps": setting.steps,
            "learning_rate": setting.rate,
            "accuracies": found[setting],
            "mean": statistics.fmean(found[setting]),
            "spread": statistics.stdev(found[setting]),
        }
        for setting in chosen
    ]


def cost(table: Table, setting: Setting) -> dict[str, Any]:
    """Seconds of one run alone on features that are ready, and the peak memory of this process."""
    wall, processor = time.perf_counter(), time.process_time()
    train(table.train, table.train_labels, [setting])
    return {
        "epsilon": setting.epsilon,
        "seconds": round(time.perf_counter() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "features_seconds": table.seconds,
        "process_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    """Choose, train and write every data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kymatio", type=Path, default=Path("kymatio"), help="Folder that holds kymatio.")
    parser.add_argument("--cache", type=Path, default=Path("runs/scatternet"))
    parser.add_argument("--data", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.data:
        table = Table(name, args.cache, args.kymatio.resolve())
        chosen, tried = choose(table)
        result.setdefault("data", {})[name] = {
            "records": len(table.train_labels),
            "evaluation": len(table.evaluation_labels),
            "cost": cost(table, chosen[EPSILONS.index(3.0)]),
            "rows": rows(table, chosen),
            "tried": tried,
        }
        result["command"] = "python benchmarks/scatternet.py"
        result["machine"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s), CPU, shared"
        result["versions"] = {package: version(package) for package in ("dptaft", "torch", "numpy")}
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

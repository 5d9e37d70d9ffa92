"""Time one private training step: fused engine, the same step without privacy, Opacus hooks, Opacus ghost.

Everything is measured in one process, alternating, so that ratios hold on a noisy machine. The steps compute
on one thread; the noise of the next step is drawn beside them on another, as in training. The model has the
geometry of ViT-B/16 (last block, 197 tokens of width 768, about 7.1 million trained weights at 10 classes)
with random weights, on cached boundary activations; ``--full`` adds the same steps through the whole
network, 100 classes, and memory.

    python benchmarks/training.py --quick --json
    python benchmarks/training.py --full --output benchmarks/results/training.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.noise import NoiseSource, gaussian_mechanism
from dptaft.training.opacus_engine import FromBoundary, OpacusEngine
from dptaft.training.optimizers import OptimizerConfig, PrivateOptimizer, build_optimizer

RATE = 1e-6  # so small that no weights diverge, whatever the number of timed steps
STEPS = 2  # consecutive fused steps that are timed together
PIECE = 16  # examples whose per-example gradients Opacus holds at once


class WholeNetwork(nn.Module):
    """The tangent model from the images, with the frozen part run in every step."""

    def __init__(self, model: TangentModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images."""
        return self.model.forward_from_boundary(self.model.boundary(images))


class Setting:
    """Model, cached features and labels for one measurement."""

    def __init__(self, batch: int, *, classes: int = 10, depth: int = 1, device: str = "cpu") -> None:
        torch.manual_seed(0)
        base = VisionTransformer(depth=depth, num_classes=classes).to(device)
        self.batch, self.classes, self.device = batch, classes, device
        self.model = TangentModel(base, "last:1")
        self.boundary = torch.randn(min(batch, 64), 197, 768, device=device)
        self.labels = torch.randint(classes, (batch,), device=device)
        self.indices = torch.arange(batch, device=device)
        self.operator = tangent_operator(self.model)
        self.source = NoiseSource()

    def features(self) -> Any:
        """Cached constants of the batch."""
        parts = [self.operator.extract(torch.randn_like(self.boundary)) for _ in range(0, self.batch, 64)]
        return Features.concat(parts).index(slice(0, self.batch))

    def optimizer(self, parameters: dict[str, nn.Parameter]) -> PrivateOptimizer:
        """Plain private gradient steps with noise multiplier 1."""
        return build_optimizer(
            parameters,
            OptimizerConfig("sgd", RATE),
            noise_multiplier=1.0,
            l2_clip_norm=1.0,
            expected_batch_size=float(self.batch),
            source=self.source,
        )

    def fused(self) -> tuple[Callable[[], None], Callable[[], None], int]:
        """A private step, the same step without clipping and noise, and the number of trained weights."""
        features, loss = self.features(), CrossEntropy()
        engine = FusedEngine(self.operator, features, self.labels, loss=loss, l2_clip_norm=1.0)
        theta = {name: nn.Parameter(value) for name, value in engine.initial_theta().items()}
        optimizer = self.optimizer(theta)
        plain = torch.optim.SGD(theta.values(), lr=RATE)

        def private() -> None:
            for _ in range(STEPS):
                optimizer.private_step(engine.clipped_sum(theta, self.indices))
            self.source.integers(0)  # wait for the noise of the next step

        @torch.no_grad()
        def ordinary_gradient() -> dict[str, Tensor]:
            total: dict[str, Tensor] = {}
            for start in range(0, self.batch, 512):
                part = features.index(slice(start, start + 512))
                logits = self.operator.jvp(part, theta)
                cotangents = loss.cotangent(logits, self.labels[start : start + 512])
                for name, value in self.operator.vjp(part, cotangents).items():
                    total[name] = total[name].add_(value) if name in total else value
            return total

        def ordinary() -> None:
            for _ in range(STEPS):
                for name, value in ordinary_gradient().items():
                    theta[name].grad = value.div_(self.batch)
                plain.step()
                plain.zero_grad()

        return private, ordinary, optimizer.dimension

    def opacus(self, method: str, images: int, *, network: bool = False) -> Callable[[], None]:
        """A private step by Opacus over the first `images` examples."""
        module = WholeNetwork(self.model) if network else FromBoundary(self.model)
        inputs = torch.randn(images, 3, 224, 224, device=self.device) if network else self.boundary[:images]
        engine = OpacusEngine(
            module,
            inputs,
            self.labels[:images],
            num_classes=self.classes,
            loss=CrossEntropy(),
            l2_clip_norm=1.0,
            parameters=self.model.theta(),
            method=method,
            physical_batch_size=PIECE,
        )
        optimizer = self.optimizer(engine.parameters)
        engine.clipped_sum(engine.parameters, self.indices[:1])  # the check of the first call is not timed

        def step() -> None:
            optimizer.private_step(engine.clipped_sum(engine.parameters, self.indices[:images]))

        step.close = engine.close  # type: ignore[attr-defined]
        return step


def timed(function: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and CPU seconds (of all threads) of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def alternate(first: Callable[[], None], second: Callable[[], None], rounds: int) -> dict[str, float]:
    """Least wall and CPU seconds of both, and their ratios (interruptions only add time)."""
    first(), second()
    pairs = [(timed(first), timed(second)) for _ in range(rounds)]
    first_s, second_s = (min(pair[i][0] for pair in pairs) for i in range(2))
    first_cpu, second_cpu = (min(pair[i][1] for pair in pairs) for i in range(2))
    return {
        "first": first_s,
        "second": second_s,
        "wall_ratio": first_s / second_s,
        "cpu_ratio": first_cpu / second_cpu,
        "first_cpu": first_cpu,
    }


def noise_seconds(dimension: int) -> float:
    """CPU seconds to draw and add the noise of one step, without help from a second thread."""
    source, zeros = NoiseSource(), {"w": torch.zeros(dimension)}
    times = []
    for _ in range(5):
        start = time.thread_time()
        gaussian_mechanism(zeros, sensitivity=1.0, noise_multiplier=1.0, source=source)
        times.append(time.thread_time() - start)
    return statistics.median(times)


def compare(
    batch: int, opacus_images: int, *, rounds: int, classes: int = 10, device: str = "cpu"
) -> dict[str, Any]:
    """The three ratios for one batch; Opacus is timed on `opacus_images` of it and scaled to the batch."""
    setting = Setting(batch, classes=classes, device=device)
    private, ordinary, dimension = setting.fused()
    times = alternate(private, ordinary, rounds)
    fused_s = times["first"] / STEPS
    found = {
        "operator": type(setting.operator).__name__,
        "batch": batch,
        "classes": classes,
        "trained_weights": dimension,
        "fused_ms_per_image": 1e3 * fused_s / batch,
        "nonprivate_ms_per_image": 1e3 * times["second"] / STEPS / batch,
        "fused_over_nonprivate": times["wall_ratio"],
        "fused_over_nonprivate_cpu_time": times["cpu_ratio"],
        "opacus_images_timed": opacus_images,
    }
    if device == "cpu":
        found["noise_over_fused_step"] = noise_seconds(dimension) / (times["first_cpu"] / STEPS)
    for method in ("hooks", "ghost"):
        step = setting.opacus(method, opacus_images)
        wall, cpu = timed(step)
        step.close()  # type: ignore[attr-defined]
        found[f"{method}_ms_per_image"] = 1e3 * wall / opacus_images
        # on the CPU both are compared in CPU time: a single step on a shared machine waits for others
        opacus_s, compared_s = (cpu, times["first_cpu"] / STEPS) if device == "cpu" else (wall, fused_s)
        found[f"{method}_over_fused"] = opacus_s / opacus_images / (compared_s / batch)
    return found


def through_network(images: int, device: str) -> dict[str, Any]:
    """Opacus' step of the last block through all twelve blocks, per image."""
    setting = Setting(images, depth=12, device=device)
    found: dict[str, Any] = {"images": images}
    for method in ("hooks", "ghost"):
        step = setting.opacus(method, images, network=True)
        found[f"{method}_ms_per_image"] = 1e3 * timed(step)[0] / images
        step.close()  # type: ignore[attr-defined]
    return found


def step_memory(step: Callable[[], None]) -> float | None:
    """MiB that a step needs beyond what is there before it (Linux with glibc: peak of resident memory)."""
    step()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    before = _resident("VmRSS")
    step()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def memory(batch: int, device: str) -> dict[str, Any]:
    """Memory of one step by every engine."""
    setting = Setting(batch, device=device)
    private, ordinary, dimension = setting.fused()
    found: dict[str, Any] = {"batch": batch, "one_gradient": 4 * dimension / 2**20}
    found |= {"nonprivate": step_memory(ordinary), "fused": step_memory(private)}
    for method in ("hooks", "ghost"):
        step = setting.opacus(method, batch)
        found[method] = step_memory(step)
        step.close()  # type: ignore[attr-defined]
    return found


def machine(device: str) -> dict[str, Any]:
    """Where the numbers come from."""
    names = ("torch", "opacus", "timm", "numpy", "cryptography", "dptaft")
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((x.split(":")[1].strip() for x in file if x.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "accelerator": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": datetime.now(UTC).date().isoformat(),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements that were asked for."""
    device = arguments.device
    rounds = 8 if arguments.full else 4
    whole = 4 * PIECE if arguments.full else 2 * PIECE
    found = compare(arguments.batch, whole, rounds=rounds, device=device)
    found["machine"] = machine(device)
    if arguments.full:
        found["classes_100"] = compare(512, 2 * PIECE, rounds=rounds, classes=100, device=device)
        found["through_whole_network"] = through_network(PIECE, device)
        found["step_memory_mib"] = memory(PIECE, device)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the three ratios only (the default)")
    parser.add_argument("--full", action="store_true", help="also 100 classes, whole network, memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output", help="also write the JSON object to this file")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = run(arguments)
    text = json.dumps(found, indent=None if arguments.json and not arguments.output else 2)
    if arguments.output:
        with open(arguments.output, "w") as file:
            file.write(text + "\n")
    if arguments.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")


if __name__ == "__main__":
    main()

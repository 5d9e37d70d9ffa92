"""Time tangent forwards and compiled training steps against the ordinary network, as ratios in one process.

Run ``python benchmarks/tangent.py`` for both geometries (minutes; records benchmarks/results/tangent.json) or
``python benchmarks/tangent.py --quick --json`` for ViT-B/16 alone in less than 50 seconds. Weights are
random: time does not depend on them. Every figure is a median over interleaved repeats, in time per image:
time of the process on one processor thread (what other programs take does not count), wall time otherwise.

What is compared, for scope last:1 (last block, final norm, head):

- block step: forward and backward of the last block, norm and head on cached block inputs, by autograd;
- network step: the same training step without a cache, all blocks forward and the last one backward;
- compiled step: tangent forward, cross-entropy gradient, exact per-example clipping, gradient of the sum.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from dptaft.features import build_features
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features, TangentOperator

RESULTS = Path(__file__).parent / "results" / "tangent.json"
GEOMETRIES = {
    "vit_base_patch16": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_large_patch16": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}
CLIP = 1.0
Work = Callable[[], object]


def median_seconds(
    work: dict[str, Work], repeats: int, budget: float, device: torch.device
) -> dict[str, float]:
    """Median seconds of every task over interleaved repeats, after an untimed round, within a time budget."""
    times: dict[str, list[float]] = {name: [] for name in work}
    clock = time.process_time if one_thread(device) else time.perf_counter
    start = time.perf_counter()
    for task in work.values():
        task()
    for i in range(repeats):
        if i >= 2 and time.perf_counter() - start > budget:
            break
        for name, task in work.items():
            synchronise(device)
            begin = clock()
            task()
            synchronise(device)
            times[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def one_thread(device: torch.device) -> bool:
    """Whether process time is the time that the work takes."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def synchronise(device: torch.device) -> None:
    """Wait for the device, where it runs on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_theta(operator: TangentOperator, device: torch.device) -> dict[str, torch.Tensor]:
    """Tangent weights of ordinary size."""
    return {
        name: 0.01 * torch.randn(shape, device=device) for name, shape in operator.parameter_shapes.items()
    }


def private_step(
    operator: TangentOperator, features: Features, labels: torch.Tensor, theta: dict[str, torch.Tensor]
) -> Work:
    """One exact clipped sum from constant Grams: all of a private step but the noise."""
    grams = operator.gram(features).float()
    targets = F.one_hot(labels, operator.num_classes)

    def step() -> dict[str, torch.Tensor]:
        r = operator.jvp(features, theta).softmax(1) - targets
        norms = torch.einsum("na,nab,nb->n", r, grams, r).clamp_min(0).sqrt()
        return operator.vjp(features, r * (CLIP / norms).clamp(max=1)[:, None])

    return step


def training_step(model: VisionTransformer, inputs: torch.Tensor, labels: torch.Tensor, cached: bool) -> Work:
    """Forward and backward of the last block, norm and head, on block inputs or on images."""
    parts = (model.blocks[-1], model.norm, model.head)
    trained = [p.requires_grad_() for part in parts for p in part.parameters()]

    def step() -> tuple[torch.Tensor, ...]:
        logits = model.head(model.norm(model.blocks[-1](inputs))[:, 0]) if cached else model(inputs)
        return torch.autograd.grad(F.cross_entropy(logits, labels), trained)

    return step


def without_gradients(function: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> Work:
    """The function as a task."""

    def task() -> torch.Tensor:
        with torch.no_grad():
            return function(inputs)

    return task


def measure(
    geometry: str, classes: int, quick: bool, device: torch.device, budget: float
) -> dict[str, float]:
    """All ratios for one geometry."""
    torch.manual_seed(0)
    network = VisionTransformer(num_classes=classes, **GEOMETRIES[geometry]).to(device).eval()
    everything, last = TangentModel(network, "all"), TangentModel(network, "last:1")
    trained = copy.deepcopy(network)  # frozen by now, but for the parts that training_step trains
    few, many, n_block = (1, 64, 8) if quick else (2, 128, 16)
    images = torch.randn(few, 3, 224, 224, device=device)
    boundary = torch.randn(many, 197, network.embed_dim, device=device)
    labels = torch.arange(many, device=device) % classes
    fast, tokens = tangent_operator(last), CompiledLastBlock(network)
    theta = random_theta(fast, device)
    features = {name: op.extract(boundary) for name, op in (("fast", fast), ("tokens", tokens))}
    block_inputs = boundary[:n_block]
    block = without_gradients(lambda x: trained.head(trained.norm(trained.blocks[-1](x))[:, 0]), block_inputs)
    work = {
        "primal": without_gradients(network, images),
        "dual_all": without_gradients(everything, images),
        "last1": without_gradients(last, images),
        "network_step": training_step(trained, images, labels[:few], cached=False),
        "block": block,
        "block_step": training_step(trained, block_inputs, labels[:n_block], cached=True),
        "fast": lambda: fast.jvp(features["fast"], theta),
        "fast_step": private_step(fast, features["fast"], labels, theta),
        "tokens": lambda: tokens.jvp(features["tokens"], theta),
        "tokens_step": private_step(tokens, features["tokens"], labels, theta),
    }
    if not quick:
        work["cache_build"] = lambda: build_features([images], few, last, fast)
    counts = {"block": n_block, "block_step": n_block}
    counts |= dict.fromkeys(("fast", "fast_step", "tokens", "tokens_step"), many)
    seconds = median_seconds(work, 5 if quick else 7, budget, device)
    per_image = {name: value / counts.get(name, few) for name, value in seconds.items()}
    sizes = {name: f.nbytes / many for name, f in features.items()}
    return ratios(per_image) | {
        "compiled_layout_is_classes": fast.layout == "classes",
        "features_megabytes_per_image": round(sizes["fast"] / 1e6, 3),
        "tokens_features_megabytes_per_image": round(sizes["tokens"] / 1e6, 3),
        "boundary_megabytes_per_image": round(boundary[0].nbytes / 1e6, 3),
        "block_step_saved_megabytes_per_image": round(saved_megabytes(work["block_step"]) / n_block, 3),
        "milliseconds_per_image": {name: round(1e3 * value, 4) for name, value in per_image.items()},
    }


def saved_megabytes(task: Work) -> float:
    """Activations that autograd keeps for the backward pass of the task, each storage counted once."""
    storages: dict[int, int] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        task()
    return sum(storages.values()) / 1e6


def ratios(seconds: dict[str, float]) -> dict[str, float]:
    """Costs relative to the primal forward, and speed-ups of the compiled path."""
    out = {
        "dual_all_over_primal": seconds["dual_all"] / seconds["primal"],
        "last1_uncached_over_primal": seconds["last1"] / seconds["primal"],
    }
    if "cache_build" in seconds:
        out["cache_build_over_primal"] = seconds["cache_build"] / seconds["primal"]
    for prefix, name in (("compiled", "fast"), ("tokens", "tokens")):
        out |= {
            f"{prefix}_step_speedup_over_block_step": seconds["block_step"] / seconds[f"{name}_step"],
            f"{prefix}_step_speedup_over_network_step": seconds["network_step"] / seconds[f"{name}_step"],
            f"{prefix}_forward_speedup_over_block_forward": seconds["block"] / seconds[name],
        }
    return {name: round(value, 3) for name, value in out.items()}


def machine(device: torch.device, threads: int) -> dict[str, object]:
    """Where the figures come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": threads,
        "clock": "process time" if one_thread(device) else "wall time",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def processor() -> str:
    """Model name of the processor where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def main() -> None:
    """Measure, print, and record a full run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ViT-B/16 alone, within 50 seconds on two cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.quick:
        result = measure("vit_base_patch16", options.classes, True, device, budget=18.0)
    else:
        result = {g: measure(g, options.classes, False, device, budget=240.0) for g in GEOMETRIES}
    result |= {"classes": options.classes, "machine": machine(device, options.threads)}
    print(json.dumps(result, indent=None if options.json else 1))
    if not options.quick:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

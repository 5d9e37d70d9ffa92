r"""Pretrain a small backbone on images made by code and write it as safetensors.

    python recipes/starter/pretrain.py --steps 5000 --output first
    python recipes/starter/pretrain.py --start first --steps 6000 --learning-rate 1e-3 --strength 0.8 \
        --seed 1 --output dptaft/starter

are the two commands of the character starter. Other generators, objectives and stems are options. No image of
a person or from a data set takes part. `probe.py` and `study.py` measure what the weights are good for.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from drawing import Sampler
from generators import Characters, make_sampler
from objectives import MEAN, OBJECTIVES, STD
from safetensors.torch import load_file, save_file
from stems import STEMS, build_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PREPROCESSING = {"mean": MEAN, "std": STD}
TIMED_STEPS = 15


def learning_rate(step: int, steps: int, peak: float, warmup: int = 150) -> float:
    """Return a linear warm-up followed by half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save(
    model: VisionTransformer, folder: Path, architecture: dict[str, Any], training: dict[str, Any]
) -> None:
    """Write the weights without the pretraining head (half precision) and the public configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(weights, folder / "starter.safetensors")
    config = {"architecture": architecture, "preprocessing": PREPROCESSING, "pretraining": training}
    (folder / "starter.json").write_text(json.dumps(config, indent=1) + "\n")


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Architecture of the backbone, as timm's VisionTransformer takes it."""
    return {
        "img_size": args.size,
        "patch_size": 4,
        "in_chans": args.channels,
        "embed_dim": args.width,
        "depth": args.depth,
        "num_heads": args.width // 32,
    }


def make_optimizer(module: nn.Module, peak: float) -> torch.optim.AdamW:
    """AdamW, with decay for matrices only."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=peak,
        betas=(0.9, 0.98),
    )


def train(
    module: nn.Module,
    sampler: Sampler,
    args: argparse.Namespace,
    report: Callable[[int, int, float, VisionTransformer], None] | None = None,
) -> tuple[VisionTransformer, int, list[float]]:
    """Minimise an objective; return the averaged backbone, the number of steps and the losses.

    With ``args.seconds`` the number of steps is set by the processor time of the first ones.
    """
    generator = torch.Generator().manual_seed(args.seed)
    average = deepcopy(module.model).eval()
    optimizer = make_optimizer(module, args.learning_rate)
    steps, losses, started = args.steps, [], time.process_time()
    step = 0
    while step < steps:
        if isinstance(sampler, Characters):
            sampler.glyphs.strength = args.strength * min(1.0, 0.3 + 3 * step / steps)
        drawing = sampler(args.batch_size, generator)
        drawing = drawing._replace(**{k: v.to(args.device) for k, v in drawing._asdict().items()})
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.learning_rate)
        with torch.autocast(args.device, torch.bfloat16):
            loss = module(drawing, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), module.model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        losses.append(loss.item())
        step += 1
        if args.seconds and step == TIMED_STEPS:
            steps = max(step, int(step * args.seconds / (time.process_time() - started)))
        if report is not None:
            report(step, steps, losses[-1], average)
    return average, steps, losses


def make(args: argparse.Namespace) -> tuple[nn.Module, Sampler]:
    """The objective around a new model, and the generator that it learns from."""
    torch.manual_seed(args.seed)
    sampler = make_sampler(args.generator, args.size, args.channels)
    classes = sampler.num_classes if args.objective == "classes" else 0
    model = build_model(describe(args), args.stem, classes)
    return OBJECTIVES[args.objective](model, sampler), sampler


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is learned, by what, and for how long."""
    parser.add_argument("--generator", default="characters", help="a name, or several joined by +")
    parser.add_argument("--objective", default="classes", choices=OBJECTIVES)
    parser.add_argument("--stem", default="patches", choices=STEMS)
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seconds", type=float, help="processor time, in place of --steps")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0, help="largest distortion of characters")
    parser.add_argument("--device", default="cpu")


def main() -> None:
    """Train, report once a minute, keep an exponential average of the weights and save that."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--start", type=Path, help="folder of an earlier result to continue from")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    module, sampler = make(args)
    if args.start is not None:
        earlier = load_file(args.start / "starter.safetensors")
        module.model.load_state_dict({k: v.float() for k, v in earlier.items()}, strict=False)  # no head
    module.to(args.device)
    named = ("generator", "objective", "stem", "steps", "batch_size", "learning_rate", "seed")
    training = {name: getattr(args, name) for name in named} | {"classes": sampler.num_classes}
    started = reported = time.time()

    def report(step: int, steps: int, loss: float, average: VisionTransformer) -> None:
        nonlocal reported
        if time.time() - reported > 60 or step == steps:
            reported = time.time()
            print(f"step {step}/{steps} loss {loss:.3f} {reported - started:.0f} s", flush=True)
            save(average, args.output, describe(args), training | {"steps": steps})

    train(module, sampler, args, report)


if __name__ == "__main__":
    main()

r"""Pretrain the starter backbone on drawn characters and write it as safetensors.

    python recipes/starter/pretrain.py --steps 5000 --output first
    python recipes/starter/pretrain.py --start first --steps 6000 --learning-rate 1e-3 --strength 0.8 \
        --seed 1 --output dptaft/starter

No image of a person or from a data set takes part. Probe accuracies are measured by `probe.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from glyphs import CHARACTERS, GlyphSampler
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

ARCHITECTURE = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 128,
    "depth": 4,
    "num_heads": 4,
}
PREPROCESSING = {"mean": 0.25, "std": 0.35}


def learning_rate(step: int, steps: int, peak: float, warmup: int = 150) -> float:
    """Return a linear warm-up followed by half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Apply the backbone's public preprocessing to images in [0, 1]."""
    return (images - PREPROCESSING["mean"]) / PREPROCESSING["std"]


def save(model: VisionTransformer, folder: Path, training: dict[str, object]) -> None:
    """Write the weights without the pretraining head (half precision) and the public configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if not k.startswith("head.")}
    save_file(weights, folder / "starter.safetensors")
    config = {"architecture": ARCHITECTURE, "preprocessing": PREPROCESSING, "pretraining": training}
    (folder / "starter.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Train, report once a minute, keep an exponential average of the weights and save that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strength", type=float, default=1.0, help="largest strength of distortions")
    parser.add_argument("--start", type=Path, help="folder of an earlier result to continue from")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    sampler = GlyphSampler(ARCHITECTURE["img_size"], args.seed)
    model = VisionTransformer(num_classes=len(CHARACTERS), **ARCHITECTURE).to(args.device)
    if args.start is not None:
        earlier = {
            name: value.float() for name, value in load_file(args.start / "starter.safetensors").items()
        }
        model.load_state_dict(earlier, strict=False)  # all but the pretraining head
    for block in model.blocks:
        block.attn.fused_attn = False  # on CPUs the fused kernel's backward pass is the slower one
    average = deepcopy(model).eval()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=args.learning_rate,
        betas=(0.9, 0.98),
    )
    training = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "classes": len(CHARACTERS),
    }
    started = reported = time.time()
    for step in range(args.steps):
        sampler.strength = args.strength * min(1.0, 0.3 + 3 * step / args.steps)
        images, labels = sampler.batch(args.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.learning_rate)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(normalise(images.to(args.device)))
        loss = F.cross_entropy(logits.float(), labels.to(args.device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 20))
        with torch.no_grad():
            for kept, new in zip(average.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 1 - decay)
        if time.time() - reported > 60 or step == args.steps - 1:
            reported = time.time()
            right = (logits.argmax(1).cpu() == labels).float().mean().item()
            print(
                f"step {step + 1}/{args.steps} loss {loss.item():.3f} batch accuracy {right:.3f} "
                f"{reported - started:.0f} s",
                flush=True,
            )
            save(average, args.output, training)


if __name__ == "__main__":
    main()

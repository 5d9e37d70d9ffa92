r"""One trial of the pretraining study: train for a while, judge, append a row to a JSON file.

    python recipes/starter/study.py --generator silhouettes --objective parameters --seconds 180
    python recipes/starter/study.py --generator silhouettes --seconds 0      # the untrained control
    python recipes/starter/study.py --judge dptaft/starter                     # finished weights
    python recipes/starter/study.py --pixels                                   # no backbone at all

Judged on the first 14,000 training images of Fashion-MNIST (10,000 to train, 4,000 held out) and 1,437 digits
(1,000 and 437); no test image is read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from judge import digits, fashion_mnist, judge, judge_pixels
from pretrain import add_options, describe, make, save, train
from safetensors.torch import load_file
from stems import build_model
from timm.models.vision_transformer import VisionTransformer

NAMED = ("generator", "objective", "stem", "width", "depth", "batch_size", "learning_rate", "seed")


def rounded(accuracies: dict[str, float]) -> dict[str, float]:
    """Four digits: more than the sampling error leaves."""
    return {name: round(value, 4) for name, value in accuracies.items()}


def append(path: Path, row: dict[str, object]) -> None:
    """Print a row and add it to the JSON list in a file."""
    print(json.dumps(row), flush=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*rows, row], indent=1) + "\n")


def load(folder: Path) -> VisionTransformer:
    """A backbone as `pretrain.py` wrote it."""
    config = json.loads((folder / "starter.json").read_text())
    model = build_model(config["architecture"], config["pretraining"].get("stem", "patches"))
    weights = load_file(folder / "starter.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model


def main() -> None:
    """Run one trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--results", type=Path, default=Path("recipes/results/starter/study.json"))
    parser.add_argument("--save", type=Path, help="folder for the weights")
    parser.add_argument("--judge", type=Path, help="folder of finished weights to judge in place of a trial")
    parser.add_argument("--pixels", action="store_true", help="judge the pixels in place of a backbone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {"fashion": fashion_mnist(args.data), "digits": digits()}
    if args.pixels:
        append(args.results, {"stem": "pixels", "kernel": "Gaussian"} | rounded(judge_pixels(tasks)))
        return
    if args.judge is not None:
        append(args.results, {"weights": str(args.judge)} | rounded(judge(load(args.judge), tasks)))
        return
    module, sampler = make(args)
    row = {name: getattr(args, name) for name in NAMED}
    model, started = module.model, time.process_time()
    if args.seconds == 0:
        row |= {"generator": None, "objective": None, "steps": 0, "seconds": 0.0}
        model.reset_classifier(0)
    else:
        model, steps, losses = train(module, sampler, args)
        row |= {"steps": steps, "seconds": round(time.process_time() - started, 1)}
        row |= {
            "first loss": round(losses[0], 4),
            "last loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        }
        model.reset_classifier(0)
        if args.save is not None:
            save(model, args.save, describe(args), row)
    started = time.process_time()
    row |= rounded(judge(model, tasks))
    row["judging seconds"] = round(time.process_time() - started, 1)
    append(args.results, row)


if __name__ == "__main__":
    main()

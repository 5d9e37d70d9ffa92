r"""One trial of the pretraining study: train for a while, judge, append a row to a JSON file.

    python recipes/starter/study.py --generator silhouettes --objective parameters --seconds 180
    python recipes/starter/study.py --generator silhouettes --seconds 0      # the untrained control

Judged on the first 14,000 training images of Fashion-MNIST (10,000 to train, 4,000 held out) and 1,437 digits
(1,000 and 437); no test image is read.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from judge import digits, fashion_mnist, judge
from pretrain import add_options, describe, make, save, train

NAMED = ("generator", "objective", "stem", "width", "depth", "batch_size", "learning_rate", "seed")


def main() -> None:
    """Run one trial."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--results", type=Path, default=Path("recipes/results/starter/study.json"))
    parser.add_argument("--save", type=Path, help="folder for the weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
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
    row |= {
        k: round(v, 4)
        for k, v in judge(model, {"fashion": fashion_mnist(args.data), "digits": digits()}).items()
    }
    row["judging seconds"] = round(time.process_time() - started, 1)
    print(json.dumps(row), flush=True)
    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Tangent of the last block against the head on 10,000 Fashion-MNIST images, both over `starter-scattering`.

    python benchmarks/scopes_small.py --output benchmarks/results/scopes_small.json

The first 10,000 training images train, the 10,000 test images judge; default options, one run each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tomli_w

import dptaft


def pixels(split: dptaft.Split, count: int) -> np.ndarray:
    """The first images (count, 28, 28) as bytes."""
    return np.stack([(split.pixels[i][0] * 255).round().byte().numpy() for i in range(count)])


def main() -> None:
    """Write the images, sweep, keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--scopes", default="head,last:1")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    data = dptaft.load_data("fashion-mnist")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(
            folder / "images.npz",
            train_images=pixels(data.train, args.records),
            train_labels=data.train.labels[: args.records].numpy(),
            test_images=pixels(data.evaluation, len(data.evaluation)),
            test_labels=data.evaluation.labels.numpy(),
        )
        recipe = {
            "seeds": [0],
            "budget": {"treatment": "public-benchmark", "epsilons": [1.0, 3.0, 8.0]},
            "options": {"model": "starter-scattering"},
            "data": [{"name": "small", "source": str(folder / "images.npz"), "classes": list(data.classes)}],
            "methods": [{"name": scope, "scope": scope} for scope in args.scopes.split(",")],
        }
        (folder / "recipe.toml").write_text(tomli_w.dumps(recipe))
        command = ["sweep", str(folder / "recipe.toml"), "--output", str(folder / "sweep"), "--json"]
        done = subprocess.run([sys.executable, "-m", "dptaft", *command], check=True, capture_output=True)
    result = json.loads(done.stdout)
    versions = {name: version(name) for name in ("dptaft", "torch", "timm")}
    body = {"records": args.records, "versions": versions, "result": result}
    print(json.dumps(body, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What large backbones cost at 224 pixels, weights random: `dptaft plan` for the last block of two ViTs.

python benchmarks/cost_vit.py --output benchmarks/results/cost_vit.json

The plan measures boundary, constants and clipped sums on a few synthetic images. Nothing is downloaded: no
number depends on the values of the weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODELS = ("vit_base_patch16_224", "vit_large_patch16_224")
RECORDS, CLASSES = 10_000, 10


def plan(model: str, scope: str) -> dict[str, Any]:
    """Numbers per image and in total, of one process with one thread on the CPU."""
    options = ["--model", model, "--scope", scope, "--records", str(RECORDS), "--num-classes", str(CLASSES)]
    command = [sys.executable, "-m", "dptaft", "plan", *options, "--device", "cpu", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    probe, seconds = found["probe"], found["seconds"]
    return {
        "model": model,
        "scope": scope,
        "trained_weights": found["setting"]["trained_weights"],
        "bytes_per_image": probe["record_bytes"],
        "features_seconds_per_image": probe["feature_seconds"],
        "clipped_sum_seconds_per_record": probe["sum_seconds"],
        "noise_and_step_seconds": probe["step_seconds"],
        "sampling_rate": found["privacy"]["sampling_rate"],
        "steps": found["privacy"]["steps"],
        "features_seconds": seconds["features"],
        "training_seconds": seconds["training"],
        "peak_bytes": found["memory"]["peak"],
    }


def main() -> None:
    """Plan every model and write the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/cost_vit.py",
        "records": RECORDS,
        "classes": CLASSES,
        "machine": f"{platform.machine()}, one thread, CPU, shared with other work: times are upper limits",
        "versions": {package: version(package) for package in ("dptaft", "torch", "timm")},
        "rows": [],
    }
    for model in MODELS:
        result["rows"].append(plan(model, "last:1"))
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

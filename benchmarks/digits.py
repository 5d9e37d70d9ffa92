"""Accuracy at equal epsilon on the bundled digits: tangent, head and ordinary fine-tuning, default options.

python benchmarks/digits.py --output benchmarks/results/digits.json

Five runs, each holds out another fifth of the images (numbers r, r+5, ...); run 0 is the split of
`dptaft train`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import dptaft
from dptaft.data import ArrayPixels

METHODS = {
    "tangent last:1": {"scope": "last:1"},
    "head": {"scope": "head"},
    "non-linear last:1": {"scope": "last:1", "method": "non-linear"},
}


def fold(number: int) -> dptaft.ImageData:
    """Return the digits with images number, number + 5, ... held out."""
    source = load_digits()
    whole = dptaft.Split(
        ArrayPixels((source.images / 16).astype("float32")), torch.from_numpy(source.target).long()
    )
    held = range(number, len(whole), 5)
    kept = sorted(set(range(len(whole))) - set(held))
    names = tuple("0123456789")
    return dptaft.ImageData("digits", names, whole.take(kept), whole.take(held), True, is_public=True)


def measure(options: dict[str, object], epsilon: float, runs: int) -> dict[str, object]:
    """Return accuracy (mean and standard deviation over runs) and seconds per run."""
    accuracies, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            started = time.perf_counter()
            run = dptaft.train(fold(number), epsilon=epsilon, output=Path(folder) / str(number), **options)
            seconds.append(time.perf_counter() - started)
            accuracies.append(run.accuracy)
    spread = statistics.stdev(accuracies) if runs > 1 else 0.0
    return {
        "epsilon": epsilon if math.isfinite(epsilon) else "inf",
        "accuracy_mean": round(statistics.mean(accuracies), 5),
        "accuracy_sd": round(spread, 5),
        "accuracies": accuracies,
        "seconds_median": round(statistics.median(seconds), 2),
    }


def main() -> None:
    """Run every method at every epsilon and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, choices=range(1, 6))
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 3.0, 8.0, math.inf])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.methods:
        for epsilon in args.epsilons:
            row = {"method": name, **measure(METHODS[name], epsilon, args.runs)}
            rows.append(row)
            print(
                f"{name:<18} epsilon {row['epsilon']:<4} accuracy {row['accuracy_mean']:.4f} "
                f"+- {row['accuracy_sd']:.4f}  {row['seconds_median']} s",
                flush=True,
            )
    result = {
        "data": "digits, five folds of 1,437 training and 360 evaluation images",
        "rows": rows,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "versions": {p: version(p) for p in ("dptaft", "torch", "timm", "opacus")},
    }
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time and peak memory of one run per method at epsilon 3, each a `dptaft train` in a process of its own.

python benchmarks/results_cost.py --output benchmarks/results/results_cost.json

Import of torch, reading of images and features are included; nothing is cached from one run to the next.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCATTERING = ["--model", "starter-scattering"]
RUNS: dict[str, tuple[str, list[str]]] = {
    "tangent last:1": ("digits", ["--scope", "last:1"]),
    "head": ("digits", ["--scope", "head"]),
    "head, certified": ("digits", ["--scope", "head", "--certified"]),
    "last:1, objective perturbation": ("digits", ["--method", "objective-perturbation"]),
    "tangent last:1, scattering starter": ("digits", [*SCATTERING, "--scope", "last:1"]),
    "head, scattering starter": ("digits", [*SCATTERING, "--scope", "head"]),
    "attention of the last block": ("digits", ["--scope", "attention:1"]),
    "Fashion-MNIST head, scattering starter": ("fashion-mnist", [*SCATTERING, "--scope", "head"]),
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run: wall time, processor time and largest resident memory of its process."""
    data, options = RUNS[name]
    where = ["--data", data, "--output", str(folder / "run"), "--no-ledger", "--json"]
    command = [sys.executable, "-m", "dptaft", "train", "--epsilon", "3", *options, *where]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return {
        "name": name.removeprefix("Fashion-MNIST "),
        "data": data,
        "options": options,
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss / 1e6, 2),
    }


def main() -> None:
    """Measure, and write after every run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python benchmarks/results_cost.py",
        "machine": f"{platform.machine()}, one thread, CPU, shared with other work: times are upper limits",
        "versions": {package: version(package) for package in ("dptaft", "torch", "timm")},
        "rows": [],
    }
    for name in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            result["rows"].append(measure(name, Path(folder)))
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Eight budgets and three seeds on digits: one sweep against 24 separate commands, wall and processor time.

python benchmarks/sweep.py --output benchmarks/results/sweep.json
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import tomli_w

EPSILONS = [0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 16.0]
SEEDS = [0, 1, 2]


def timed(commands: list[list[str]]) -> dict[str, float]:
    """Wall and processor seconds of commands, one after the other."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": round(time.perf_counter() - started, 1), "processor_s": round(processor, 1)}


def main() -> None:
    """Run both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    dptaft = [sys.executable, "-m", "dptaft"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe = {
            "seeds": SEEDS,
            "budget": {"treatment": "public-benchmark", "epsilons": EPSILONS},
            "data": [{"name": "digits", "source": "digits"}],
            "methods": [{"name": "tangent", "scope": "last:1"}],
        }
        (root / "grid.toml").write_text(tomli_w.dumps(recipe))
        sweep = timed([[*dptaft, "sweep", str(root / "grid.toml"), "--output", str(root / "sweep")]])
        print("sweep", sweep, flush=True)
        commands = [
            [
                *dptaft,
                "train",
                f"--epsilon={epsilon}",
                f"--seed={seed}",
                f"--output={root / f'{seed}-{epsilon}'}",
            ]
            for seed in SEEDS
            for epsilon in EPSILONS
        ]
        alone = timed(commands)
    result = {
        "sweep": sweep,
        "separate_commands": alone | {"number": len(commands)},
        "wall_ratio": round(sweep["wall_s"] / alone["wall_s"], 3),
        "processor_ratio": round(sweep["processor_s"] / alone["processor_s"], 3),
        "machine": f"{platform.machine()}, CPU, other work beside it",
        "versions": {name: version(name) for name in ("dptaft", "torch", "timm", "opacus")},
    }
    print(json.dumps(result, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

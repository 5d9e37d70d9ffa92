"""Certified training with fewer steps than it needs to converge: more regularisation, or an early stop?

    python benchmarks/certified_steps.py --output benchmarks/results/certified_steps.json

Large data ask for a regularisation so small that convergence takes thousands of steps. `raise` raises it
until `limit` steps suffice; `stop` keeps it and stops after `limit` steps. Head of `starter-scattering`;
training images of Fashion-MNIST only: the first n train, the last 5,000 of 60,000 judge, one run per row.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import dptaft
from dptaft.training.certified import FORGETTING, LOGIT_NOISE
from dptaft_accounting import epsilon_to_mu

JUDGES, DELTA, CURVATURE = 5000, 1e-5, 0.5
GRID = [
    (10_000, 3.0, "raise", 1000),
    (10_000, 3.0, "stop", 1000),
    (10_000, 3.0, "stop", 3000),
    (55_000, 3.0, "stop", 1000),
    (55_000, 3.0, "stop", 3000),
    (55_000, 3.0, "raise", 3000),
    (55_000, 8.0, "stop", 1000),
    (55_000, 8.0, "stop", 3000),
    (55_000, 8.0, "raise", 3000),
    (55_000, 1.0, "stop", 1000),
    (55_000, 1.0, "stop", 3000),
]


def data(records: int) -> dptaft.ImageData:
    """The first training images, judged by the last."""
    whole = dptaft.load_data("fashion-mnist")
    count = len(whole.train)
    return replace(
        whole,
        train=whole.train.take(range(records)),
        evaluation=whole.train.take(range(count - JUDGES, count)),
    )


def converged(records: int, epsilon: float) -> int:
    """Steps until convergence at the regularisation that the proxy asks for."""
    noise = math.sqrt(2) / (records * epsilon_to_mu(epsilon, DELTA) * LOGIT_NOISE)
    return math.ceil(FORGETTING * (2 * noise + CURVATURE) / (2 * noise))


def regularization(steps: int) -> float:
    """The smallest with which so many steps suffice."""
    return FORGETTING * CURVATURE / (2 * (steps - FORGETTING))


def main() -> None:
    """One row after the other; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "command": "python benchmarks/certified_steps.py",
        "machine": f"{platform.machine()}, CPU, shared",
        "versions": {name: version(name) for name in ("dptaft", "torch", "timm")},
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for number, (records, epsilon, kind, limit) in enumerate(GRID):
            started = time.perf_counter()
            needed = converged(records, epsilon)
            strength = regularization(limit) if kind == "raise" and needed > limit else None
            run = dptaft.train(
                data(records),
                model="starter-scattering",
                scope="head",
                certified=True,
                epsilon=epsilon,
                delta=DELTA,
                steps=min(limit, needed),
                optimizer=None if strength is None else {"l2_regularization": strength},
                ledger=None,
                feature_cache=f"{folder}/features",
                output=f"{folder}/{number}",
            )
            row = {"records": records, "epsilon": epsilon, "kind": kind, "limit": limit}
            row |= {"steps": min(limit, needed), "accuracy": run.accuracy}
            result["rows"].append(row | {"seconds": round(time.perf_counter() - started, 1)})
            print(result["rows"][-1], flush=True)
            args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

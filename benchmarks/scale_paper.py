"""Paper calculation for docs/scale.md: ViT-L/16 at 224 pixels, 10^6 to 10^9 images.

Sizes come from the operators of the real model with random weights, noise from the accountant. Times on a CPU
are measured here; times on GPUs are arithmetic from the assumptions at the top of this file.

    python benchmarks/scale_paper.py --output benchmarks/results/scale.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from dptaft.estimate import blank_data
from dptaft.estimate_probe import measure
from dptaft.features import boundary_of, keeps_grams
from dptaft.learner import Learner
from dptaft.training.clipping import FLOAT_SLACK
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request, default_delta
from dptaft.training.preparation import build_learner, prepare
from dptaft_accounting import (
    FullBatchGaussian,
    PoissonGaussian,
    Target,
    best_bound,
    calibrate_noise_multiplier,
)

MODEL = "vit_large_patch16_224"
RECORDS = (10**6, 10**7, 10**8, 10**9)
PRECISIONS = ("float32", "bfloat16")
FULL_STEPS, POISSON_STEPS, BATCH = 100, 1000, 100_000
DEVICES = 8
SUSTAINED_FLOPS = 30e12  # float32 per GPU: 45 % of the 67e12 that an H100 data sheet states
DISK_BYTES_PER_SECOND = 6e9  # one NVMe drive per GPU
NETWORK_BYTES_PER_SECOND = 25e9  # between machines: 200 Gbit/s
TOKENS, WIDTH, BLOCKS = 197, 1024, 24


def request(scope: str, cache: str | None = None) -> Request:
    """ViT-L with random weights."""
    return Request(
        privacy=PrivacyConfig(3.0),
        model=ModelConfig(name=MODEL, weights="random", scope=scope),
        optimizer={},
        performance=PerformanceConfig("cpu", feature_cache=cache),
        data="records",
    )


def record_bytes(learner: Learner, precision: str) -> dict[str, int]:
    """Bytes of one record in a cache, with its Gram where that is kept."""
    size = learner.backbone.preprocessing.size
    with torch.no_grad():
        boundary = boundary_of(learner.tangent, torch.zeros(1, 3, size, size), precision)
        features = learner.operator.extract(boundary).nbytes
    classes = learner.operator.num_classes
    kept = learner.operator.kind != "head" and keeps_grams(features, classes)
    gram = 8 * classes**2 if kept else 0
    return {"features": features, "gram": gram, "total": features + gram}


def sizes() -> list[dict[str, Any]]:
    """Cache per record and trained weights, by scope, classes and precision."""
    rows = []
    for scope, classes in (("head", 10), ("head", 1000), ("last:1", 10), ("last:1", 1000)):
        learner = build_learner(blank_data(1000, classes), request(scope))
        trained = sum(p.numel() for p in learner.parameters.values())
        for precision in PRECISIONS:
            row = {"scope": scope, "classes": classes, "precision": precision, "trained": trained}
            rows.append(row | record_bytes(learner, precision))
    return rows


def rehearsed() -> dict[str, float]:
    """One record of the default plan at scope last:1 and 10 classes, on one core of this machine."""
    data, asked = blank_data(10**6, 10), request("last:1")
    probe = measure(prepare(data, asked), asked, data, available=4 << 30)
    return {
        "feature_seconds": probe.feature_seconds,
        "sum_seconds": probe.sum_seconds,
        "step_seconds": probe.step_seconds,
    }


def forward_flops() -> float:
    """Of the frozen network for one image: 24 D^2 per token and block, and attention."""
    return BLOCKS * (24 * WIDTH**2 * TOKENS + 4 * TOKENS**2 * WIDTH)


def times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arithmetic for `DEVICES` GPUs: building a cache, one pass over it, one sampled step, communication."""
    found = []
    for row in rows:
        if row["classes"] != 10:
            continue
        for records in RECORDS:
            amount = records * row["total"]
            found.append(
                {
                    "scope": row["scope"],
                    "precision": row["precision"],
                    "records": records,
                    "cache_bytes": amount,
                    "network_forward_seconds": records * forward_flops() / SUSTAINED_FLOPS / DEVICES,
                    "write_seconds": amount / DISK_BYTES_PER_SECOND / DEVICES,
                    "pass_seconds": amount / DISK_BYTES_PER_SECOND / DEVICES,
                    "sampled_step_seconds": BATCH * row["total"] / DISK_BYTES_PER_SECOND / DEVICES,
                    "communication_bytes_per_step": 12 * row["trained"],
                    "communication_seconds_per_step": 12 * row["trained"] / NETWORK_BYTES_PER_SECOND,
                }
            )
    return found


def noise() -> list[dict[str, Any]]:
    """Noise multipliers for epsilon 1 and 3, and the noise that one record's mean gradient meets."""
    found = []
    for records in RECORDS:
        delta = default_delta(records)
        for epsilon in (1.0, 3.0):
            for kind, rate, steps in (
                ("full-batch", 1.0, FULL_STEPS),
                ("poisson", BATCH / records, POISSON_STEPS),
            ):

                def mechanism(z: float, rate: float = rate, steps: int = steps) -> Any:
                    whole = FullBatchGaussian(z, steps=steps)
                    return whole if rate == 1.0 else PoissonGaussian(z, sampling_rate=rate, steps=steps)

                z = calibrate_noise_multiplier(mechanism, Target(epsilon=epsilon, delta=delta))
                found.append(
                    {
                        "records": records,
                        "delta": delta,
                        "epsilon_asked": epsilon,
                        "sampling": kind,
                        "rate": rate,
                        "steps": steps,
                        "noise_multiplier": z,
                        "epsilon": best_bound(mechanism(z), delta=delta).epsilon,
                        "noise_std_on_mean": z / (rate * records),
                        "noise_std_on_mean_of_all_steps": z / (rate * records) / steps**0.5,
                    }
                )
    return found


def lost_by_sums(dtype: type, pieces: int = 2_000_000, size: int = 512) -> float:
    """Simulation: how far one record's change of a sum of 10^9 is from the record, in clip norms.

    Records that all point one way, added in pieces one after the other.
    """
    values = size * np.random.default_rng(0).uniform(0.9, 1.0, pieces)
    neighbour = values.copy()
    neighbour[7] -= 1 / 3
    change = values[7] - neighbour[7]
    totals = [float(np.add.accumulate(part.astype(dtype))[-1]) for part in (values, neighbour)]
    return abs(totals[0] - totals[1] - change)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", help="also write the JSON object to this file")
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    rows = sizes()
    found = {
        "assumed": {
            "devices": DEVICES,
            "sustained_flops": SUSTAINED_FLOPS,
            "disk_bytes_per_second": DISK_BYTES_PER_SECOND,
            "network_bytes_per_second": NETWORK_BYTES_PER_SECOND,
        },
        "forward_flops": forward_flops(),
        "sizes": rows,
        "times": times(rows),
        "noise": noise(),
        "simulated_rounding": {
            "float32": lost_by_sums(np.float32),
            "float64": lost_by_sums(np.float64),
            "allowance": FLOAT_SLACK,
        },
        "measured": rehearsed(),
        "machine": {
            "platform": platform.platform(),
            "load_average": os.getloadavg()[0],
            "date": datetime.now(UTC).date().isoformat(),
        },
    }
    text = json.dumps(found, indent=2)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""Memory of training from cached features: does it grow with the number of records?

Synthetic features are written straight into a cache and trained on in a new process for each number of
records: two full batches and ten Poisson samples. The peak of the resident set is recorded, in all
(``VmHWM``, with mapped pages of files) and of anonymous memory alone (polled), for writing and for training.

    python benchmarks/memory.py --quick
    python benchmarks/memory.py --output benchmarks/results/memory.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

KEY = "0123456789abcdef"
CLASSES = 10
WRITTEN = 512
EXPECTED_BATCH = 1000
FULL_STEPS, POISSON_STEPS = 2, 10
SETTINGS = ("head", "last:1")


class Peak:
    """Largest anonymous resident set while the block runs, in bytes."""

    def __enter__(self) -> Peak:
        self.value, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.value = max(self.value, resident("RssAnon"))


def resident(name: str) -> int:
    """One size of this process, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def operator_and_model(scope: str) -> tuple[Any, Any]:
    """A head of width 64, or a tiny compiled last block; both over images that never exist."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from dptaft.tangent.choose import tangent_operator
    from dptaft.tangent.model import TangentModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    width = 64 if scope == "head" else 16
    base = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=width, depth=1, num_heads=2, num_classes=CLASSES
    )
    model = TangentModel(base.eval(), scope)
    return tangent_operator(model), model


def write(folder: Path, scope: str, records: int) -> dict[str, Any]:
    """Stream synthetic features to a cache."""
    import torch

    from dptaft.feature_cache import write_features
    from dptaft.features import keeps_grams
    from dptaft.tangent.operator import Features

    operator, model = operator_and_model(scope)
    boundary = model.boundary(torch.randn(WRITTEN, 3, 8, 8))
    part = operator.extract(boundary)
    if keeps_grams(part.nbytes // WRITTEN, CLASSES):
        part = Features(part.tensors, operator.gram(part))

    def parts() -> Iterator[Features]:
        for start in range(0, records, WRITTEN):
            yield part.index(slice(0, min(WRITTEN, records - start)))

    started = time.perf_counter()
    with Peak() as peak:
        write_features(folder, KEY, parts(), records)
    return {
        "seconds": time.perf_counter() - started,
        "bytes_per_record": part.nbytes / WRITTEN,
        "anonymous": peak.value,
        "total": resident("VmHWM"),
    }


def train(folder: Path, scope: str, records: int) -> dict[str, Any]:
    """Open the cache, take full batches and Poisson samples."""
    import torch

    from dptaft.feature_cache import read_features
    from dptaft.training.fused import FusedEngine
    from dptaft.training.losses import CrossEntropy
    from dptaft.training.noise import NoiseSource
    from dptaft.training.sampling import FullBatch, Poisson

    found: dict[str, Any] = {}
    operator, _ = operator_and_model(scope)
    with Peak() as peak:
        started = time.perf_counter()
        features = read_features(folder, KEY)
        found["open_seconds"] = time.perf_counter() - started
        labels = torch.arange(records).remainder_(CLASSES)
        engine = FusedEngine(operator, features, labels, loss=CrossEntropy(), l2_clip_norm=1.0)
        theta = engine.initial_theta()
        poisson = Poisson(records, EXPECTED_BATCH / records, NoiseSource())
        for name, sampler, steps in (
            ("full_batch", FullBatch(records), FULL_STEPS),
            ("poisson", poisson, POISSON_STEPS),
        ):
            started = time.perf_counter()
            for _ in range(steps):
                engine.clipped_sum(theta, sampler.next_batch())
            found[f"{name}_seconds_per_step"] = (time.perf_counter() - started) / steps
    return found | {"anonymous": peak.value, "total": resident("VmHWM")}


def measure(scope: str, records: int, root: Path) -> dict[str, Any]:
    """Both parts, each in a process of its own."""
    folder = root / f"{scope.replace(':', '')}-{records}"
    found: dict[str, Any] = {"records": records}
    try:
        for part in ("write", "train"):
            command = [sys.executable, __file__, "--part", part, str(folder), scope, str(records)]
            found[part] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Peaks at the most records over those at the fewest, and bytes that every further record took."""
    first, last = rows[0], rows[-1]
    found = {}
    for part in ("write", "train"):
        for kind in ("anonymous", "total"):
            few, many = first[part][kind], last[part][kind]
            found[f"{part}_{kind}_ratio"] = many / few
            found[f"{part}_{kind}_bytes_per_record"] = (many - few) / (last["records"] - first["records"])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="up to 100,000 records, scope head")
    parser.add_argument("--output", help="also write the JSON object to this file")
    parser.add_argument("--folder", help="where the synthetic features go (up to 5 GB; removed)")
    parser.add_argument("--part", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, folder, scope, records = arguments.part
        print(json.dumps({"write": write, "train": train}[part](Path(folder), scope, int(records))))
        return
    counts = (10_000, 100_000) if arguments.quick else (10_000, 100_000, 1_000_000)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as root:
        for scope in ("head",) if arguments.quick else SETTINGS:
            rows = [measure(scope, records, Path(root)) for records in counts]
            found[scope] = {"rows": rows, "growth": growth(rows)}
    found["machine"] = {"platform": platform.platform(), "date": datetime.now(UTC).date().isoformat()}
    text = json.dumps(found, indent=2)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

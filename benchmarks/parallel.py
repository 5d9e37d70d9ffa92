"""Throughput of two processes against one: building the feature cache, and private steps (fused engine).

Three settings take turns: one process with one thread, two processes with one thread each, and one process
with two threads. Every turn is a fresh start; the best of all turns counts, which other work on the machine
disturbs least (``cores_used_by_others`` says how much there was). Beside the time on the clock stands the
processor time of the busier process. Images are random.

    python benchmarks/parallel.py --quick
    python benchmarks/parallel.py --output benchmarks/results/parallel.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SETTINGS = {"one process": (1, 1), "two processes": (2, 1), "one process, two threads": (1, 2)}
MODEL = "starter"
PHASES = ("cache", "steps")
PIXELS = 28


def environment(rank: int, size: int, threads: int, port: int) -> dict[str, str]:
    """Variables of one process, as a launcher sets them."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    return {**os.environ, **{name: str(value) for name, value in {**place, **meeting}.items()}}


def work(images: int, steps: int, threads: int) -> dict[str, Any]:
    """One turn in one process: seconds on the clock and of the processor, of every phase."""
    import torch

    torch.set_num_threads(threads)
    from dptaft.data import ArrayPixels, ImageData, Split
    from dptaft.distributed import launched
    from dptaft.distributed.process_group import joined
    from dptaft.distributed.ranks import OneProcess
    from dptaft.distributed.share import Share
    from dptaft.training.noise import NoiseSource
    from dptaft.training.optimizers import OptimizerConfig, build_optimizer
    from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request, Sampling

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, PIXELS, PIXELS), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (images,), generator=generator)
    names = tuple("abcdefghij")
    data = ImageData("random", names, Split(ArrayPixels(pixels.numpy()), labels), None, True)
    place = launched()
    with (
        nullcontext(OneProcess()) if place is None else joined(place) as ranks,
        tempfile.TemporaryDirectory() as cache,
    ):
        performance = PerformanceConfig(device="cpu", feature_cache=cache)
        request = Request(
            PrivacyConfig(epsilon=float("inf")),
            ModelConfig(MODEL, weights="pretrained"),
            {},
            performance,
            "random",
        )
        share = Share(ranks, data, request)
        learner = share.build()
        found = {"cache": timed(share.features)}
        share.begin(Sampling("full-batch"), 1.0, "zero-out")
        private = build_optimizer(
            learner.parameters,
            OptimizerConfig(learning_rate=1e-3),
            noise_multiplier=1.0,
            l2_clip_norm=1.0,
            expected_batch_size=images,
            source=NoiseSource(),
        )

        def step() -> None:
            clipped, _ = share.step()
            if ranks.is_first:
                private.private_step(clipped)

        step()
        found["steps"] = timed(lambda: [step() for _ in range(steps)])
    return found


def timed(task: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    task()
    return time.perf_counter() - clock, time.process_time() - processor


def turn(setting: str, images: int, steps: int) -> dict[str, Any]:
    """Start the processes of one setting; the clock of the first one, the processor time of the busiest."""
    size, threads = SETTINGS[setting]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    words = [sys.executable, __file__, "--work", str(images), str(steps), str(threads)]
    busy, start = machine_busy(), time.perf_counter()
    processes = [
        subprocess.Popen(words, env=environment(rank, size, threads, port), stdout=subprocess.PIPE)
        for rank in range(size)
    ]
    answers = [json.loads(process.communicate()[0]) for process in processes]
    own = sum(answer["processor"] for answer in answers)
    others = max(0.0, (machine_busy() - busy - own) / (time.perf_counter() - start))
    found = {
        phase: {
            "clock": answers[0][phase][0],
            "processor": max(answer[phase][1] for answer in answers) / threads,
        }
        for phase in PHASES
    }
    return {"setting": setting, "cores_used_by_others": round(others, 2), **found}


def machine_busy() -> float:
    """Seconds that all cores have worked since the machine started."""
    user, nice, system = (int(text) for text in Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def summary(turns: list[dict[str, Any]], images: int, steps: int) -> dict[str, Any]:
    """Best throughput of every setting, and ratios to one process."""
    amount = {"cache": images, "steps": images * steps}
    found: dict[str, Any] = {}
    for phase in PHASES:
        found[phase] = {}
        for setting in SETTINGS:
            mine = [one[phase] for one in turns if one["setting"] == setting]
            rates = {
                f"records_per_second_{kind}": amount[phase] / min(one[kind] for one in mine)
                for kind in ("clock", "processor")
            }
            found[phase][setting] = {name: round(rate, 1) for name, rate in rates.items()}
        base = found[phase]["one process"]
        for setting in SETTINGS:
            for kind in ("clock", "processor"):
                name = f"records_per_second_{kind}"
                found[phase][setting][f"ratio_{kind}"] = round(found[phase][setting][name] / base[name], 2)
    return found


def main() -> None:
    """Take turns, print the ratios and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--work", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        found = work(*options.work)
        print(json.dumps({**found, "processor": time.process_time()}))
        return
    images, steps, rounds = (2048, 5, 1) if options.quick else (8192, 20, options.rounds)
    turns = []
    for _ in range(rounds):
        for setting in SETTINGS:
            turns.append(turn(setting, images, steps))
            print(json.dumps(turns[-1]), flush=True)
    found = summary(turns, images, steps)
    for phase, settings in found.items():
        for setting, numbers in settings.items():
            print(f"{phase:6} {setting:26} {numbers}")
    if options.output is not None:
        options.output.write_text(json.dumps(_record(found, turns, images, steps), indent=1) + "\n")


def _record(found: dict[str, Any], turns: list[dict[str, Any]], images: int, steps: int) -> dict[str, Any]:
    import torch

    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"processor": names[0] if names else platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": MODEL,
        "images": images,
        "steps": steps,
        "best_of_turns": found,
        "turns": turns,
    }


if __name__ == "__main__":
    main()

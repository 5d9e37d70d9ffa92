"""What this machine has room for: memory (limits of control groups honoured), and whether features fit."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from dptaft.data import ImageData
from dptaft.distributed import launched
from dptaft.learner import Learner
from dptaft.training.fused import GRAM_BYTES
from dptaft.training.plan import PlanError

INDEX_BYTES = 16
"""Per record, whatever the features: its label and its number."""
_GB = 1e9


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that a process can still take: available memory, or less where a control group allows less.

    Args:
        root: folder below which ``proc`` and ``sys`` lie.

    >>> available_memory() > 0
    True
    """
    return max(0, min((_machine_memory(root), *_group_memory(root))))


def _machine_memory(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # no Linux: all that is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_memory(root: Path) -> Iterator[int]:
    """What is left of every limit above this process; pages of files that can be dropped count as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    top = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            yield from _left(top, path, names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(top / "memory", path, names)


def _left(top: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    limit_name, used_name, reclaimable = names
    group = top / path.strip("/")
    for folder in (group, *group.parents):
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
            if limit != "max":
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int(limit) - int(used) + int(stat.get(reclaimable, 0))
        except (OSError, ValueError):
            pass
        if folder == top:
            return


def features_in_memory(learner: Learner, records: int) -> int:
    """Bytes of the constants of so many records in memory, with the Grams where an engine keeps them."""
    grams = 8 * records * learner.operator.num_classes**2
    kept = learner.engine_kind == "fused" and not learner.config.is_one_shot and grams <= GRAM_BYTES
    return records * (learner.bytes_per_record + INDEX_BYTES) + (grams if kept else 0)


def require_memory(learner: Learner, data: ImageData, available: int | None = None) -> None:
    """Refuse features that would not fit into memory; public numbers alone decide.

    Args:
        learner: whose features they are; nothing is refused where it has a feature cache.
        data: all records; where several processes share them, those on this machine (on a GPU, each of
            them) hold their part.
        available: bytes; None asks the machine, or the GPU.

    Raises:
        PlanError: with the need, what there is, and the remedies.
    """
    if learner.performance.feature_cache is not None:
        return
    on_gpu = learner.device.type == "cuda"
    if available is None:
        available = torch.cuda.mem_get_info(learner.device)[0] if on_gpu else available_memory()
    records = len(data.train) + (0 if data.evaluation is None else len(data.evaluation))
    launch = launched()
    if launch is not None:
        here = 1 if on_gpu else launch.local_world_size
        records = math.ceil(records * here / launch.world_size)
    needed = features_in_memory(learner, records)
    if needed > available:
        raise PlanError(
            f"the features of {records} records need {needed / _GB:.3g} GB of memory, and "
            f"{available / _GB:.3g} GB are free ({learner.device}); keep them on disk (--feature-cache DIR), "
            "store half precision (--feature-precision float16), or train a smaller scope"
        )

"""What a training will take, before anything starts: time, disk, memory, cost, noise.

Times are those of a measured rehearsal (`dptaft.estimate_probe`) times the numbers of the plan; disk and
memory follow from the sizes of one record; privacy is the plan itself.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dptaft.bundled import STARTERS
from dptaft.data import ImageData, ItemPixels, Split
from dptaft.estimate_probe import Probe, existing_folder, measure
from dptaft.estimate_room import INDEX_BYTES, available_memory, require_memory
from dptaft.training.fused import GRAM_BYTES
from dptaft.training.plan import PlanError, Request
from dptaft.training.preparation import Prepared, prepare
from dptaft.training.steps import MOST_BLOCK_STEPS

_MANIFEST_BYTES = 4096
_DIGEST_BYTES = 120
"""Per record while the ledger identifies the data: a digest, its place, and the sorted list."""
_FORWARD = 0.5
"""A prediction from cached constants, relative to a clipped sum."""


@dataclass(frozen=True)
class Estimate:
    """Everything `dptaft plan` prints; times in seconds, sizes in bytes.

    Attributes:
        setting: model, scope, method, engine, device, records.
        privacy: epsilon, delta, noise multiplier, sampling, expected batch size, steps.
        seconds: by stage, and `total`.
        disk: `cache` and `weights`, and `free`.
        memory: `peak` of all processes on this machine, of which `features`; `per_process`, without them;
            `available`; `device_peak` on a GPU.
        communication: bytes that every process but the first sends and receives in a step.
        cost: at the given price for all processes together; None without a price.
        warnings: what this machine does not have room for, with the remedy.
        probe: what was measured.
    """

    setting: Mapping[str, Any]
    privacy: Mapping[str, Any]
    seconds: Mapping[str, float]
    disk: Mapping[str, int]
    memory: Mapping[str, int]
    communication: int
    cost: float | None
    warnings: tuple[str, ...]
    probe: Probe

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"warnings": list(self.warnings)}


def blank_data(records: int, num_classes: int = 10, evaluation: int = 0) -> ImageData:
    """Records that are only counted: their labels take no memory and their images do not exist."""

    def no_image(index: int) -> Any:
        raise PlanError(f"there is no image {index}: the records are only counted")

    def split(count: int) -> Split:
        labels = torch.zeros(1, dtype=torch.int64).expand(count)
        return Split(ItemPixels(count, no_image, "counted records"), labels)

    names = tuple(str(number) for number in range(num_classes))
    held = split(evaluation) if evaluation else None
    return ImageData("records", names, split(records), held, True)


def estimate_training(
    data: ImageData,
    request: Request,
    *,
    processes: int = 1,
    price_per_hour: float | None = None,
    image_side: int | None = None,
    start_seconds: float = 0.0,
) -> Estimate:
    """Plan a training and rehearse its parts for a few seconds.

    Args:
        data: the records, or `blank_data`; no image is read unless the data is a public benchmark.
        request: as for `dptaft.training.trainer.run_training`. Weights are not needed: those of timm models
            are random here, since times and sizes do not depend on them.
        processes: that share the records (on one machine, each with its own GPU where there are GPUs).
        price_per_hour: of the machine with all of them.
        image_side: of the JPEG files that stand for private images; None takes the size the model reads.
        start_seconds: that the caller took before; planning itself is added.

    Raises:
        ValueError: a request that cannot be met.
    """
    if processes < 1:
        raise PlanError(f"the number of processes must be at least 1, got {processes}")
    if request.model.name not in STARTERS:
        request = replace(request, model=replace(request.model, weights="random"))
    started = time.perf_counter()
    prepared = prepare(data, request)
    start_seconds += time.perf_counter() - started
    available = available_memory()
    probe = measure(prepared, request, data, image_side=image_side, available=available)
    return combine(
        prepared,
        request,
        data,
        probe,
        processes=processes,
        price_per_hour=price_per_hour,
        available=available,
        start_seconds=start_seconds,
    )


def combine(
    prepared: Prepared,
    request: Request,
    data: ImageData,
    probe: Probe,
    *,
    processes: int = 1,
    price_per_hour: float | None = None,
    available: int,
    start_seconds: float = 0.0,
) -> Estimate:
    """The estimate that follows from a plan and a rehearsal; arguments as for `estimate_training`."""
    disk = _disk(prepared, request, data, probe)
    memory = _memory(prepared, request, data, probe, processes) | {"available": available}
    seconds = _seconds(prepared, request, data, probe, processes, reread=disk["cache"] > available)
    seconds = {"start": start_seconds} | seconds
    seconds["total"] = sum(seconds.values())
    return Estimate(
        setting=_setting(prepared, request, data, processes),
        privacy=_privacy(prepared, request),
        seconds=seconds,
        disk=disk,
        memory=memory,
        communication=(8 + 4) * probe.trained if processes > 1 else 0,
        cost=None if price_per_hour is None else price_per_hour * seconds["total"] / 3600,
        warnings=tuple(_warnings(prepared, data, disk, memory)),
        probe=probe,
    )


def _counts(data: ImageData) -> tuple[int, int]:
    return len(data.train), 0 if data.evaluation is None else len(data.evaluation)


def _setting(prepared: Prepared, request: Request, data: ImageData, processes: int) -> dict[str, Any]:
    learner, (records, evaluation) = prepared.learner, _counts(data)
    return {
        "data": data.name,
        "records": records,
        "evaluation_records": evaluation,
        "classes": len(data.classes),
        "model": request.model.name,
        "scope": request.model.scope,
        "method": request.model.method,
        "feature_precision": request.model.feature_precision,
        "feature_cache": request.performance.feature_cache,
        "engine": learner.engine_kind,
        "operator": learner.operator.kind,
        "device": str(learner.device),
        "processes": processes,
        "trained_weights": sum(p.numel() for p in learner.parameters.values()),
    }


def _privacy(prepared: Prepared, request: Request) -> dict[str, Any]:
    plan = prepared.plan
    return {
        "epsilon": request.privacy.epsilon if math.isfinite(request.privacy.epsilon) else None,
        "delta": plan.delta,
        "adjacency": plan.adjacency,
        "released": plan.released,
        "noise_multiplier": plan.noise_multiplier,
        "noise_std_on_mean": plan.noise_multiplier / plan.normaliser,
        "sampling": plan.sampling.kind,
        "sampling_rate": plan.sampling.rate,
        "expected_batch_size": plan.normaliser,
        "steps": plan.steps,
        "optimizer": prepared.optimizer.kind,
    }


def _seconds(
    prepared: Prepared, request: Request, data: ImageData, probe: Probe, processes: int, *, reread: bool
) -> dict[str, float]:
    """Every stage; work on records is shared by processes that have a core or a GPU of their own."""
    plan, learner, (records, evaluation) = prepared.plan, prepared.learner, _counts(data)
    alone = learner.device.type == "cuda"
    workers = processes if alone else min(processes, os.cpu_count() or 1)
    images = records + evaluation
    cached = request.performance.feature_cache is not None
    in_step = records * plan.sampling.rate
    block = max(1, min(MOST_BLOCK_STEPS, plan.steps // 20))
    fetched = 0.0 if plan.sampling.kind == "full-batch" else probe.pick_seconds
    fetched += probe.record_bytes * probe.read_seconds if reread else 0.0
    per_step = in_step * (probe.sum_seconds + fetched)
    return {
        "identify": (records + (images if cached else 0)) * probe.identify_seconds / workers,
        "features": images * (probe.image_seconds + probe.feature_seconds) / workers,
        "cache": images * probe.record_bytes * (probe.write_seconds + probe.check_seconds) if cached else 0.0,
        "training": records * probe.gram_seconds / workers
        + plan.steps * (per_step / workers + records * probe.draw_seconds / workers + probe.step_seconds),
        "bookkeeping": math.ceil(plan.steps / block) * probe.block_seconds + probe.finish_seconds,
        "evaluation": _FORWARD * evaluation * probe.sum_seconds / workers,
    }


def _disk(prepared: Prepared, request: Request, data: ImageData, probe: Probe) -> dict[str, int]:
    cache = request.performance.feature_cache
    splits = [count for count in _counts(data) if count]
    size = sum(count * probe.record_bytes + _MANIFEST_BYTES for count in splits) if cache else 0
    return {
        "cache": size,
        "weights": 4 * probe.trained,
        "free": shutil.disk_usage(existing_folder(cache)).free,
    }


def _memory(
    prepared: Prepared, request: Request, data: ImageData, probe: Probe, processes: int
) -> dict[str, int]:
    """Peaks: what the rehearsal took, and what grows with the records.

    Records in memory are there once and steps look at them; the batch of the rehearsal was a copy of its own,
    which only a sample of them makes again.
    """
    records, evaluation = _counts(data)
    on_gpu = prepared.learner.device.type == "cuda"
    held = 0
    if request.performance.feature_cache is None:
        grams = probe.gram_bytes if records * probe.gram_bytes <= GRAM_BYTES else 0
        held = (records + evaluation) * probe.record_bytes + records * grams
        if prepared.plan.sampling.kind == "full-batch":
            held = max(0, held - probe.batch_bytes)
    per_record = records * INDEX_BYTES
    fixed = processes * probe.resident_bytes
    host = fixed + max(per_record + (0 if on_gpu else held), _DIGEST_BYTES * records)
    found = {"peak": host, "features": held, "per_process": probe.resident_bytes}
    return found | ({"device_peak": probe.device_bytes + held // processes} if on_gpu else {})


def _warnings(
    prepared: Prepared, data: ImageData, disk: Mapping[str, int], memory: Mapping[str, int]
) -> list[str]:
    cache, free, available = (f"{n / 1e9:.3g} GB" for n in (disk["cache"], disk["free"], memory["available"]))
    found = []
    if disk["cache"] > disk["free"]:
        found.append(
            f"the feature cache needs {cache} but {free} of disk are free; free some space, choose another "
            "folder, store half precision (--feature-precision float16), or train a smaller scope"
        )
    elif disk["cache"] > memory["available"]:
        found.append(
            f"the feature cache of {cache} is larger than the {available} of memory that could hold it, so "
            "every pass reads the disk again; store half precision, sample smaller batches, or share the "
            "records between machines"
        )
    try:
        require_memory(prepared.learner, data)
    except PlanError as error:
        found.append(str(error))
    return found

"""After training: evaluation on held-out images, and the run folder with its statement."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dptaft.backbones import describe_preprocessing
from dptaft.data import ImageData
from dptaft.data.load import published_name
from dptaft.learner import Cached, Learner
from dptaft.predictor import HEAD, TRAINED
from dptaft.runs import (
    FORMAT,
    WEIGHTS,
    RunError,
    dry_run,
    hash_files,
    require_text,
    write_config,
    write_metrics,
    write_no_claim,
    write_statement,
)
from dptaft.training.describe import build_one_shot_statement, build_statement, no_claim
from dptaft.training.facts import facts_of_one_shot, facts_of_steps
from dptaft.training.plan import Request, delta_warning, plain
from dptaft.training.preparation import Prepared, PreparedOneShot
from dptaft.training.steps import Trained


def warn_of_delta(delta: float, data: ImageData, request: Request) -> None:
    """Warn where a private run's delta protects nobody."""
    warning = delta_warning(delta, request.privacy.public_size or len(data.train))
    if warning is not None and request.privacy.is_private:
        warnings.warn(warning, UserWarning, stacklevel=3)


def evaluate(
    learner: Learner, data: ImageData, held_out: Cached | None, weights: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Accuracy and mean cross-entropy on the evaluation split; nothing about the training records.

    Images that were skipped because they cannot be read are left out.
    """
    if data.evaluation is None or held_out is None:
        return []
    return scores(data, learner.logits(held_out.features, weights), held_out.features["finite"].cpu())


def scores(data: ImageData, logits: Tensor, finite: Tensor) -> list[dict[str, Any]]:
    """What `evaluate` says of given logits.

    Args:
        data: with an evaluation split.
        logits: (n, C) of its images.
        finite: (n,) bool, False for an image that could not be read.
    """
    if data.evaluation is None:
        return []
    labels = data.evaluation.labels
    if data.skips_corrupt:
        logits, labels = logits[finite], labels[finite]
    if not len(labels):
        return []
    return [
        {
            "split": "evaluation",
            "images": len(labels),
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
            "cross_entropy": float(torch.nn.functional.cross_entropy(logits, labels)),
        }
    ]


def write_run(
    folder: Path,
    name: str,
    data: ImageData,
    request: Request,
    prepared: Prepared,
    trained: Trained,
    metrics: list[dict[str, Any]],
    charged: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    cross_check: bool = True,
) -> None:
    """Write configuration, weights, metrics and the statement.

    `charged` is what the account says; `sections` are further tables of the configuration; `cross_check`
    adds the second opinions on the bound, which take a second or two.
    """
    tables: dict[str, Mapping[str, Any]] = {
        "optimizer": plain(prepared.optimizer),
        "processes": {"count": trained.processes},
        "training": facts_of_steps(data, request, prepared, trained),
        **(sections or {}),
    }
    found = write_files(folder, name, data, request, prepared, trained.weights, metrics, tables)
    if found.no_claim:
        return
    statement = build_statement(
        data,
        request,
        prepared.plan,
        prepared.optimizer,
        trained,
        backbone=found.backbone,
        charged=charged,
        utility=utility_of(metrics),
        admin=found.admin,
        certificate=prepared.spending(trained.executed).certificate,
        cross_check=cross_check,
    )
    write_statement(folder, statement)


def write_one_shot_run(
    folder: Path,
    name: str,
    data: ImageData,
    request: Request,
    prepared: PreparedOneShot,
    trained: Trained,
    metrics: list[dict[str, Any]],
    charged: Mapping[str, Any],
    *,
    cross_check: bool = True,
) -> None:
    """`write_run` for a run without steps."""
    plan = prepared.plan
    tables = {
        "optimizer": {"kind": plan.method, "l2_regularization": plan.regularization},
        "training": facts_of_one_shot(data, request, plan),
    }
    found = write_files(folder, name, data, request, prepared, trained.weights, metrics, tables)
    if found.no_claim:
        return
    statement = build_one_shot_statement(
        data,
        request,
        plan,
        backbone=found.backbone,
        charged=charged,
        utility=utility_of(metrics),
        admin=found.admin,
        cross_check=cross_check,
    )
    write_statement(folder, statement)


def rehearse(
    output: Path,
    data: ImageData,
    request: Request,
    prepared: Prepared | PreparedOneShot,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write the run with blank weights, read it and remove it, before anything is charged.

    So names that no file can hold, a full disk or a folder without permission cost nothing.

    Raises:
        RunError: it cannot be written; the message names the cause and the remedy.
    """
    require_writable_names(data, request)
    weights = {
        name: torch.zeros_like(p, dtype=torch.float32) for name, p in prepared.learner.parameters.items()
    }
    require_room(output.parent, weights)
    metrics = [{"split": "evaluation", "images": 1, "accuracy": 0.0, "cross_entropy": 0.0}]
    charged = {"ledger": "none: nothing is charged yet"}
    with dry_run(output) as folder:
        if isinstance(prepared, PreparedOneShot):
            blank = Trained(weights, 1.0)
            write_one_shot_run(
                folder, output.name, data, request, prepared, blank, metrics, charged, cross_check=False
            )
        else:
            steps = prepared.plan.steps
            blank = Trained(weights, prepared.l2_clip_norm, tuple(range(steps)), steps)
            write_run(
                folder, output.name, data, request, prepared, blank, metrics, charged, sections,
                cross_check=False,
            )  # fmt: skip


def require_room(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse a disk without room for the run, its checkpoint (twice: it is replaced) and its result."""
    needed = _COPIES * sum(value.numel() * value.element_size() for value in weights.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the run, its checkpoints and its result need {needed / 1e6:.3g} MB in {folder}, which has "
            f"{free / 1e6:.3g} MB free; make room, or choose another output"
        )


_COPIES = 8


def require_writable_names(data: ImageData, request: Request) -> None:
    """Refuse classes, data and files of the model whose names no run can hold.

    Raises:
        RunError: naming it and the remedy.
    """
    for name in data.classes:
        require_text("the class", name, "rename its folder (or entry), so that the run can be written")
    for name in dict.fromkeys((data.name, request.data)):
        require_text("the data", name, "rename it, so that the run can be written")
    for name, value in plain(request.model).items():
        if isinstance(value, str):
            require_text(f"the {name}", value, "rename it, so that the run can be written")


@dataclass(frozen=True)
class Written:
    """What a statement says of files: the backbone, the folder; `no_claim` where there is no statement."""

    backbone: Mapping[str, str]
    admin: Mapping[str, Any]
    no_claim: bool


def write_files(
    folder: Path,
    name: str,
    data: ImageData,
    request: Request,
    prepared: Prepared | PreparedOneShot,
    weights: Mapping[str, Tensor],
    metrics: list[dict[str, Any]],
    tables: Mapping[str, Mapping[str, Any]],
) -> Written:
    """Write everything but a statement; `tables` are further tables of the configuration."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    tensors = {f"{TRAINED}{key}": value for key, value in weights.items()}
    tensors |= {f"{HEAD}{key}": value for key, value in prepared.head.items()}
    content = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    (folder / WEIGHTS).write_bytes(save(content))
    backbone = prepared.learner.backbone
    described = {"name": backbone.name, "source": backbone.source, "sha256": backbone.digest}
    privacy = {key: value for key, value in plain(request.privacy).items() if key != "insecure_seed"}
    config = {
        "run": {"format": FORMAT, "id": name, "time": now},
        "privacy": privacy,
        "model": plain(request.model),
        "engine": {"kind": prepared.learner.engine_kind},
        "backbone": described,
        "preprocessing": describe_preprocessing(backbone.preprocessing),
        "data": {"name": published_name(request.data), "classes": list(data.classes)},
        **tables,
    }
    write_config(folder, config)
    write_metrics(folder, metrics)
    admin = {"run": name, "time": now, "files": hash_files(folder)}
    reason = no_claim(request)
    if reason is not None:
        write_no_claim(folder, reason, admin)
    return Written(described, admin, reason is not None)


def utility_of(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of the evaluation split, as the statement gives it."""
    if not metrics:
        return {}
    return {
        "metric": "accuracy",
        "value": metrics[0]["accuracy"],
        "split": "evaluation",
        "records": metrics[0]["images"],
        "private": False,
    }

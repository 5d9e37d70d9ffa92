"""A finished run turned back into its recipe: the same plan, noise, clip norm, optimiser and sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from dptaft.auditing.canaries import AuditSetupError
from dptaft.data import ArrayPixels, ImageData, Split, load_data
from dptaft.training.optimizers import OptimizerConfig, Schedule
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request
from dptaft.training.preparation import Prepared, prepare
from dptaft_accounting import ConvexityCertificate, Mechanism, PrivacyStatement, mechanism_from_dict
from dptaft_accounting.audit import Family, mechanism_family

if TYPE_CHECKING:
    from dptaft.runs import Run

OBSERVERS = ("all-iterates", "last-iterate", "black-box")
SYNTHETIC = "synthetic"
_GRADIENT_STEPS = ("full-batch-gaussian", "poisson-gaussian", "cyclic-gaussian")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Recipe:
    """What is needed to repeat a run.

    Attributes:
        data: the records that are trained on.
        request: as asked.
        prepared: as decided, with the recorded noise and clip norm.
        mechanism: the record of the planned steps.
        certificate: of a certified run.
        delta: of the claim.
        statement_id: name of the statement that is audited.
        private: whether the audit reads private records.
        notes: how the repetition differs from the run.
    """

    data: ImageData
    request: Request
    prepared: Prepared
    mechanism: Mechanism
    certificate: ConvexityCertificate | None
    delta: float
    statement_id: str
    private: bool
    notes: tuple[str, ...] = ()

    def family(self, observer: str) -> Family:
        """The claim that an observer is held to: composition unless only the last iterate is claimed."""
        last = getattr(self.mechanism, "released", "all-iterates") == "last-iterate"
        bound = "composition" if observer == "all-iterates" or not last else None
        return mechanism_family(self.mechanism, self.delta, self.certificate, bound)


def load_recipe(run: Run, data: str | ImageData | None = None) -> Recipe:
    """The recipe of a finished run.

    Args:
        run: with a claim.
        data: the records, or ``synthetic`` for images without content, as many as the run had; by default
            what the run was trained on, by name or path.

    Raises:
        AuditSetupError: no claim, other data, or a version of dptaft that would plan another mechanism.
    """
    if run.statement is None:
        raise AuditSetupError(f"{run.path} claims nothing ({run.no_claim}); there is nothing to audit")
    statement = run.statement
    kind = statement.mechanism["record"]["kind"]
    if kind not in _GRADIENT_STEPS:
        raise AuditSetupError(
            f"{run.path} was made by {kind}; an audit repeats noisy gradient steps: "
            + ", ".join(_GRADIENT_STEPS)
        )
    images = _images(run, statement, data)
    request = _request(run, statement)
    prepared = _same_plan(prepare(images, request), run, statement)
    if (
        abs(prepared.plan.normaliser - statement.mechanism["normaliser"])
        > _TOLERANCE * prepared.plan.normaliser
    ):
        raise AuditSetupError(
            f"{images.name} has {len(images.train)} training records, which gives the normaliser "
            f"{prepared.plan.normaliser:g}; the run had {statement.mechanism['normaliser']:g}: give its data"
        )
    mechanism = prepared.spending().mechanism
    if mechanism is None:
        raise AuditSetupError(f"{run.path} was trained without noise; there is nothing to audit")
    notes = _compare(mechanism, statement)
    return Recipe(
        data=images,
        request=request,
        prepared=prepared,
        mechanism=mechanism,
        certificate=prepared.certificate,
        delta=float(statement.claim["delta"]),
        statement_id=run.id,
        private=not images.is_public,
        notes=notes,
    )


def _images(run: Run, statement: PrivacyStatement, data: str | ImageData | None) -> ImageData:
    if isinstance(data, ImageData):
        return data
    spec = run.config["data"]["name"] if data is None else data
    if spec == SYNTHETIC:
        record = statement.mechanism["record"]
        rate = record.get("sampling_rate") or 1.0 / record.get("batches_per_epoch", 1)
        return synthetic_data(round(statement.mechanism["normaliser"] / rate), run.classes)
    try:
        return load_data(spec, classes=None if spec == "digits" else run.classes)
    except ValueError as error:
        raise AuditSetupError(
            f"the records of the run are needed ({error}); give --data, or --data {SYNTHETIC} for an audit "
            "that reads none of them"
        ) from None


def synthetic_data(count: int, classes: tuple[str, ...], size: int = 32) -> ImageData:
    """Smooth random images with labels in turn: an audit on them reads no private record.

    >>> data = synthetic_data(6, ("a", "b"))
    >>> len(data.train), data.is_public
    (6, True)
    """
    split = Split(ArrayPixels(smooth_images(count, size)), torch.arange(count) % len(classes))
    return ImageData(SYNTHETIC, classes, split, None, True, True)


def smooth_images(count: int, size: int = 32, seed: int = 0) -> Any:
    """Random images (count, size, size) in [0, 1], smooth at the scale of an eighth of their size."""
    coarse = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (size, size), mode="bilinear")[:, 0].clamp(0, 1).numpy()


def _request(run: Run, statement: PrivacyStatement) -> Request:
    privacy = dict(run.config["privacy"]) | {"steps": statement.mechanism["steps_planned"]}
    optimizer = _optimizer(run.config["optimizer"])
    if optimizer.get("kind") != "momentum":
        optimizer.pop("momentum", None)
    return Request(
        privacy=_known(PrivacyConfig, privacy),
        model=_known(ModelConfig, run.config["model"]),
        optimizer=optimizer,
        performance=PerformanceConfig(engine=run.config["engine"]["kind"]),
        data=run.config["data"]["name"],
    )


def _known(kind: type, values: Mapping[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise AuditSetupError(f"this version of dptaft does not know the setting {unknown[0]!r} of the run")
    return kind(**values)


def _optimizer(values: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(values)
    for name in ("learning_rate_schedule", "noise_schedule"):
        if name in found:
            found[name] = Schedule(**found[name])
    if "betas" in found:
        found["betas"] = tuple(found["betas"])
    return found


def _same_plan(prepared: Prepared, run: Run, statement: PrivacyStatement) -> Prepared:
    """The prepared run with the noise and the clip norm of the record."""
    record = statement.mechanism["record"]
    noise = record["noise_multiplier"]
    base = noise if isinstance(noise, float) else noise[0] / prepared.plan.noise_factors[0]
    clip = float(statement.mechanism["l2_clip_norm"])
    if not math.isclose(base, prepared.plan.noise_multiplier, rel_tol=0.01):
        raise AuditSetupError(
            f"this version of dptaft plans the noise multiplier {prepared.plan.noise_multiplier:g} for the "
            f"settings of {run.path}, the run used {base:g}; audit it with the version that trained it"
        )
    plan = replace(prepared.plan, noise_multiplier=base, delta=float(statement.claim["delta"]))
    config = OptimizerConfig(**_optimizer(run.config["optimizer"]))
    return replace(prepared, plan=plan, optimizer=config, l2_clip_norm=clip)


def _compare(mechanism: Mechanism, statement: PrivacyStatement) -> tuple[str, ...]:
    """Refuse another mechanism; steps may differ where the run was interrupted."""
    recorded = mechanism_from_dict(statement.mechanism["record"])
    if type(recorded) is not type(mechanism) or recorded.adjacency != mechanism.adjacency:
        raise AuditSetupError(
            f"the run was {recorded.kind} under {recorded.adjacency}, this version plans {mechanism.kind} "
            f"under {mechanism.adjacency}; audit it with the version that trained it"
        )
    for name in ("sampling_rate", "batches_per_epoch"):
        own, other = getattr(mechanism, name, None), getattr(recorded, name, None)
        if own != other and not (own and other and math.isclose(own, other, rel_tol=_TOLERANCE)):
            raise AuditSetupError(f"the run had {name} {other}, these records give {own}; give its own data")
    executed, planned = getattr(recorded, "steps", 0), getattr(mechanism, "steps", 0)
    if executed != planned:
        return (f"the run was interrupted: {executed} steps are accounted, the audit repeats {planned}",)
    return ()

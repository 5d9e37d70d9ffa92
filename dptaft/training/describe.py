"""The privacy statement of a run, filled from what the run really did."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast

from dptaft.data import ImageData
from dptaft.revision import source_revision
from dptaft.training.clipping import Adjacency, l2_sensitivity
from dptaft.training.noise import FLOAT_MITIGATION, NoiseSource, noise_std
from dptaft.training.one_shot_plan import DIAMETER, MARGIN, OneShotPlan
from dptaft.training.optimizers import OptimizerConfig
from dptaft.training.plan import ModelConfig, Plan, Request
from dptaft.training.steps import Trained
from dptaft.training.vouching import assumptions, data_accesses, held_out_by_class
from dptaft_accounting import ConvexityCertificate, PrivacyStatement

_PACKAGES = ("dptaft", "torch", "timm", "opacus", "numpy", "scipy", "cryptography", "dp-accounting")
SEEDED = (
    "noise and sampling were seeded (--insecure-seed): whoever knows the seed can undo them, "
    "so no privacy is claimed and no budget is charged"
)
UNIT = "one training record"
_BOUNDED = "none acts: unit Jacobians keep every gradient below the clip norm"
NOISELESS = "epsilon is infinite: a non-private baseline without noise; no budget is charged"


def no_claim(request: Request) -> str | None:
    """Why a run claims nothing; None for a private one."""
    if request.privacy.is_private:
        return None
    return SEEDED if request.privacy.insecure_seed is not None else NOISELESS


def build_statement(
    data: ImageData,
    request: Request,
    plan: Plan,
    optimizer: OptimizerConfig,
    trained: Trained,
    *,
    backbone: Mapping[str, str],
    charged: Mapping[str, Any],
    utility: Mapping[str, Any],
    admin: Mapping[str, Any],
    certificate: ConvexityCertificate | None = None,
    cross_check: bool = True,
) -> PrivacyStatement:
    """Account all executed steps and write down claim, mechanism and circumstances.

    `charged` is what the account says. The published standard deviation is the least of all steps.
    `certificate` covers the executed steps of a certified run.
    """
    executed, completed, processes = trained.executed, trained.completed, trained.processes
    caveats = _caveats(data, request)
    if completed < plan.steps or len(executed) != plan.steps:
        caveats.append(
            f"the run was interrupted: {plan.steps} steps were planned, {len(executed)} are accounted, "
            f"the weights contain {completed}"
        )
    return PrivacyStatement.build(
        plan.mechanism(executed),
        plan.delta,
        certificate=certificate,
        cross_check=cross_check,
        unit=UNIT,
        claim=_claim(data, request, plan, backbone, certificate, processes),
        details=_details(request, plan, optimizer, trained),
        composition=_composition(request) | dict(charged),
        implementation=_implementation(_sampling_source(plan, processes)) | {"processes": processes},
        utility=utility,
        admin={**admin, "caveats": caveats + _unrecorded(charged)},
    )


def build_one_shot_statement(
    data: ImageData,
    request: Request,
    plan: OneShotPlan,
    *,
    backbone: Mapping[str, str],
    charged: Mapping[str, Any],
    utility: Mapping[str, Any],
    admin: Mapping[str, Any],
    cross_check: bool = True,
) -> PrivacyStatement:
    """Account a run without steps and write down claim, mechanism and circumstances."""
    return PrivacyStatement.build(
        plan.mechanism(),
        plan.delta,
        cross_check=cross_check,
        unit=UNIT,
        claim=_claim(data, request, plan, backbone, None),
        details=_one_shot_details(request, plan),
        composition=_composition(request) | dict(charged),
        implementation=_implementation("none: all records at once"),
        utility=utility,
        admin={**admin, "caveats": _caveats(data, request) + _unrecorded(charged)},
    )


def _one_shot_details(request: Request, plan: OneShotPlan) -> dict[str, Any]:
    return {
        "method": plan.method,
        "clipping": "none acts: Jacobians of diameter 1 bound every gradient",
        "gradient_bound": DIAMETER,
        "regularization": plan.regularization,
        "objective_noise_std": plan.noise_std,
        "output_noise_std": plan.output_noise_std,
        "gradient_tolerance": plan.gradient_tolerance,
        "sampler": "none: all records at once",
        "stopping_rule": "none: there are no steps; the problem is solved to the gradient tolerance",
        "scope": request.model.scope,
        "loss": request.model.loss,
        "margin": MARGIN,
        "dtypes": {"sums": "float64", "noise": "float64", "features": request.model.feature_precision},
    }


def _claim(
    data: ImageData,
    request: Request,
    plan: Plan | OneShotPlan,
    backbone: Mapping[str, str],
    certificate: ConvexityCertificate | None,
    processes: int = 1,
) -> dict[str, Any]:
    not_protected = ["side channels: timing, memory, files on the training machine"]
    if data.evaluation is not None:
        not_protected.insert(0, "the evaluation images: their accuracy is published as it is")
    if request.model.head != "random":
        not_protected.insert(0, "records that the given head was trained on")
    if not data.classes_are_public:
        not_protected.insert(0, "the list of classes: it was taken from the data")
    if held_out_by_class(data):
        not_protected.insert(0, "the number of images of each class: it decides which of them are held out")
    return {
        "not_protected": not_protected,
        "public": [
            f"backbone {backbone['name']} ({backbone['source']}) and its normalisation constants",
            f"number of classes: {len(data.classes)}",
        ],
        "data_accesses": data_accesses(data, request, tuned=bool(chosen(request))),
        "assumptions": assumptions(data, request, plan, backbone, certificate, processes),
    }


def _caveats(data: ImageData, request: Request) -> list[str]:
    """What a reader of the claim must know, one line each."""
    found = []
    given = chosen(request)
    if given:
        found.append(
            f"given by the user: {', '.join(given)}; trying several values on these records costs privacy "
            "that is not accounted here"
        )
    if data.skips_corrupt:
        found.append(
            "an image that cannot be read counts as an empty record: one of the n, which contributes nothing"
        )
    if data.is_public:
        found.append(f"{data.name} is a public benchmark: the claim shows what private data would get")
    return found


def _unrecorded(charged: Mapping[str, Any]) -> list[str]:
    """Caveats about the account that was charged."""
    if "ledger_entry" in charged:
        return [str(charged["budget_note"])] if "budget_note" in charged else []
    return [
        f"no budget ledger recorded this run ({charged.get('ledger', 'none')}): other runs add to its cost"
    ]


def chosen(request: Request) -> list[str]:
    """Names of all settings that differ from the public defaults."""
    privacy = [
        name
        for name in ("steps", "l2_clip_norm", "expected_batch_size")
        if getattr(request.privacy, name) is not None
    ]
    if request.privacy.sampling != "auto":
        privacy.append("sampling")
    default = asdict(ModelConfig())
    chosen = {name for name, value in asdict(request.model).items() if value != default[name]}
    model = sorted(chosen - {"unit_jacobian"})  # a part of certified training
    return privacy + model + sorted(request.optimizer)


def clipping_of(request: Request) -> str:
    """What bounds one record's gradient, in words."""
    return _BOUNDED if request.privacy.certified else "exact joint L2 norm of every record's gradient"


def _details(
    request: Request,
    plan: Plan,
    optimizer: OptimizerConfig,
    trained: Trained,
) -> dict[str, Any]:
    executed = trained.executed
    sensitivity = l2_sensitivity(trained.l2_clip_norm, cast(Adjacency, plan.adjacency))
    least_noise = noise_std(
        sensitivity=sensitivity,
        noise_multiplier=plan.noise_over_sensitivity * min(plan.noise_factors[i] for i in executed),
        dimension=trained.dimension,
    )
    return {
        "clipping": clipping_of(request),
        "l2_clip_norm": trained.l2_clip_norm,
        "noise_std": least_noise,
        "sensitivity": sensitivity,
        "sampler": plan.sampling.kind,
        "expected_batch_size": plan.normaliser,
        "normaliser": plan.normaliser,
        "steps_planned": plan.steps,
        "steps_executed": len(executed),
        "stopping_rule": "fixed number of steps",
        "method": request.model.method,
        "scope": request.model.scope,
        "loss": request.model.loss,
        "optimizer": optimizer.kind,
        "averaging": optimizer.averaging,
        "dtypes": {
            "sums": "float32 within a physical batch, float64 across batches",
            "noise": "float64",
            "features": request.model.feature_precision,
        },
    }


def _composition(request: Request) -> dict[str, Any]:
    given = chosen(request)
    return {
        "hyperparameter_choice": "given by the user" if given else "public defaults",
        "hyperparameter_cost": "not accounted: trying several values on the same data costs privacy"
        if given
        else "none: fixed before the data was read",
    }


def _sampling_source(plan: Plan, processes: int) -> str:
    if plan.sampling.kind == "full-batch":
        return "none: every record in every step"
    if plan.sampling.kind == "poisson" and processes > 1:
        return f"{NoiseSource.description}; another key in each of {processes} processes"
    return NoiseSource.description


def _implementation(sampling: str) -> dict[str, Any]:
    return {
        "versions": _versions(),
        "source_revision": source_revision(),
        "noise_source": NoiseSource.description,
        "sampling_source": sampling,
        "float_mitigation": FLOAT_MITIGATION,
        "nan_policy": "records with non-finite values contribute zero",
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

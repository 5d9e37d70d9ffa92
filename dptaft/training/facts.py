"""What a run did, in public numbers that its statement is held against: table `training` of ``run.toml``."""

from __future__ import annotations

from typing import Any, cast

from dptaft.data import ImageData
from dptaft.training.clipping import Adjacency, l2_sensitivity
from dptaft.training.describe import UNIT, chosen, clipping_of
from dptaft.training.noise import InsecureSeededNoise, NoiseSource, noise_std
from dptaft.training.one_shot_plan import DIAMETER, OneShotPlan
from dptaft.training.plan import Request
from dptaft.training.preparation import Prepared
from dptaft.training.steps import Trained


def facts_of_steps(data: ImageData, request: Request, prepared: Prepared, trained: Trained) -> dict[str, Any]:
    """Of a run of noisy steps; under add-remove `records` is the public number, never the true one."""
    plan = prepared.plan
    factors = [plan.noise_factors[i] for i in trained.executed]
    noise = [plan.noise_multiplier * factor for factor in factors]
    found = {
        **_common(data, request, plan.delta),
        "sampling": plan.sampling.kind,
        "sampling_rate": plan.sampling.rate,
        "batches_per_epoch": plan.sampling.parts,
        "partition": "secret-random",
        "normaliser": plan.normaliser,
        "clipping": clipping_of(request),
        "l2_clip_norm": prepared.l2_clip_norm,
        "noise_multiplier": noise[0] if len(set(noise)) == 1 else noise,
        "steps_planned": plan.steps,
        "steps_executed": len(trained.executed),
        "steps_completed": trained.completed,
    }
    if min(noise) > 0:
        found["noise_std"] = noise_std(
            sensitivity=l2_sensitivity(prepared.l2_clip_norm, cast(Adjacency, plan.adjacency)),
            noise_multiplier=plan.noise_over_sensitivity * min(factors),
            dimension=sum(value.numel() for value in trained.weights.values()),
        )
    if prepared.design is not None:
        certificate = prepared.design.certificate
        found["max_batch_size"] = certificate.max_batch_size
        found["feature_bound"] = float(certificate.origin["feature_bound"])
    return found


def facts_of_one_shot(data: ImageData, request: Request, plan: OneShotPlan) -> dict[str, Any]:
    """Of a run without steps."""
    return {
        **_common(data, request, plan.delta),
        "diameter": DIAMETER,
        "objective_noise_std": plan.noise_std,
        "output_noise_std": plan.output_noise_std,
        "gradient_tolerance": plan.gradient_tolerance,
    }


def _common(data: ImageData, request: Request, delta: float) -> dict[str, Any]:
    source = NoiseSource if request.privacy.insecure_seed is None else InsecureSeededNoise
    return {
        "unit": UNIT,
        "given": chosen(request),
        "classes_are_public": data.classes_are_public,
        "noise_source": source.description,
        "delta": delta,
        "records": request.privacy.public_size or len(data.train),
    }

"""Small runs made without training: real files of a run with a real statement."""

import json

import numpy as np
from safetensors.numpy import save_file

from dptaft.runs import hash_files, load_run, write_config, write_metrics, write_no_claim, write_statement
from dptaft_accounting import PrivacyStatement
from dptaft_accounting.canonical import content_id, dumps
from dptaft_accounting.convexity import ConvexityCertificate, LossConstants
from dptaft_accounting.mechanisms import FullBatchGaussian, PoissonGaussian

FULL = FullBatchGaussian(10.0, 50)
POISSON = PoissonGaussian(1.0, 0.05, 100)
CONVEX = FullBatchGaussian(10.0, 50, released="last-iterate")
CLIP = 1.5
AES = "AES-256-CTR, key from operating-system entropy"


def proof(steps=50, **changes):
    values = {
        "loss": "cross-entropy",
        "constants": LossConstants(2**0.5, 0.5, scalar=False),
        "feature_bound": 1.0 + 2.0**-12,
        "l2_clip_norm": CLIP,
        "regularization": 0.1,
        "step_size": 1.0,
        "normaliser": 1000.0,
        "sampling": "full-batch",
        "steps": steps,
        "records": 1000,
    }
    return ConvexityCertificate.issue(**(values | changes))


def config(name="one", **privacy):
    return {
        "run": {"format": 2, "id": name, "time": "2026-01-02T03:04:05+00:00"},
        "privacy": {"epsilon": 100.0, "adjacency": "zero-out", "sampling": "auto", **privacy},
        "model": {"name": "starter", "weights": "pretrained", "scope": "last:1", "method": "tangent", "loss": "cross-entropy", "seed": 0},
        "optimizer": {"kind": "momentum"},
        "engine": {"kind": "fused"},
        "backbone": {"name": "starter", "source": "bundled", "sha256": "0" * 64},
        "data": {"name": "small", "classes": ["cat", "dog"]},
    }  # fmt: skip


def certified(settings, certificate):
    """The settings of a run that a certificate can belong to."""
    return settings | {
        "privacy": settings["privacy"] | {"certified": True},
        "model": settings["model"] | {"unit_jacobian": True, "loss": certificate.origin["loss"]},
        "optimizer": {
            "kind": "sgd",
            "averaging": "last",
            "learning_rate": certificate.step_size,
            "l2_regularization": certificate.strong_convexity,
            "learning_rate_schedule": {"kind": "constant", "final": 1.0, "warmup_steps": 0},
        },
    }


def details(mechanism, certificate=None):
    noise = mechanism.noise_multiplier
    return {
        "clipping": "exact",
        "l2_clip_norm": CLIP,
        "sensitivity": CLIP * mechanism.sensitivity,
        "noise_std": CLIP * (noise if isinstance(noise, float) else min(noise)),
        "sampler": "poisson" if isinstance(mechanism, PoissonGaussian) else "full-batch",
        "normaliser": 1000.0,
        "steps_planned": mechanism.steps,
        "steps_executed": mechanism.steps,
        "loss": "cross-entropy" if certificate is None else certificate.origin["loss"],
        "scope": "last:1",
        "method": "tangent",
        "optimizer": "momentum" if certificate is None else "sgd",
    }


CLAIM = {
    "not_protected": ["the evaluation images"],
    "public": ["the backbone"],
    "data_accesses": {
        "training": "covered",
        "classes": "public, declared by the user",
        "evaluation": "not covered",
        "early_stopping": "none",
    },
    "assumptions": [
        {"assumption": "noise is Gaussian", "vouched_by": "enforced by the code", "where": "noise.py"},
        {"assumption": "one person owns one record", "vouched_by": "not checked", "where": "the data"},
    ],
}


def make_run(folder, mechanism=FULL, *, certificate=None, name="one", weights=0.0, accuracy=0.9, **groups):
    """A run folder as training writes it; `groups` are further arguments of `PrivacyStatement.build`."""
    folder.mkdir(parents=True)
    save_file({"trained/head.weight": np.full((2, 3), weights, np.float32)}, folder / "model.safetensors")
    settings = config(name, adjacency=mechanism.adjacency)
    write_config(folder, settings if certificate is None else certified(settings, certificate))
    write_metrics(folder, [{"accuracy": accuracy, "images": 10, "split": "evaluation"}])
    admin = {"run": name, "time": "2026-01-02T03:04:05+00:00", "files": hash_files(folder)}
    values = {
        "delta": 1e-5,
        "certificate": certificate,
        "cross_check": False,
        "claim": CLAIM,
        "details": details(mechanism, certificate),
        "implementation": {"noise_source": AES, "sampling_source": AES, "versions": {"dptaft": "0.1.0"}},
        "utility": {"metric": "accuracy", "value": accuracy, "split": "evaluation", "private": False},
    }
    extra = groups.pop("admin", {})
    write_statement(folder, PrivacyStatement.build(mechanism, **(values | groups), admin={**admin, **extra}))
    return load_run(folder)


def make_baseline(folder, reason="epsilon is infinite", name="none"):
    folder.mkdir(parents=True)
    save_file({"trained/head.weight": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    write_config(folder, config(name))
    write_metrics(folder, [])
    write_no_claim(folder, reason, {"run": name, "time": "now", "files": hash_files(folder)})
    return load_run(folder)


def leaves(value, path=()):
    """Paths of all scalars of a JSON document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def replaced(document, path, value, *, seal=False):
    """Canonical text of the document with another value at `path`; sealed: with the id of its new content."""
    data = json.loads(json.dumps(document))
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    if seal:
        data["admin"]["id"] = content_id(data)
    return dumps(data)


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 if value else type(value)(1)
    return "changed" if value is None else f"{value}x"

"""What a run will do, decided before any private image is read: configuration, mechanism, noise.

Three frozen configurations are kept apart: `PrivacyConfig` decides the guarantee, `ModelConfig` what is
learned, `PerformanceConfig` only how fast; no performance setting can reach the mechanism record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dptaft_accounting import (
    ConvexityCertificate,
    CyclicGaussian,
    FullBatchGaussian,
    Mechanism,
    PoissonGaussian,
    Target,
    calibrate_noise_multiplier,
)
from dptaft_accounting.accountants.last_iterate import batch_overflow

SAMPLERS = ("auto", "full-batch", "poisson", "cyclic-partition")
ADJACENCIES = ("zero-out", "add-remove", "replace-one")
ENGINES = ("auto", "fused", "hooks", "ghost")
ONE_SHOT = ("objective-perturbation", "output-perturbation")
METHODS = ("tangent", "non-linear", *ONE_SHOT)
_OVERFLOW_SHARE = 1e-3
_SMALLEST_CLIP = 1e-20
"""Far smaller clipped gradients would be rounded to multiples of float32's smallest number."""


class PlanError(ValueError):
    """A requested run cannot be made private as asked; the message names the value and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PlanError(message)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"unknown {name} {value!r}; use {', '.join(allowed)}")


@dataclass(frozen=True)
class PrivacyConfig:
    """Everything that decides the guarantee.

    Attributes:
        epsilon: target; ``inf`` trains without noise and claims nothing.
        delta: failure probability; None takes ``min(1e-5, 1/(10 n))``.
        adjacency: ``zero-out`` (one record replaced by nothing, n public), ``add-remove`` (needs
            `public_size`) or ``replace-one`` (twice the sensitivity).
        steps: gradient steps; None takes the public default.
        l2_clip_norm: bound on one record's gradient; None takes the public default.
        sampling: ``full-batch``, ``poisson``, ``cyclic-partition`` (secret, random), or ``auto``.
        expected_batch_size: of Poisson samples and cyclic parts.
        public_size: public constant that normalises sums in place of the number of records.
        insecure_seed: makes noise and samples reproducible, which voids every claim.
        certified: train a convex loss within a certificate and claim the last iterate alone.

    Raises:
        PlanError: a value out of range.
    """

    epsilon: float
    delta: float | None = None
    adjacency: str = "zero-out"
    steps: int | None = None
    l2_clip_norm: float | None = None
    sampling: str = "auto"
    expected_batch_size: int | None = None
    public_size: int | None = None
    insecure_seed: int | None = None
    certified: bool = False

    def __post_init__(self) -> None:
        _require(
            isinstance(self.epsilon, int | float) and self.epsilon > 0,
            f"epsilon must be a positive number, got {self.epsilon}; use inf for a run without privacy",
        )
        _require(
            self.delta is None or 0 < self.delta < 1,
            f"delta must lie strictly between 0 and 1, got {self.delta}; a usual choice is 1e-5",
        )
        _choice("adjacency", self.adjacency, ADJACENCIES)
        _choice("sampling", self.sampling, SAMPLERS)
        _require(self.steps is None or self.steps >= 1, f"steps must be at least 1, got {self.steps}")
        clip = self.l2_clip_norm
        _require(
            clip is None or _SMALLEST_CLIP <= clip <= 1.0 / _SMALLEST_CLIP,
            f"the clip norm must be finite and positive, got {clip}; "
            f"use a value from {_SMALLEST_CLIP:g} to {1.0 / _SMALLEST_CLIP:g}",
        )
        for name in ("expected_batch_size", "public_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            (self.adjacency == "add-remove") == (self.public_size is not None),
            "adjacency add-remove needs a public number of records to divide by (and only it takes one); "
            "give --public-size, or use zero-out",
        )
        _require(
            self.sampling != "full-batch" or self.expected_batch_size is None,
            f"a full batch has no batch size to choose, got {self.expected_batch_size}; use poisson sampling",
        )

    @property
    def is_private(self) -> bool:
        """Whether the run will make a privacy claim."""
        return math.isfinite(self.epsilon) and self.insecure_seed is None


@dataclass(frozen=True)
class ModelConfig:
    """What is learned. Public; a part of the model's description.

    Attributes:
        name: ``starter`` or a timm name.
        weights: ``pretrained``, ``random``, or the path of a checkpoint.
        scope: which weights are trained.
        method: ``tangent``, ``non-linear``, or a tangent model that is solved once:
            ``objective-perturbation`` or ``output-perturbation``.
        loss: name of the loss.
        seed: public seed of everything random in the model.
        feature_precision: of cached activations.
        head: ``random``, or a safetensors file with ``weight`` and ``bias``.
        centered: drop the offset f(x; w0) of the tangent model.
        fresh_class_token: replace the class token at the first linearised block.
        reinitialised_blocks: number of last blocks that start afresh.
        unit_jacobian: divide the Jacobian of every image by its norm (certified training needs it).
    """

    name: str = "starter"
    weights: str = "pretrained"
    scope: str = "last:1"
    method: str = "tangent"
    loss: str = "cross-entropy"
    seed: int = 0
    feature_precision: str = "float32"
    head: str = "random"
    centered: bool = True
    fresh_class_token: bool = False
    reinitialised_blocks: int = 0
    unit_jacobian: bool = False

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _require(0 <= self.seed < 2**63, f"seed must be from 0 to 2^63 - 1, got {self.seed}")
        _require(
            self.reinitialised_blocks >= 0,
            f"reinitialised_blocks must not be negative, got {self.reinitialised_blocks}",
        )
        _require(
            self.is_linear or (self.centered and not self.fresh_class_token),
            "an uncentred offset and a fresh class token belong to tangent models; use method tangent",
        )
        _require(
            self.method == "tangent" or not self.unit_jacobian,
            "certified training takes steps on logits that are linear in the weights, not so method "
            f"{self.method}; use method tangent",
        )
        _require(
            not self.is_one_shot or self.loss == "cross-entropy",
            f"{self.method} is proved for softmax cross-entropy, not for the loss {self.loss}; leave it out",
        )

    @property
    def is_linear(self) -> bool:
        """Whether the logits are linear in the trained weights."""
        return self.method != "non-linear"

    @property
    def is_one_shot(self) -> bool:
        """Whether the weights come from one perturbed problem in place of steps."""
        return self.method in ONE_SHOT


@dataclass(frozen=True)
class PerformanceConfig:
    """How the same mechanism is computed; cannot change the guarantee."""

    device: str = "auto"
    engine: str = "auto"
    physical_batch_size: int | None = None
    feature_cache: str | None = None

    def __post_init__(self) -> None:
        _choice("engine", self.engine, ENGINES)
        size = self.physical_batch_size
        _require(size is None or size >= 1, f"physical_batch_size must be at least 1, got {size}")


def default_delta(num_records: int) -> float:
    """``min(1e-5, 1/(10 n))``: far below the chance of exposing one of n records by publishing it.

    >>> default_delta(1437), default_delta(10**6)
    (1e-05, 1e-07)
    """
    return min(1e-5, 1.0 / (10.0 * num_records))


def delta_warning(delta: float, num_records: int) -> str | None:
    """Say why a delta above 1/n protects nobody; None where it is small enough."""
    if delta <= 1.0 / num_records:
        return None
    return (
        f"delta {delta:g} is above 1/n: publishing one whole record at random would satisfy such a claim; "
        f"use at most {default_delta(num_records):.2g}"
    )


@dataclass(frozen=True)
class Sampling:
    """Sampler with its numbers: probability of one record per step, parts per epoch for cyclic ones."""

    kind: str
    rate: float = 1.0
    parts: int = 1


def resolve_sampling(privacy: PrivacyConfig, num_records: int, automatic_rate: float = 1.0) -> Sampling:
    """Choose the sampler for a data set.

    Args:
        privacy: the request.
        num_records: n.
        automatic_rate: sampling rate for ``auto``; 1 means full batch.

    Raises:
        PlanError: a batch larger than the data, or none given where one is needed.
    """
    size, kind = privacy.expected_batch_size, privacy.sampling
    normaliser = privacy.public_size or num_records
    if size is not None and size > normaliser:
        raise PlanError(f"batch size {size} is larger than the {normaliser} records; make it smaller")
    if kind == "auto":
        rate = automatic_rate if size is None else size / normaliser
        return Sampling("full-batch") if rate >= 1 else Sampling("poisson", rate)
    if kind == "full-batch":
        return Sampling("full-batch")
    if size is None:
        raise PlanError(f"{kind} sampling needs an expected batch size; give --batch-size")
    if kind == "poisson":
        return Sampling("poisson", size / normaliser)
    parts = max(1, round(normaliser / size))
    return Sampling("cyclic-partition", 1.0 / parts, parts)


def whole_epochs(steps: int, sampling: Sampling) -> int:
    """Steps rounded up to whole passes over a cyclic partition; unchanged for other samplers.

    >>> whole_epochs(25, Sampling("cyclic-partition", 0.1, parts=10))
    30
    """
    return sampling.parts * math.ceil(steps / sampling.parts)


def normaliser_of(sampling: Sampling, records: int) -> float:
    """b, the public divisor of a noised sum: the number of records that a step sums on average.

    >>> normaliser_of(Sampling("cyclic-partition", 0.5, parts=2), 1437)
    718.5
    """
    return records * sampling.rate


def largest_batch(records: int, sampling: Sampling, *, delta: float, adjacency: str, most_steps: int) -> int:
    """B, the largest number of records that one step of a certified run may sum.

    All records of a batch. A Poisson batch has no largest size: B is then so large that a larger one in any
    of `most_steps` steps has at most a thousandth of delta as its probability, which the bound pays.

    Args:
        records: public number of records (an upper bound of it under add-remove).
        sampling: how batches are drawn.
        delta: of the claim.
        adjacency: of the claim.
        most_steps: number of steps, or an upper bound of it.
    """
    if sampling.kind == "full-batch" or (sampling.parts == 1 and sampling.kind != "poisson"):
        return records + (1 if adjacency == "add-remove" else 0)
    if sampling.kind != "poisson":
        return math.ceil(records / sampling.parts)
    mean, extra = records * sampling.rate, 0.0
    while True:
        extra += 0.5
        largest = min(records + 1, math.ceil(mean + extra * math.sqrt(mean) + extra))
        if (
            largest > records
            or batch_overflow(records, sampling.rate, largest, most_steps) <= _OVERFLOW_SHARE * delta
        ):
            return largest


@dataclass(frozen=True)
class Plan:
    """A run with all numbers filled in; `noise_multiplier` is standard deviation of the noise over clip norm.

    Attributes:
        delta: of the claim.
        steps: planned gradient steps.
        sampling: how batches are drawn.
        noise_multiplier: base value; 0 for a run without privacy.
        noise_factors: per-step factors on it (all 1 without a schedule).
        adjacency: of the claim.
        normaliser: public divisor of the noised sum.
        released: `all-iterates`, or `last-iterate` for a certified run.
    """

    delta: float
    steps: int
    sampling: Sampling
    noise_multiplier: float
    noise_factors: tuple[float, ...] = field(repr=False)
    adjacency: str
    normaliser: float
    released: str = "all-iterates"

    @property
    def noise_over_sensitivity(self) -> float:
        """Base noise in units of the sensitivity, which is twice the clip norm for replace-one."""
        return self.noise_multiplier / (2.0 if self.adjacency == "replace-one" else 1.0)

    def last_step(self, done: int, charged: Sequence[int]) -> int:
        """Where a resumed run must stop so that all its steps cost no more than the planned ones.

        Every execution of step i costs ``1/factor_i^2`` of the squared Gaussian parameter, lost ones too.

        Args:
            done: number of steps whose result was kept.
            charged: numbers of all steps that were authorised so far, repeated ones again.
        """
        cost = [factor**-2 for factor in self.noise_factors]
        left = math.fsum(cost) * (1 + 1e-12) - math.fsum(cost[i] for i in charged)
        for step in range(done, self.steps):
            left -= cost[step]
            if left < 0:
                return step
        return self.steps

    def mechanism(self, executed: tuple[int, ...] | None = None) -> Mechanism:
        """Record of the planned steps, or of the steps that were executed (numbers, repeated ones again)."""
        return _record(self, self.noise_multiplier, executed)


def make_plan(
    privacy: PrivacyConfig,
    *,
    num_records: int,
    steps: int,
    sampling: Sampling,
    noise_factors: tuple[float, ...] | None = None,
    certify: Callable[[Mechanism], ConvexityCertificate] | None = None,
) -> Plan:
    """Calibrate the noise so that the planned mechanism spends at most the requested epsilon.

    With `certify` only the last iterate is released, and the noise is calibrated against the best bound.

    Raises:
        PlanError: a combination without a sound bound, or a target that no noise reaches.
    """
    factors = noise_factors or (1.0,) * steps
    if len(set(factors)) > 1 and sampling.kind != "full-batch":
        raise PlanError(
            f"a noise schedule needs full-batch sampling, not {sampling.kind}; keep the noise constant"
        )
    delta = privacy.delta if privacy.delta is not None else default_delta(privacy.public_size or num_records)
    plan = Plan(
        delta=delta,
        steps=steps,
        sampling=sampling,
        noise_multiplier=0.0,
        noise_factors=factors,
        adjacency=privacy.adjacency,
        normaliser=normaliser_of(sampling, privacy.public_size or num_records),
        released="all-iterates" if certify is None else "last-iterate",
    )
    if math.isinf(privacy.epsilon):
        return plan
    target = Target(epsilon=float(privacy.epsilon), delta=delta)
    noise = calibrate_noise_multiplier(lambda z: _record(plan, z, None), target, certificate=certify)
    return replace(plan, noise_multiplier=noise)


def _record(plan: Plan, noise: float, executed: tuple[int, ...] | None) -> Mechanism:
    numbers = tuple(range(plan.steps)) if executed is None else executed
    values = tuple(noise * plan.noise_factors[i] for i in numbers)
    if plan.sampling.kind == "full-batch" and len(set(values)) > 1:
        return FullBatchGaussian(values, len(values), plan.adjacency, plan.released)
    noise = values[0] if plan.sampling.kind == "full-batch" else noise
    return constant_record(plan.sampling, noise, len(numbers), plan.adjacency, plan.released)


def constant_record(
    sampling: Sampling,
    noise_multiplier: float,
    steps: int,
    adjacency: str = "zero-out",
    released: str = "all-iterates",
) -> Mechanism:
    """Record of steps with the same noise; what `dptaft budget` plans is what training accounts.

    Raises:
        PlanError: an unknown sampler.
        MechanismError: an adjacency that the sampler does not cover.

    >>> constant_record(Sampling("cyclic-partition", 0.5, parts=2), 2.0, 30).epochs
    15
    """
    common = {"adjacency": adjacency, "released": released}
    _choice("sampling", sampling.kind, SAMPLERS[1:])
    if sampling.kind == "poisson":
        return PoissonGaussian(noise_multiplier, sampling_rate=sampling.rate, steps=steps, **common)
    if sampling.kind == "full-batch" or sampling.parts == 1:
        return FullBatchGaussian(noise_multiplier, steps=steps, **common)
    return CyclicGaussian(
        noise_multiplier,
        batches_per_epoch=sampling.parts,
        epochs=math.ceil(steps / sampling.parts),
        partition="secret-random",
        **common,
    )


@dataclass(frozen=True)
class Request:
    """Everything a run was asked for; a resumed run is held to it.

    Attributes:
        privacy: decides the guarantee.
        model: what is learned.
        optimizer: fields of `OptimizerConfig` that the user set; the others take public defaults.
        performance: how fast.
        data: name or path of the data, for records.
    """

    privacy: PrivacyConfig
    model: ModelConfig
    optimizer: Mapping[str, Any]
    performance: PerformanceConfig
    data: str


def plain(config: Any) -> dict[str, Any]:
    """A configuration as TOML-able values: unset fields left out."""
    return dict(_plain_items(asdict(config)))


def _plain_items(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    items = []
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            value = dict(_plain_items(value))
        items.append((key, list(value) if isinstance(value, tuple) else value))
    return items

"""Training in one shot, decided before any private image is read: regularisation, noise, tolerance.

The loss of a record is ``log(1 + sum_{c != y} exp(MARGIN + z_c - z_y))`` of the logits z = J theta, with
every Jacobian of diameter 1 (`dptaft.tangent.diameter`); the objective is the sum over the records plus
``(lambda/2) |theta|^2``. *Objective perturbation* adds ``<b, theta>`` with Gaussian b and returns the
minimiser; *output perturbation* adds Gaussian noise to the minimiser. Neither has steps, a clip norm, or
anything to stop early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from dptaft.training.plan import ONE_SHOT, PlanError, PrivacyConfig, default_delta
from dptaft_accounting import (
    Mechanism,
    OutputPerturbation,
    SoftmaxObjectivePerturbation,
    Target,
    calibrate_noise_multiplier,
)
from dptaft_accounting.errors import CalibrationError

MARGIN = 4.0
"""Added to the wrong classes' logits: records count until they are classified with room to spare."""

DIAMETER = 1.0
_TOLERANCE = 2.5e-4
_OUTPUT_SHARE = 0.05
_NOISELESS_STD = 0.25
_GRID = 2.0**-26
_LOG_RANGE = (-7.0, 12.0)


@dataclass(frozen=True)
class OneShotPlan:
    """A one-shot run with all numbers filled in; all of them are public.

    Attributes:
        method: ``objective-perturbation`` or ``output-perturbation``.
        delta: of the claim.
        adjacency: of the claim.
        records: public number of records.
        classes: number of classes.
        regularization: lambda, coefficient of ``|theta|^2/2`` beside the *sum* of the losses.
        noise_std: standard deviation of every coordinate of b; 0 without.
        gradient_tolerance: the released point is where the gradient of the sum objective is at most this.
        output_noise_std: standard deviation of the noise on every weight; 0 without privacy.
    """

    method: str
    delta: float
    adjacency: str
    records: int
    classes: int
    regularization: float
    noise_std: float
    gradient_tolerance: float
    output_noise_std: float

    @property
    def is_noisy(self) -> bool:
        """Whether the run makes a claim at all."""
        return self.output_noise_std > 0

    @property
    def output_sensitivity(self) -> float:
        """How far the solver's answers for two neighbouring data sets may lie apart, given what b hides."""
        moved = 2.0 * self.gradient_tolerance
        if self.method == "output-perturbation":
            moved += (2.0 if self.adjacency == "replace-one" else 1.0) * DIAMETER
        return moved / self.regularization

    def mechanism(self) -> Mechanism:
        """The record of the run.

        Raises:
            MechanismError: an adjacency that the method does not cover.
        """
        if self.method == "output-perturbation":
            return OutputPerturbation(
                gradient_bound=DIAMETER,
                regularization=self.regularization / self.records,
                records=self.records,
                noise_std=self.output_noise_std,
                gradient_tolerance=self.gradient_tolerance / self.records,
                adjacency=self.adjacency,
            )
        return SoftmaxObjectivePerturbation(
            diameter=DIAMETER,
            classes=self.classes,
            regularization=self.regularization,
            noise_std=self.noise_std,
            gradient_tolerance=self.gradient_tolerance,
            output_noise_std=self.output_noise_std,
            adjacency=self.adjacency,
        )


def plan_one_shot(
    method: str, privacy: PrivacyConfig, *, num_records: int, num_classes: int, dimension: int
) -> OneShotPlan:
    """Choose regularisation and noise for a target from public facts alone.

    The excess loss of a perturbed minimiser has a term for the noise, of the order sigma^2/lambda, and one
    for the bias, of the order lambda: lambda is best in proportion to sigma, the noise in units of the
    gradient. The constant of proportion, and how it falls with the records per class for objective
    perturbation (whose noise the curvature of the data damps), were chosen on public benchmarks. Since less
    regularisation needs more noise, lambda minimises ``(ratio sigma(lambda))^2/lambda + lambda``.

    Args:
        method: ``objective-perturbation`` or ``output-perturbation``.
        privacy: target and adjacency.
        num_records: n; under add-remove the public size counts instead.
        num_classes: C.
        dimension: number of trained weights.

    Raises:
        PlanError: a setting without meaning for a run without steps, or a target that no noise reaches.
        MechanismError: an adjacency that the method does not cover.

    Example:
        >>> found = plan_one_shot("objective-perturbation", PrivacyConfig(epsilon=3.0), num_records=1437,
        ...                       num_classes=10, dimension=1290)
        >>> 0.5 < found.regularization < 2, 1.5 < found.noise_std < 2.5
        (True, True)
    """
    if method not in ONE_SHOT:
        raise PlanError(f"unknown one-shot method {method!r}; use {', '.join(ONE_SHOT)}")
    check_settings(method, privacy)
    if num_classes < 2:
        raise PlanError(f"a classifier needs at least 2 classes, got {num_classes}; add images of another")
    records = privacy.public_size or num_records
    delta = privacy.delta if privacy.delta is not None else default_delta(records)
    ratio = 1.1
    if method == "objective-perturbation":
        ratio = min(0.6, 3.2 / (records / num_classes) ** (1.0 / 3.0))

    def at(log_regularization: float) -> OneShotPlan:
        lam = math.exp(log_regularization)
        empty = OneShotPlan(method, delta, privacy.adjacency, records, num_classes, lam, 0.0, 0.0, 0.0)
        return _with_noise(empty, float(privacy.epsilon), dimension)

    def cost(log_regularization: float) -> float:
        lam = math.exp(log_regularization)
        try:
            noise = _gradient_noise(at(log_regularization))
        except CalibrationError:
            return math.inf
        return (ratio * noise) ** 2 / lam + lam

    return at(_minimiser(cost, *_LOG_RANGE))


def check_settings(method: str, privacy: PrivacyConfig) -> None:
    """Refuse settings of stepwise training.

    Raises:
        PlanError: naming the setting.
    """
    for name in ("steps", "l2_clip_norm", "expected_batch_size"):
        value = getattr(privacy, name)
        if value is not None:
            raise PlanError(
                f"{name} {value:g} has no meaning for {method}, which takes no steps; leave it out"
            )
    if privacy.certified:
        raise PlanError(f"certified training takes steps, which {method} does not; choose one of them")
    if privacy.sampling not in ("auto", "full-batch"):
        raise PlanError(
            f"{privacy.sampling} sampling has no meaning for {method}, which uses all records at once; "
            "leave it out"
        )


def _with_noise(empty: OneShotPlan, epsilon: float, dimension: int) -> OneShotPlan:
    """Fills in noise and tolerance for a target; noiseless for an infinite one."""
    if math.isinf(epsilon):
        return replace(empty, gradient_tolerance=_TOLERANCE)
    target = Target(epsilon=epsilon, delta=empty.delta)
    build = _with_output_noise if empty.method == "output-perturbation" else _with_objective_noise
    noise = calibrate_noise_multiplier(lambda z: build(empty, z, dimension).mechanism(), target)
    return build(empty, noise, dimension)


def _with_output_noise(empty: OneShotPlan, noise_multiplier: float, dimension: int) -> OneShotPlan:
    plan = replace(empty, gradient_tolerance=_TOLERANCE)
    return replace(plan, output_noise_std=noise_multiplier * plan.output_sensitivity)


def _with_objective_noise(empty: OneShotPlan, noise_multiplier: float, dimension: int) -> OneShotPlan:
    """Noise b in units of the diameter; the tolerance also covers the rounding of b to its grid."""
    std = noise_multiplier * DIAMETER
    tolerance = _TOLERANCE * DIAMETER + 4.0 * quantisation(std, dimension)
    plan = replace(empty, noise_std=std, gradient_tolerance=tolerance)
    share = _OUTPUT_SHARE * DIAMETER / std
    return replace(plan, output_noise_std=plan.output_sensitivity / share)


def quantisation(noise_std: float, dimension: int) -> float:
    """Largest distance between a Gaussian vector and its rounding to the public grid of the noise source.

    Example:
        >>> quantisation(2.0, 200_000) < 2e-5
        True
    """
    return noise_std * math.sqrt(dimension) * _GRID


def _gradient_noise(plan: OneShotPlan) -> float:
    """Noise in units of the gradient of the sum: that of b, or what would move the minimiser as much."""
    if not plan.is_noisy:
        return _NOISELESS_STD
    return plan.noise_std if plan.noise_std > 0 else plan.output_noise_std * plan.regularization


def _minimiser(cost: Callable[[float], float], low: float, high: float) -> float:
    """Golden-section search, from the high end where the cost is infinite at the low one."""
    shrink = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - shrink * (high - low), low + shrink * (high - low)
    at_a, at_b = cost(a), cost(b)
    while high - low > 1e-3:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - shrink * (high - low)
            at_a = cost(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + shrink * (high - low)
            at_b = cost(b)
    return (low + high) / 2.0

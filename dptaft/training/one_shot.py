"""Objective and output perturbation: a strongly convex problem, solved once, to a certified tolerance.

Products with the Jacobians are taken in float64 on the cached (float32) constants, which define one exact
linear model; features stream through in physical batches and no Jacobian is materialised. The solver is
L-BFGS with exact line searches: logits are linear in the weights, so that a line search needs no pass over
the features, and an iteration costs one product in each direction.

Floating-point assumptions. The theorem speaks of a continuous Gaussian b; the source rounds b to a grid,
which moves the minimiser as much as a gradient of norm `quantisation`, a part of the tolerance. So is an
allowance for the rounding of float64 sums, 2^-40 of the sum of their terms' norms (the usual error of such
sums is below 2^-45). The release itself adds noise as exact integers on a public grid
(`dptaft.training.noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dptaft.tangent.diameter import inverse_diameters
from dptaft.tangent.operator import Features, TangentOperator
from dptaft.training.clipping import PhysicalBatches
from dptaft.training.fused import check_labels
from dptaft.training.noise import InsecureSeededNoise, NoiseSource, gaussian_mechanism
from dptaft.training.one_shot_plan import DIAMETER, MARGIN, OneShotPlan, quantisation
from dptaft.training.plan import PlanError

MAX_ITERATIONS = 20_000
_ALLOWANCE = 2.0**-40
_LOGIT_ALLOWANCE = 2.0**-45
_MEMORY_BYTES = 1 << 31
_LONGEST_MEMORY = 20
_SHRINK = 1.0 - 2.0**-30
"""Rounding of the float64 Grams may not push a diameter above 1."""


def margin_cotangents(logits: Tensor, labels: Tensor, margin: float = MARGIN) -> Tensor:
    """Derivative by the logits of ``log(1 + sum_{c != y} exp(margin + z_c - z_y))``: p - e_y, (n, C).

    Softmax cross-entropy of logits whose label's entry is lowered by the margin: convex, with a gradient that
    is a convex combination of e_c - e_y and a Hessian that is the covariance of e_c under p.

    Example:
        >>> margin_cotangents(torch.tensor([[4.0, 0.0]]), torch.tensor([0]))
        tensor([[-0.5000,  0.5000]])
    """
    rows = torch.arange(len(labels), device=logits.device)
    moved = logits.clone()
    moved[rows, labels] -= margin
    found = torch.softmax(moved, 1)
    found[rows, labels] -= 1.0
    return found


class SoftmaxProblem:
    """``sum_i loss_i(theta) + (regularization/2) |theta|^2 + <linear, theta>`` over flat float64 weights.

    Args:
        operator: products in float64 (`dptaft.tangent.diameter.double_operator`), not normalised.
        features: cached constants of all records.
        labels: (n,) int64.
        regularization: coefficient of the quadratic term beside the sum.
        linear: (P,) float64, or None for zero.
        offsets: (n, C) added to the logits; None for centred models.
        physical_batch_size: records in memory at once; halved when memory runs out.

    Raises:
        ValueError: labels that do not fit, a regularisation that is not positive, or float32 products.

    Formal guarantees:
        Every record's gradient is a convex combination of differences of rows of a Jacobian whose diameter
        is at most 1, recomputed here in float64; records without finite features contribute nothing.
    """

    def __init__(
        self,
        operator: TangentOperator,
        features: Features,
        labels: Tensor,
        *,
        regularization: float,
        linear: Tensor | None = None,
        offsets: Tensor | None = None,
        physical_batch_size: int = 256,
    ) -> None:
        check_labels(labels, len(features), operator.num_classes)
        if not 0 < regularization < float("inf"):
            raise ValueError(f"regularization must be finite and positive, got {regularization}")
        precision = operator.offset(features.index(slice(0, 1))).dtype
        if precision != torch.float64:
            raise ValueError(f"products must be taken in float64, not {precision}; use double_operator")
        self.operator, self.labels, self.regularization = operator, labels, float(regularization)
        self._features, self._offsets = features, offsets
        self._physical = PhysicalBatches(physical_batch_size)
        self._shapes = operator.parameter_shapes
        self.dimension = sum(shape.numel() for shape in self._shapes.values())
        self._scales = torch.cat(self._pieces(lambda few, _: inverse_diameters(operator.gram(few)) * _SHRINK))
        self.linear = self._scales.new_zeros(self.dimension) if linear is None else linear.to(self._scales)

    def __len__(self) -> int:
        return len(self._features)

    def _pieces(self, work: Callable[[Features, slice], Tensor]) -> list[Tensor]:
        """`work` on consecutive parts of the records, each of which fits in memory."""
        found: list[Tensor] = []

        self._run(work, found.append)
        return found

    @torch.no_grad()
    def _run(self, work: Callable[[Features, slice], Tensor], keep: Callable[[Tensor], None]) -> None:
        def compute(start: int, stop: int) -> Tensor:
            return work(self._features.index(slice(start, stop)), slice(start, stop))

        self._physical.run(len(self), compute, keep)

    def unflatten(self, weights: Tensor) -> dict[str, Tensor]:
        """Views of flat weights by name."""
        parts = weights.split([shape.numel() for shape in self._shapes.values()])
        return {
            name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def products(self, weights: Tensor) -> Tensor:
        """J_i theta of all records, (n, C), without offsets."""
        named = self.unflatten(weights)
        parts = self._pieces(lambda few, at: self.operator.jvp(few, named) * self._scales[at, None])
        return torch.cat(parts)

    def cotangents(self, products: Tensor) -> Tensor:
        """Derivative of every record's loss by its logits, (n, C)."""
        logits = products if self._offsets is None else products + self._offsets
        return margin_cotangents(logits, self.labels)

    def gradient(self, weights: Tensor, products: Tensor) -> Tensor:
        """Gradient of the objective, (P,), from weights and their products."""
        cotangents = self.cotangents(products) * self._scales[:, None]
        total = self.regularization * weights + self.linear

        def pull(few: Features, at: slice) -> Tensor:
            pulled = self.operator.vjp(few, cotangents[at])
            return torch.cat([pulled[name].reshape(-1) for name in self._shapes])

        def add(part: Tensor) -> None:
            total.add_(part)

        self._run(pull, add)
        return total

    def allowance(self, weights: Tensor) -> float:
        """What rounding may hide of a gradient: 2^-40 of the norms of all its terms, 2^-45 of all logits.

        Logits that are off by that share of |theta| turn every record's gradient by half as much, at most.
        """
        length = float(weights.norm())
        terms = len(self) * DIAMETER + self.regularization * length + float(self.linear.norm())
        return _ALLOWANCE * terms + _LOGIT_ALLOWANCE * len(self) * DIAMETER**2 * length


@dataclass(frozen=True)
class Solution:
    """An approximate minimiser. All of it is private until noise is added.

    Attributes:
        weights: (P,) float64.
        gradient_norm: norm of the gradient there, the rounding allowance included.
        iterations: of the solver.
    """

    weights: Tensor
    gradient_norm: float
    iterations: int


def minimise(
    problem: SoftmaxProblem, gradient_tolerance: float, progress: Callable[[float], None] | None = None
) -> Solution:
    """Find a point where the objective's gradient is at most `gradient_tolerance`; verified at that point.

    L-BFGS (Liu and Nocedal 1989) with exact line searches; the strongly convex problem has one minimiser,
    which is at most ``gradient_tolerance / regularization`` away.

    Args:
        problem: what to minimise.
        gradient_tolerance: bound on the gradient's norm.
        progress: called with the share of the way, from 0 to 1, on a logarithmic scale.

    Raises:
        PlanError: rounding prevents the tolerance from being reached; nothing may be released.
    """
    weights = -problem.linear / problem.regularization
    memory = max(3, min(_LONGEST_MEMORY, _MEMORY_BYTES // (16 * problem.dimension)))
    pairs: list[tuple[Tensor, Tensor]] = []
    products = problem.products(weights)
    gradient = problem.gradient(weights, products)
    start = float(gradient.norm())
    for iteration in range(MAX_ITERATIONS):
        allowance = problem.allowance(weights)
        if float(gradient.norm()) + allowance <= gradient_tolerance:
            products = problem.products(weights)  # afresh: updates along lines leave rounding errors behind
            gradient = problem.gradient(weights, products)
            norm = float(gradient.norm()) + allowance
            if norm <= gradient_tolerance:
                return Solution(weights, norm, iteration)
        direction = -_inverse_hessian(pairs, gradient, problem)
        if not float(direction @ gradient) < 0.0:
            pairs, direction = [], -gradient / problem.regularization
        pushed = problem.products(direction)
        step = _line_search(problem, weights, products, direction, pushed)
        products = products + step * pushed
        moved = weights + step * direction
        new = problem.gradient(moved, products)
        if float((moved - weights) @ (new - gradient)) > 0.0:
            pairs = [*pairs, (moved - weights, new - gradient)][-memory:]
        weights, gradient = moved, new
        if progress is not None:
            share = _share(start, float(gradient.norm()), gradient_tolerance)
            progress(share)
    raise PlanError(
        f"no minimiser to gradient tolerance {gradient_tolerance:g} in {MAX_ITERATIONS} iterations; "
        "nothing is released; check the features for extreme values"
    )


def _share(start: float, now: float, end: float) -> float:
    if not 0.0 < end < min(start, now):
        return 1.0
    return min(1.0, max(0.0, 1.0 - math.log(now / end) / math.log(start / end)))


def _inverse_hessian(pairs: list[tuple[Tensor, Tensor]], gradient: Tensor, problem: SoftmaxProblem) -> Tensor:
    """Two-loop recursion of L-BFGS; the first step uses the largest curvature that the problem can have."""
    found, factors = gradient.clone(), []
    for moved, change in reversed(pairs):
        factor = (moved @ found) / (moved @ change)
        factors.append(factor)
        found -= factor * change
    if pairs:
        moved, change = pairs[-1]
        found *= (moved @ change) / (change @ change)
    else:
        found /= problem.regularization + 0.5 * DIAMETER**2 * len(problem)
    for (moved, change), factor in zip(pairs, reversed(factors), strict=True):
        found += (factor - (change @ found) / (moved @ change)) * moved
    return found


def _line_search(
    problem: SoftmaxProblem, weights: Tensor, products: Tensor, direction: Tensor, pushed: Tensor
) -> float:
    """Minimise along a line: a root of the slope, which increases; no pass over the features."""
    constant = float((problem.regularization * weights + problem.linear) @ direction)
    curvature = problem.regularization * float(direction @ direction)

    def slope(step: float) -> float:
        along = (problem.cotangents(products + step * pushed) * pushed).sum()
        return float(along) + constant + step * curvature

    start, low, high = abs(slope(0.0)), 0.0, 1.0
    while slope(high) < 0.0 and high < 1e30:
        low, high = high, 2.0 * high
    step = high
    for _ in range(40):
        found = slope(step)
        if abs(found) <= 0.05 * start:
            break
        low, high = (low, step) if found > 0.0 else (step, high)
        step = (low + high) / 2.0
    return step


def train_once(
    operator: TangentOperator,
    features: Features,
    labels: Tensor,
    plan: OneShotPlan,
    source: NoiseSource | InsecureSeededNoise,
    *,
    offsets: Tensor | None = None,
    physical_batch_size: int = 256,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Tensor]:
    """Draw b, solve, and release the solution with the output noise of the plan: name -> float64 tensor.

    Args:
        operator: products in float64, not normalised.
        features: cached constants of all records.
        labels: (n,) int64.
        plan: regularisation, noise and tolerance.
        source: of b and of the output noise.
        offsets: (n, C) added to the logits; None for centred models.
        physical_batch_size: records in memory at once.
        progress: called with the share of the solver's way, from 0 to 1; private.

    Raises:
        ValueError: labels that do not fit the plan.
        PlanError: the problem was not solved to the tolerance; nothing may be released.

    Formal guarantees:
        The result is an output of ``plan.mechanism()`` on these records, up to the floating-point
        assumptions of the module text; without noise in the plan nothing is claimed.
    """
    if operator.num_classes != plan.classes:
        raise ValueError(f"the plan is for {plan.classes} classes, the operator has {operator.num_classes}")
    dimension = sum(shape.numel() for shape in operator.parameter_shapes.values())
    linear = None
    if plan.noise_std > 0.0:
        linear = source.normal((dimension,), std=plan.noise_std, dtype=torch.float64)
    problem = SoftmaxProblem(
        operator,
        features,
        labels,
        regularization=plan.regularization,
        linear=linear,
        offsets=offsets,
        physical_batch_size=physical_batch_size,
    )
    spare = quantisation(plan.noise_std, dimension)
    solution = minimise(problem, plan.gradient_tolerance - spare, progress)
    named = problem.unflatten(solution.weights)
    if not plan.is_noisy:
        return named
    sensitivity = plan.output_sensitivity
    return gaussian_mechanism(
        named, sensitivity=sensitivity, noise_multiplier=plan.output_noise_std / sensitivity, source=source
    )

"""The optimiser step: noise, public normaliser, update. Schedules and averages of iterates.

Noise, accumulation and stepping happen in one place, Opacus' DP optimiser, here with cryptographic noise and
with sums that were clipped before they arrive. Momentum, Adam, averaging and projection are post-processing
of the noised sums under composition accounting; last-iterate bounds allow plain gradient steps alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dptaft.training.clipping import Adjacency, ClippedSum, check_clip_norm, l2_sensitivity
from dptaft.training.noise import InsecureSeededNoise, NoiseSource, gaussian_mechanism, noise_std

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from opacus.optimizers import DPOptimizerFastGradientClipping

_SCHEDULES = ("constant", "linear", "cosine")
_LARGEST_RATE = 1e30
_LEAST_NOISE_FACTOR = 1e-3


@dataclass(frozen=True)
class Schedule:
    """Public factor on a base value: from 1 at the first step to `final` at the last one.

    ``constant``: 1. ``linear``: ``1 + (final - 1) u``. ``cosine``: ``final + (1 - final)(1 + cos(pi u))/2``,
    with u = step/(steps - 1). In the first `warmup_steps` this is also multiplied by (step + 1)/warmup_steps.

    Example:
        >>> [Schedule("linear", final=0.5).factor(step, 3) for step in range(3)]
        [1.0, 0.75, 0.5]
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    final: float = 1.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in _SCHEDULES:
            raise ValueError(f"unknown schedule {self.kind!r}; use one of {', '.join(_SCHEDULES)}")
        if not (math.isfinite(self.final) and self.final >= 0):
            raise ValueError(f"final must be finite and not negative, got {self.final}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read ``KIND`` or ``KIND:FINAL``.

        Raises:
            ValueError: another text.

        Example:
            >>> Schedule.parse("cosine:0.1")
            Schedule(kind='cosine', final=0.1, warmup_steps=0)
        """
        kind, _, final = text.partition(":")
        try:
            return cls(kind, float(final) if final else 1.0)
        except ValueError as error:
            raise ValueError(
                f"cannot read the schedule {text!r}: {error}; write for example linear:0.1"
            ) from None

    def factor(self, step: int, steps: int) -> float:
        """Factor of step 0 <= step < steps."""
        if not 0 <= step < steps:
            raise ValueError(f"step must be in [0, {steps}), got {step}")
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        u = step / max(steps - 1, 1)
        if self.kind == "constant":
            return warm
        if self.kind == "linear":
            return warm * (1.0 + (self.final - 1.0) * u)
        return warm * (self.final + (1.0 - self.final) * (1.0 + math.cos(math.pi * u)) / 2.0)


CONSTANT = Schedule()


@dataclass(frozen=True)
class OptimizerConfig:
    """How noised gradients become updates; public, and without influence on the sensitivity.

    Attributes:
        kind: ``sgd``, ``momentum`` or ``adam``.
        learning_rate: base step size on the mean gradient (sum divided by the public expected batch size).
        momentum: decay of the velocity, for ``momentum``.
        betas: decay rates of Adam.
        l2_regularization: lambda of ``(lambda/2)|theta|^2``, added outside clipping.
        learning_rate_schedule: factor on the learning rate.
        noise_schedule: factor on the noise multiplier (0 is refused: a step without noise has no privacy).
        averaging: what is released: the ``last`` iterate, the mean of those of the second half of the steps
            (``tail``), or an exponential moving average (``ema``).
        ema_decay: decay of the moving average.

    Raises:
        ValueError: a value out of range.
    """

    kind: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: float = 1.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    l2_regularization: float = 0.0
    learning_rate_schedule: Schedule = CONSTANT
    noise_schedule: Schedule = CONSTANT
    averaging: Literal["last", "tail", "ema"] = "last"
    ema_decay: float = 0.95

    def __post_init__(self) -> None:
        if self.kind not in ("sgd", "momentum", "adam"):
            raise ValueError(f"unknown optimizer {self.kind!r}; use 'sgd', 'momentum' or 'adam'")
        if not 0 < self.learning_rate <= _LARGEST_RATE:
            raise ValueError(
                f"learning_rate must be positive and at most {_LARGEST_RATE:g}, got {self.learning_rate}"
            )
        for name, decay in {"momentum": self.momentum, "ema_decay": self.ema_decay}.items():
            if not 0 <= decay < 1:
                raise ValueError(f"{name} must be in [0, 1), got {decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not (math.isfinite(self.l2_regularization) and self.l2_regularization >= 0):
            raise ValueError(
                f"l2_regularization must be finite and not negative, got {self.l2_regularization}"
            )
        if self.noise_schedule.final < _LEAST_NOISE_FACTOR or self.noise_schedule.warmup_steps:
            raise ValueError(
                "noise_schedule must not come near zero; use a final factor of at least "
                f"{_LEAST_NOISE_FACTOR:g} and no warm-up"
            )
        if self.averaging not in ("last", "tail", "ema"):
            raise ValueError(f"unknown averaging {self.averaging!r}; use 'last', 'tail' or 'ema'")

    @property
    def is_plain_gradient_descent(self) -> bool:
        """Whether the released weights are the last iterate of plain gradient steps."""
        return self.kind == "sgd" and self.averaging == "last"

    def noise_multipliers(self, noise_multiplier: float, steps: int) -> list[float]:
        """Noise multiplier of every step, for the accountant."""
        return [noise_multiplier * self.noise_schedule.factor(step, steps) for step in range(steps)]


class PrivateOptimizer(DPOptimizerFastGradientClipping):
    """Opacus' DP optimiser for sums that are clipped already, with noise from a cryptographic source.

    One step: collect the clipped sums of one batch (`accept`, in any number of disjoint pieces), then `step`
    adds noise once, divides by the public expected batch size and updates. An empty batch is a sum of zeros.

    Args:
        parameters: name -> parameter; the names of the clipped sums.
        optimizer: torch optimiser over exactly these parameters.
        noise_multiplier: noise standard deviation divided by the sensitivity of the sum.
        l2_clip_norm: clip norm that every accepted sum must have.
        adjacency: adjacency that every accepted sum must have.
        expected_batch_size: public normaliser; the drawn batch size is never used.
        source: where the noise comes from.

    Raises:
        ValueError: a value out of range, or parameters that are not those of the optimiser.

    Formal guarantees:
        Given sums with their declared sensitivity, one step is one Gaussian mechanism with `noise_multiplier`
        (`dptaft.training.noise.gaussian_mechanism`); everything after it is post-processing.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        l2_clip_norm: float,
        expected_batch_size: float,
        source: NoiseSource | InsecureSeededNoise,
        adjacency: Adjacency = "zero-out",
    ) -> None:
        check_clip_norm(l2_clip_norm)
        if not (math.isfinite(expected_batch_size) and expected_batch_size > 0):
            raise ValueError(f"expected_batch_size must be finite and positive, got {expected_batch_size}")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(p) for p in parameters.values()}:
            raise ValueError("the optimizer must hold exactly the named parameters")
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=l2_clip_norm,
            expected_batch_size=expected_batch_size,
        )
        self.parameters_by_name = dict(parameters)
        self.adjacency: Adjacency = adjacency
        self.source = source
        self._noised = {
            name: torch.empty_like(p, memory_format=torch.contiguous_format).detach()
            for name, p in parameters.items()
        }
        self.dimension = sum(p.numel() for p in parameters.values())
        self._check_noise()

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the sum (not the mean) of clipped gradients."""
        sensitivity = l2_sensitivity(self.max_grad_norm, self.adjacency)
        return noise_std(
            sensitivity=sensitivity, noise_multiplier=self.noise_multiplier, dimension=self.dimension
        )

    def _check_noise(self) -> None:
        _ = self.noise_std

    def set_step(self, config: OptimizerConfig, noise_multiplier: float, step: int, steps: int) -> None:
        """Set learning rate and noise multiplier of one step from the schedules of `config`."""
        rate = config.learning_rate * config.learning_rate_schedule.factor(step, steps)
        for group in self.param_groups:
            group["lr"] = rate
        self.noise_multiplier = noise_multiplier * config.noise_schedule.factor(step, steps)
        self._check_noise()

    def accept(self, clipped: ClippedSum) -> None:
        """Add the clipped sum of (a piece of) the batch.

        Raises:
            ValueError: another clip norm, adjacency, set of names or shape, or a sum with a members axis.
        """
        if clipped.members is not None:
            raise ValueError("take one member of the clipped sum; every member has an optimizer of its own")
        if (clipped.l2_clip_norm, clipped.adjacency) != (self.max_grad_norm, self.adjacency):
            raise ValueError(
                f"the sum was clipped to {clipped.l2_clip_norm} under {clipped.adjacency}, the noise is for "
                f"{self.max_grad_norm} under {self.adjacency}"
            )
        if clipped.value.keys() != self.parameters_by_name.keys():
            raise ValueError("the clipped sum and the optimizer name different parameters")
        for name, p in self.parameters_by_name.items():
            if clipped.value[name].shape != p.shape:
                raise ValueError(f"the clipped sum of {name!r} has shape {tuple(clipped.value[name].shape)}")
        for name, p in self.parameters_by_name.items():
            value = clipped.value[name]
            p.summed_grad = value if p.summed_grad is None else p.summed_grad + value

    def accumulate(self) -> None:
        """Opacus calls this before the noise; `accept` has done it."""
        if any(p.summed_grad is None for p in self.parameters_by_name.values()):
            raise ValueError(
                "no clipped sum was accepted since the last step; an empty batch is a sum of zeros"
            )

    def add_noise(self) -> None:
        """Noise the joint sum once; the result goes to the gradients."""
        noised = gaussian_mechanism(
            {name: p.summed_grad for name, p in self.parameters_by_name.items()},
            sensitivity=l2_sensitivity(self.max_grad_norm, self.adjacency),
            noise_multiplier=self.noise_multiplier,
            source=self.source,
            out=self._noised,
        )
        for name, p in self.parameters_by_name.items():
            p.grad = noised[name]
            p.summed_grad = None

    def private_step(self, clipped: ClippedSum) -> None:
        """One whole step for one batch; the next noise is drawn in the background."""
        self.accept(clipped)
        self.step()
        self.zero_grad(set_to_none=True)
        if self.noise_multiplier > 0:
            self.source.prefetch(self.dimension)


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    config: OptimizerConfig,
    *,
    noise_multiplier: float,
    l2_clip_norm: float,
    expected_batch_size: float,
    source: NoiseSource | InsecureSeededNoise,
    adjacency: Adjacency = "zero-out",
) -> PrivateOptimizer:
    """Private optimiser of the configured kind.

    Example:
        >>> theta = {"w": nn.Parameter(torch.zeros(2))}
        >>> optimizer = build_optimizer(theta, OptimizerConfig(learning_rate=0.5), noise_multiplier=0.0,
        ...     l2_clip_norm=1.0, expected_batch_size=2, source=NoiseSource())
        >>> optimizer.private_step(ClippedSum({"w": torch.tensor([1.0, -1.0])}, 1.0))
        >>> theta["w"].tolist()
        [-0.25, 0.25]
    """
    shared = {"lr": config.learning_rate, "weight_decay": config.l2_regularization}
    inner: torch.optim.Optimizer
    if config.kind == "adam":
        inner = torch.optim.Adam(parameters.values(), betas=config.betas, **shared)
    else:
        momentum = config.momentum if config.kind == "momentum" else 0.0
        inner = torch.optim.SGD(parameters.values(), momentum=momentum, **shared)
    return PrivateOptimizer(
        parameters,
        inner,
        noise_multiplier=noise_multiplier,
        l2_clip_norm=l2_clip_norm,
        expected_batch_size=expected_batch_size,
        source=source,
        adjacency=adjacency,
    )


def member_parameters(stacked: Mapping[str, Tensor], index: int) -> dict[str, nn.Parameter]:
    """Parameters that share memory with one weight vector on the members axis of `stacked`.

    With one optimiser per member (its own noise, learning rate, schedules) and one engine for all, a sweep
    takes one pass over the features per step.

    Example:
        >>> stacked = {"w": torch.zeros(2, 3)}
        >>> with torch.no_grad():
        ...     _ = member_parameters(stacked, 1)["w"].fill_(5.0)
        >>> stacked["w"].sum(1).tolist()
        [0.0, 15.0]
    """
    return {name: nn.Parameter(value.detach()[index]) for name, value in stacked.items()}


class IterateAverage:
    """Average of iterates: post-processing of noised steps, not allowed under last-iterate bounds.

    Args:
        config: names the kind of average.
        steps: planned number of steps.

    Example:
        >>> average = IterateAverage(OptimizerConfig(averaging="tail"), steps=4)
        >>> for step in range(4):
        ...     average.update({"w": torch.tensor([float(step)])}, step)
        >>> average.value({"w": torch.tensor([3.0])})["w"].item()
        2.5
    """

    def __init__(self, config: OptimizerConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.count = 0
        self.mean: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, theta: Mapping[str, Tensor], step: int) -> None:
        """Take in the iterate after step `step` (counted from 0)."""
        kind = self.config.averaging
        if kind == "last" or (kind == "tail" and step < self.steps // 2):
            return
        self.count += 1
        decay = self.config.ema_decay
        weight = 1.0 / self.count if kind == "tail" else (1.0 - decay) / (1.0 - decay**self.count)
        for name, value in theta.items():
            if name in self.mean:
                self.mean[name].lerp_(value.detach(), weight)
            else:
                self.mean[name] = value.detach().clone()

    def value(self, theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The average, or the last iterate `theta` where nothing was averaged."""
        chosen = self.mean or theta
        return {name: value.detach().clone() for name, value in chosen.items()}


@torch.no_grad()
def project_to_ball(theta: Mapping[str, Tensor], radius: float) -> None:
    """Scale the joint vector in place to L2 norm at most `radius` (a set of diameter twice that).

    Example:
        >>> theta = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
        >>> project_to_ball(theta, 1.0)
        >>> [round(value.item(), 6) for value in theta.values()]
        [0.6, 0.8]
    """
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be finite and positive, got {radius}")
    norm = math.sqrt(sum(float(value.double().square().sum()) for value in theta.values()))
    if norm > radius:
        for value in theta.values():
            value.mul_(radius / norm)

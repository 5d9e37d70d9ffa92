"""ConvexityCertificate: the facts that make a last-iterate bound true, and where each of them comes from.

A step of training is theta <- Pi[theta - eta (S(theta)/b + lambda theta) + noise], where S sums the example
gradients, b is a public normaliser and Pi projects on a convex set (or does nothing). With convex example
losses of smoothness M, at most B of them in one step, and 0 < eta, the noiseless map is Lipschitz with factor

    c = max(|1 - eta lambda|, |1 - eta (lambda + M B / b)|)

(co-coercivity of convex smooth functions; Nesterov 2004, Theorem 2.1.12). Last-iterate bounds need c <= 1,
gradients of norm at most the clip norm, and that nothing but the last iterate depends on the data. The
constructor refuses anything else and says which assumption fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from functools import cached_property
from typing import Any

from dptaft_accounting import _checks as check
from dptaft_accounting.errors import CertificateError
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian, Mechanism, PoissonGaussian

_STEP_ROUNDING = 1e-12  # a step size given as 2/(2 lambda + M) may round to a factor this far above 1
_CEILING, _FLOOR = Context(prec=60, rounding=ROUND_CEILING), Context(prec=60, rounding=ROUND_FLOOR)
SAMPLINGS = ("full-batch", "poisson", "cyclic")


@dataclass(frozen=True)
class LossConstants:
    """Constants of a convex loss as a function of the outputs (logits).

    Attributes:
        gradient: largest Euclidean norm of the gradient by the outputs; infinity where unbounded.
        curvature: largest eigenvalue of the Hessian by the outputs.
        scalar: one output per example, so that clipping a gradient keeps the loss convex.
    """

    gradient: float
    curvature: float
    scalar: bool


LOSSES: dict[str, LossConstants] = {
    # softmax minus one-hot has norm below sqrt 2; the covariance of a one-hot vector has eigenvalues below
    # 1/2
    "multinomial-logistic": LossConstants(math.sqrt(2.0), 0.5, False),
    "binary-logistic": LossConstants(1.0, 0.25, True),
    "squared": LossConstants(math.inf, 1.0, True),
    "huber": LossConstants(1.0, 1.0, True),
}

TRAINED_LOSSES: dict[str, Callable[[int], LossConstants]] = {
    "cross-entropy": lambda classes: LOSSES["multinomial-logistic"],
    # (1/C) h(|e|), h(t) = t^2 up to the threshold 15 and linear beyond, residual e of C logits: gradient
    # 2 * 15/C, curvature 2/C
    "huber-square": lambda classes: LossConstants(30.0 / classes, 2.0 / classes, False),
}
"""Losses of training -> constants for a number of classes; `dptaft.training.losses` holds the formulas."""


def trained_constants(loss: str, classes: int | None) -> LossConstants | None:
    """Constants of a loss of training, to issue a certificate with; None for those of `LOSSES`.

    Raises:
        CertificateError: the loss is in neither list, or `classes` is missing.

    >>> trained_constants("huber-square", 10).curvature
    0.2
    """
    if loss in LOSSES:
        return None
    if loss not in TRAINED_LOSSES:
        known = ", ".join(sorted(TRAINED_LOSSES))
        raise CertificateError(
            f"gradients of the loss {loss} are unbounded, or no bound is known; use {known}"
        )
    if not classes:
        raise CertificateError("the number of classes is needed; verify the whole run")
    return TRAINED_LOSSES[loss](classes)


def certified_name(loss: str) -> str:
    """Name of a loss of training in a certificate.

    >>> certified_name("cross-entropy"), certified_name("huber-square")
    ('multinomial-logistic', 'huber-square')
    """
    return "multinomial-logistic" if loss == "cross-entropy" else loss


@dataclass(frozen=True)
class ConvexityCertificate:
    """Proof obligations of a last-iterate bound; build it with `issue`, never by hand.

    Attributes:
        sampling: `full-batch`, `poisson` or `cyclic`.
        steps: number of steps the certificate covers.
        step_size: eta, one number or one per step.
        strong_convexity: lambda, from the quadratic regulariser that is applied outside the sum.
        smoothness: M, of one example loss in the weights.
        gradient_bound: largest norm of an example gradient as it enters the sum.
        l2_clip_norm: C, the norm to which the noise is scaled; at least `gradient_bound`.
        normaliser: b, the public divisor of the sum.
        max_batch_size: B, the largest number of examples one step sums.
        records: n, the public number of records (an upper bound of it under add-remove).
        sampling_rate: p, for Poisson sampling.
        batches_per_epoch: l, for cyclic sampling.
        diameter: D of the convex set on which every iterate is projected, if there is one.
        adjacency: as in the mechanism.
        origin: for each number, where it comes from.
    """

    sampling: str
    steps: int
    step_size: float | tuple[float, ...]
    strong_convexity: float
    smoothness: float
    gradient_bound: float
    l2_clip_norm: float
    normaliser: float
    max_batch_size: int
    records: int
    sampling_rate: float | None = None
    batches_per_epoch: int | None = None
    diameter: float | None = None
    adjacency: str = "zero-out"
    origin: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        error = CertificateError
        check.choice("sampling", self.sampling, SAMPLINGS, error)
        check.whole("steps", self.steps, error)
        self._check_step_sizes()
        check.non_negative("strong_convexity", self.strong_convexity, error)
        check.positive("smoothness", self.smoothness, error)
        for name in ("gradient_bound", "l2_clip_norm", "normaliser"):
            check.positive(name, getattr(self, name), error)
        check.whole("records", self.records, error)
        check.whole("max_batch_size", self.max_batch_size, error)
        if self.diameter is not None:
            check.positive("diameter", self.diameter, error)
        if self.gradient_bound > self.l2_clip_norm:
            raise error(
                f"gradient_bound {self.gradient_bound:g} exceeds l2_clip_norm {self.l2_clip_norm:g}: "
                "clipping would act and break convexity; raise l2_clip_norm or bound the features "
                "more tightly"
            )
        self._check_sampling()
        worst = max(self.contractions)
        if worst > 1 + _STEP_ROUNDING:
            limit = 2 / (self.strong_convexity + self.smoothness * self.max_batch_size / self.normaliser)
            raise error(
                f"the step expands distances (factor {worst:g}): step_size must be at most {limit:g} "
                "for this smoothness and batch size"
            )

    def _check_step_sizes(self) -> None:
        if isinstance(self.step_size, (tuple, list)):
            sizes = tuple(check.positive("step_size", eta, CertificateError) for eta in self.step_size)
            if len(sizes) != self.steps:
                raise CertificateError(f"step_size holds {len(sizes)} values for {self.steps} steps")
            if self.sampling != "full-batch":
                raise CertificateError(
                    "a schedule of step sizes is covered for full-batch sampling only; use one size"
                )
            object.__setattr__(self, "step_size", sizes)
        else:
            check.positive("step_size", self.step_size, CertificateError)

    def _check_sampling(self) -> None:
        if self.sampling == "poisson":
            check.rate("sampling_rate", self.sampling_rate, CertificateError)
        elif self.sampling_rate is not None:
            raise CertificateError(f"sampling_rate has no meaning for {self.sampling} sampling; leave it out")
        if self.sampling == "cyclic":
            batches = check.whole("batches_per_epoch", self.batches_per_epoch, CertificateError)
            smallest = math.ceil(self.records / batches)
        elif self.batches_per_epoch is not None:
            raise CertificateError(
                f"batches_per_epoch has no meaning for {self.sampling} sampling; leave it out"
            )
        else:
            smallest = self.records if self.sampling == "full-batch" else 1
        if self.max_batch_size < smallest:
            raise CertificateError(
                f"max_batch_size {self.max_batch_size} is below the {smallest} records that one step sums"
            )

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """The step size of every step."""
        return self.step_size if isinstance(self.step_size, tuple) else (self.step_size,) * self.steps

    @cached_property
    def contractions(self) -> tuple[float, ...]:
        """The contraction factor c, rounded up: one per step for a schedule, else one.

        mu grows with 1/(1 - c), so a rounding error in c would weigh the more the closer c is to 1.
        """
        sizes = self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)
        low = Decimal(self.strong_convexity)
        largest = _CEILING.multiply(Decimal(self.smoothness), Decimal(self.max_batch_size))
        top = _CEILING.add(low, _CEILING.divide(largest, Decimal(self.normaliser)))
        return tuple(_contraction(Decimal(eta), low, top) for eta in sizes)

    @classmethod
    def issue(
        cls,
        *,
        loss: str,
        feature_bound: float,
        l2_clip_norm: float,
        regularization: float,
        step_size: float | tuple[float, ...],
        normaliser: float,
        sampling: str,
        steps: int,
        records: int,
        max_batch_size: int | None = None,
        sampling_rate: float | None = None,
        batches_per_epoch: int | None = None,
        diameter: float | None = None,
        adjacency: str = "zero-out",
        gradient_clipping: bool = False,
        optimizer: str = "sgd",
        momentum: float = 0.0,
        released_iterate: str = "last",
        origin: Mapping[str, str] | None = None,
        constants: LossConstants | None = None,
    ) -> ConvexityCertificate:
        """Issues a certificate from what the training enforces.

        Args:
            loss: one of `LOSSES`, a convex function of outputs that are affine in the weights; with
                `constants` the name of any other one.
            feature_bound: K, largest operator norm of an example's Jacobian (outputs by weights); for a
                linear model with scalar output the largest norm of a feature vector.
            l2_clip_norm: C, to which the noise is scaled.
            regularization: lambda of (lambda/2)|theta|^2, whose gradient is added outside the clipped sum.
            step_size: eta, one number or one per step.
            normaliser: b, public divisor of the sum.
            sampling: `full-batch`, `poisson` or `cyclic`.
            steps: number of steps.
            records: public number of records (under add-remove: a public upper bound).
            max_batch_size: B for Poisson sampling, chosen by the user; derived for the others.
            sampling_rate: p for Poisson sampling.
            batches_per_epoch: l for cyclic sampling.
            diameter: of the convex set on which every iterate is projected.
            adjacency: as in the mechanism.
            gradient_clipping: whether example gradients are clipped (instead of bounded by construction).
            optimizer: only `sgd` (plain gradient steps) keeps the proof.
            momentum: must be 0.
            released_iterate: must be `last`; `average`, `best` or `all` release other iterates.
            origin: where numbers come from, kept in the record.
            constants: of a convex loss that `LOSSES` does not list; whoever passes them vouches for them.

        Raises:
            CertificateError: the assumption that fails and what would satisfy it.

        >>> proof = ConvexityCertificate.issue(
        ...     loss="multinomial-logistic", feature_bound=1.0, l2_clip_norm=1.5, regularization=0.1,
        ...     step_size=1.0, normaliser=100.0, sampling="full-batch", steps=50, records=100)
        >>> proof.contractions
        (0.9,)
        """
        _refuse_other_algorithms(optimizer, momentum, released_iterate)
        known = _constants(loss, constants)
        gradient, smoothness = _bounds(loss, known, feature_bound, l2_clip_norm, gradient_clipping)
        if max_batch_size is None:
            max_batch_size = _largest_batch(sampling, records, batches_per_epoch, adjacency)
        derived = {
            "loss": loss,
            "gradient_bound": "clipping of a scalar output"
            if gradient_clipping
            else "loss constant x feature bound",
            "smoothness": "loss curvature x feature bound squared",
            "strong_convexity": "quadratic regulariser outside the sum",
            "feature_bound": repr(float(feature_bound)),
        }
        return cls(
            sampling=sampling,
            steps=steps,
            step_size=step_size,
            strong_convexity=regularization,
            smoothness=smoothness,
            gradient_bound=gradient,
            l2_clip_norm=l2_clip_norm,
            normaliser=normaliser,
            max_batch_size=max_batch_size,
            records=records,
            sampling_rate=sampling_rate,
            batches_per_epoch=batches_per_epoch,
            diameter=diameter,
            adjacency=adjacency,
            origin={**derived, **(origin or {})},
        )

    def check(self, mechanism: Mechanism) -> None:
        """Raises `CertificateError` unless this certificate belongs to `mechanism`."""
        if getattr(mechanism, "released", None) != "last-iterate":
            raise CertificateError(
                f"released is {getattr(mechanism, 'released', 'undefined')!r}: a last-iterate bound "
                "hides all other iterates; state released='last-iterate' if the final weights alone leave"
            )
        kinds: dict[type[Mechanism], str] = {
            FullBatchGaussian: "full-batch",
            PoissonGaussian: "poisson",
            CyclicGaussian: "cyclic",
        }
        expected = {
            "sampling": kinds.get(type(mechanism)),
            "steps": getattr(mechanism, "steps", None),
            "adjacency": mechanism.adjacency,
            "sampling_rate": getattr(mechanism, "sampling_rate", None),
            "batches_per_epoch": getattr(mechanism, "batches_per_epoch", None),
        }
        for name, value in expected.items():
            own = getattr(self, name)
            if own != value:
                raise CertificateError(
                    f"the certificate says {name} {own!r}, the mechanism {value!r}; issue one for "
                    "this mechanism"
                )

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dictionary; `from_dict` inverts it exactly."""
        values = asdict(self)
        values["origin"] = dict(self.origin)
        if isinstance(self.step_size, tuple):
            values["step_size"] = list(self.step_size)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ConvexityCertificate:
        """Rebuilds and validates a certificate; unknown fields are errors."""
        names = {item.name for item in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise CertificateError(f"a certificate has no field {unknown[0]!r}")
        try:
            return cls(**values)
        except TypeError as error:
            raise CertificateError(f"the certificate is incomplete: {error}") from None


def _contraction(eta: Decimal, low: Decimal, top: Decimal) -> float:
    """The smallest float that is not below max(1 - eta low, eta top - 1), low <= top."""
    exact = max(
        _CEILING.subtract(Decimal(1), _FLOOR.multiply(eta, low)),
        _CEILING.subtract(_CEILING.multiply(eta, top), Decimal(1)),
    )
    near = float(exact)
    return near if Decimal(near) >= exact else math.nextafter(near, math.inf)


def _refuse_other_algorithms(optimizer: str, momentum: float, released_iterate: str) -> None:
    if optimizer != "sgd":
        raise CertificateError(
            f"optimizer {optimizer!r} is not covered: last-iterate bounds need plain gradient steps; use sgd"
        )
    if check.real("momentum", momentum, CertificateError) != 0:
        raise CertificateError(
            f"momentum {momentum:g} is not covered: the map is no contraction; use momentum 0"
        )
    if released_iterate != "last":
        raise CertificateError(
            f"released_iterate {released_iterate!r} is not covered: averages, checkpoints chosen on "
            "the data and logs depend on hidden iterates; release the last one, chosen in advance"
        )


def _constants(loss: str, given: LossConstants | None) -> LossConstants:
    if given is None:
        if loss not in LOSSES:
            raise CertificateError(
                f"loss {loss!r} is not known to be convex; known losses: {', '.join(sorted(LOSSES))}"
            )
        return LOSSES[loss]
    if loss in LOSSES and given != LOSSES[loss]:
        raise CertificateError(f"loss {loss!r} has constants of its own; leave constants out")
    check.positive("curvature", given.curvature, CertificateError)
    return given


def _bounds(
    loss: str, constants: LossConstants, feature_bound: float, clip: float, clipped: bool
) -> tuple[float, float]:
    """Largest gradient norm and smoothness of one example's loss in the weights."""
    bound = check.positive("feature_bound", feature_bound, CertificateError)
    check.positive("l2_clip_norm", clip, CertificateError)
    if clipped and not constants.scalar:
        raise CertificateError(
            f"clipping the gradients of {loss!r} breaks convexity (several outputs); bound the "
            "Jacobian so that no gradient exceeds l2_clip_norm, or train one scalar output per class"
        )
    gradient = min(clip, constants.gradient * bound) if clipped else constants.gradient * bound
    if math.isinf(gradient):
        raise CertificateError(f"gradients of {loss!r} are unbounded; clip them (scalar output) or use huber")
    return gradient, constants.curvature * bound**2


def _largest_batch(sampling: str, records: int, batches: int | None, adjacency: str) -> int:
    check.whole("records", records, CertificateError)
    if sampling == "poisson":
        raise CertificateError(
            "max_batch_size is needed for Poisson sampling: batches above it are charged to delta; "
            "choose about p n + 6 sqrt(p n)"
        )
    if sampling == "cyclic":
        return math.ceil(records / check.whole("batches_per_epoch", batches, CertificateError))
    return records + (1 if adjacency == "add-remove" else 0)

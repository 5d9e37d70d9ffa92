"""What happened: frozen, validated, serialisable records of the private computations that can be accounted.

A record holds public facts only. Gaussian records give the noise as `noise_multiplier`: standard deviation of
the noise on the *sum* of clipped contributions, divided by the clip norm C. Adjacency decides the
sensitivity of that sum: C for `zero-out` (one record replaced by a null record) and `add-remove`, 2C for
`replace-one`.

`released` says what leaves the computation: `all-iterates` (also right for momentum, Adam, averaging,
checkpoints) or `last-iterate` (the final weights and functions of them alone).

Anything that is not one of these records is refused by name; nothing is ever accounted by analogy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dptaft_accounting import _checks as check
from dptaft_accounting.errors import MechanismError

ADJACENCIES = ("zero-out", "add-remove", "replace-one")
RELEASES = ("all-iterates", "last-iterate")
PARTITIONS = ("fixed", "secret-random")
CANDIDATE_COUNTS = ("truncated-negative-binomial", "poisson")
_MOST_LEVELS = 50  # of mechanisms inside mechanisms
_MOST_CANDIDATES = 1e12


class Mechanism:
    """Base of all records: adjacency, unit sensitivity and a dictionary form with an exact round trip."""

    kind: ClassVar[str]
    adjacency: str

    @property
    def sensitivity(self) -> float:
        """Sensitivity of the clipped sum in units of the clip norm: 1, or 2 for replace-one."""
        return 2.0 if self.adjacency == "replace-one" else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able dictionary that `mechanism_from_dict` turns back into an equal record."""
        record: dict[str, Any] = {"kind": self.kind}
        for field in fields(self):  # type: ignore[arg-type]
            record[field.name] = _plain(getattr(self, field.name))
        return record


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _set(record: Any, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _check_adjacency(adjacency: str, allowed: tuple[str, ...], remedy: str) -> None:
    check.choice("adjacency", adjacency, ADJACENCIES, MechanismError)
    if adjacency not in allowed:
        raise MechanismError(f"adjacency {adjacency!r} is not sound here: {remedy}")


@dataclass(frozen=True)
class FullBatchGaussian(Mechanism):
    """Every step sums the clipped contributions of all records and adds Gaussian noise.

    Attributes:
        noise_multiplier: noise standard deviation over clip norm; one number, or one per step (a schedule).
        steps: number of steps.
        adjacency: zero-out, add-remove (then the normaliser must be public) or replace-one.
        released: `all-iterates` or `last-iterate`.

    Raises:
        MechanismError: a noise multiplier that is not a finite positive number, a schedule of the wrong
            length, steps below one, an unknown adjacency or release.

    >>> FullBatchGaussian(noise_multiplier=20.0, steps=100).to_dict()["kind"]
    'full-batch-gaussian'
    """

    kind: ClassVar[str] = "full-batch-gaussian"
    noise_multiplier: float | tuple[float, ...]
    steps: int
    adjacency: str = "zero-out"
    released: str = "all-iterates"

    def __post_init__(self) -> None:
        steps = check.whole("steps", self.steps, MechanismError)
        noise: float | tuple[float, ...]
        if isinstance(self.noise_multiplier, (tuple, list)):
            noise = tuple(
                check.positive("noise_multiplier", z, MechanismError) for z in self.noise_multiplier
            )
            if len(noise) != steps:
                raise MechanismError(
                    f"noise_multiplier holds {len(noise)} values for {steps} steps; give one per step "
                    "or one for all"
                )
        else:
            noise = check.positive("noise_multiplier", self.noise_multiplier, MechanismError)
        check.choice("adjacency", self.adjacency, ADJACENCIES, MechanismError)
        check.choice("released", self.released, RELEASES, MechanismError)
        _set(self, noise_multiplier=noise, steps=steps)

    @property
    def noise_schedule(self) -> tuple[float, ...]:
        """The noise multiplier of every step."""
        if isinstance(self.noise_multiplier, tuple):
            return self.noise_multiplier
        return (self.noise_multiplier,) * self.steps


@dataclass(frozen=True)
class PoissonGaussian(Mechanism):
    """Every step includes each record with probability `sampling_rate`, sums, adds Gaussian noise.

    The sum is divided by a public constant, never by the realised batch size; an empty batch still adds its
    noise.

    Attributes:
        noise_multiplier: noise standard deviation over clip norm.
        sampling_rate: inclusion probability p in (0, 1].
        steps: number of steps.
        adjacency: zero-out or add-remove. Replace-one is refused: no sound amplified bound is implemented.
        released: `all-iterates` or `last-iterate`.
    """

    kind: ClassVar[str] = "poisson-gaussian"
    noise_multiplier: float
    sampling_rate: float
    steps: int
    adjacency: str = "zero-out"
    released: str = "all-iterates"

    def __post_init__(self) -> None:
        noise = check.positive("noise_multiplier", self.noise_multiplier, MechanismError)
        p = check.rate("sampling_rate", self.sampling_rate, MechanismError)
        steps = check.whole("steps", self.steps, MechanismError)
        _check_adjacency(
            self.adjacency,
            ("zero-out", "add-remove"),
            "Poisson sampling amplifies zero-out and add-remove; use one of them, or full-batch training",
        )
        check.choice("released", self.released, RELEASES, MechanismError)
        _set(self, noise_multiplier=noise, sampling_rate=p, steps=steps)


@dataclass(frozen=True)
class CyclicGaussian(Mechanism):
    """The records are split once into disjoint batches, which are visited in the same order in every epoch.

    Attributes:
        noise_multiplier: noise standard deviation over clip norm, in every step.
        batches_per_epoch: number l of disjoint batches.
        epochs: number E of passes.
        partition: `fixed` (known to the adversary) or `secret-random` (drawn uniformly, never disclosed).
        adjacency: zero-out or replace-one. Add-remove is refused: it would move other records between
            batches.
        released: `all-iterates` or `last-iterate`. The order of a secret partition must stay secret as well.
    """

    kind: ClassVar[str] = "cyclic-gaussian"
    noise_multiplier: float
    batches_per_epoch: int
    epochs: int
    partition: str = "fixed"
    adjacency: str = "zero-out"
    released: str = "all-iterates"

    def __post_init__(self) -> None:
        noise = check.positive("noise_multiplier", self.noise_multiplier, MechanismError)
        batches = check.whole("batches_per_epoch", self.batches_per_epoch, MechanismError)
        epochs = check.whole("epochs", self.epochs, MechanismError)
        check.choice("partition", self.partition, PARTITIONS, MechanismError)
        _check_adjacency(
            self.adjacency,
            ("zero-out", "replace-one"),
            "adding or removing a record changes a partition into equal batches; use zero-out",
        )
        check.choice("released", self.released, RELEASES, MechanismError)
        _set(self, noise_multiplier=noise, batches_per_epoch=batches, epochs=epochs)

    @property
    def steps(self) -> int:
        """Total number of steps, l times E."""
        return self.batches_per_epoch * self.epochs


@dataclass(frozen=True)
class ObjectivePerturbation(Mechanism):
    """Minimiser of sum_i loss_i + (regularization/2)|theta|^2 + <b, theta> with b ~ N(0, noise_std^2 I).

    Attributes:
        gradient_bound: L, bound on every example gradient.
        hessian_bound: beta, bound on the (single) eigenvalue of every example Hessian (generalised linear
            losses).
        regularization: coefficient of the quadratic term of the *sum* objective; must exceed `hessian_bound`.
        noise_std: standard deviation of every coordinate of b.
        gradient_tolerance: norm t of the gradient at the returned point (0 for an exact minimiser).
        output_noise_std: noise added to the returned point; must be positive where `gradient_tolerance` is.
        problems: number of independent problems on the same records (one-vs-rest classes); they compose.
        adjacency: zero-out or add-remove.
    """

    kind: ClassVar[str] = "objective-perturbation"
    gradient_bound: float
    hessian_bound: float
    regularization: float
    noise_std: float
    gradient_tolerance: float = 0.0
    output_noise_std: float = 0.0
    problems: int = 1
    adjacency: str = "zero-out"

    def __post_init__(self) -> None:
        values = {
            "gradient_bound": check.positive("gradient_bound", self.gradient_bound, MechanismError),
            "hessian_bound": check.positive("hessian_bound", self.hessian_bound, MechanismError),
            "regularization": check.positive("regularization", self.regularization, MechanismError),
            "noise_std": check.positive("noise_std", self.noise_std, MechanismError),
            "gradient_tolerance": check.non_negative(
                "gradient_tolerance", self.gradient_tolerance, MechanismError
            ),
            "output_noise_std": check.non_negative("output_noise_std", self.output_noise_std, MechanismError),
            "problems": check.whole("problems", self.problems, MechanismError),
        }
        _set(self, **values)
        if self.regularization <= self.hessian_bound:
            raise MechanismError(
                f"regularization {self.regularization:g} must exceed hessian_bound {self.hessian_bound:g}; "
                "raise the regularisation or bound the features more tightly"
            )
        _check_tolerance(self.gradient_tolerance, self.output_noise_std)
        _check_adjacency(
            self.adjacency,
            ("zero-out", "add-remove"),
            "the theorem covers one added or removed loss; use zero-out",
        )


@dataclass(frozen=True)
class SoftmaxObjectivePerturbation(Mechanism):
    """Minimiser of sum_i loss_i + (regularization/2)|theta|^2 + <b, theta> with b ~ N(0, noise_std^2 I).

    One record's loss is multi-class: log(1 + sum_{c != y} exp(a + z_c - z_y)) of logits z = J theta that are
    linear in the weights, with a fixed margin a. A Gaussian on the returned point hides how far it is from
    the minimiser.

    Attributes:
        diameter: D, largest distance between two rows of one record's Jacobian J; bounds the gradient.
        classes: number C of rows.
        regularization: coefficient of the quadratic term of the *sum* objective.
        noise_std: standard deviation of every coordinate of b.
        gradient_tolerance: bound t on the norm of the gradient at the returned point (0: exact minimiser).
        output_noise_std: noise added to the returned point; must be positive where `gradient_tolerance` is.
        adjacency: zero-out, add-remove or replace-one.
    """

    kind: ClassVar[str] = "softmax-objective-perturbation"
    diameter: float
    classes: int
    regularization: float
    noise_std: float
    gradient_tolerance: float = 0.0
    output_noise_std: float = 0.0
    adjacency: str = "zero-out"

    def __post_init__(self) -> None:
        values: dict[str, Any] = {
            name: check.positive(name, getattr(self, name), MechanismError)
            for name in ("diameter", "regularization", "noise_std")
        }
        for name in ("gradient_tolerance", "output_noise_std"):
            values[name] = check.non_negative(name, getattr(self, name), MechanismError)
        values["classes"] = check.whole("classes", self.classes, MechanismError)
        _set(self, **values)
        if self.classes < 2:
            raise MechanismError(f"classes must be at least 2, got {self.classes}; one class has no loss")
        _check_tolerance(self.gradient_tolerance, self.output_noise_std)
        check.choice("adjacency", self.adjacency, ADJACENCIES, MechanismError)


def _check_tolerance(gradient_tolerance: float, output_noise_std: float) -> None:
    if gradient_tolerance > 0 and output_noise_std == 0:
        raise MechanismError(
            f"gradient_tolerance {gradient_tolerance:g} needs output_noise_std above 0: "
            "an inexact minimiser leaks unless noise hides the error"
        )


@dataclass(frozen=True)
class OutputPerturbation(Mechanism):
    """Minimiser of mean_i loss_i + (regularization/2)|theta|^2, released with Gaussian noise on the weights.

    Attributes:
        gradient_bound: L, bound on every example gradient.
        regularization: strong convexity of the *mean* objective.
        records: public number n in the normaliser of the mean.
        noise_std: standard deviation of the noise on every weight.
        gradient_tolerance: norm of the gradient of the mean objective at the returned point.
        adjacency: zero-out or replace-one; add-remove would change the normaliser.
    """

    kind: ClassVar[str] = "output-perturbation"
    gradient_bound: float
    regularization: float
    records: int
    noise_std: float
    gradient_tolerance: float = 0.0
    adjacency: str = "zero-out"

    def __post_init__(self) -> None:
        values = {
            "gradient_bound": check.positive("gradient_bound", self.gradient_bound, MechanismError),
            "regularization": check.positive("regularization", self.regularization, MechanismError),
            "records": check.whole("records", self.records, MechanismError),
            "noise_std": check.positive("noise_std", self.noise_std, MechanismError),
            "gradient_tolerance": check.non_negative(
                "gradient_tolerance", self.gradient_tolerance, MechanismError
            ),
        }
        _set(self, **values)
        _check_adjacency(
            self.adjacency,
            ("zero-out", "replace-one"),
            "n is the public normaliser of the mean; use zero-out",
        )


def _depth(mechanism: Mechanism) -> int:
    """Levels of nesting, counted once, when a composition is built."""
    return int(getattr(mechanism, "_levels", 0))


def _deepest(parts: tuple[Mechanism, ...]) -> int:
    return 1 + max(_depth(part) for part in parts)


def _check_parts(parts: Any) -> tuple[Mechanism, ...]:
    items = tuple(parts) if isinstance(parts, (tuple, list)) else ()
    if not items:
        raise MechanismError(f"parts must be a non-empty sequence of mechanisms, got {parts!r}")
    for item in items:
        if type(item) not in _KINDS.values():
            raise MechanismError(f"unknown mechanism {type(item).__name__!r}; it cannot be accounted")
        if _depth(item) >= _MOST_LEVELS:
            raise MechanismError(f"mechanisms are nested deeper than {_MOST_LEVELS} levels; write them flat")
    if len({item.adjacency for item in items}) > 1:
        names = ", ".join(sorted({item.adjacency for item in items}))
        raise MechanismError(
            f"parts use different adjacencies ({names}); state all of them for one adjacency"
        )
    return items


@dataclass(frozen=True)
class SequenceComposition(Mechanism):
    """Several mechanisms on the same records, each may depend on the results of the ones before."""

    kind: ClassVar[str] = "sequence"
    parts: tuple[Mechanism, ...]

    def __post_init__(self) -> None:
        parts = _check_parts(self.parts)
        _set(self, parts=parts, _levels=_deepest(parts))

    @property
    def adjacency(self) -> str:  # type: ignore[override]
        """The adjacency shared by all parts."""
        return self.parts[0].adjacency


@dataclass(frozen=True)
class ParallelComposition(Mechanism):
    """Several mechanisms on disjoint shards; a record's shard never depends on other records."""

    kind: ClassVar[str] = "parallel"
    parts: tuple[Mechanism, ...]

    def __post_init__(self) -> None:
        parts = _check_parts(self.parts)
        _set(self, parts=parts, _levels=_deepest(parts))
        if self.adjacency == "replace-one":
            raise MechanismError(
                "adjacency 'replace-one' is not sound here: a replacement may touch two shards; use "
                "zero-out, or "
                "compose in sequence"
            )

    @property
    def adjacency(self) -> str:  # type: ignore[override]
        """The adjacency shared by all parts."""
        return self.parts[0].adjacency


@dataclass(frozen=True)
class RepeatAndSelect(Mechanism):
    """Runs `base` on a random number K of candidates drawn from a public list and releases the best one only.

    K is drawn secretly; candidates are drawn independently with replacement, and the choice uses only the
    outputs of the runs (a score on private data must be part of `base`).

    Attributes:
        base: what one candidate run costs.
        mean_candidates: E[K], at least 1.
        candidate_count: `truncated-negative-binomial` or `poisson`.
        shape: eta of the truncated negative binomial (at least 0; 0 logarithmic, 1 geometric); ignored for
            Poisson and then required to be 0.
    """

    kind: ClassVar[str] = "repeat-and-select"
    base: Mechanism
    mean_candidates: float
    candidate_count: str = "truncated-negative-binomial"
    shape: float = 0.0

    def __post_init__(self) -> None:
        _check_parts((self.base,))
        mean = check.positive("mean_candidates", self.mean_candidates, MechanismError)
        check.choice("candidate_count", self.candidate_count, CANDIDATE_COUNTS, MechanismError)
        shape = check.real("shape", self.shape, MechanismError)
        if self.candidate_count == "poisson" and shape != 0:
            raise MechanismError(f"shape {shape:g} has no meaning for a Poisson count; leave it at 0")
        if shape < 0:
            raise MechanismError(f"shape must be at least 0, got {shape:g}")
        if mean < 1 or (self.candidate_count != "poisson" and mean == 1):
            least = "be at least 1" if self.candidate_count == "poisson" else "exceed 1"
            raise MechanismError(
                f"mean_candidates must {least}, got {mean:g}; account a single run by its base"
            )
        if mean > _MOST_CANDIDATES or shape > _MOST_CANDIDATES:
            raise MechanismError(
                f"mean_candidates {mean:g} and shape {shape:g} must be at most {_MOST_CANDIDATES:g}"
            )
        _set(self, mean_candidates=mean, shape=shape, _levels=_deepest((self.base,)))

    @property
    def adjacency(self) -> str:  # type: ignore[override]
        """The adjacency of the base mechanism."""
        return self.base.adjacency


@dataclass(frozen=True)
class CertifiedLastIterate(Mechanism):
    """A mechanism that released its last iterate alone, with the certificate that bounds what it discloses.

    For compositions, where every part has a certificate of its own.

    Attributes:
        base: what happened; it must say that only the last iterate was released.
        certificate: the `ConvexityCertificate` (or its dictionary) that covers `base`.
        delta: where the bounds of the certificate were optimised; the curve holds everywhere.

    Raises:
        MechanismError: a base that released its iterates, or a delta out of range.
        CertificateError: the certificate belongs to another mechanism.
    """

    kind: ClassVar[str] = "certified-last-iterate"
    base: Mechanism
    certificate: Any
    delta: float

    def __post_init__(self) -> None:
        from dptaft_accounting.convexity import ConvexityCertificate

        _check_parts((self.base,))
        if getattr(self.base, "released", None) != "last-iterate":
            raise MechanismError(
                f"{self.base.kind} does not say that only the last iterate was released, which a certificate "
                "needs; leave the certificate out"
            )
        found = self.certificate
        if not isinstance(found, ConvexityCertificate):
            found = ConvexityCertificate.from_dict(found)
        found.check(self.base)
        delta = check.positive("delta", self.delta, MechanismError)
        if delta >= 1:
            raise MechanismError(f"delta must lie strictly between 0 and 1, got {delta:g}")
        _set(self, certificate=found, delta=delta)

    def __hash__(self) -> int:
        return hash((self.kind, self.base, self.delta))

    @property
    def adjacency(self) -> str:  # type: ignore[override]
        """The adjacency of the base mechanism."""
        return self.base.adjacency


_KINDS: dict[str, type[Mechanism]] = {
    cls.kind: cls
    for cls in (
        FullBatchGaussian,
        PoissonGaussian,
        CyclicGaussian,
        ObjectivePerturbation,
        SoftmaxObjectivePerturbation,
        OutputPerturbation,
        SequenceComposition,
        ParallelComposition,
        RepeatAndSelect,
        CertifiedLastIterate,
    )
}


def mechanism_from_dict(record: Mapping[str, Any]) -> Mechanism:
    """Rebuilds a record from `Mechanism.to_dict`; unknown kinds and fields are errors.

    >>> mechanism_from_dict({"kind": "full-batch-gaussian", "noise_multiplier": 2.0, "steps": 3}).steps
    3
    """
    return _from_dict(record, 0)


def _from_dict(record: Any, level: int) -> Mechanism:
    kind = record.get("kind") if isinstance(record, Mapping) else record
    if level > _MOST_LEVELS:
        raise MechanismError(f"mechanisms are nested deeper than {_MOST_LEVELS} levels; write them flat")
    if not isinstance(record, Mapping) or not isinstance(kind, str) or kind not in _KINDS:
        raise MechanismError(f"unknown mechanism {kind!r}; known kinds are {', '.join(sorted(_KINDS))}")
    cls = _KINDS[record["kind"]]
    names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(record) - names - {"kind"})
    if unknown:
        raise MechanismError(
            f"{record['kind']} has no field {unknown[0]!r}; known fields: {', '.join(sorted(names))}"
        )
    values = {name: record[name] for name in names if name in record}
    if isinstance(values.get("parts"), (list, tuple)):
        values["parts"] = tuple(_from_dict(part, level + 1) for part in values["parts"])
    if "base" in values:
        values["base"] = _from_dict(values["base"], level + 1)
    if isinstance(values.get("noise_multiplier"), list):
        values["noise_multiplier"] = tuple(values["noise_multiplier"])
    try:
        return cls(**values)
    except TypeError as error:
        raise MechanismError(f"{record['kind']} is incomplete: {error}") from None

"""The curves of a report, computed from the record of a statement: errors, delta, steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dptaft_accounting import PrivacyStatement, best_bound, mechanism_from_dict
from dptaft_accounting.bounds import BoundReport
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.mechanisms import CyclicGaussian, FullBatchGaussian, Mechanism, PoissonGaussian

Points = tuple[tuple[float, float], ...]
_COMPOSITION = "composition"


@dataclass(frozen=True)
class Curves:
    """What the plots show; every value is an upper bound of the privacy loss (a lower bound of errors).

    Attributes:
        tradeoff: (false-positive rate, smallest false-negative rate) of any membership test.
        delta: name of the bound -> (delta, epsilon).
        steps: name of the bound -> (steps, epsilon at the claim's delta); empty for one-shot mechanisms.
    """

    tradeoff: Points
    delta: dict[str, Points]
    steps: dict[str, Points]


def curves(statement: PrivacyStatement) -> Curves:
    """Compute all curves of a statement.

    Raises:
        AccountingError: the record cannot be accounted.
    """
    mechanism = mechanism_from_dict(statement.mechanism["record"])
    raw = statement.accounting.get("certificate")
    certificate = None if raw is None else ConvexityCertificate.from_dict(raw)
    delta, size = statement.claim["delta"], statement.claim["records_per_unit"]
    report = best_bound(mechanism, certificate, delta=delta, records_per_unit=size)
    alphas = np.concatenate([np.geomspace(1e-6, 0.02, 10), np.linspace(0.03, 0.999, 50)])
    tradeoff = tuple((float(a), report.profile.beta(float(a))) for a in alphas)
    return Curves(tradeoff, _over_delta(report), _over_steps(mechanism, certificate, delta, size))


def _shown(report: BoundReport) -> list[str]:
    """Composition, and the best bound where that is another one."""
    return [_COMPOSITION] if report.name == _COMPOSITION else [report.name, _COMPOSITION]


def _over_delta(report: BoundReport) -> dict[str, Points]:
    deltas = np.geomspace(1e-10, 1e-2, 33)
    found = {}
    for name in _shown(report):
        bound = report.named(name)
        if bound is not None:
            pairs = [(float(d), bound.profile.epsilon(float(d))) for d in deltas]
            found[name] = tuple((d, e) for d, e in pairs if math.isfinite(e))
    return found


def _over_steps(
    mechanism: Mechanism, certificate: ConvexityCertificate | None, delta: float, size: int
) -> dict[str, Points]:
    """Epsilon if the same training had been planned with fewer steps."""
    found: dict[str, list[tuple[float, float]]] = {}
    for shorter, proof in _shorter(mechanism, certificate):
        try:
            report = best_bound(shorter, proof, delta=delta, records_per_unit=size)
        except AccountingError:
            continue
        for name in _shown(report):
            bound = report.named(name)
            if bound is not None and math.isfinite(bound.epsilon):
                label = name if name == _COMPOSITION else "last iterate"
                found.setdefault(label, []).append((float(getattr(shorter, "steps", 1)), bound.epsilon))
    if set(found) == {_COMPOSITION, "last iterate"}:  # where composition is the better one, both agree
        known = dict(found["last iterate"])
        found["last iterate"] = [(t, known.get(t, e)) for t, e in found[_COMPOSITION]]
    return {name: tuple(points) for name, points in found.items() if len(points) > 1}


def _shorter(
    mechanism: Mechanism, certificate: ConvexityCertificate | None
) -> Iterator[tuple[Mechanism, ConvexityCertificate | None]]:
    if isinstance(mechanism, CyclicGaussian):
        for epochs in _counts(mechanism.epochs, 24):
            shorter = dataclasses.replace(mechanism, epochs=epochs)
            yield shorter, _cut(certificate, shorter.steps)
    elif isinstance(mechanism, FullBatchGaussian):
        for steps in _counts(mechanism.steps, 40):
            noise = mechanism.noise_multiplier
            cut = noise[:steps] if isinstance(noise, tuple) else noise
            yield dataclasses.replace(mechanism, steps=steps, noise_multiplier=cut), _cut(certificate, steps)
    elif isinstance(mechanism, PoissonGaussian):
        for steps in _counts(mechanism.steps, 12 if certificate is None else 5):
            yield dataclasses.replace(mechanism, steps=steps), _cut(certificate, steps)


def _counts(total: int, points: int) -> list[int]:
    return sorted({max(1, round(total * k / points)) for k in range(1, points + 1)})


def _cut(certificate: ConvexityCertificate | None, steps: int) -> ConvexityCertificate | None:
    if certificate is None:
        return None
    sizes = certificate.step_size
    return dataclasses.replace(
        certificate, steps=steps, step_size=sizes[:steps] if isinstance(sizes, tuple) else sizes
    )

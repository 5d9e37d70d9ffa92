"""Objective perturbation of generalised linear losses: its hockey-stick curve."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dptaft_accounting.mechanisms import ObjectivePerturbation
from dptaft_accounting.profiles import DeltaCurve
from dptaft_accounting.tradeoff import mu_to_delta


@dataclass(frozen=True)
class ObjectivePerturbationProfile(DeltaCurve):
    """Curve of one exactly solved problem with a generalised linear loss (Redberg, Koskela, Wang 2023).

    With e = eps - |log(1 - beta/lambda)| and e^ = e - L^2/(2 sigma^2):
    delta = 2 H(e, L/sigma) where e^ >= 0, else 1 - exp(e^) + 2 exp(e^) H(L^2/(2 sigma^2), L/sigma).
    Below |log(1 - beta/lambda)| the chord of the curve in e^eps is used.
    """

    gradient_bound: float
    hessian_bound: float
    regularization: float
    noise_std: float

    @classmethod
    def of(cls, mechanism: ObjectivePerturbation) -> ObjectivePerturbationProfile:
        """Reads the constants of one problem from the record."""
        return cls(
            mechanism.gradient_bound, mechanism.hessian_bound, mechanism.regularization, mechanism.noise_std
        )

    def delta(self, epsilon: float) -> float:
        """Evaluates the theorem."""
        mu = self.gradient_bound / self.noise_std
        left = epsilon - abs(math.log1p(-self.hessian_bound / self.regularization))
        if left < 0:
            # the curve is convex in e^eps and 1 at e^eps = 0: below the threshold its chord is above it
            return 1 + math.exp(left) * (self.delta(epsilon - left) - 1)
        threshold = mu * mu / 2
        if left >= threshold:
            return min(1.0, 2 * mu_to_delta(mu, left))
        gap = left - threshold
        return min(1.0, -math.expm1(gap) + 2 * math.exp(gap) * mu_to_delta(mu, threshold))

"""Objective perturbation: hockey-stick curves for generalised linear losses and for softmax cross-entropy.

The multi-class bound is derived here; the change of variables is that of Chaudhuri, Monteleoni, Sarwate 2011
and Kifer, Smith, Thakurta 2012.

**Setting.** F sums the losses of the other records plus (lambda/2)|theta|^2. The record in question adds
l(theta) = log(1 + sum_{c != y} exp(a + (J_c - J_y) theta)). With v_c = J_c - J_y (v_y = 0) its gradient is
g = sum_c p_c v_c for a probability vector p that depends on theta, and its Hessian A is the covariance of v
under p, of rank at most C - 1. All |v_c| and |v_c - v_d| are at most the diameter D. The minimiser of F + <b,
theta> determines b = -grad F(theta), so theta has density N(b; 0, sigma^2 I) det(Hessian of F); likewise with
the record, where H + A stands for H >= lambda I. N(.;.) is the normal density.

**With the record against without it** (theta drawn with it, b ~ N(0, sigma^2 I) its noise). The privacy loss
is

    log det(I + H^-1 A) + (|g|^2 + 2 <b, g>) / (2 sigma^2).

Since g is the mean of v under p, |g|^2 = sum_c p_c |v_c|^2 - tr A, so with l_c = (|v_c|^2 + 2 <b, v_c>)/(2
sigma^2) the loss is sum_c p_c l_c - tr A/(2 sigma^2) + log det(I + H^-1 A), hence at most

    max_c l_c + kappa,   kappa = sup_A [log det(I + A/lambda) - tr A/(2 sigma^2)],   l_y = 0.

However p depends on b, the v_c do not, so l_c ~ N(m^2/2, m^2) with m = |v_c|/sigma is the privacy loss of a
Gaussian mechanism. The trace of A is half the mean squared distance of two independent draws of v, at most
tau = D^2 (1 - 1/C)/2; with k = C - 1 eigenvalues, each of which counts a concave function, the worst ones are
equal: kappa = k [log(1 + x/lambda) - x/(2 sigma^2)] at x = 2 sigma^2 - lambda, clipped to [0, tau/k].

**Without against with** (theta drawn without it): the loss is (|g|^2 - 2 <b, g>)/(2 sigma^2) - log det(I +
H^-1 A), at most max_c l_c with -b for b. The same bound holds with kappa = 0.

**Curve.** delta(eps) <= E[(1 - e^(eps - kappa - max(0, max_c l_c)))_+], and a maximum is at most the sum:

    delta(eps) <= H(eps - kappa, m_out) + (C - 1) H(eps - kappa, sqrt(m_out^2 + D^2/sigma^2)).

Here the returned point is at most t/lambda from the minimiser (strong convexity) and gets Gaussian noise s,
which releases, given the minimiser, a Gaussian mechanism of parameter m_out = 2 t/(lambda s): its curve at
eps minus the loss above, averaged, gives the two terms, for every real eps - kappa.

**Replace-one.** With p, v of one record and q, w of the other, g - g' is the mean of v_c - w_d under the
product of p and q, of covariance trace tr A + tr A'. The same steps give C^2 - 1 differences that are not
zero, each of norm at most 2 D, and the same kappa.

The factor C - 1 is the price of multi-class; two classes pay none, and the factor 2 of the general theorem
for generalised linear losses vanishes because a logistic loss pushes one way only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from dptaft_accounting.errors import MechanismError
from dptaft_accounting.mechanisms import ObjectivePerturbation, SoftmaxObjectivePerturbation
from dptaft_accounting.profiles import DeltaCurve
from dptaft_accounting.tradeoff import mu_to_delta

_UP = 1 + 1e-12
_NO_CHORD = 1e-3
_LEAST_KNEE = 0.01
_KNEES = 64


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
        mu = _UP * self.gradient_bound / self.noise_std
        # the difference of the constants is exact where they are close, unlike that of 1 and their ratio
        left = epsilon + math.log((self.regularization - self.hessian_bound) / self.regularization)
        if left < 0:
            # the curve is convex in e^eps and 1 at e^eps = 0: below the threshold its chord is above it
            return 1 + math.exp(left) * (self.delta(epsilon - left) - 1)
        threshold = mu * mu / 2
        if left >= threshold:
            return min(1.0, 2 * mu_to_delta(mu, left))
        gap = left - threshold
        return min(1.0, (-math.expm1(gap) + 2 * math.exp(gap) * mu_to_delta(mu, threshold)) * _UP)


@dataclass(frozen=True)
class SoftmaxObjectiveProfile(DeltaCurve):
    """Curve of one softmax problem: H(eps - kappa, m_out) + alternatives * H(eps - kappa, m); see the module.

    Attributes:
        mu: m, Gaussian parameter of one vertex of the gradient's polytope together with the output noise.
        output_mu: m_out, of the output noise alone (0 for an exact minimiser).
        shift: kappa, what the Jacobian of the change of variables may add.
        alternatives: number of vertices, C - 1 (C^2 - 1 for replace-one).
    """

    mu: float
    output_mu: float
    shift: float
    alternatives: int

    @classmethod
    def of(cls, mechanism: SoftmaxObjectivePerturbation) -> SoftmaxObjectiveProfile:
        """Computes the parameters of the theorem, rounded up."""
        lam, variance = mechanism.regularization, mechanism.noise_std * mechanism.noise_std
        if variance == 0 or lam * mechanism.output_noise_std == 0 < mechanism.gradient_tolerance:
            raise MechanismError(f"noise_std {mechanism.noise_std:g} is too small to be accounted; add noise")
        output = 0.0
        if mechanism.gradient_tolerance > 0:
            output = 2 * mechanism.gradient_tolerance / (lam * mechanism.output_noise_std)
        mu = math.hypot(mechanism.sensitivity * mechanism.diameter / mechanism.noise_std, output)
        classes, rank = mechanism.classes, mechanism.classes - 1
        trace = mechanism.diameter * mechanism.diameter * (1 - 1 / classes) / 2
        x = min(max(2 * variance - lam, 0.0), trace / rank)
        # at the maximum, where a rounded x does not matter; the two terms nearly cancel for small x
        shift = rank * max(0.0, math.log1p(x / lam) - x / (2 * variance) + 1e-15 * x / lam)
        vertices = classes**2 - 1 if mechanism.adjacency == "replace-one" else rank
        return cls(mu * _UP, output * _UP, shift * _UP, vertices)

    def delta(self, epsilon: float) -> float:
        """Evaluates the theorem, or the chord around epsilon 0 where that is smaller."""
        left = epsilon - self.shift
        found = mu_to_delta(self.output_mu, left) + self.alternatives * mu_to_delta(self.mu, left)
        if found < _NO_CHORD or epsilon < 0:
            return min(1.0, found)
        return min(1.0, found, self._chord(epsilon))

    def _chord(self, epsilon: float) -> float:
        """At most this between -a and a: the true curve is convex in e^eps and known at both ends.

        Both directions have the same bound, so delta(-a) = 1 - e^-a (1 - delta'(a)) with delta' the other
        direction.
        """
        a, top = self._knee
        if epsilon >= a:
            return 1.0
        low, bottom = math.exp(-a), -math.expm1(-a) + math.exp(-a) * top
        share = (math.exp(epsilon) - low) / (math.exp(a) - low)
        return (bottom + share * (top - bottom)) * _UP

    @cached_property
    def _knee(self) -> tuple[float, float]:
        """Epsilon a whose chord to -a is lowest at 0, and delta there; any a would be valid."""
        best, at = (0.0, 1.0), 1.0
        for k in range(_KNEES):
            a = _LEAST_KNEE * 1.12**k
            left = a - self.shift
            delta = mu_to_delta(self.output_mu, left) + self.alternatives * mu_to_delta(self.mu, left)
            middle = (math.expm1(a) + 2 * delta) / (math.exp(a) + 1)
            if middle < at:
                best, at = (a, min(1.0, delta)), middle
        return best

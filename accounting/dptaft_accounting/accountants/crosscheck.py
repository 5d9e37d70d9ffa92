"""Independent second opinions on composition: dp-accounting (PLD) and prv-accountant.

A peer that fails, or that has a known defect on the input, gives no cross-check; it never gives an epsilon
of its own to a claim. A peer whose *optimistic* value exceeds ours proves an error, and the claim is refused.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version

from dptaft_accounting import _checks as check
from dptaft_accounting.accountants.gaussian import gaussian_mu
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.mechanisms import Mechanism, PoissonGaussian

_INTERVAL = 1e-4
_LARGEST_LATTICE = 2e6
_NEAR = 0.01  # relative distance within which two values agree
_FAR = 0.5
_SMALL = 1e-3  # absolute, what a lattice of 1e-4 may cost a peer
_LARGEST_EPSILON = 300.0  # dp-accounting 0.6 sums exp(-loss) without scaling, which underflows


@dataclass(frozen=True)
class CrossCheck:
    """What a peer says about epsilon by composition.

    Attributes:
        accountant: name of the peer.
        version: its installed version.
        epsilon: its upper bound, None where it gave none.
        lower: a value that the true epsilon cannot be below, None where it gave none.
        note: `agrees` (see `distance`), how far apart the values are, or why there is no cross-check.
    """

    accountant: str
    version: str
    epsilon: float | None
    lower: float | None
    note: str


def cross_checks(mechanism: Mechanism, delta: float, epsilon: float) -> tuple[CrossCheck, ...]:
    """Compares our composition epsilon with the peers that know the mechanism.

    Args:
        mechanism: what happened.
        delta: of the claim.
        epsilon: our upper bound by composition.

    Raises:
        AccountingError: a peer's lower value exceeds our upper bound; nothing may be claimed.
    """
    results = [_guard("dp-accounting", _dp_accounting, mechanism, delta)]
    if isinstance(mechanism, PoissonGaussian):
        results.append(_guard("prv-accountant", _prv_accountant, mechanism, delta))
    for result in results:
        if result.lower is not None and result.lower > epsilon * (1 + 1e-6):
            raise AccountingError(
                f"{result.accountant} shows epsilon above {result.lower:.6g}, our bound is {epsilon:.6g}; "
                "no claim is made, report this mechanism as a defect"
            )
    return tuple(_compared(result, epsilon) for result in results)


def distance(stated: float, lower: float, upper: float) -> float:
    """How far a bound may be from a value that lies in [lower, upper], relative to the bound; on both sides.

    Below 0.01 the two agree: neither can hide an error of the mechanism larger than that.

    >>> round(distance(2.0, 1.9, 2.1), 6), distance(2.0, 2.0, 2.0)
    (0.0495, 0.0)
    """
    if stated <= 0:
        return 0.0 if upper <= _SMALL else math.inf
    return max(0.0, stated - lower - _SMALL, upper - stated - _SMALL) / stated


def _compared(result: CrossCheck, epsilon: float) -> CrossCheck:
    """Says how far the peer's value may be from ours, where it has one."""
    if result.epsilon is None or result.lower is None:
        return result
    apart = distance(epsilon, result.lower, result.epsilon)
    note = "agrees" if apart <= _NEAR else f"within {100 * apart:.2g} % of the epsilon by composition"
    if apart > _FAR:
        least = max(0.0, result.lower)
        note = f"no comparison: the peer's value lies between {least:.4g} and {result.epsilon:.4g}"
    return replace(result, note=note)


@lru_cache(maxsize=256)
def _guard(
    name: str, peer: Callable[[Mechanism, float], tuple[float, float]], mechanism: Mechanism, delta: float
) -> CrossCheck:
    try:
        with _quiet():
            lower, upper = peer(mechanism, delta)
    except Exception as error:  # a third party's failure of any kind is the absence of a cross-check
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return CrossCheck(name, version(name), None, None, f"no cross-check: {reason[:160]}")
    if max(lower, upper) > _LARGEST_EPSILON:
        note = "no cross-check: the peer loses precision at this epsilon"
        return CrossCheck(name, version(name), None, None, note)
    if not (math.isfinite(upper) and math.isfinite(lower)) or lower > upper:
        return CrossCheck(name, version(name), None, None, "no cross-check: no finite value")
    return CrossCheck(name, version(name), check.round_up(upper), lower, "agrees")


@contextmanager
def _quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _dp_accounting(mechanism: Mechanism, delta: float) -> tuple[float, float]:
    """Optimistic and pessimistic epsilon, larger of both directions."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    def epsilon(pessimistic: bool) -> float:
        mu = gaussian_mu(mechanism)
        if mu is not None:
            if mu * (mu + 8) / 2 > _LARGEST_EPSILON:
                return math.inf
            # connect-the-dots and privacy buckets on a lattice that stays small for large mu
            interval = max(_INTERVAL, (mu + 1) * (mu + 20) / _LARGEST_LATTICE)
            return float(
                pld.from_gaussian_mechanism(
                    1 / mu,
                    pessimistic_estimate=pessimistic,
                    value_discretization_interval=interval,
                    use_connect_dots=pessimistic,
                ).get_epsilon_for_delta(delta)
            )
        if not isinstance(mechanism, PoissonGaussian):
            raise AccountingError(f"not available for {mechanism.kind}")
        single = pld.from_gaussian_mechanism(
            mechanism.noise_multiplier,
            sampling_prob=mechanism.sampling_rate,
            pessimistic_estimate=pessimistic,
            value_discretization_interval=_INTERVAL,
            use_connect_dots=pessimistic,
        )
        return float(single.self_compose(mechanism.steps).get_epsilon_for_delta(delta))

    return epsilon(False), epsilon(True)


def _prv_accountant(mechanism: Mechanism, delta: float) -> tuple[float, float]:
    """Lower and upper epsilon of the removal direction alone, the only one that the peer covers."""
    from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant

    if not isinstance(mechanism, PoissonGaussian):
        raise AccountingError(f"not available for {mechanism.kind}")
    prv = PoissonSubsampledGaussianMechanism(
        sampling_probability=mechanism.sampling_rate, noise_multiplier=mechanism.noise_multiplier
    )
    accountant = PRVAccountant(
        prvs=prv, max_self_compositions=mechanism.steps, eps_error=0.05, delta_error=delta * 1e-3
    )
    low, _, high = accountant.compute_epsilon(delta=delta, num_self_compositions=mechanism.steps)
    return float(low), float(high)

"""What a run costs and when a budget is exceeded: the privacy filters of the ledger.

A *filter* decides, before a mechanism runs, whether the budget still permits it, where mechanisms and their
costs may be chosen from all results before them (Rogers, Roth, Ullman, Vadhan 2016, "Privacy odometers and
filters").

Formal guarantees:
    ``gdp``: entry i is mu_i-GDP except with probability r_i, and is admitted only while
    sum mu_i^2 <= B^2 and sum r_i <= R, both fixed in advance. Then everything together satisfies
    delta(eps) <= R + H(eps, B). Without failures this is the filter of Smith and Thakurta 2022, "Fully
    adaptive composition for Gaussian differential privacy" (also Koskela, Tobaben, Honkela 2023, "Individual
    privacy accounting with Gaussian differential privacy"). With failures: some mechanism fails with
    probability at most E[sum r_i] <= R; on the event that none fails, the outcomes have the law of
    mu_i-GDP mechanisms weighted by prod(1 - r_i), a function of the history in [0, 1], and a test weighted so
    gains at most H(eps, B). B and R must be fixed separately: trading one for the other along the way is no
    valid filter, since the analyst could take the failures on some branches and the Gaussian part on others.

    ``sum``: sum eps_i <= eps and sum delta_i <= delta (basic composition, Rogers et al. 2016).

    Runs that are open at the same time count with all that they may still spend; concurrent composition of
    adaptively chosen mechanisms keeps a filter valid (Haney, Shoemate, Tian, Vadhan, Vyrros, Xu, Zhang 2023).

All amounts are decimals with nine significant digits, rounded up; sums are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from dptaft_accounting import _checks as check
from dptaft_accounting.errors import AccountingError

if TYPE_CHECKING:
    from dptaft_accounting.convexity import ConvexityCertificate
    from dptaft_accounting.mechanisms import Mechanism

FILTERS = ("gdp", "sum")
RESIDUAL_SHARE = Decimal("0.01")
"""Part of a budget's delta that pays for the residual deltas of its runs."""
_RUN_RESIDUAL = 1e-4
_UP, _DOWN = Context(prec=9, rounding=ROUND_CEILING), Context(prec=9, rounding=ROUND_FLOOR)
_EXACT = Context(prec=200)
ZERO = Decimal(0)
Part = tuple[str, str]


class LedgerError(AccountingError):
    """A ledger cannot be used as asked; the message names the reason and the remedy."""


class BudgetExceededError(LedgerError):
    """A reservation does not fit the budget; nothing was recorded."""


def decimal_up(value: float | Decimal) -> Decimal:
    """Rounds up to nine significant digits; infinity stays.

    >>> decimal_up(1.23456789012)
    Decimal('1.23456790')
    """
    return Decimal("Infinity") if math.isinf(value) else _UP.create_decimal(Decimal(value))


def stated(value: float) -> Decimal:
    """The decimal number that a user wrote: the shortest one with this float.

    >>> stated(1e-5)
    Decimal('0.00001')
    """
    return Decimal(repr(float(value)))


def float_up(value: Decimal) -> float:
    """The least float that is not below `value`."""
    near = float(value)
    return near if math.isinf(near) or Decimal(near) >= value else math.nextafter(near, math.inf)


def float_down(value: Decimal) -> float:
    """The largest float that is not above `value`."""
    near = float(value)
    return near if Decimal(near) <= value else math.nextafter(near, -math.inf)


def text(value: Decimal) -> str:
    """Canonical text of an amount: plain digits, no trailing zeros.

    >>> text(Decimal("0.71911100")), text(Decimal("1E-9")), text(Decimal("Infinity"))
    ('0.719111', '0.000000001', 'Infinity')
    """
    if not value.is_finite():
        return str(value)
    digits = format(value, "f")
    return (digits.rstrip("0").rstrip(".") if "." in digits else digits) or "0"


def parse_amount(name: str, value: object) -> Decimal:
    """Reads what `text` wrote, and nothing else.

    Raises:
        LedgerError: another form, a negative number, or NaN.
    """
    try:
        amount = Decimal(value) if isinstance(value, str) else None
    except InvalidOperation:
        amount = None
    if amount is None or amount.is_nan() or amount.is_signed() or text(amount) != value:
        raise LedgerError(f"{name} is {value!r}, which is no amount; the ledger is damaged, restore it")
    return amount


@dataclass(frozen=True)
class Cost:
    """What one run costs: a Gaussian reading and one (epsilon, delta) point, both valid.

    Attributes:
        mu: the run is mu-GDP except with probability `residual_delta`; infinity where there is no such
            reading.
        residual_delta: that probability.
        epsilon: the run is (epsilon, delta)-differentially private.
        delta: of that point.
    """

    mu: Decimal
    residual_delta: Decimal
    epsilon: Decimal
    delta: Decimal

    @classmethod
    def of(
        cls,
        mechanism: Mechanism,
        certificate: ConvexityCertificate | None = None,
        *,
        delta: float,
        records_per_unit: int = 1,
    ) -> Cost:
        """Accounts a mechanism by its smallest bound.

        Raises:
            LedgerError: no finite epsilon follows at this delta.
            AccountingError: the mechanism cannot be accounted.

        >>> from dptaft_accounting.mechanisms import FullBatchGaussian
        >>> print(Cost.of(FullBatchGaussian(10.0, steps=25), delta=1e-5).mu)
        0.500000001
        """
        from dptaft_accounting.bounds import best_bound
        from dptaft_accounting.dominating_gaussian import gaussian_view

        report = best_bound(mechanism, certificate, delta=delta, records_per_unit=records_per_unit)
        if math.isinf(report.epsilon):
            raise LedgerError(f"no finite epsilon at delta {delta:g}; raise delta or the noise")
        view = gaussian_view(report.profile, residual_delta=min(1e-9, _RUN_RESIDUAL * delta))
        return cls(
            mu=Decimal("Infinity") if view is None else decimal_up(view.mu),
            residual_delta=ZERO if view is None else decimal_up(stated(view.residual_delta)),
            epsilon=stated(report.epsilon),  # rounded up to nine digits already
            delta=stated(delta),
        )

    @classmethod
    def zero(cls) -> Cost:
        """Nothing."""
        return cls(ZERO, ZERO, ZERO, ZERO)

    def join(self, other: Cost) -> Cost:
        """The larger amount of every field: enough to pay for either."""
        return Cost(*(max(a, b) for a, b in zip(self.amounts(), other.amounts(), strict=True)))

    def within(self, other: Cost) -> bool:
        """Whether no field exceeds that of `other`."""
        return all(a <= b for a, b in zip(self.amounts(), other.amounts(), strict=True))

    def amounts(self) -> tuple[Decimal, ...]:
        """All four fields in order."""
        return self.mu, self.residual_delta, self.epsilon, self.delta

    def to_dict(self) -> dict[str, str]:
        """Decimal strings."""
        return dict(zip(_COST_FIELDS, map(text, self.amounts()), strict=True))

    @classmethod
    def from_dict(cls, record: object) -> Cost:
        """Reads `to_dict` back.

        Raises:
            LedgerError: another form.
        """
        if not isinstance(record, Mapping) or set(record) != set(_COST_FIELDS):
            raise LedgerError(f"a cost holds {', '.join(_COST_FIELDS)}, not {record!r}; restore the ledger")
        return cls(*(parse_amount(name, record[name]) for name in _COST_FIELDS))


_COST_FIELDS = ("mu", "residual_delta", "epsilon", "delta")


@dataclass(frozen=True)
class Load:
    """Sums of costs: squares of mu, residual deltas, epsilons, deltas."""

    mu_squared: Decimal = ZERO
    residual_delta: Decimal = ZERO
    epsilon: Decimal = ZERO
    delta: Decimal = ZERO

    @classmethod
    def of(cls, cost: Cost) -> Load:
        """The load of one run."""
        return cls(_EXACT.multiply(cost.mu, cost.mu), cost.residual_delta, cost.epsilon, cost.delta)

    def __add__(self, other: Load) -> Load:
        return Load(*(_EXACT.add(a, b) for a, b in zip(self.amounts(), other.amounts(), strict=True)))

    def join(self, other: Load) -> Load:
        """The larger amount of every field."""
        return Load(*(max(a, b) for a, b in zip(self.amounts(), other.amounts(), strict=True)))

    def amounts(self) -> tuple[Decimal, ...]:
        """All four fields in order."""
        return self.mu_squared, self.residual_delta, self.epsilon, self.delta

    @property
    def mu(self) -> Decimal:
        """Root of the sum of squares, rounded up."""
        if not self.mu_squared.is_finite():
            return self.mu_squared
        root = self.mu_squared.sqrt(Context(prec=30, rounding=ROUND_CEILING))
        found = _UP.create_decimal(root)
        while _EXACT.multiply(found, found) < self.mu_squared:
            found = found.next_plus(_UP)
        return found

    def epsilon_at(self, delta: float) -> float:
        """Smallest epsilon that the Gaussian reading gives at `delta`, rounded up; infinity where none."""
        from dptaft_accounting.tradeoff import mu_to_epsilon

        left = Decimal(delta) - self.residual_delta
        if left <= 0 or not self.mu_squared.is_finite():
            return math.inf
        return check.round_up(mu_to_epsilon(float_up(self.mu), float_down(left)))


def total_load(charges: Iterable[tuple[Cost, Part | None]]) -> Load:
    """The load on the record that bears most.

    Entries on different parts of one public partition touch different records, so the partition counts with
    its heaviest part; entries on everything, and different partitions, add up (parallel composition;
    McSherry 2009, Theorem 4, for neighbours that differ in one record of one part).

    >>> half = Cost(Decimal("0.5"), ZERO, Decimal(2), Decimal("1e-5"))
    >>> total_load([(half, ("thirds", "1")), (half, ("thirds", "2"))]).mu
    Decimal('0.5')
    """
    whole, partitions = Load(), dict[str, dict[str, Load]]()
    for cost, part in charges:
        if part is None:
            whole = whole + Load.of(cost)
        else:
            parts = partitions.setdefault(part[0], {})
            parts[part[1]] = parts.get(part[1], Load()) + Load.of(cost)
    for parts in partitions.values():
        heaviest = Load()
        for load in parts.values():
            heaviest = heaviest.join(load)
        whole = whole + heaviest
    return whole


@dataclass(frozen=True)
class Budget:
    """A limit that is declared before the data is used.

    Build it by `Budget.from_epsilon` or `Budget.from_mu`.

    Attributes:
        filter: ``gdp`` or ``sum``.
        epsilon: of the claim for all runs together.
        delta: of the same claim.
        mu: B, the limit on the root of sum mu_i^2 (``gdp``), else zero.
        residual_delta: R, the limit on the sum of residual deltas (``gdp``), else zero.
        adjacency: what neighbouring data sets are.
        unit: what one protected unit is, in words.
    """

    filter: str
    epsilon: Decimal
    delta: Decimal
    mu: Decimal
    residual_delta: Decimal
    adjacency: str
    unit: str

    def __post_init__(self) -> None:
        from dptaft_accounting.mechanisms import ADJACENCIES

        check.choice("filter", self.filter, FILTERS, LedgerError)
        check.choice("adjacency", self.adjacency, ADJACENCIES, LedgerError)

    @classmethod
    def from_epsilon(
        cls,
        epsilon: float,
        delta: float,
        *,
        filter: str = "gdp",
        adjacency: str = "zero-out",
        unit: str = "one training record",
    ) -> Budget:
        """A limit on the total (epsilon, delta).

        With ``gdp``, one hundredth of delta pays for residual deltas and B follows from the rest.

        >>> print(Budget.from_epsilon(3.0, 1e-5).mu)
        0.718757041
        """
        check.positive("epsilon", epsilon, LedgerError)
        check.probability("delta", delta, LedgerError)
        mu = residual = ZERO
        if filter == "gdp":
            from dptaft_accounting.tradeoff import epsilon_to_mu

            residual = _DOWN.multiply(stated(delta), RESIDUAL_SHARE)
            rest = float_down(stated(delta) - residual)
            mu = _DOWN.create_decimal(Decimal(epsilon_to_mu(float(epsilon), rest)))
        return cls(filter, stated(epsilon), stated(delta), mu, residual, adjacency, unit)

    @classmethod
    def from_mu(
        cls, mu: float, delta: float, *, adjacency: str = "zero-out", unit: str = "one training record"
    ) -> Budget:
        """A limit B on the root of sum mu_i^2; epsilon is read off at `delta`.

        >>> print(Budget.from_mu(0.7, 1e-5).epsilon)
        2.91137869
        """
        check.positive("mu", mu, LedgerError)
        check.probability("delta", delta, LedgerError)
        limit, residual = stated(mu), _DOWN.multiply(stated(delta), RESIDUAL_SHARE)
        epsilon = Load(_EXACT.multiply(limit, limit), residual).epsilon_at(delta)
        return cls("gdp", decimal_up(epsilon), stated(delta), limit, residual, adjacency, unit)

    def permits(self, load: Load) -> bool:
        """Whether the filter admits this total."""
        if self.filter == "sum":
            return load.epsilon <= self.epsilon and load.delta <= self.delta
        return load.mu_squared <= _EXACT.multiply(self.mu, self.mu) and (
            load.residual_delta <= self.residual_delta
        )

    def epsilon_of(self, load: Load) -> float:
        """What a total amounts to, in the epsilon of this budget's claim, rounded up."""
        if self.filter == "sum":
            return float_up(load.epsilon)
        return Load(load.mu_squared, max(load.residual_delta, self.residual_delta)).epsilon_at(
            float_down(self.delta)
        )

    def remaining_mu(self, load: Load) -> Decimal:
        """Largest mu that still fits, rounded down (``gdp``)."""
        left = max(ZERO, _EXACT.subtract(_EXACT.multiply(self.mu, self.mu), load.mu_squared))
        return _DOWN.create_decimal(left.sqrt(Context(prec=30, rounding=ROUND_FLOOR)))

    def largest_epsilon(self, load: Load, delta: float, cost: Cost | None = None) -> float:
        """Largest epsilon at `delta` of one more run that fits, rounded down; 0 where none does.

        Args:
            load: what counts already.
            delta: of the run.
            cost: of a run of the same kind; its excess over an exactly Gaussian one is taken off. None: an
                exactly Gaussian run (full batch).
        """
        if self.filter == "sum":
            fits = _EXACT.add(load.delta, stated(delta)) <= self.delta
            return float_down(max(ZERO, _EXACT.subtract(self.epsilon, load.epsilon))) if fits else 0.0
        from dptaft_accounting.tradeoff import epsilon_to_mu, mu_to_epsilon

        room = float_down(self.remaining_mu(load))
        if cost is not None:
            if load.residual_delta + cost.residual_delta > self.residual_delta or not cost.mu.is_finite():
                return 0.0
            room /= max(1.0, float_up(cost.mu) / epsilon_to_mu(float(cost.epsilon), float(cost.delta)))
        if room <= 1e-9:
            return 0.0
        found = Context(prec=5, rounding=ROUND_FLOOR).create_decimal(Decimal(mu_to_epsilon(room, delta)))
        while found > 0 and epsilon_to_mu(float(found), delta) > room * (1 - 1e-8):
            found = found.next_minus(Context(prec=5, rounding=ROUND_FLOOR))
        return float(found)

    def covers_alone(self, cost: Cost) -> bool:
        """Whether the budget's claim follows from a single run by its own (epsilon, delta)."""
        return cost.epsilon <= self.epsilon and cost.delta <= self.delta

    def to_dict(self) -> dict[str, str]:
        """Text fields only."""
        amounts = {name: text(getattr(self, name)) for name in _BUDGET_AMOUNTS}
        return {"filter": self.filter, "adjacency": self.adjacency, "unit": self.unit, **amounts}

    @classmethod
    def from_dict(cls, record: object) -> Budget:
        """Reads `to_dict` back.

        Raises:
            LedgerError: another form.
        """
        names = {"filter", "adjacency", "unit", *_BUDGET_AMOUNTS}
        if not isinstance(record, Mapping) or set(record) != names:
            raise LedgerError(
                f"a budget holds {', '.join(sorted(names))}, not {record!r}; restore the ledger"
            )
        amounts: dict[str, Any] = {name: parse_amount(name, record[name]) for name in _BUDGET_AMOUNTS}
        return cls(filter=record["filter"], adjacency=record["adjacency"], unit=record["unit"], **amounts)


_BUDGET_AMOUNTS = ("epsilon", "delta", "mu", "residual_delta")


def counts_under(adjacency: str, account: str) -> bool:
    """Whether a cost accounted for one adjacency is valid, as it is, for the neighbours of an account.

    Every cost is valid for its own adjacency. Under zero-out all are: a record replaced by nothing changes
    a clipped sum by at most C (replace-one allows 2C), and a mechanism that is private under add-remove
    divides by public constants, so that a null record and no record are the same. Nothing else converts
    without a loss: zero-out discloses the number of records, and a replacement is two changes.

    >>> counts_under("replace-one", "zero-out"), counts_under("zero-out", "replace-one")
    (True, False)
    """
    return account in (adjacency, "zero-out")

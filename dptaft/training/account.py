"""Where a run's privacy is charged: the seam between training and a budget ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dptaft_accounting import ConvexityCertificate, Mechanism


@dataclass(frozen=True)
class Spending:
    """All that a run has done, or will have done, to the records so far.

    Attributes:
        mechanism: cumulative record; None for a run without noise, which no budget can pay.
        certificate: proof of convexity, where there is one.
        delta: of the run's claim.
    """

    mechanism: Mechanism | None
    certificate: ConvexityCertificate | None
    delta: float


class Account(Protocol):
    """Takes what a run may spend, then what it has spent.

    Formal guarantees:
        `reserve` comes before any private image is read, `authorise` returns only when the amount is durable
        and comes before the steps that it covers, so an account never shows less than what was spent.
    """

    def reserve(self, plan: Spending) -> None:
        """Claim the whole plan; raises ValueError where it does not fit."""

    def authorise(self, spent: Spending) -> None:
        """Charge all steps so far and the ones that are about to run."""

    def commit(self, spent: Spending) -> Mapping[str, Any]:
        """Charge what was executed for good; returns fields for the statement's composition group."""

    def close(self) -> None:
        """End; without a commit, what was authorised stays charged and the rest is given back."""


class NoAccount:
    """Charges nothing and says why.

    Args:
        reason: goes into the statement.

    >>> NoAccount("declined by the user").commit(Spending(None, None, 1e-5))
    {'ledger': 'none: declined by the user'}
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def reserve(self, plan: Spending) -> None:
        """Nothing to claim."""

    def authorise(self, spent: Spending) -> None:
        """Nothing to charge."""

    def commit(self, spent: Spending) -> Mapping[str, Any]:
        """The reason."""
        return {"ledger": f"none: {self.reason}"}

    def close(self) -> None:
        """Nothing to give back."""

"""Whether the batches of a repeated run look like those of the sampler that is claimed.

The auditor owns the repetition and so may look at its batches. Poisson sampling makes both the batch sizes
and the number of steps a record takes part in vary binomially; a shuffled data set makes neither vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVEL = 1e-9
"""False alarms of the two-sided variance tests; they use the normal approximation of counts."""
_LEAST_VARIANCE = 2.0


@dataclass(frozen=True)
class SamplingCheck:
    """Outcome: what was claimed, and what is wrong with the batches (None where nothing is)."""

    claimed: str
    problem: str | None

    @property
    def holds(self) -> bool:
        """Whether the batches are those of the claimed sampler, as far as can be seen."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"claimed": self.claimed, "holds": self.holds, "problem": self.problem}


def check_sampling(
    kind: str, rate: float, records: int, batch_sizes: Sequence[Sequence[int]], participations: Tensor
) -> SamplingCheck:
    """Compare batches with the claimed sampler.

    Args:
        kind: ``full-batch``, ``poisson`` or ``cyclic-partition``.
        rate: probability of one record per step.
        records: records and canary slots together.
        batch_sizes: of every step, per repetition.
        participations: how often each canary slot was drawn.

    >>> full = check_sampling("full-batch", 1.0, 5, [[5, 5]], torch.tensor([2, 2]))
    >>> full.holds, check_sampling("full-batch", 1.0, 5, [[5, 4]], torch.tensor([2, 1])).problem
    (True, 'a step left records out')
    """
    steps = len(batch_sizes[0])
    if kind == "full-batch" or rate >= 1:
        complete = all(size == records for sizes in batch_sizes for size in sizes)
        return SamplingCheck(kind, None if complete else "a step left records out")
    if kind == "cyclic-partition":
        epochs = round(steps * rate)
        even = bool((participations == epochs).all())
        return SamplingCheck(kind, None if even else "a record did not take part once per epoch")
    sizes = torch.tensor([size for run in batch_sizes for size in run], dtype=torch.float64)
    counts = participations.double()
    problem = _dispersion("batch sizes", sizes, records * rate, records * rate * (1 - rate)) or _dispersion(
        "participations of a record", counts, steps * rate, steps * rate * (1 - rate)
    )
    return SamplingCheck(kind, problem)


def _dispersion(what: str, values: Tensor, mean: float, variance: float) -> str | None:
    """Chi-square test of sum (x - mean)^2 / variance in both directions, where the approximation is good."""
    if len(values) < 20 or variance < _LEAST_VARIANCE:
        return None
    from scipy.stats import chi2

    statistic = float(((values - mean).square() / variance).sum())
    low, high = float(chi2.cdf(statistic, len(values))), float(chi2.sf(statistic, len(values)))
    if min(low, high) > LEVEL / 2:
        return None
    word, ratio = "too little" if low < high else "too much", statistic / len(values)
    return f"the {what} vary {word} for Poisson sampling: {ratio:.3g} times the binomial variance"

"""Whether the noise that a repeated run really added is as strong as claimed, at every step, in every tensor.

The auditor knows the records and the coins, so what is left of a noised sum after subtracting both is the
noise itself. Its squares are compared with the declared variance, and each step's noise with that of the step
before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LEVEL = 1e-9
"""False alarms over the whole audit, shared by all tests of one repetition."""


@dataclass(frozen=True)
class NoiseCheck:
    """Outcome.

    Attributes:
        declared: standard deviation of the noise on the sum that the claim needs at the first step.
        ratio: measured over declared standard deviation, over all steps and weights.
        problem: what is wrong, None where nothing is.
    """

    declared: float
    ratio: float
    problem: str | None

    @property
    def holds(self) -> bool:
        """Whether the noise is at least as strong as declared, as far as can be seen."""
        return self.problem is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"declared": self.declared, "ratio": self.ratio, "holds": self.holds, "problem": self.problem}


class NoiseMeter:
    """Collects the noise of a repetition step by step.

    Args:
        stds: declared standard deviation at every step.
    """

    def __init__(self, stds: tuple[float, ...]) -> None:
        self._stds = stds
        self._squares, self._count, self._step = 0.0, 0, 0
        self._last: dict[str, Tensor] = {}
        self._problem: str | None = None

    def add(self, noise: Mapping[str, Tensor]) -> None:
        """Test the noise of the next step, tensor by tensor."""
        from scipy.stats import chi2, norm

        std, tests = self._stds[self._step], len(self._stds) * len(noise) * 2
        for name, value in noise.items():
            scaled = (value / std).double()
            squares, size = float(scaled.square().sum()), scaled.numel()
            self._squares, self._count = self._squares + squares, self._count + size
            if chi2.cdf(squares, size) < LEVEL / tests:
                self._note(f"{name} has {math.sqrt(squares / size):.3g} times its noise", self._step)
            if name in self._last:
                product = float((scaled * self._last[name]).sum()) / math.sqrt(size)
                if size >= 100 and norm.sf(abs(product)) * 2 < LEVEL / tests:
                    self._note(f"{name} uses noise that the step before used", self._step)
            self._last[name] = scaled
        self._step += 1

    def _note(self, what: str, step: int) -> None:
        if self._problem is None:
            self._problem = f"{what} at step {step + 1}"

    def result(self) -> NoiseCheck:
        """The outcome after the last step."""
        ratio = math.sqrt(self._squares / self._count) if self._count else 0.0
        return NoiseCheck(self._stds[0], ratio, self._problem)

"""Privacy accounting for convex and general training mechanisms; never imports torch.

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dptaft_accounting.bounds import Bound, BoundReport, best_bound
    from dptaft_accounting.calibration import (
        Target,
        calibrate_noise_multiplier,
        calibrate_sampling_rate,
        calibrate_steps,
    )
    from dptaft_accounting.convexity import ConvexityCertificate
    from dptaft_accounting.dominating_gaussian import GaussianView, gaussian_view
    from dptaft_accounting.errors import AccountingError
    from dptaft_accounting.ledger import Budget, BudgetExceededError, Cost, Ledger, LedgerError
    from dptaft_accounting.mechanisms import (
        CyclicGaussian,
        FullBatchGaussian,
        Mechanism,
        ObjectivePerturbation,
        OutputPerturbation,
        ParallelComposition,
        PoissonGaussian,
        RepeatAndSelect,
        SequenceComposition,
        SoftmaxObjectivePerturbation,
        mechanism_from_dict,
    )
    from dptaft_accounting.policy import Policy, Violation
    from dptaft_accounting.statement import PrivacyStatement
    from dptaft_accounting.tradeoff import GaussianProfile, epsilon_to_mu, mu_to_delta, mu_to_epsilon

_HOMES = {
    "bounds": ("Bound", "BoundReport", "best_bound"),
    "calibration": ("Target", "calibrate_noise_multiplier", "calibrate_sampling_rate", "calibrate_steps"),
    "convexity": ("ConvexityCertificate",),
    "errors": ("AccountingError",),
    "dominating_gaussian": ("GaussianView", "gaussian_view"),
    "ledger": ("Budget", "BudgetExceededError", "Cost", "Ledger", "LedgerError"),
    "mechanisms": (
        "CertifiedLastIterate",
        "CyclicGaussian",
        "FullBatchGaussian",
        "Mechanism",
        "ObjectivePerturbation",
        "OutputPerturbation",
        "ParallelComposition",
        "PoissonGaussian",
        "RepeatAndSelect",
        "SequenceComposition",
        "SoftmaxObjectivePerturbation",
        "mechanism_from_dict",
    ),
    "policy": ("Policy", "Violation"),
    "statement": ("PrivacyStatement",),
    "tradeoff": ("GaussianProfile", "epsilon_to_mu", "mu_to_delta", "mu_to_epsilon"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


__all__ = [
    "AccountingError",
    "Bound",
    "BoundReport",
    "Budget",
    "BudgetExceededError",
    "CertifiedLastIterate",
    "ConvexityCertificate",
    "Cost",
    "CyclicGaussian",
    "FullBatchGaussian",
    "GaussianProfile",
    "GaussianView",
    "Ledger",
    "LedgerError",
    "Mechanism",
    "ObjectivePerturbation",
    "OutputPerturbation",
    "ParallelComposition",
    "PoissonGaussian",
    "Policy",
    "PrivacyStatement",
    "RepeatAndSelect",
    "SequenceComposition",
    "SoftmaxObjectivePerturbation",
    "Target",
    "Violation",
    "best_bound",
    "calibrate_noise_multiplier",
    "calibrate_sampling_rate",
    "calibrate_steps",
    "epsilon_to_mu",
    "gaussian_view",
    "mechanism_from_dict",
    "mu_to_delta",
    "mu_to_epsilon",
]

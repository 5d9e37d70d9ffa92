"""Who was in the training set? Likelihood-ratio attacks on the released model, against its trade-off curve.

The attacker has the released weights, images that were and images that were not trained on, and shadow
models. Both attacks score one record by its logit-scaled confidence phi = log p_y - log(1 - p_y):

LiRA   Carlini et al. 2022, "Membership inference attacks from first principles": log-likelihood ratio of
       phi under normal distributions fitted to shadow models with and without the record.
RMIA   Zarifzadeh, Liu, Shokri 2024, "Low-cost high-power membership inference attacks", offline: p_y over its
       mean in shadow models without the record, compared with that ratio of population records.

No attack may, on average over records, have a higher true-positive rate at a false-positive rate than the
claim allows. These are measurements, not bounds with a confidence level: the audit is what gives a verdict.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dptaft.auditing.canaries import AuditSetupError
from dptaft.auditing.recipe import Recipe, load_recipe
from dptaft.auditing.shadows import train_shadows
from dptaft.tangent.operator import Features
from dptaft_accounting.tradeoff import Profile, tpr_at_fpr

if TYPE_CHECKING:
    from dptaft.data import ImageData
    from dptaft.runs import Run

Array = NDArray[np.float64]

FPRS = (1e-3, 1e-2, 1e-1)
_OFFLINE = 0.3
_LEAST_SHADOWS = 4


@dataclass(frozen=True)
class MembershipResult:
    """Scores of both attacks on members and non-members.

    Attributes:
        members: attack -> scores of records that were trained on.
        others: attack -> scores of records that were not.
        profile: the claim's curve for whoever holds the released weights.
        shadows: number of shadow models.
        run: name of the run.
    """

    members: dict[str, Array]
    others: dict[str, Array]
    profile: Profile
    shadows: int
    run: str

    def tpr(self, attack: str, fpr: float) -> float:
        """True-positive rate at the smallest threshold whose false-positive rate is at most `fpr`."""
        others = np.sort(self.others[attack])[::-1]
        allowed = int(fpr * len(others))
        threshold = others[allowed] if allowed < len(others) else -np.inf
        return float((self.members[attack] > threshold).mean())

    def auc(self, attack: str) -> float:
        """Chance that a member scores higher than a non-member, ties counted half."""
        from scipy.stats import rankdata

        inside, outside = self.members[attack], self.others[attack]
        ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)].sum()
        return float((ranks - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the bound beside every rate."""
        attacks = {
            name: {"auc": self.auc(name), "tpr_at_fpr": [{"fpr": f, "tpr": self.tpr(name, f)} for f in FPRS]}
            for name in self.members
        }
        count = len(next(iter(self.others.values())))
        bound = [{"fpr": f, "tpr": tpr_at_fpr(self.profile, f)} for f in FPRS]
        return {
            "attacks": attacks,
            "bound": bound,
            "shadows": self.shadows,
            "members": len(next(iter(self.members.values()))),
            "non_members": count,
            "smallest_fpr": 1 / count,
            "summary": [self._line(name) for name in self.members],
        }

    def _line(self, attack: str) -> str:
        rates = ", ".join(
            f"{self.tpr(attack, f):.3f} (at most {tpr_at_fpr(self.profile, f):.3f}) at FPR {f:g}"
            for f in FPRS
        )
        return f"{attack}: TPR {rates}; AUC {self.auc(attack):.3f}"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw both attacks and the bound, true- over false-positive rate, both logarithmic (.png, .svg)."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        count = len(next(iter(self.others.values())))
        low = 0.5 / count
        grid = np.geomspace(low, 1.0, 200)[:-1]
        bound = [tpr_at_fpr(self.profile, float(f)) for f in grid]
        axes.fill_between(grid, bound, 1.0, color="0.88", label="excluded by the claim")
        axes.plot(grid, bound, color="0.25", label="bound of the claim")
        for attack, style in zip(self.members, ("-", "--"), strict=False):
            fprs = np.arange(1, count + 1) / count
            axes.plot(fprs, [self.tpr(attack, float(f)) for f in fprs], style, label=attack)
        axes.plot(grid, grid, ":", color="0.5", label="guessing")
        axes.set(xscale="log", yscale="log", xlim=(low, 1), ylim=(low, 1))
        axes.set(xlabel="false-positive rate", ylabel="true-positive rate")
        axes.set_title(f"Membership inference on {self.run}", fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=9)
        figure.savefig(Path(path), dpi=150)


def membership_attack(
    run: str | os.PathLike[str] | Run,
    *,
    data: str | ImageData | None = None,
    shadows: int = 16,
    progress: Callable[[str, int, int], None] | None = None,
) -> MembershipResult:
    """Attack the released model of a run.

    Args:
        run: a finished run with a claim, or its folder.
        data: its records, with evaluation images as non-members; by default what the run names.
        shadows: number of shadow models, each trained on a random half of all images.
        progress: called with (stage, done, total).

    Raises:
        ValueError: no evaluation images, or a model that cannot be trained in batches.
    """
    from dptaft.runs import load_run

    loaded = load_run(run) if isinstance(run, str | os.PathLike) else run
    recipe = load_recipe(loaded, data)
    if recipe.data.name == "synthetic" or recipe.data.evaluation is None or not len(recipe.data.evaluation):
        raise AuditSetupError(
            "membership inference needs the run's records and evaluation images beside them"
        )
    if shadows < _LEAST_SHADOWS:
        raise AuditSetupError(f"shadows must be at least {_LEAST_SHADOWS}, got {shadows}")
    learner = recipe.prepared.learner
    parts = [learner.features(split, progress, "reading images").features for split in _splits(recipe)]
    features, labels = Features.concat(parts), torch.cat([split.labels for split in _splits(recipe)])
    inside = _halves(shadows, len(labels))
    weights = train_shadows(
        recipe.prepared,
        recipe.request,
        features,
        labels,
        inside,
        None if progress is None else lambda done, total: progress("shadow models", done, total),
    )
    phi = torch.stack(
        [
            confidence(learner.logits(features, {name: value[i] for name, value in weights.items()}), labels)
            for i in range(shadows)
        ]
    )
    target = confidence(learner.logits(features, loaded.predictor.weights), labels)
    scores = {"LiRA": lira(target, phi, inside), "RMIA": rmia(target, phi, inside)}
    count = len(recipe.data.train)
    return MembershipResult(
        members={name: value[:count] for name, value in scores.items()},
        others={name: value[count:] for name, value in scores.items()},
        profile=recipe.family("last-iterate").curve(1.0),
        shadows=shadows,
        run=loaded.path.name,
    )


def _splits(recipe: Recipe) -> list[Any]:
    return [recipe.data.train, recipe.data.evaluation]


def _halves(models: int, records: int) -> Tensor:
    """(models, records) bool: every record is in exactly half of the models (rounded down)."""
    order = torch.rand(models, records).argsort(0)
    return order < models // 2


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit-scaled confidence z_y - log sum_{j != y} e^(z_j), (n,) in float64.

    >>> confidence(torch.tensor([[2.0, 0.5]]), torch.tensor([0])).item()
    1.5
    """
    z = logits.double()
    own = z.gather(1, labels[:, None])[:, 0]
    others = z.scatter(1, labels[:, None], -torch.inf)
    return own - torch.logsumexp(others, 1)


def lira(target: Tensor, shadow: Tensor, inside: Tensor) -> Array:
    """Log-likelihood ratio of `target` (n,) under normals fitted to `shadow` (models, n), common variance.

    With few shadow models the variance is pooled over all records, as in the fixed-variance form of LiRA.
    """
    with_it, without = _mean(shadow, inside), _mean(shadow, ~inside)
    residual = shadow - torch.where(inside, with_it, without)
    variance = residual.square().mean().clamp(min=1e-12)
    ratio = ((target - without).square() - (target - with_it).square()) / (2 * variance)
    return np.asarray(ratio.numpy(), dtype=np.float64)


def rmia(target: Tensor, shadow: Tensor, inside: Tensor) -> Array:
    """Share of records z whose ratio p(z)/mean p(z) is below that of x; the mean from models without x.

    The mean over models with and without the record is approximated from those without as
    ((1+a) p_out + (1-a))/2, a = 0.3.
    """
    out = _mean(torch.sigmoid(shadow), ~inside)
    usual = ((1 + _OFFLINE) * out + (1 - _OFFLINE)) / 2
    ratio = (torch.sigmoid(target) / usual).numpy()
    return np.searchsorted(np.sort(ratio), ratio, side="left") / len(ratio)


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum(0) / where.sum(0)

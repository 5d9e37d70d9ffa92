"""Canaries: contributions whose presence an auditor tries to see in what training releases.

A *coordinate* canary is a gradient along one weight, longer than the clip norm at every step; canaries in
different weights never meet, so each is a worst case of its own, and thousands fit in one run. A *record*
canary has features and a label and goes through the engine like any record: mislabelled images, images of the
user's own, or *tangent* canaries, whose loss is linear, so that their gradient is one fixed direction in the
span of the tangent features (convex, hence legal under a convexity certificate).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dptaft.learner import Learner
from dptaft.tangent.operator import Features
from dptaft.training.clipping import Adjacency, ClippedSum, clip_factors
from dptaft.training.fused import gram_norms
from dptaft.training.losses import Loss

KINDS = ("coordinate", "tangent", "mislabelled", "images")
_LONGER = 8.0
"""Raw norm of a coordinate canary in clip norms: clipping has to act."""


class AuditSetupError(ValueError):
    """An audit cannot be set up as asked; the message names the value and the remedy."""


class Canaries(Protocol):
    """m canaries, each included or not by a coin; excluded ones contribute nothing, or their opposite.

    Under replace-one adjacency an excluded canary is another record in the same place.
    """

    kind: str
    exercises: str
    independent: bool

    def __len__(self) -> int: ...

    def clipped_sum(self, theta: Mapping[str, Tensor], slots: Tensor, coins: Tensor) -> ClippedSum:
        """Sum of the clipped contributions of the sampled `slots`, as their coins say."""

    def prepare_step(self, theta: Mapping[str, Tensor]) -> None:
        """Remember what the scores of this step need."""

    def project(self, residual: Mapping[str, Tensor]) -> Tensor:
        """Score (m,) of one step in units of the sensitivity: expectation 0 without, 1 with a worst case."""

    def along(self, difference: Mapping[str, Tensor]) -> Tensor:
        """Inner product (m,) of a difference of weights with every contribution at the prepared weights."""


class CoordinateCanaries:
    """One weight each, chosen at random without looking at data.

    Args:
        parameters: name -> trained weights (for shapes and device).
        count: number of canaries, at most the number of weights.
        l2_clip_norm: clip norm of the run.
        adjacency: of the run.

    Raises:
        AuditSetupError: more canaries than weights.
    """

    kind = "coordinate"
    exercises = (
        "sampler, clip factors, merging of sums, sensitivity, noise, normaliser, optimiser and schedules; "
        "the model's own gradients and norms are left to the sensitivity check and to record canaries"
    )
    independent = True

    def __init__(
        self, parameters: Mapping[str, Tensor], count: int, l2_clip_norm: float, adjacency: Adjacency
    ) -> None:
        sizes = {name: p.numel() for name, p in parameters.items()}
        total = sum(sizes.values())
        if not 1 <= count <= total:
            raise AuditSetupError(f"there is room for 1 to {total} coordinate canaries, got {count}")
        self._like = {name: p.detach() for name, p in parameters.items()}
        self._clip, self._adjacency = l2_clip_norm, adjacency
        chosen = torch.randperm(total, generator=_fresh_generator())[:count]
        self._places: dict[str, tuple[Tensor, Tensor]] = {}
        start = 0
        for name, size in sizes.items():
            slots = ((chosen >= start) & (chosen < start + size)).nonzero().squeeze(1)
            device = parameters[name].device
            self._places[name] = (slots.to(device), (chosen[slots] - start).to(device))
            start += size
        self._count = count

    def __len__(self) -> int:
        return self._count

    def clipped_sum(self, theta: Mapping[str, Tensor], slots: Tensor, coins: Tensor) -> ClippedSum:
        """Clip a raw gradient of `_LONGER` clip norms along each sampled canary's weight."""
        raw = torch.full((len(slots),), _LONGER * self._clip)
        clipped = clip_factors(raw, self._clip) * raw
        amounts = torch.zeros(self._count)
        if self._adjacency == "replace-one":
            amounts[slots] = torch.where(coins[slots], clipped, -clipped)
        else:
            amounts[slots] = torch.where(coins[slots], clipped, torch.zeros_like(clipped))
        value = {}
        for name, like in self._like.items():
            slots_here, places = self._places[name]
            flat = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
            flat[places] = amounts.to(like.device)[slots_here].to(like.dtype)
            value[name] = flat.reshape(like.shape)
        return ClippedSum(value, self._clip, self._adjacency)

    def prepare_step(self, theta: Mapping[str, Tensor]) -> None:
        """Nothing: the contribution is the same at every step."""

    def project(self, residual: Mapping[str, Tensor]) -> Tensor:
        """The residual at each canary's weight, over the sensitivity."""
        read = self._read(residual) / self._clip
        return (read + 1.0) / 2.0 if self._adjacency == "replace-one" else read

    def along(self, difference: Mapping[str, Tensor]) -> Tensor:
        """The difference at each canary's weight, times the clip norm."""
        return self._clip * self._read(difference)

    def _read(self, values: Mapping[str, Tensor]) -> Tensor:
        out = torch.zeros(self._count, dtype=torch.float64)
        for name, (slots, places) in self._places.items():
            out[slots.cpu()] = values[name].detach().reshape(-1)[places].double().cpu()
        return out


@dataclass(frozen=True)
class LinearLoss(Loss):
    """``scale * (mean z - z_y)``: its derivative is the same at all weights, so its gradient is a direction.

    Convex with curvature 0; `scale` must be large enough for clipping to act at every record.
    """

    scale: float = 1.0
    name = "linear"

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        picked = torch.gather(logits, -1, labels.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return self.scale * (logits.mean(-1) - picked)

    def cotangent(self, logits: Tensor, labels: Tensor) -> Tensor:  # noqa: D102
        hot = torch.nn.functional.one_hot(labels, logits.shape[-1]).to(logits.dtype)
        return self.scale * (1.0 / logits.shape[-1] - hot).expand(logits.shape)

    def cotangent_bound(self, num_classes: int) -> float:  # noqa: D102
        return self.scale * math.sqrt(1.0 - 1.0 / num_classes)

    def smoothness(self, num_classes: int) -> float:  # noqa: D102
        return 0.0


class RecordCanaries:
    """Records with features and a label, through an engine of the run's own kind.

    Under replace-one adjacency the excluded canary is the same image with another label.

    Args:
        kind: ``tangent``, ``mislabelled`` or ``images``.
        learner: of the run; only its fused engine keeps canaries apart from records.
        features: (m) canaries.
        labels: (m,) int64.
        loss: of the run, or a linear one.
        l2_clip_norm: of the run.
        adjacency: of the run.

    Raises:
        AuditSetupError: an engine that is not the fused one.
    """

    independent = False

    def __init__(
        self,
        kind: str,
        learner: Learner,
        features: Features,
        labels: Tensor,
        *,
        loss: Loss,
        l2_clip_norm: float,
        adjacency: Adjacency,
    ) -> None:
        if learner.engine_kind != "fused":
            raise AuditSetupError(
                f"record canaries need the fused engine, this run used {learner.engine_kind}; "
                "use coordinate canaries"
            )
        self.kind = kind
        self.exercises = (
            "sampler, features, per-record norms, clipping, sums, noise, normaliser, optimiser and schedules"
            + ("" if kind == "tangent" else ", and the run's loss")
        )
        self.features, self.labels, self.loss = features, labels, loss
        self._learner, self._clip, self._replace = learner, l2_clip_norm, adjacency == "replace-one"
        self._others = (labels + 1) % learner.operator.num_classes
        both = Features.concat([features, features]) if self._replace else features
        marks = torch.cat([labels, self._others]) if self._replace else labels
        self._engine = learner.engine(both, marks, loss=loss, l2_clip_norm=l2_clip_norm, adjacency=adjacency)
        self._gram = learner.operator.gram(features)
        self._cotangents, self._alternatives = self._clipped_cotangents(None)

    def __len__(self) -> int:
        return len(self.labels)

    def clipped_sum(self, theta: Mapping[str, Tensor], slots: Tensor, coins: Tensor) -> ClippedSum:
        """The engine's clipped sum over the included canaries (and the alternatives of the others)."""
        chosen = slots[coins[slots]]
        if self._replace:
            chosen = torch.cat([chosen, slots[~coins[slots]] + len(self)])
        return self._engine.clipped_sum(theta, chosen)

    def _clipped_cotangents(self, theta: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """c_i r_i of every canary, and of its alternative (zero unless replace-one)."""
        operator = self._learner.operator
        if theta is None:
            theta = {name: torch.zeros_like(p) for name, p in self._learner.parameters.items()}
        logits = operator.jvp(self.features, theta)
        if not self._learner.config.centered:
            logits = logits + operator.offset(self.features)
        own = self._clip_rows(self.loss.cotangent(logits, self.labels.to(logits.device)))
        if not self._replace:
            return own, torch.zeros_like(own)
        return own, self._clip_rows(self.loss.cotangent(logits, self._others.to(logits.device)))

    def _clip_rows(self, cotangents: Tensor) -> Tensor:
        norms = gram_norms(self._gram, cotangents)
        return clip_factors(norms, self._clip).unsqueeze(-1) * cotangents

    def prepare_step(self, theta: Mapping[str, Tensor]) -> None:
        """Gradients of all canaries at the iterate, as cotangents."""
        with torch.no_grad():
            self._cotangents, self._alternatives = self._clipped_cotangents(theta)

    def project(self, residual: Mapping[str, Tensor]) -> Tensor:
        """``(<residual - g', d> - |d|^2/2)/S^2 + 1/2`` with d = g - g' the step's two contributions."""
        d = self._cotangents - self._alternatives
        inner = (self._learner.operator.jvp(self.features, residual) * d).sum(-1).double()
        against = torch.einsum("nc,ncd,nd->n", (self._alternatives + d / 2).double(), self._gram, d.double())
        sensitivity = self._clip * (2.0 if self._replace else 1.0)
        return ((inner - against) / sensitivity**2 + 0.5).cpu()

    def along(self, difference: Mapping[str, Tensor]) -> Tensor:
        """Inner products through one tangent product with the canaries' features."""
        d = self._cotangents - self._alternatives
        return (self._learner.operator.jvp(self.features, difference) * d).sum(-1).double().cpu()


def secret_coins(count: int) -> Tensor:
    """Independent fair coins from operating-system entropy, (count,) bool."""
    from dptaft.training.noise import NoiseSource

    return (NoiseSource().integers(count) & 1).bool()


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator

"""Shadow models: many weight vectors on one members axis, each trained on its own random half of the records.

One pass over the cached features serves all of them; a 0/1 mask on the cotangents says whose record counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from dptaft.auditing.canaries import AuditSetupError
from dptaft.tangent.operator import Features
from dptaft.training.clipping import Adjacency, ClippedSum, clip_factors
from dptaft.training.fused import gram_norms
from dptaft.training.losses import LOSSES
from dptaft.training.noise import NoiseSource
from dptaft.training.optimizers import IterateAverage, build_optimizer, member_parameters
from dptaft.training.plan import Request
from dptaft.training.preparation import Prepared

_CHUNK = 128


def train_shadows(
    prepared: Prepared,
    request: Request,
    features: Features,
    labels: Tensor,
    members: Tensor,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Train one model per row of `members` with the recipe's noise, clipping, optimiser and rate.

    Args:
        prepared: of the run; a tangent model with the fused engine.
        request: of the run.
        features: (n) cached constants.
        labels: (n,) classes.
        members: (models, n) bool, which records each model trains on.
        progress: called with (steps done, steps).

    Returns:
        Weights with a leading axis of models. The public normaliser is scaled to the number of records a
        model has, so that steps are as long as the run's.

    Raises:
        AuditSetupError: a run without batched weights.
    """
    learner, plan = prepared.learner, prepared.plan
    if learner.engine_kind != "fused":
        raise AuditSetupError("shadow models need a tangent model with the fused engine")
    count = len(members)
    stacked = {name: torch.zeros(count, *p.shape).to(p) for name, p in learner.parameters.items()}
    parameters = [member_parameters(stacked, i) for i in range(count)]
    share = float(members.double().mean()) * len(labels) * plan.sampling.rate
    adjacency = cast(Adjacency, plan.adjacency)
    optimizers = [
        build_optimizer(
            own,
            prepared.optimizer,
            noise_multiplier=plan.noise_over_sensitivity,
            l2_clip_norm=prepared.l2_clip_norm,
            expected_batch_size=share,
            source=NoiseSource(),
            adjacency=adjacency,
        )
        for own in parameters
    ]
    averages = [IterateAverage(prepared.optimizer, plan.steps) for _ in range(count)]
    sums = _Sums(prepared, request, features, labels)
    for step in range(plan.steps):
        mask = members & (torch.rand(members.shape) < plan.sampling.rate)
        clipped = sums.clipped(stacked, mask, adjacency)
        for i, optimizer in enumerate(optimizers):
            optimizer.set_step(prepared.optimizer, plan.noise_over_sensitivity, step, plan.steps)
            optimizer.private_step(clipped.member(i))
            averages[i].update(parameters[i], step)
        if progress is not None:
            progress(step + 1, plan.steps)
    values = [average.value(own) for average, own in zip(averages, parameters, strict=True)]
    return {name: torch.stack([value[name] for value in values]) for name in stacked}


class _Sums:
    """Clipped sums of all models over their own records, with the product's norms and factors."""

    def __init__(self, prepared: Prepared, request: Request, features: Features, labels: Tensor) -> None:
        self._operator = prepared.learner.operator
        self._centered = prepared.learner.config.centered
        self._clip = prepared.l2_clip_norm
        self._loss = LOSSES[request.model.loss]()
        self._pieces = [slice(start, start + _CHUNK) for start in range(0, len(labels), _CHUNK)]
        self._features = [features.index(piece) for piece in self._pieces]
        self._labels = labels.to(prepared.learner.device)
        self._grams = [self._operator.gram(part) for part in self._features]

    @torch.no_grad()
    def clipped(self, theta: Mapping[str, Tensor], mask: Tensor, adjacency: Adjacency) -> ClippedSum:
        """One sum per model; `mask` is (models, n)."""
        total = {name: torch.zeros_like(value) for name, value in theta.items()}
        for piece, part, gram in zip(self._pieces, self._features, self._grams, strict=True):
            logits = self._operator.jvp(part, theta)
            if not self._centered:
                logits = logits + self._operator.offset(part)
            cotangents = self._loss.cotangent(logits, self._labels[piece])
            factors = clip_factors(gram_norms(gram, cotangents), self._clip) * mask[:, piece].to(logits)
            for name, value in self._operator.vjp(part, factors.unsqueeze(-1) * cotangents).items():
                total[name] += value
        return ClippedSum(total, self._clip, adjacency, len(mask))

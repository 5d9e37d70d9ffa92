"""The recipe repeated with canaries under secret coins: scores for each kind of observer.

Training is the product's own loop. Features are computed once; a repetition costs its private steps alone.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dptaft.auditing.canaries import (
    AuditSetupError,
    Canaries,
    CoordinateCanaries,
    LinearLoss,
    RecordCanaries,
    secret_coins,
)
from dptaft.auditing.engine import AuditLearner, StepObserver, watching
from dptaft.auditing.noise_check import NoiseCheck
from dptaft.auditing.recipe import Recipe, smooth_images
from dptaft.data import ArrayPixels, ImageData, Split
from dptaft.learner import Cached, Learner
from dptaft.training.account import NoAccount
from dptaft.training.clipping import Adjacency, l2_sensitivity
from dptaft.training.losses import LOSSES
from dptaft.training.steps import Trained, train_steps

_MOST = 50_000
_RECORDS = 200
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Observed:
    """Scores and coins of all canaries of all repetitions, and what the sampler did.

    Attributes:
        scores: (m x repetitions,), large where a canary looks included.
        included: the coins.
        participations: steps in which each canary slot was sampled.
        batch_sizes: per repetition, the number of sampled records and slots of every step.
        noise: per repetition, the check of the noise that was added.
    """

    scores: Tensor
    included: Tensor
    participations: Tensor
    batch_sizes: tuple[tuple[int, ...], ...]
    noise: tuple[NoiseCheck, ...]


class Repeater:
    """Repeats one recipe; the features of its records are computed at construction.

    Args:
        recipe: of the run.
        progress: called with (stage, done, total).
    """

    def __init__(self, recipe: Recipe, progress: Report | None = None) -> None:
        self.recipe, self._progress = recipe, progress
        self.learner: Learner = recipe.prepared.learner
        self.cached = self.learner.features(recipe.data.train, progress, "reading images")
        self._start = {name: p.detach().clone() for name, p in self.learner.parameters.items()}

    @property
    def adjacency(self) -> Adjacency:
        """Of the run."""
        return cast(Adjacency, self.recipe.prepared.plan.adjacency)

    def canaries(self, kind: str, count: int | None, images: ImageData | None = None) -> Canaries:
        """Canaries of one kind.

        Args:
            kind: one of `dptaft.auditing.canaries.KINDS`.
            count: how many; None takes a default for the kind.
            images: for ``images``: the user's own, with their labels.

        Raises:
            AuditSetupError: a kind that cannot be built for this run.
        """
        clip, records = self.recipe.prepared.l2_clip_norm, len(self.recipe.data.train)
        room = records - 1 if self._take_places(kind) else _MOST
        if count is not None and count > room:
            raise AuditSetupError(
                f"{kind} canaries take the places of records here: at most {room}, got {count}"
            )
        if kind == "coordinate":
            most = min(sum(p.numel() for p in self._start.values()), room, _MOST)
            return CoordinateCanaries(self._start, count or most, clip, self.adjacency)
        split = self._canary_records(kind, count or min(_RECORDS, max(2, room // 2)), images)
        features = self.learner.features(split, self._progress, "reading canaries").features
        loss = LOSSES[self.recipe.request.model.loss]()
        if kind == "tangent":
            loss = LinearLoss(scale=1.0)
            norms = self.learner.operator.gradient_norms(
                features,
                loss.cotangent(self.learner.operator.offset(features), split.labels.to(self.learner.device)),
            )
            loss = LinearLoss(scale=2.0 * clip / float(norms[norms > 0].min()))
        return RecordCanaries(
            kind,
            self.learner,
            features,
            split.labels,
            loss=loss,
            l2_clip_norm=clip,
            adjacency=self.adjacency,
        )

    def _take_places(self, kind: str) -> bool:
        """Whether canaries stand in for records instead of joining them.

        A convexity certificate bounds the curvature of a batch by the number of records in it. Canaries with
        curvature, or that change how records fall into cyclic batches, must not add to that number.
        """
        curved = kind in ("mislabelled", "images")
        cyclic = self.recipe.prepared.plan.sampling.kind == "cyclic-partition"
        return self.recipe.certificate is not None and (curved or cyclic)

    def num_records(self, canaries: Canaries) -> int:
        """How many records are trained on beside the canaries."""
        records = len(self.recipe.data.train)
        return records - len(canaries) if self._take_places(canaries.kind) else records

    def _canary_records(self, kind: str, count: int, images: ImageData | None) -> Split:
        classes = len(self.recipe.data.classes)
        if kind == "images":
            if images is None:
                raise AuditSetupError("canaries of kind images need images; give --canary-data")
            return images.train.take(range(min(count, len(images.train))))
        held_out = self.recipe.data.evaluation
        if kind == "mislabelled" and held_out is not None and len(held_out):
            chosen = held_out.take(range(min(count, len(held_out))))
        else:
            chosen = Split(ArrayPixels(smooth_images(count, seed=1)), torch.arange(count) % classes)
        wrong = torch.randint(1, classes, chosen.labels.shape, generator=torch.Generator().manual_seed(2))
        return Split(chosen.pixels, (chosen.labels + wrong) % classes)

    def observe(self, canaries: Canaries, observer: str, repetitions: int = 1) -> Observed:
        """Train `repetitions` times, each with coins of its own, and score every canary."""
        scores, coins, taken, sizes, noise = [], [], [], [], []
        reference = None if observer == "all-iterates" else self._reference(canaries)
        for number in range(repetitions):
            included = secret_coins(len(canaries))
            watcher = self._watcher(canaries)
            trained = self._train(canaries, included, watcher)
            if reference is None:
                scores.append(watcher.scores)
            elif observer == "last-iterate":
                scores.append(self._moved(canaries, reference, trained.weights))
            else:
                scores.append(self._black_box(canaries, reference, trained.weights))
            coins.append(included)
            taken.append(watcher.participations)
            sizes.append(tuple(watcher.batch_sizes))
            noise.append(watcher.meter.result())
            if self._progress is not None:
                self._progress("auditing", number + 1, repetitions)
        return Observed(torch.cat(scores), torch.cat(coins), torch.cat(taken), tuple(sizes), tuple(noise))

    def _watcher(self, canaries: Canaries) -> StepObserver:
        plan = self.recipe.prepared.plan
        noise = tuple(plan.noise_over_sensitivity * factor for factor in plan.noise_factors)
        hidden = plan.sampling.kind == "poisson" and plan.sampling.rate < 1
        sensitivity = l2_sensitivity(self.recipe.prepared.l2_clip_norm, self.adjacency)
        rate = plan.sampling.rate if hidden else None
        return StepObserver(canaries, noise, plan.normaliser, rate, sensitivity)

    def _train(self, canaries: Canaries, included: Tensor, watcher: StepObserver | None) -> Trained:
        return self._run(self.recipe.prepared, canaries, included, watcher)

    def _run(
        self, prepared: Any, canaries: Canaries, included: Tensor, watcher: StepObserver | None
    ) -> Trained:
        self._reset()
        records = self.num_records(canaries)
        labels = self.recipe.data.train.labels[:records]
        slots = torch.zeros(len(canaries), dtype=labels.dtype)
        learner = AuditLearner(self.learner, records, canaries, included, watcher)
        prepared = replace(prepared, learner=cast(Learner, learner))
        with tempfile.TemporaryDirectory(prefix="dptaft-audit-", dir=_memory_folder()) as folder:
            arguments = (
                prepared,
                self.recipe.request,
                Cached(self.cached.features.index(slice(0, records)), self.cached.digest),
                torch.cat([labels, slots]),
                Path(folder) / "run.partial",
                NoAccount("an audit: its output is not covered by any claim"),
            )
            watch = nullcontext() if watcher is None else watching(watcher, self.learner.parameters)
            try:
                with watch:
                    return train_steps(*arguments)
            finally:
                learner.close()

    def _reset(self) -> None:
        with torch.no_grad():
            for name, p in self.learner.parameters.items():
                p.copy_(self._start[name])
                p.grad = None

    def _reference(self, canaries: Canaries) -> dict[str, Tensor]:
        """Weights of the recipe without noise and without canaries: what an informed observer expects."""
        prepared = self.recipe.prepared
        silent = replace(prepared, plan=replace(prepared.plan, noise_multiplier=0.0))
        nobody = torch.zeros(len(canaries), dtype=torch.bool)
        trained = self._run(silent, canaries, nobody, None)
        return {name: value.detach().clone() for name, value in trained.weights.items()}

    def _moved(
        self, canaries: Canaries, reference: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """How far the weights moved along each canary's descent direction, beyond the reference."""
        canaries.prepare_step(weights)
        return canaries.along({name: reference[name] - weights[name].detach() for name in reference})

    def _black_box(
        self, canaries: Canaries, reference: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """How much smaller each canary's loss is than at the reference; needs predictions alone."""
        if not isinstance(canaries, RecordCanaries):
            raise AuditSetupError("a black-box observer sees losses of records; use mislabelled canaries")
        before, after = (
            canaries.loss.value(self.learner.logits(canaries.features, theta), canaries.labels)
            for theta in (reference, {name: value.detach() for name, value in weights.items()})
        )
        return (before - after).double()


def _memory_folder() -> str | None:
    """Where checkpoints of a repetition go: to memory if there is such a folder; they are never resumed."""
    shared = Path("/dev/shm")
    return str(shared) if shared.is_dir() and os.access(shared, os.W_OK) else None

"""What the runs of a sweep need only once: activations below the trained part, in the fastest layout."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from dptaft.data import Split
from dptaft.features import boundary_of, gather
from dptaft.learner import FEATURE_BATCH, Cached, Learner, PixelDigest, Progress
from dptaft.precision import full_float32
from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.factored import FactoredLastBlock
from dptaft.tangent.operator import Features

MOST_BYTES = 1 << 30
"""Boundary activations are kept while they need at most this many bytes."""

_SHARE_OF_MEMORY = 4


def memory_share(processes: int = 1) -> int:
    """Bytes that the features of one process may take: a quarter of the machine's memory for all together."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (_SHARE_OF_MEMORY * processes)


def use_fastest_layout(learner: Learner, count: int, most_bytes: int) -> None:
    """Store class factors in place of tokens where those of `count` images need at most `most_bytes`.

    Both layouts are the same linear model, up to rounding in float32; with class factors a step takes about
    half the time.
    """
    if not isinstance(learner.operator, CompiledLastBlock) or learner.config.feature_precision != "float32":
        return
    faster = FactoredLastBlock(learner.backbone.model)
    if 4 * faster.scalars_per_example * count <= most_bytes:
        learner.operator = faster


class Boundaries:
    """Boundary activations by split and frozen model: heads of other seeds and other losses share them.

    Args:
        most_bytes: activations of a split are kept in memory up to this size, and computed again otherwise.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most = most_bytes
        self._kept: dict[tuple[object, ...], tuple[Split, list[Tensor], str]] = {}

    @full_float32()
    def features(self, learner: Learner, split: Split, progress: Progress | None, label: str) -> Cached:
        """The features that `Learner.features` gives, from boundary activations computed once."""
        if learner.performance.feature_cache is not None:
            return learner.features(split, progress, label)
        key = (id(split), *_frozen_part(learner))
        digest = PixelDigest()
        if key in self._kept:
            _, batches, value = self._kept[key]
            return Cached(gather((learner.operator.extract(b) for b in batches), len(split)), value)
        kept: list[Tensor] = []

        def parts() -> Iterator[Features]:
            done = 0
            for boundary in self._compute(learner, split, digest):
                if boundary.nbytes / len(boundary) * len(split) <= self._most:
                    kept.append(boundary)
                yield learner.operator.extract(boundary)
                done += len(boundary)
                if progress is not None:
                    progress(label, done, len(split))

        features = gather(parts(), len(split))
        if kept:
            self._kept[key] = (split, kept, digest.value())
        return Cached(features, digest.value())

    @torch.no_grad()
    def _compute(self, learner: Learner, split: Split, digest: PixelDigest) -> Iterator[Tensor]:
        def read(image: Tensor) -> Tensor:
            digest.add(image)
            return learner.backbone.preprocessing(image)

        for images in split.batches(FEATURE_BATCH, read):
            precision = learner.config.feature_precision
            yield boundary_of(learner.tangent, images.to(learner.device), precision)


def _frozen_part(learner: Learner) -> tuple[object, ...]:
    """All that boundary activations depend on, apart from the images."""
    config, cut = learner.config, learner.tangent.cut
    fresh = config.fresh_class_token or config.reinitialised_blocks > 0
    return (
        learner.backbone.name,
        learner.backbone.digest,
        cut.kind,
        cut.block,
        config.feature_precision,
        config.fresh_class_token,
        config.reinitialised_blocks,
        config.seed if fresh else None,
        str(learner.device),
    )

"""Everything below the linearised part, computed once: images to boundary to per-example constants."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dptaft.feature_cache import (
    FeatureCacheError,
    discard_features,
    has_features,
    read_features,
    remove_cache,
    write_features,
)
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features, TangentOperator

__all__ = [
    "FeatureCacheError",
    "boundary_of",
    "build_features",
    "feature_key",
    "gather",
    "keeps_grams",
    "remove_cache",
    "tensors_digest",
]

_logger = logging.getLogger(__name__)
_PRECISIONS = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def build_features(
    batches: Iterable[Tensor],
    count: int,
    model: TangentModel,
    operator: TangentOperator,
    *,
    precision: str = "float32",
    cache: Path | None = None,
    key: str | None = None,
    grams: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Features of all images, in memory or on disk in a cache folder.

    Images stream through the frozen part and the operator's ``extract`` one batch at a time. With
    ``cache``, the batches go to disk as they come, so that memory is bounded by one batch however many
    images there are; a complete entry of the same key is used instead of reading any image, and a damaged
    one is rebuilt with a warning in the log.

    With half ``precision`` the boundary activations are rounded (and saturated, for float16) first and the
    rounded values define the model, at training and at prediction alike: build features for prediction with
    the same precision. All arithmetic on features stays float32 or wider.

    Args:
        batches: preprocessed images (n_b, channels, height, width), in the fixed order of the data.
        count: number of images in all batches.
        model: whose ``boundary`` is applied to every batch.
        operator: from ``tangent_operator(model)``.
        precision: ``float32`` (that of the weights), ``float16`` or ``bfloat16``.
        cache: folder for the features; None keeps them in memory.
        key: from :func:`feature_key`; required with ``cache``.
        grams: keep the Grams of the operator with the features (see :func:`keeps_grams`).
        progress: called with (images done, ``count``) after every batch.

    Raises:
        FeatureCacheError: a full disk or unusable folder, a cache without a key, or a wrong ``count``.
        ValueError: unknown precision, or images that the model does not take.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"unknown feature precision {precision!r}; use {', '.join(_PRECISIONS)}")
    if (cache is None) != (key is None):
        raise FeatureCacheError("a feature cache needs both a folder and a key; pass both or neither")
    parts = _parts(batches, count, model, operator, _PRECISIONS[precision], grams, progress)
    if cache is None or key is None:
        return gather(parts, count)
    if has_features(cache, key):
        try:
            return read_features(cache, key).to(_device(model))
        except FeatureCacheError as error:
            _logger.warning("%s; rebuilding", error)
            discard_features(cache, key)
    write_features(cache, key, parts, count)
    return read_features(cache, key).to(_device(model))


def keeps_grams(bytes_per_example: int, num_classes: int) -> bool:
    """Whether Grams (8 C^2 bytes an example) are worth their place on disk: a quarter of the constants.

    They save one backward pass over every example in every step. Where constants are smaller than that, as
    pooled features are, the pass costs next to nothing.

    >>> keeps_grams(605_184, num_classes=10), keeps_grams(3_072, num_classes=10)
    (True, False)
    """
    return 8 * num_classes**2 <= bytes_per_example / 4


def boundary_of(model: TangentModel, images: Tensor, precision: str = "float32") -> Tensor:
    """Boundary activations of prepared images, rounded as `build_features` rounds them."""
    return _rounded(model.boundary(images), _PRECISIONS[precision])


def feature_key(
    model: TangentModel,
    operator: TangentOperator,
    *,
    preprocessing: Mapping[str, object],
    data: str,
    precision: str = "float32",
    grams: bool = False,
) -> str:
    """SHA-256 of all that features depend on: weights, scope, architecture, preprocessing, data, precision.

    Grams, and the scales of bounded operators, are those of the weights in scope: two scopes with one cut
    (``last:2`` and ``attention:2``) have different keys.

    Args:
        model: the tangent model.
        operator: from ``tangent_operator(model)``.
        preprocessing: JSON-serialisable description of the image preprocessing.
        data: digest of the images in their order (:func:`tensors_digest`, or the source's own fingerprint).
        precision: as for :func:`build_features`.
        grams: as for :func:`build_features`.
    """
    facts = {
        "operator": [operator.kind, getattr(operator, "layout", None)],
        "cut": [model.cut.kind, model.cut.block],
        "in scope": {name: list(shape) for name, shape in operator.parameter_shapes.items()},
        "architecture": _architecture(model.base),
        "weights": tensors_digest(_state(model)),
        "preprocessing": preprocessing,
        "data": data,
        "precision": precision,
        "grams": grams,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors: names, types, shapes and bytes.

    >>> a = tensors_digest({"x": torch.zeros(2)})
    >>> a == tensors_digest({"x": torch.zeros(2)}), a == tensors_digest({"x": torch.zeros(1, 2)})
    (True, False)
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        digest.update(t.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _device(model: TangentModel) -> torch.device:
    return next(model.base.parameters()).device


def _state(model: TangentModel) -> dict[str, Tensor]:
    fresh = {} if model.fresh_token is None else {"fresh_token": model.fresh_token}
    return {f"base.{name}": t for name, t in model.base.state_dict().items()} | fresh


def _architecture(module: nn.Module) -> dict[str, object]:
    """Type and plain settings (heads, eps, pooling, ...) of every submodule, which weights do not tell."""
    described = {}
    for name, part in module.named_modules():
        settings = {k: v for k, v in vars(part).items() if isinstance(v, int | float | str)}
        settings.pop("training", None)
        described[name] = [f"{type(part).__module__}.{type(part).__qualname__}", settings]
    return described


def _parts(
    batches: Iterable[Tensor],
    count: int,
    model: TangentModel,
    operator: TangentOperator,
    dtype: torch.dtype | None,
    grams: bool,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Features]:
    done = 0
    for images in batches:
        part = operator.extract(_rounded(model.boundary(images), dtype))
        yield Features(part.tensors, operator.gram(part)) if grams else part
        done += len(images)
        if progress is not None:
            progress(done, count)


def _rounded(boundary: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return boundary
    largest = torch.finfo(dtype).max
    return boundary.clamp(-largest, largest).to(dtype)


def gather(parts: Iterable[Features], count: int) -> Features:
    """Consecutive parts in memory: tensors are allocated once, so that the peak is one copy and one batch.

    Raises:
        FeatureCacheError: the parts do not hold ``count`` examples.
    """
    tensors: dict[str, Tensor] = {}
    done = 0
    for part in parts:
        if done + len(part) > count:
            raise FeatureCacheError(
                f"more than the announced {count} images arrived; pass their number as count"
            )
        for name, t in part.tensors.items():
            if done == 0:
                tensors[name] = t.new_empty(count, *t.shape[1:])
            tensors[name][done : done + len(part)] = t
        done += len(part)
    if done != count or count == 0:
        raise FeatureCacheError(
            f"{done} images arrived where {count} were announced; pass their number as count"
        )
    return Features(tensors)

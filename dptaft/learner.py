"""A trainable model over a backbone: features, clipping engine, logits; tangent or ordinary fine-tuning."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from dptaft.backbones import Backbone, describe_preprocessing
from dptaft.data import Split
from dptaft.features import boundary_of, build_features, feature_key, keeps_grams
from dptaft.precision import full_float32
from dptaft.tangent.bounded import BoundedOperator
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.cut import Above
from dptaft.tangent.diameter import DiameterOperator, double_operator
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.initialise import reinitialise_blocks
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features, TangentOperator
from dptaft.training.clipping import Adjacency, needs_double
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import Loss
from dptaft.training.opacus_engine import (
    FromBoundary,
    OpacusEngine,
    check_private_modules,
    in_double,
)
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError

Progress = Callable[[str, int, int], None]
FEATURE_BATCH = 128


@dataclass(frozen=True)
class Cached:
    """Features of a split, and the digest of its pixels (private: it identifies the data).

    Attributes:
        features: constants of every image.
        digest: of the pixels of all images.
        blocks: the digests of blocks that `digest` was made from.
    """

    features: Features
    digest: str
    blocks: tuple[bytes, ...] = field(default=(), repr=False)


class Learner:
    """A backbone with trainable weights on top, seen through cached features.

    Args:
        backbone: frozen model with its head.
        model: scope, method, feature precision.
        performance: device and engine.

    Raises:
        PlanError: an engine that the method or model does not have.
        ValueError: a scope that the model does not have, or layers that no per-example clipping bounds.
    """

    def __init__(self, backbone: Backbone, model: ModelConfig, performance: PerformanceConfig) -> None:
        check_private_modules(backbone.model)
        self.backbone, self.config, self.performance = backbone, model, performance
        self.device = resolve_device(performance.device)
        if model.reinitialised_blocks:
            reinitialise_blocks(backbone.model, model.reinitialised_blocks, model.seed)
        self.tangent = TangentModel(
            backbone.model.to(self.device),
            model.scope,
            centered=model.centered,
            fresh_cls_token_seed=model.seed if model.fresh_class_token else None,
        )
        self.engine_kind = self._choose_engine()
        self.operator = self._build_operator()
        self._module, self.parameters = self._build_module()

    @property
    def is_convex(self) -> bool:
        """Whether the logits are linear in the trained weights."""
        return self.config.is_linear

    @property
    def tokens(self) -> int:
        """Number of tokens that the trained part works on."""
        size, channels = self.backbone.preprocessing.size, self.backbone.preprocessing.channels
        with torch.no_grad():
            boundary = self.tangent.boundary(torch.zeros(1, channels, size, size, device=self.device))
        if boundary.ndim == 3:
            return boundary.shape[1]
        patches = getattr(self.backbone.model, "patch_embed", None)
        return getattr(patches, "num_patches", 1) if boundary.ndim == 4 else 1

    @torch.no_grad()
    def blank_features(self, count: int = 1) -> Features:
        """Constants of blank images: their sizes are those of any image."""
        size, channels = self.backbone.preprocessing.size, self.backbone.preprocessing.channels
        images = torch.zeros(count, channels, size, size, device=self.device)
        return self.operator.extract(boundary_of(self.tangent, images, self.config.feature_precision))

    @cached_property
    def bytes_per_record(self) -> int:
        """Bytes of the cached constants of one image, without its Gram."""
        return self.blank_features().nbytes

    @property
    def keeps_grams(self) -> bool:
        """Whether Grams are kept with the features in a cache."""
        used = self.engine_kind == "fused" and not self.config.is_one_shot and self.operator.kind != "head"
        return used and keeps_grams(self.bytes_per_record, self.operator.num_classes)

    def _choose_engine(self) -> str:
        asked = self.performance.engine
        bounded = self.config.unit_jacobian or self.config.is_one_shot
        if bounded and asked in ("hooks", "ghost"):
            raise PlanError(f"engine {asked} does not bound Jacobians; use engine fused")
        if self.config.method == "non-linear":
            if asked == "fused":
                raise PlanError(
                    "the fused engine needs a tangent model; use engine hooks or ghost with non-linear"
                )
            return "hooks" if asked == "auto" else asked
        if asked in ("hooks", "ghost") and not self.tangent.is_dual:
            raise PlanError(
                f"engine {asked} does not see the tangents of {self.backbone.name}; use engine fused"
            )
        return "fused" if asked == "auto" else asked

    def _build_operator(self) -> TangentOperator:
        operator = (
            tangent_operator(self.tangent) if self.engine_kind == "fused" else DualOperator(self.tangent)
        )
        if self.config.is_one_shot:
            return DiameterOperator(operator)
        return BoundedOperator(operator) if self.config.unit_jacobian else operator

    def _build_module(self) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        if self.config.is_linear:
            theta = self.tangent.theta()
            if (
                self.config.unit_jacobian
            ):  # float64: the rounding of an update is no part of the certified step
                theta = {name: nn.Parameter(value.detach().double()) for name, value in theta.items()}
            return FromBoundary(self.tangent), theta
        above = Above(copy.deepcopy(self.backbone.model), self.tangent.cut).requires_grad_(False)
        chosen = {name: above.get_parameter(f"model.{name}") for name in self.tangent.names}
        for parameter in chosen.values():
            parameter.requires_grad_(True)
        return _PlainAbove(above), chosen

    @full_float32()
    def features(self, split: Split, progress: Progress | None = None, label: str = "features") -> Cached:
        """Cached constants of all images of a split, on the device, in memory or in the feature cache."""
        cache, seen = self.performance.feature_cache, PixelDigest()
        if cache is not None:
            for i in range(len(split)):
                seen.add(split.pixels[i])
        key = None if cache is None else self._key(seen.value())
        prepare = self.backbone.preprocessing

        def read(image: Tensor) -> Tensor:
            if cache is None:
                seen.add(image)
            return prepare(image)

        features = build_features(
            (images.to(self.device) for images in split.batches(FEATURE_BATCH, read)),
            len(split),
            self.tangent,
            self.operator,
            precision=self.config.feature_precision,
            cache=None if cache is None else Path(cache),
            key=key,
            grams=key is not None and self.keeps_grams,
            progress=None if progress is None else lambda done, total: progress(label, done, total),
        )
        return Cached(features, seen.value(), seen.blocks())

    def _key(self, pixels: str) -> str:
        return feature_key(
            self.tangent,
            self.operator,
            preprocessing=describe_preprocessing(self.backbone.preprocessing),
            data=pixels,
            precision=self.config.feature_precision,
            grams=self.keeps_grams,
        )

    def engine(
        self, features: Features, labels: Tensor, *, loss: Loss, l2_clip_norm: float, adjacency: Adjacency
    ) -> FusedEngine | OpacusEngine:
        """The engine that computes clipped sums over these examples."""
        size = self.performance.physical_batch_size
        common = {"loss": loss, "l2_clip_norm": l2_clip_norm, "adjacency": adjacency}
        if size is not None:
            common["physical_batch_size"] = size
        labels = labels.to(self.device)
        double = needs_double(adjacency, contracts=self.config.unit_jacobian)
        if self.engine_kind == "fused":
            operator = self._double_operator if double else self.operator
            return FusedEngine(operator, features, labels, centered=self.config.centered, **common)
        module, parameters = self._module, self.parameters
        if double:
            module, parameters = in_double(module, parameters)
        return OpacusEngine(
            module,
            _unmasked(features),
            labels,
            num_classes=self.operator.num_classes,
            parameters=parameters,
            method=self.engine_kind,
            **common,
        )

    @cached_property
    def _double_operator(self) -> TangentOperator:
        """The operator with all products in float64, on the same constants."""
        wide = double_operator(self.operator, self.tangent)
        return BoundedOperator(wide) if isinstance(self.operator, BoundedOperator) else wide

    @torch.no_grad()
    def logits(self, features: Features, weights: Mapping[str, Tensor], batch: int = 512) -> Tensor:
        """Logits (n, C) of cached examples for trained weights, on the CPU."""
        if self.config.is_linear:
            chunks = [features.index(slice(i, i + batch)) for i in range(0, len(features), batch)]
            parts = [self.operator.jvp(chunk, weights) for chunk in chunks]
            if not self.config.centered:
                parts = [
                    part + self.operator.offset(chunk) for part, chunk in zip(parts, chunks, strict=True)
                ]
        else:
            named = {f"above.model.{name}": value for name, value in weights.items()}
            module = self._module.eval()
            parts = [
                torch.func.functional_call(module, named, (features["boundary"][i : i + batch],))
                for i in range(0, len(features), batch)
            ]
        return torch.cat(parts).float().cpu()


def _unmasked(features: Features) -> Tensor:
    """Boundary activations; records that are not finite are NaN again, so that no engine sums them."""
    boundary, finite = features["boundary"], features["finite"]
    if bool(finite.all()):
        return boundary
    return torch.where(finite.view(-1, *[1] * (boundary.ndim - 1)), boundary, float("nan"))


class _PlainAbove(nn.Module):
    """The trainable part of the ordinary model, from cached activations of any precision."""

    def __init__(self, above: Above) -> None:
        super().__init__()
        self.above = above

    def forward(self, boundary: Tensor) -> Tensor:
        return self.above(boundary.to(next(self.above.parameters()).dtype))


def resolve_device(name: str) -> torch.device:
    """``auto`` is a CUDA device where there is one, else the CPU.

    Raises:
        PlanError: an unknown or missing device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise PlanError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


class PixelDigest:
    """Digest of images in order: SHA-256 of the SHA-256 digests of blocks of `FEATURE_BATCH` images.

    Processes that hold whole blocks each can therefore find the digest of all images together.

    >>> parts = PixelDigest(), PixelDigest()
    >>> for i in range(FEATURE_BATCH + 1):
    ...     parts[i // FEATURE_BATCH].add(torch.full((1, 1, 1), float(i)))
    >>> whole = PixelDigest()
    >>> for i in range(FEATURE_BATCH + 1):
    ...     whole.add(torch.full((1, 1, 1), float(i)))
    >>> whole.value() == digest_of_blocks([*parts[0].blocks(), *parts[1].blocks()])
    True
    """

    def __init__(self) -> None:
        self._full: list[bytes] = []
        self._block, self._count = hashlib.sha256(), 0

    def add(self, image: Tensor) -> None:
        """Take in the next image."""
        self._block.update(str(tuple(image.shape)).encode())
        self._block.update(image.contiguous().numpy().tobytes())
        self._count += 1
        if self._count == FEATURE_BATCH:
            self._full.append(self._block.digest())
            self._block, self._count = hashlib.sha256(), 0

    def blocks(self) -> tuple[bytes, ...]:
        """Digests of the blocks so far; the last one may be shorter than the others."""
        return (*self._full, self._block.digest()) if self._count else tuple(self._full)

    def value(self) -> str:
        """Hexadecimal digest of all images so far."""
        return digest_of_blocks(self.blocks())


def digest_of_blocks(blocks: Iterable[bytes]) -> str:
    """Hexadecimal digest of images whose blocks have these digests."""
    return hashlib.sha256(b"".join(blocks)).hexdigest()

"""Prediction with a trained run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dptaft.algebra import HEAD, TRAINED
from dptaft.backbones import load_backbone
from dptaft.data import Split, read_image
from dptaft.learner import Learner
from dptaft.runs import WEIGHTS, RunError
from dptaft.tangent.initialise import initialise_head
from dptaft.training.plan import ModelConfig, PerformanceConfig


@dataclass(frozen=True)
class Prediction:
    """One image's label and the probability of every class.

    Attributes:
        label: name of the most likely class.
        scores: class name -> probability (softmax of the logits).
    """

    label: str
    scores: Mapping[str, float]


class _Given:
    """Images from files or tensors, by number."""

    def __init__(self, images: Sequence[str | os.PathLike[str] | Tensor]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        image = self._images[index]
        return image if isinstance(image, Tensor) else read_image(Path(image))


class Predictor:
    """A learner with trained weights and class names."""

    def __init__(self, learner: Learner, weights: Mapping[str, Tensor], classes: Sequence[str]) -> None:
        self.learner, self.weights, self.classes = learner, dict(weights), tuple(classes)

    def predict(self, images: Sequence[str | os.PathLike[str] | Tensor]) -> list[Prediction]:
        """Labels and scores of images: files, or tensors (1 or 3, height, width) in [0, 1].

        Raises:
            DataError: an image that cannot be read.
        """
        if not images:
            return []
        split = Split(_Given(images), torch.zeros(len(images), dtype=torch.int64))
        scores = self.learner.logits(self.learner.features(split).features, self.weights).softmax(1)
        return [
            Prediction(self.classes[int(row.argmax())], dict(zip(self.classes, row.tolist(), strict=True)))
            for row in scores
        ]


def load_predictor(path: Path, config: Mapping[str, Any], device: str = "auto") -> Predictor:
    """Rebuild the model of a run from its files and its backbone.

    Raises:
        RunError: the weights are unreadable, or the backbone is not the one that was trained on.
    """
    model = ModelConfig(**config["model"])
    classes = config["data"]["classes"]
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"cannot read {path / WEIGHTS}: {error}; the run is incomplete or damaged") from None
    backbone = load_backbone(model.name, num_classes=len(classes), seed=model.seed, weights=model.weights)
    if backbone.digest != config["backbone"]["sha256"]:
        raise RunError(f"the weights of {model.name} are not those {path} was trained on; restore them")
    initialise_head(
        backbone.model, len(classes), weight=tensors[f"{HEAD}weight"], bias=tensors[f"{HEAD}bias"]
    )
    learner = Learner(backbone, model, PerformanceConfig(device=device, engine=config["engine"]["kind"]))
    weights = {
        k.removeprefix(TRAINED): v.to(learner.device) for k, v in tensors.items() if k.startswith(TRAINED)
    }
    return Predictor(learner, weights, classes)

"""Judge a starter by non-private linear probe on the bundled digits.

    python recipes/starter/probe.py dptaft/starter

The probe is multinomial logistic regression on standardised features; the split is that of `dptaft train`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from objectives import normalise
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import VisionTransformer

from dptaft import ImageData, Split, load_data
from dptaft.backbones import Preprocessing

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


def features(model: VisionTransformer, split: Split) -> torch.Tensor:
    """Return pooled features (n, width) of images that are resized as for training."""
    resize = Preprocessing(model.patch_embed.img_size[0], (0.0,), (1.0,))
    with torch.no_grad():
        return torch.cat([model(normalise(images)) for images in split.batches(256, resize)])


def probe(model: VisionTransformer, data: ImageData) -> dict[float, float]:
    """Return evaluation accuracy by inverse regularisation strength."""
    train, evaluation = features(model, data.train).numpy(), features(model, data.evaluation).numpy()
    found = {}
    for strength in STRENGTHS:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        classifier.fit(train, data.train.labels.numpy())
        found[strength] = classifier.score(evaluation, data.evaluation.labels.numpy())
    return found


def main() -> None:
    """Print one line per regularisation strength."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="digits", help="as for dptaft train")
    args = parser.parse_args()
    architecture = json.loads((args.folder / "starter.json").read_text())["architecture"]
    model = VisionTransformer(num_classes=0, **architecture).eval()
    model.load_state_dict(load_file(args.folder / "starter.safetensors"))
    for strength, accuracy in probe(model, load_data(args.data)).items():
        print(f"C = {strength:<6} accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()

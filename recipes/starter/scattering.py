"""Make the scattering starter: one transformer block over a fixed scattering stem, from synthetic images.

    python recipes/starter/scattering.py --output dptaft/starter

Nothing is trained by gradients. The stem's linear map is a partly whitening principal component analysis of
the log-scattering coefficients of synthetic images; the block passes the sum of its tokens to the class token
and adds random features of it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from generators import make_sampler
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from dptaft.scattering import ScatteringEmbed

ARCHITECTURE = {
    "img_size": 28,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 512,
    "depth": 1,
    "num_heads": 8,
    "mlp_ratio": 1.0,
}
PREPROCESSING = {"mean": 0.0, "std": 1.0}
BATCH = 500
WHITENING = 0.7
"""Components are divided by their standard deviation to this power: 0 is plain PCA, 1 whitening."""
REGULARISER = 0.05
"""Added to every variance, relative to that of the 50th component."""
HIDDEN_GAIN = 2.0
"""Standard deviation of the inputs of the hidden layer's activations."""
QUERY = 0.5
"""Size of the class token's queries: weight of the keys' tangents."""
CARRIER = 5.0
"""Size of the constant part of a token relative to the rest, which makes its LayerNorm nearly linear."""


@torch.no_grad()
def statistics(stem: ScatteringEmbed, generators: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean (cells, 81) and covariance (cells * 81, cells * 81) of the coefficients of synthetic images."""
    sampler, generator = make_sampler(generators, stem.img_size[0]), torch.Generator().manual_seed(seed)
    total = products = torch.zeros((), dtype=torch.float64)
    for _ in range(count // BATCH):
        rows = stem.coefficients(sampler(BATCH, generator).images).flatten(1).double()
        total, products = total + rows.sum(0), products + rows.T @ rows
    mean = total / (count // BATCH * BATCH)
    return mean.view(stem.num_patches, -1), products / (count // BATCH * BATCH) - torch.outer(mean, mean)


def whitening(covariance: Tensor, components: int) -> tuple[Tensor, float]:
    """Map (components, features), and the root mean square of a mapped record's norm."""
    variance, vectors = torch.linalg.eigh(covariance)
    variance, vectors = variance.flip(0)[:components].clamp(min=0), vectors.flip(1)[:, :components]
    gain = (variance + REGULARISER * variance[50]) ** (-WHITENING / 2)
    # a sign per component, so that every machine finds the same map
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0)[None]).sign()
    return (vectors * gain).T, math.sqrt(float((variance * gain.square()).sum()))


@torch.no_grad()
def fill(model: VisionTransformer, mean: Tensor, covariance: Tensor, seed: int) -> None:
    """Write all weights of the backbone."""
    stem, block, generator = model.patch_embed, model.blocks[0], torch.Generator().manual_seed(seed)
    width, cells = model.embed_dim, stem.num_patches
    matrix, size = whitening(covariance, width - 2)
    stem.centre.copy_(mean)
    # tokens whose sum has entries of about one, times the number of cells
    unit = math.sqrt(width) / size
    stem.weight.zero_()
    stem.weight[:, :, :-2] = (unit * matrix).T.reshape(cells, -1, width - 2).float()
    carrier = CARRIER * math.sqrt(width / cells / 2)
    constant = torch.zeros(width)
    constant[-2], constant[-1] = carrier, -carrier
    stem.shift.copy_(constant)
    model.pos_embed.zero_()
    model.cls_token.zero_()
    model.pos_embed[0, 0] = constant
    _attention(block, width, cells, carrier, generator)
    hidden = block.mlp.fc1.out_features
    block.mlp.fc1.weight.normal_(0, HIDDEN_GAIN * math.sqrt(1 / width), generator=generator)
    block.mlp.fc2.weight.normal_(0, 0.3 / (HIDDEN_GAIN * math.sqrt(hidden)), generator=generator)
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        layer.bias.zero_()


def _attention(
    block: torch.nn.Module, width: int, cells: int, carrier: float, generator: torch.Generator
) -> None:
    """Uniform attention that adds up the tokens: keys are zero, only their tangents tell cells apart."""
    tokens = cells + 1
    block.norm1.weight.fill_(tokens * math.sqrt(2 / width) * carrier)  # undoes LayerNorm and mean
    block.norm1.weight[-2:] = 0
    block.norm1.bias.zero_()
    mixing = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    block.attn.qkv.weight.zero_()
    block.attn.qkv.weight[2 * width :] = mixing
    block.attn.proj.weight.copy_(mixing.T)
    block.attn.qkv.bias.zero_()
    block.attn.qkv.bias[:width] = QUERY / tokens * torch.randn(width, generator=generator)


def main() -> None:
    """Fit, fill and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generators", default="silhouettes+characters")
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = VisionTransformer(num_classes=0, embed_layer=ScatteringEmbed, **ARCHITECTURE)
    mean, covariance = statistics(model.patch_embed, args.generators, args.images, args.seed)

    fill(model, mean, covariance, args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.output / "scattering.safetensors")
    training = {"generators": args.generators, "images": args.images, "seed": args.seed}
    config = {"architecture": ARCHITECTURE, "preprocessing": PREPROCESSING, "pretraining": training}
    (args.output / "scattering.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()

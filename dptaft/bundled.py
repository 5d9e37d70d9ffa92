"""Names of the bundled backbones; needs no torch."""

from __future__ import annotations

STARTER = "starter"
STARTERS = {
    STARTER: ("starter", "bundled; pretrained on rendered characters only"),
    "starter-scattering": ("scattering", "bundled; fitted to rendered silhouettes and characters only"),
}
"""Name -> name of its files, and where the weights come from."""


def has_public_weights(name: object, weights: object) -> bool:
    """Whether a model's weights are bundled or untrained, so that nobody's word is needed.

    >>> has_public_weights("starter", "pretrained"), has_public_weights("starter", "a.safetensors")
    (True, False)
    """
    return weights == "random" or (name in STARTERS and weights == "pretrained")

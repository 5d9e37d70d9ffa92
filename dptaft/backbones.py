"""Pretrained backbones with their own public preprocessing: the bundled starter, or any timm model."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dptaft.bundled import STARTERS
from dptaft.features import tensors_digest
from dptaft.scattering import ScatteringEmbed
from dptaft.tangent.initialise import initialise_head

_STARTER_FILES = files("dptaft") / "starter"
_LONGEST = 16
"""Longer images, relative to their shorter side, are cut before they are resized."""


class BackboneError(ValueError):
    """A model or its weights cannot be used; the message names the value and the remedy."""


@dataclass(frozen=True)
class Preprocessing:
    """Public, fixed map from an image to the model's input; never fitted to the data.

    Resize the shorter side to ``size / crop_pct``, cut the centre, convert to the model's channels, and
    normalise: ``(x - mean) / std`` per channel.

    >>> Preprocessing(28, (0.5,), (0.5,))(torch.ones(3, 40, 56)).shape
    torch.Size([1, 28, 28])
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    @property
    def channels(self) -> int:
        """Number of channels of the model's input."""
        return len(self.mean)

    def __call__(self, image: Tensor) -> Tensor:
        """Prepare one image (1 or 3, height, width) with values in [0, 1]."""
        image = self._resize(self._convert(image))
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (image - mean[:, None, None]) / std[:, None, None]

    def _convert(self, image: Tensor) -> Tensor:
        if image.shape[0] == self.channels:
            return image
        if self.channels == 1:
            luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
            return (luma[:, None, None] * image).sum(0, keepdim=True)
        return image.expand(self.channels, -1, -1)

    def _resize(self, image: Tensor) -> Tensor:
        if image.shape[1] > _LONGEST * image.shape[2] or image.shape[2] > _LONGEST * image.shape[1]:
            image = _middle(image)
        height, width = image.shape[1:]
        scale = round(self.size / self.crop_pct) / min(height, width)
        target = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        if target != (height, width):
            image = F.interpolate(
                image[None], size=target, mode=self.interpolation, align_corners=False, antialias=True
            )[0].clamp(0, 1)
        top, left = (target[0] - self.size) // 2, (target[1] - self.size) // 2
        return image[:, top : top + self.size, left : left + self.size]


def _middle(image: Tensor) -> Tensor:
    """The middle of a very long image: all that is left of it after the cut, at bounded memory."""
    longest = _LONGEST * min(image.shape[1:])
    top, left = (max(0, (side - longest) // 2) for side in image.shape[1:])
    return image[:, top : top + longest, left : left + longest]


@dataclass(frozen=True)
class Backbone:
    """A pretrained model with a new classification head, frozen.

    Attributes:
        name: of a bundled starter, or a timm name.
        model: the timm model, its head replaced.
        preprocessing: the model's own.
        source: where the weights come from, in words.
        digest: SHA-256 of all weights but the head's.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing
    source: str
    digest: str


def load_backbone(
    name: str, *, num_classes: int, seed: int = 0, weights: str = "pretrained", head: str = "random"
) -> Backbone:
    """Load a model and give it a head, random from a public seed or from a file.

    Args:
        name: ``starter``, ``starter-scattering``, or a name that ``timm.create_model`` knows.
        num_classes: outputs of the new head.
        seed: public seed of the head (and of the weights, where those are random).
        weights: ``pretrained`` (bundled, or from the model hub), ``random``, or the path of a checkpoint
            (``.safetensors``, or ``.pth``/``.bin``/``.pt`` read without running code).
        head: ``random``, or a safetensors file with ``weight`` (classes, width) and ``bias`` (classes,).

    Raises:
        BackboneError: unknown model, no vision transformer head, weights that cannot be had or do not fit.
    """
    if name in STARTERS:
        model, preprocessing, source = _starter(name, weights, seed)
    else:
        model, preprocessing, source = _timm(name, weights, seed)
    if not isinstance(getattr(model, "get_classifier", tuple)(), nn.Module):
        raise BackboneError(f"{name} has no single classification head; choose another model")
    digest = backbone_digest(model)
    given = {"seed": seed} if head == "random" else _read_head(Path(head))
    try:
        initialise_head(model, num_classes, **given)
    except ValueError as error:
        raise BackboneError(f"{name}: {error}") from None
    return Backbone(name, model.eval(), preprocessing, source, digest)


def _read_head(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"cannot read the head {path}: {error}; use random or a safetensors file"
        ) from None
    if set(tensors) != {"weight", "bias"}:
        raise BackboneError(f"the head {path} holds {sorted(tensors)}; it needs weight and bias")
    return tensors


def backbone_digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers without the classification head."""
    heads = model.get_classifier() if hasattr(model, "get_classifier") else None
    own = set() if heads is None else {id(p) for p in heads.parameters()}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return tensors_digest({key: value for key, value in named.items() if id(value) not in own})


def _starter(name: str, weights: str, seed: int) -> tuple[nn.Module, Preprocessing, str]:
    from timm.models.vision_transformer import VisionTransformer

    stem, source = STARTERS[name]
    config = json.loads((_STARTER_FILES / f"{stem}.json").read_text())
    architecture, public = config["architecture"], config["preprocessing"]
    if stem == "scattering":
        architecture["embed_layer"] = ScatteringEmbed
    preprocessing = Preprocessing(architecture["img_size"], (public["mean"],), (public["std"],))
    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = VisionTransformer(num_classes=0, **architecture)
    finally:
        torch.random.set_rng_state(torch_state)
    if weights == "random":
        return model, preprocessing, f"random, public seed {seed}"
    if weights != "pretrained":
        _load_checkpoint(model, Path(weights))
        return model, preprocessing, f"checkpoint {Path(weights).name}"
    with as_file(_STARTER_FILES / f"{stem}.safetensors") as path:
        _fill(model, load_file(path), f"the bundled {name}")
    return model, preprocessing, source


def _timm(name: str, weights: str, seed: int) -> tuple[nn.Module, Preprocessing, str]:
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name}*")[:5]) or "dptaft models shows some"
        raise BackboneError(f"unknown model {name!r}; use starter, or a timm name ({near})")
    torch_state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        with quiet_hub():
            model = timm.create_model(name, pretrained=weights == "pretrained")
    except (RuntimeError, OSError, ValueError) as error:
        raise BackboneError(
            f"cannot get the weights of {name}: {_reason(error)}; give a file with --weights FILE, or use "
            "--model starter-scattering, which is bundled"
        ) from error
    finally:
        torch.random.set_rng_state(torch_state)
    preprocessing = _timm_preprocessing(model, name)
    if weights == "pretrained":
        source = f"model hub, {model.pretrained_cfg.get('hf_hub_id') or name}"
    elif weights == "random":
        source = f"random, public seed {seed}"
    else:
        _load_checkpoint(model, Path(weights))
        source = f"checkpoint {Path(weights).name}"
    return model, preprocessing, source


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Ask the model hub without its warnings about every try, and only its cache where it is out of reach."""
    from huggingface_hub import constants

    level, offline = logging.root.manager.disable, constants.HF_HUB_OFFLINE
    logging.disable(logging.WARNING)
    try:
        constants.HF_HUB_OFFLINE = offline or not _in_reach(constants.ENDPOINT)
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(level)


def _in_reach(endpoint: str) -> bool:
    """False where a connection fails at once; a slow one, or one through a proxy, may still succeed."""
    if getproxies():
        return True
    parts = urlsplit(endpoint)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 443), timeout=10).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


def _reason(error: Exception) -> str:
    """The first sentence of what the hub says."""
    if type(error).__name__ in ("LocalEntryNotFoundError", "OfflineModeIsEnabled"):
        return "the model hub is out of reach, and they are not in its cache"
    text = str(error).strip()
    return text.splitlines()[0].split(". ")[0].rstrip(".") if text else type(error).__name__


def _timm_preprocessing(model: nn.Module, name: str) -> Preprocessing:
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    if height != width:
        raise BackboneError(f"{name} takes images of {height} x {width}; only square inputs are supported")
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    mean, std = (tuple(float(v) for v in config[key]) for key in ("mean", "std"))
    if len(mean) != channels:
        raise BackboneError(f"{name} takes {channels} channels but has {len(mean)} normalisation constants")
    return Preprocessing(height, mean, std, interpolation, float(config["crop_pct"]))


def _load_checkpoint(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise BackboneError(f"no weights {str(path)!r}; use pretrained, random, or the path of a checkpoint")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = (str(error).strip().splitlines() or ["it is empty or cut off"])[0]
        raise BackboneError(f"cannot read the checkpoint {path}: {reason}; give another --weights") from None
    except Exception as error:  # an unpickling error: the file wants to run code
        raise BackboneError(f"{path} is not a plain file of tensors; save it as safetensors") from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise BackboneError(f"{path} holds no named tensors; save the state_dict of the model")
    _fill(model, dict(state), str(path))


@torch.no_grad()
def _fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy weights by name; the head's may be missing or of another shape, since it is replaced."""
    heads = model.get_classifier()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    persistent = set(model.state_dict())
    spare = {name for name, p in own.items() if any(p is q for q in heads.parameters())}
    for name in sorted(persistent - spare):
        if name not in state:
            raise BackboneError(f"{where} lacks {name!r}; it belongs to another model")
        if state[name].shape != own[name].shape:
            raise BackboneError(
                f"{where} has {name!r} with shape {tuple(state[name].shape)}, "
                f"the model needs {tuple(own[name].shape)}"
            )
    unknown = sorted(key for key in set(state) - persistent if not key.startswith(("head.", "head_dist.")))
    if unknown:
        raise BackboneError(f"{where} holds {unknown[0]!r}, which the model does not have")
    for name in persistent - spare:
        own[name].copy_(state[name])


def describe_preprocessing(preprocessing: Preprocessing) -> dict[str, object]:
    """Plain values, for cache keys and run files."""
    return asdict(preprocessing) | {"mean": list(preprocessing.mean), "std": list(preprocessing.std)}

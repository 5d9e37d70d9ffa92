"""The frozen weights of a class-token transformer's last block, and a refusal for everything else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from timm.layers import Attention, LayerNorm, LayerScale, Mlp
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

_ACTIVATIONS = (nn.GELU, GELU, GELUTanh, QuickGELU, nn.ReLU, nn.SiLU)
_INACTIVE = (nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Norm:
    """A LayerNorm over the last axis: y = gain * (x - mean) / sqrt(var + eps) + shift."""

    name: str
    gain: Tensor
    shift: Tensor
    eps: float

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The normalised input before the affine map, and 1/sqrt(var + eps) with a kept last axis."""
        centred = x - x.mean(-1, keepdim=True)
        inverse = (centred.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return centred * inverse, inverse

    def affine(self, normalised: Tensor) -> Tensor:
        """The output gain * normalised + shift."""
        return torch.addcmul(self.shift, self.gain, normalised)


def project_norm(v: Tensor, normalised: Tensor, inverse: Tensor) -> Tensor:
    """The symmetric Jacobian of normalisation: inverse * (v - mean(v) - xh mean(xh v)), xh the normalised."""
    return inverse * (v - v.mean(-1, keepdim=True) - normalised * (v * normalised).mean(-1, keepdim=True))


@dataclass(frozen=True)
class LastBlock:
    """Weights of the last block, the final norm and the head, in the compute precision.

    ``wq`` (A, D), ``wk`` and ``wv`` (H, d, D) with A = H d; ``ls1``, ``ls2`` are None without LayerScale,
    ``final`` is None without a final norm, biases are None where the layer has none.
    """

    prefix: str
    heads: int
    head_dim: int
    scale: float
    norm1: Norm
    wq: Tensor
    wk: Tensor
    wv: Tensor
    bq: Tensor | None
    bv: Tensor | None
    wp: Tensor
    bp: Tensor | None
    ls1: Tensor | None
    norm2: Norm
    w1: Tensor
    b1: Tensor | None
    act: nn.Module
    w2: Tensor
    b2: Tensor | None
    ls2: Tensor | None
    final: Norm | None
    wh: Tensor
    bh: Tensor | None


def _refuse(where: str, found: object) -> ValueError:
    return ValueError(
        f"the compiled path does not cover {where} ({found}); use the dual operator for this model"
    )


def _require(condition: bool, where: str, found: object) -> None:
    if not condition:
        raise _refuse(where, found)


def _check_children(module: nn.Module, where: str, covered: dict[str, tuple[type, ...]]) -> None:
    """Every child must be of a covered type or inactive in eval mode (drop path counts as inactive)."""
    for name, child in module.named_children():
        allowed = covered.get(name, _INACTIVE)
        inactive = type(child) in _INACTIVE and name not in covered
        if not (inactive or type(child) in allowed or name.startswith("drop_path")):
            raise _refuse(f"{where}.{name}", type(child).__name__)


def _check_block(block: nn.Module, where: str) -> None:
    _require(type(block) is Block, where, type(block).__name__)
    norms, scales = (nn.LayerNorm, LayerNorm), (LayerScale, nn.Identity)
    parts = {
        "norm1": norms,
        "norm2": norms,
        "ls1": scales,
        "ls2": scales,
        "attn": (Attention,),
        "mlp": (Mlp,),
    }
    _check_children(block, where, parts)
    _check_children(block.attn, f"{where}.attn", {"qkv": (nn.Linear,), "proj": (nn.Linear,)})
    layers = {"fc1": (nn.Linear,), "fc2": (nn.Linear,), "act": _ACTIVATIONS}
    _check_children(block.mlp, f"{where}.mlp", layers)


def _norm(module: nn.Module, name: str, dtype: torch.dtype) -> Norm:
    _require(type(module) in (nn.LayerNorm, LayerNorm), name, type(module).__name__)
    _require(module.weight is not None and module.bias is not None, name, "no affine parameters")
    return Norm(name, module.weight.detach().to(dtype), module.bias.detach().to(dtype), module.eps)


def _final_norm(model: VisionTransformer, dtype: torch.dtype) -> Norm | None:
    present = [name for name in ("norm", "fc_norm") if not isinstance(getattr(model, name), nn.Identity)]
    _require(len(present) < 2, " and ".join(present), "two final norms")
    return _norm(getattr(model, present[0]), present[0], dtype) if present else None


def _check_model(model: nn.Module) -> None:
    _require(type(model) is VisionTransformer, "the model", type(model).__name__)
    _require(len(model.blocks) > 0, "the model", "no blocks")
    _require(model.global_pool == "token" and model.has_class_token, "global_pool", model.global_pool)
    _require(model.attn_pool is None, "attn_pool", type(model.attn_pool).__name__)
    _require(type(model.head) is nn.Linear, "head", type(model.head).__name__)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The precision of tangent arithmetic: that of the weights, but never below float32."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def read_last_block(model: nn.Module) -> LastBlock:
    """The frozen weights behind the compiled path.

    Raises:
        ValueError: naming the part of the model that the compiled path does not cover.
    """
    _check_model(model)
    where = f"blocks.{len(model.blocks) - 1}"
    block, dtype = model.blocks[-1], compute_dtype(model)
    _check_block(block, where)
    attn, mlp = block.attn, block.mlp

    def frozen(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype)

    def layer_scale(module: nn.Module) -> Tensor | None:
        return frozen(module.gamma) if isinstance(module, LayerScale) else None

    wq, wk, wv = frozen(attn.qkv.weight).chunk(3)
    bq, _, bv = (None, None, None) if attn.qkv.bias is None else frozen(attn.qkv.bias).chunk(3)
    shape = (attn.num_heads, wq.shape[0] // attn.num_heads, wq.shape[1])
    return LastBlock(
        prefix=where + ".", heads=shape[0], head_dim=shape[1], scale=float(attn.scale),
        norm1=_norm(block.norm1, f"{where}.norm1", dtype), wq=wq, wk=wk.reshape(shape), wv=wv.reshape(shape),
        bq=bq, bv=bv, wp=frozen(attn.proj.weight), bp=frozen(attn.proj.bias), ls1=layer_scale(block.ls1),
        norm2=_norm(block.norm2, f"{where}.norm2", dtype), w1=frozen(mlp.fc1.weight), b1=frozen(mlp.fc1.bias),
        act=mlp.act, w2=frozen(mlp.fc2.weight), b2=frozen(mlp.fc2.bias), ls2=layer_scale(block.ls2),
        final=_final_norm(model, dtype), wh=frozen(model.head.weight), bh=frozen(model.head.bias),
    )  # fmt: skip


def last_block_parameter_shapes(model: VisionTransformer) -> dict[str, torch.Size]:
    """Names and shapes of the parameters of scope ``last:1``, in the model's order."""
    prefixes = (f"blocks.{len(model.blocks) - 1}.", "norm.", "fc_norm.", "head.")
    return {name: p.shape for name, p in model.named_parameters() if name.startswith(prefixes)}

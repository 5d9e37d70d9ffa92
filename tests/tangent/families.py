"""Tiny vision transformers of many kinds, with random weights in every parameter, for the tangent tests."""

from functools import partial

import torch
from timm.layers import Attention, RmsNorm, SwiGLU, SwiGLUPacked
from timm.layers.activations import GELUTanh, QuickGELU
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

torch.set_num_threads(1)  # the models are so small that more threads only cost time
CLASSES = 4
DEPTH = 3
_TINY = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 24,
    "depth": DEPTH,
    "num_heads": 3,
    "num_classes": CLASSES,
}
_VIT = partial(VisionTransformer, **_TINY, mlp_ratio=2)
_BEIT = partial(Beit, **_TINY, mlp_ratio=2)
_EVA = partial(Eva, **_TINY, mlp_ratio=2, global_pool="token")


def _gated():
    model = _VIT()
    for block in model.blocks:
        block.attn = Attention(24, 3, qkv_bias=True, gated=True)
    return model


FAMILIES = {
    "class token": _VIT,
    "average pool": partial(_VIT, global_pool="avg"),
    "no class token": partial(_VIT, class_token=False, global_pool="avg", fc_norm=False),
    "pool with prefix": partial(_VIT, global_pool="avg", pool_include_prefix=True, reg_tokens=1),
    "registers, no embed class": partial(_VIT, reg_tokens=2, no_embed_class=True, init_values=0.1),
    "class token and fc_norm": partial(_VIT, fc_norm=True, pos_embed="none"),
    "qk-norm": partial(_VIT, qk_norm=True, qkv_bias=False, init_values=0.1),
    "clip": partial(_VIT, pre_norm=True, act_layer=QuickGELU, norm_layer=torch.nn.LayerNorm),
    "no biases, rms": partial(
        _VIT, qkv_bias=False, proj_bias=False, norm_layer=RmsNorm, mlp_layer=SwiGLUPacked, qk_norm=True
    ),
    "layer norm without bias": partial(_VIT, norm_layer=partial(torch.nn.LayerNorm, bias=False)),
    "swiglu, inner norms": partial(_VIT, mlp_layer=SwiGLU, scale_attn_norm=True, scale_mlp_norm=True),
    "tanh gelu": partial(_VIT, act_layer=GELUTanh, dynamic_img_size=True),
    "siglip": partial(_VIT, class_token=False, global_pool="map"),
    "map with class token": partial(_VIT, global_pool="map"),
    "gated": _gated,
    "distilled": partial(VisionTransformerDistilled, **_TINY, mlp_ratio=2),
    "beit": partial(_BEIT, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1),
    "beit shared bias": partial(_BEIT, use_shared_rel_pos_bias=True, global_pool="token", swiglu_mlp=True),
    "beit both biases": partial(_BEIT, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, scale_mlp=True),
    "eva": partial(_EVA, qkv_bias=True, init_values=0.1, global_pool="avg"),
    "eva02": partial(_EVA, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "eva inner norm": partial(
        _EVA, scale_attn_inner=True, swiglu_mlp=True, use_rot_pos_emb=True, qk_norm=True
    ),
    "dinov3": partial(
        _EVA,
        use_rot_pos_emb=True,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=2,
        no_embed_class=True,
        use_abs_pos_emb=False,
        init_values=0.1,
        dynamic_img_size=True,
    ),
    "grouped queries": partial(
        _EVA, attn_type="rope", qkv_fused=False, num_kv_heads=1, use_rot_pos_emb=True, global_pool="map"
    ),
    "pre-norm eva": partial(_EVA, use_pre_transformer_norm=True, attn_type="rope", use_rot_pos_emb=True),
}


def randomise(model, generator):
    """Give every parameter and every bias-like buffer random values of a size that keeps activations tame."""
    with torch.no_grad():
        for parameter in model.parameters():
            centre = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3 + centre
            )
        for name, buffer in model.named_buffers():
            if name.endswith("k_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def build(family, seed=0):
    """A tiny float64 model of the family in eval mode."""
    return randomise(FAMILIES[family]().double(), torch.Generator().manual_seed(seed)).eval()


def images(count=3, seed=1):
    """Random float64 images for the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)


def random_like(values, seed=2, scale=0.3):
    """Random values for a mapping from names to tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * scale
        for name, value in values.items()
    }

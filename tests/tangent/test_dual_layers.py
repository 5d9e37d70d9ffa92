"""Each dual layer alone against forward-mode differentiation of the layer it stands for, in float64."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import (
    Attention,
    GluMlp,
    LayerNorm,
    LayerScale,
    Mlp,
    RmsNorm,
    SwiGLU,
    SwiGLUPacked,
)
from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.vision_transformer import Block
from torch import nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from dptaft.tangent.dual_attention import DualAttention, attend
from dptaft.tangent.dual_blocks import DualBlock, dual_mlp
from dptaft.tangent.dual_layers import (
    DualActivation,
    DualConv2d,
    DualLinear,
    Tangents,
    UncoveredPartError,
    dual_layer_scale,
    dual_norm,
    require_type,
)
from tests.tangent.families import random_like, randomise

# forward-mode differentiation of torch compiles its rules with a deprecated function
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
WIDTH = 24
LAYERS = {
    "linear": (DualLinear, lambda: nn.Linear(WIDTH, 7)),
    "linear without bias": (DualLinear, lambda: nn.Linear(WIDTH, 7, bias=False)),
    "layer norm": (dual_norm, lambda: LayerNorm(WIDTH)),
    "torch layer norm": (dual_norm, lambda: nn.LayerNorm(WIDTH, eps=0.1)),
    "layer norm without bias": (dual_norm, lambda: nn.LayerNorm(WIDTH, bias=False)),
    "layer norm without affine": (dual_norm, lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "rms norm": (dual_norm, lambda: RmsNorm(WIDTH, eps=0.1)),
    "torch rms norm": (dual_norm, lambda: nn.RMSNorm(WIDTH)),
    "rms norm without affine": (dual_norm, lambda: RmsNorm(WIDTH, affine=False)),
    "identity": (dual_norm, nn.Identity),
    "layer scale": (dual_layer_scale, lambda: LayerScale(WIDTH)),
    "mlp": (dual_mlp, lambda: Mlp(WIDTH, 16)),
    "mlp with norm": (dual_mlp, lambda: Mlp(WIDTH, 16, norm_layer=LayerNorm, act_layer=QuickGELU)),
    "packed swiglu": (dual_mlp, lambda: SwiGLUPacked(WIDTH, 16, norm_layer=RmsNorm)),
    "glu, gate last": (dual_mlp, lambda: GluMlp(WIDTH, 16)),
    "swiglu": (dual_mlp, lambda: SwiGLU(WIDTH, 16, norm_layer=LayerNorm)),
    "attention": (DualAttention, lambda: Attention(WIDTH, 3, qkv_bias=True)),
    "attention with norms": (
        DualAttention,
        lambda: Attention(WIDTH, 3, qk_norm=True, scale_norm=True, norm_layer=LayerNorm, gated=True),
    ),
    "attention of another width": (DualAttention, lambda: Attention(WIDTH, 3, attn_head_dim=5)),
    "block": (DualBlock, lambda: Block(WIDTH, 3, qkv_bias=True, init_values=0.1, drop_path=0.5)),
}


def prepared(layer):
    generator = torch.Generator().manual_seed(0)
    primal = randomise(LAYERS[layer][1]().double(), generator).eval().requires_grad_(False)
    x, dx = torch.randn(2, 4, 5, WIDTH, dtype=torch.float64, generator=generator)
    return primal, x, dx


def forward_mode(primal, weights, x, dx):
    values = dict(primal.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(lambda w, a: functional_call(primal, w, (a,)), (values, x), (weights, dx))


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("moved_input", [True, False], ids=["moved input", "fixed input"])
@pytest.mark.parametrize("trained", [True, False], ids=["in scope", "out of scope"])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_layer_agrees_with_forward_mode(layer, trained, moved_input):
    primal, x, dx = prepared(layer)
    names = [f"part.{name}" for name, _ in primal.named_parameters()] if trained else []
    tangents = Tangents(names)
    dual = LAYERS[layer][0](primal, "part", tangents)
    assert set(tangents.parameters) == set(names)
    values = {name: torch.zeros_like(parameter) for name, parameter in primal.named_parameters()}
    if trained:
        values = random_like(values)
        for name, value in values.items():
            tangents.parameters[f"part.{name}"].data.copy_(value)
    expected, dexpected = forward_mode(primal, values, x, dx if moved_input else torch.zeros_like(x))
    out, dout = dual(x, dx if moved_input else None)
    close(out, expected)
    if moved_input or names:
        close(dout, dexpected)
    else:
        assert dout is None


@pytest.mark.parametrize("layer", list(LAYERS))
def test_tangents_start_at_zero(layer):
    primal, x, _ = prepared(layer)
    tangents = Tangents(f"part.{name}" for name, _ in primal.named_parameters())
    _, dout = LAYERS[layer][0](primal, "part", tangents)(x, None)
    assert dout is None or not dout.any()


ACTIVATIONS = [
    nn.GELU(),
    nn.GELU("tanh"),
    GELU(),
    GELUTanh(),
    QuickGELU(),
    nn.SiLU(),
    nn.Sigmoid(),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activation_agrees_with_forward_mode(activation):
    x = torch.cat([torch.linspace(-8, 8, 101, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    dx = torch.randn_like(x)
    out, dout = DualActivation(activation, "act")(x, dx)
    expected, dexpected = jvp(activation, (x,), (dx,))
    close(out, expected)
    close(dout, dexpected)


def test_gelu_has_slope_one_half_at_zero():
    _, slope = DualActivation(nn.GELU(), "act")(torch.zeros(1), torch.ones(1))
    assert slope.item() == 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activation_tangent_has_a_gradient(activation):
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    dx = torch.randn_like(x).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: DualActivation(activation, "act")(x, t)[1], (dx,))


def test_patch_convolution():
    primal = randomise(nn.Conv2d(3, 5, 4, stride=4).double(), torch.Generator().manual_seed(0))
    tangents = Tangents(["p.weight", "p.bias"])
    dual, x = DualConv2d(primal.requires_grad_(False), "p", tangents), torch.randn(2, 3, 8, 8).double()
    values = random_like(dict(primal.named_parameters()))
    for name, value in values.items():
        tangents.parameters[f"p.{name}"].data.copy_(value)
    out, dout = dual(x)
    close(out, primal(x))
    close(dout, F.conv2d(x, values["weight"], values["bias"], stride=4))


@pytest.mark.parametrize("mask", range(16))
def test_attention_with_any_tangent_missing(mask):
    generator = torch.Generator().manual_seed(mask)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v, b = draw(2, 3, 4, 5), draw(2, 3, 6, 5), draw(2, 3, 6, 5), draw(1, 3, 4, 6)
    steps = [torch.randn_like(a) for a in (q, k, v, b)]
    present = [step if mask >> i & 1 else None for i, step in enumerate(steps)]

    def plain(q, k, v, b):
        return (0.3 * q @ k.mT + b).softmax(-1) @ v

    filled = tuple(torch.zeros_like(s) if p is None else p for s, p in zip(steps, present, strict=True))
    expected, dexpected = jvp(plain, (q, k, v, b), filled)
    out, dout = attend((q, present[0]), (k, present[1]), (v, present[2]), 0.3, (b, present[3]))
    close(out, expected)
    if mask:
        close(dout, dexpected)
    else:
        assert dout is None


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_block_for_leading_tokens_is_the_block_cut_off(rows):
    primal, x, dx = prepared("block")
    tangents = Tangents(f"b.{name}" for name, _ in primal.named_parameters())
    dual = DualBlock(primal, "b", tangents)
    for value in tangents.parameters.values():
        value.data.normal_()
    for step in (dx, None):
        for part, whole in zip(dual(x, step, rows), dual(x, step), strict=True):
            close(part, whole[:, :rows])


class _OddNorm(LayerNorm):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("create", "primal"),
    [
        (dual_norm, _OddNorm(4)),
        (dual_norm, nn.LayerNorm((2, 4))),
        (dual_norm, nn.GroupNorm(2, 4)),
        (dual_mlp, Mlp(4, 4, act_layer=nn.ReLU)),
        (dual_mlp, Mlp(4, 4, use_conv=True)),
        (DualAttention, nn.MultiheadAttention(4, 2)),
        (dual_layer_scale, nn.Linear(2, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_layers_without_a_dual_form_are_named(create, primal):
    with pytest.raises(UncoveredPartError, match=r"^part"):
        create(primal, "part", Tangents([]))


def test_an_attention_with_another_scale_is_not_covered():
    attention = Attention(8, 2)
    attention.scale = 1.0
    with pytest.raises(UncoveredPartError, match=r"scale 1\.0"):
        DualAttention(attention, "part", Tangents([]))


def test_a_changed_forward_or_hook_is_not_covered():
    layer = nn.Linear(2, 2)
    require_type(layer, (nn.Linear,), "part")
    handle = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UncoveredPartError, match="changed forward"):
        require_type(layer, (nn.Linear,), "part")
    handle.remove()
    layer.forward = lambda x: x
    with pytest.raises(UncoveredPartError, match="changed forward"):
        require_type(layer, (nn.Linear,), "part")


def test_a_layer_half_in_scope_is_not_covered():
    with pytest.raises(UncoveredPartError, match="only some"):
        DualLinear(nn.Linear(2, 2), "part", Tangents(["part.weight"]))


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    DualLinear(nn.Linear(2, 2), "part", Tangents(["part.weight", "part.bias"]))
    state = torch.get_rng_state()
    torch.set_rng_state(before)
    nn.Linear(2, 2)
    assert torch.equal(torch.get_rng_state(), state)

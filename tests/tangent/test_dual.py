"""Whole models: the single pass against forward- and reverse-mode differentiation, every family and scope."""

import warnings

import pytest
import torch
from torch import nn

from dptaft.tangent.cut import Above, below, boundary_axes, find_cut
from dptaft.tangent.linearize import linearize
from dptaft.tangent.model import TangentModel
from dptaft.tangent.scope import Scope
from tests.tangent.families import DEPTH, FAMILIES, build, images, random_like

SCOPES = ["head", "last:1", "last:2", f"last:{DEPTH}", "attention:1", f"attention:{DEPTH}", "all"]


def tangent_model(family, scope, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        model = TangentModel(build(family), scope, **options)
    model.load_theta(random_like(model.theta()))
    return model


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10 * float(right.detach().abs().max()))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_one_pass_is_the_linearised_model(family, scope):
    model, x = tangent_model(family, scope, centered=False), images()
    assert model.is_dual
    offset, moved = linearize(model.base, model.names, split=True)(model.theta(), x)
    assert moved.abs().max() > 1e-3
    close(model(x), offset + moved)
    model.centered = True
    close(model(x), moved)


@pytest.mark.parametrize("scope", ["last:1", "all"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradient_is_the_vector_jacobian_product_of_the_model(family, scope):
    model, x = tangent_model(family, scope), images()
    out = model(x)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(out, list(model.theta().values()), cotangent)
    weights = [model.base.get_parameter(name).requires_grad_() for name in model.names]
    expected = torch.autograd.grad(model.base(x), weights, cotangent)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2", "all"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_two_halves_of_a_cut_are_the_model(family, scope):
    model, x = build(family), images()
    cut = find_cut(model, Scope.parse(scope))
    boundary = below(model, cut, x)
    assert boundary.ndim == boundary_axes(model, cut)
    close(Above(model, cut)(boundary), model(x))


def test_every_block_below_the_cut_is_run_once():
    model, x = build("class token"), images()
    counts = [0] * DEPTH
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: counts.__setitem__(index, counts[index] + 1))
    below(model, find_cut(model, Scope("last", 1)), x)
    assert counts == [1, 1, 0]


@pytest.mark.parametrize("family", ["class token", "distilled", "average pool"])
def test_the_last_block_runs_only_for_the_tokens_that_are_pooled(family):
    model, sizes = tangent_model(family, "last:1"), []
    model.tangent.blocks[-1].mlp.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[1]))
    model(images())
    assert sizes == {"class token": [1], "distilled": [2], "average pool": [5]}[family]


def test_below_the_scope_no_tangent_is_computed():
    model = tangent_model("class token", "last:1")
    seen = []
    model.tangent.blocks[0].norm1.register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    model(images())
    assert seen == [None]


@pytest.mark.parametrize("scope", SCOPES)
def test_float32_is_close_to_float64(scope):
    model = tangent_model("registers, no embed class", scope)
    wide = model(images())
    torch.testing.assert_close(model.float()(images().float()).double(), wide, rtol=2e-4, atol=2e-4)


class _Odd(nn.Module):
    """A block with a part that no dual layer knows."""

    def __init__(self, block):
        super().__init__()
        self.norm1, self.attn, self.mlp = block.norm1, block.attn, block.mlp

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + torch.tanh(self.attn(self.norm1(x))) + self.mlp(x)


def odd_model(index):
    model = build("class token")
    model.blocks[index] = _Odd(model.blocks[index])
    return model


@pytest.mark.parametrize("scope", ["last:1", "attention:2", "all"])
def test_an_unknown_block_falls_back_with_one_warning_that_names_it(scope):
    base, x = odd_model(DEPTH - 1), images()
    with pytest.warns(UserWarning, match=rf"blocks\.{DEPTH - 1} \(_Odd\)") as caught:
        model = TangentModel(base, scope, centered=False)
    assert len(caught) == 1
    assert not model.is_dual
    model.load_theta(random_like(model.theta()))
    close(model(x), linearize(base, model.names)(model.theta(), x))


def test_an_unknown_block_below_the_scope_does_not_matter():
    base, x = odd_model(0), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = TangentModel(base, "last:1", centered=False)
    assert model.is_dual
    model.load_theta(random_like(model.theta()))
    close(model(x), linearize(base, model.names)(model.theta(), x))


class _Doubled(FAMILIES["class token"].func):
    """A subclass whose forward differs from that of the class it extends."""

    def forward_head(self, x, pre_logits=False):
        return 2 * super().forward_head(x, pre_logits)


def test_a_subclass_is_not_taken_for_its_parent():
    base, x = build("class token"), images()
    base.__class__ = _Doubled
    with pytest.warns(UserWarning, match="_Doubled"):
        model = TangentModel(base, "last:1", centered=False)
    model.load_theta(random_like(model.theta()))
    assert torch.equal(model.boundary(x), x)
    close(model(x), linearize(base, model.names)(model.theta(), x))


@pytest.mark.parametrize("pool", ["avgmax", "max"])
def test_unknown_pooling_falls_back(pool):
    base = FAMILIES["class token"](global_pool=pool).double()
    with pytest.warns(UserWarning, match="pooling"):
        assert not TangentModel(base, "last:1").is_dual


def test_learned_rotary_frequencies_fall_back_only_where_they_are_in_scope():
    base = FAMILIES["eva02"](rope_type="mixed").double()
    with pytest.warns(UserWarning, match=r"rope\.freqs"):
        assert not TangentModel(base, "all").is_dual
    model = TangentModel(base, "last:1", centered=False)
    assert model.is_dual
    model.load_theta(random_like(model.theta()))
    close(model(images()), linearize(base, model.names)(model.theta(), images()))


@pytest.mark.parametrize("method", ["forward", "forward_head", "_pos_embed"])
def test_a_method_replaced_on_the_instance_is_noticed(method):
    base, x = build("class token"), images()
    original = getattr(base, method)
    setattr(base, method, lambda *args, **kwargs: 2 * original(*args, **kwargs))
    with pytest.warns(UserWarning, match="changed forward"):
        model = TangentModel(base, "last:1", centered=False)
    model.load_theta(random_like(model.theta()))
    close(model(x), linearize(base, model.names)(model.theta(), x))


@pytest.mark.parametrize(
    "part", ["blocks.2.attn.proj_drop", "blocks.2.mlp.drop1", "blocks.2.drop_path1", "head_drop"]
)
def test_a_dropout_that_was_replaced_is_noticed(part):
    base, x = build("class token"), images()
    base.set_submodule(part, nn.Tanh())
    with pytest.warns(UserWarning, match=f"{part} "):
        model = TangentModel(base, "last:1", centered=False)
    model.load_theta(random_like(model.theta()))
    close(model(x), linearize(base, model.names)(model.theta(), x))

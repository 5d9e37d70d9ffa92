"""Properties of the tangent model: linear in theta, exact at zero, frozen base, clear refusals."""

import copy

import pytest
import torch
from torch import nn

from dptaft.tangent.cut import Above
from dptaft.tangent.linearize import linearize
from dptaft.tangent.model import TangentModel
from dptaft.tangent.scope import Scope, tangent_parameter_names
from tests.tangent.families import DEPTH, FAMILIES, build, images, random_like

SCOPES = ["head", "last:1", "attention:2", "all"]


def tangent_model(scope="last:1", family="registers, no embed class", **options):
    return TangentModel(build(family), scope, **options)


def fallback_model(scope="last:1", **options):
    base = build("class token")
    base.blocks[-1].mlp.act = nn.Softplus()
    with pytest.warns(UserWarning, match="mlp.act"):
        return TangentModel(base, scope, **options)


MAKERS = [tangent_model, fallback_model]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("scope", ["last:1", "attention:1", "all"])
def test_theta_is_named_ordered_and_zero(make, scope):
    model = make(scope)
    names = tangent_parameter_names(model.base, Scope.parse(scope))
    assert tuple(model.theta()) == names == model.theta_names
    for name, value in model.theta().items():
        assert isinstance(value, nn.Parameter)
        assert value.requires_grad
        assert value.shape == model.base.get_parameter(name).shape
        assert not value.any()
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in model.theta().values()}


@pytest.mark.parametrize("make", MAKERS)
def test_exact_at_zero(make):
    x = images()
    centred, plain = make(), make(centered=False)
    assert not centred(x).any()
    torch.testing.assert_close(plain(x), plain.base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("centered", [True, False])
def test_linear_in_theta(scope, centered):
    model, x = tangent_model(scope, centered=centered), images()
    zero = model(x)
    one, two = random_like(model.theta(), 5), random_like(model.theta(), 6)

    def moved(theta):
        model.load_theta(theta)
        return model(x) - zero

    mixed = moved({name: 2 * one[name] - 3 * two[name] for name in one})
    torch.testing.assert_close(mixed, 2 * moved(one) - 3 * moved(two), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scope", SCOPES)
def test_agrees_with_central_differences_of_the_network(scope):
    model, x, h = tangent_model(scope), images(), 1e-5
    step = random_like(model.theta(), scale=1.0)
    model.load_theta(step)

    def shifted(size):
        weights = {name: model.base.get_parameter(name) + size * step[name] for name in step}
        return torch.func.functional_call(model.base, weights, (x,))

    difference = (shifted(h) - shifted(-h)) / (2 * h)
    assert (model(x) - difference).abs().max() < 1e-6 * difference.abs().max()


@pytest.mark.parametrize("scope", SCOPES)
def test_boundary_then_forward_is_forward(scope):
    model, x = tangent_model(scope), images()
    model.load_theta(random_like(model.theta()))
    boundary = model.boundary(x)
    assert not boundary.requires_grad
    assert torch.equal(model.forward_from_boundary(boundary), model(x))
    expected = {"head": (3, 24), "last:1": (3, 7, 24), "attention:2": (3, 7, 24), "all": (3, 3, 16, 16)}
    assert tuple(boundary.shape) == expected[scope]


def test_boundary_is_what_enters_the_block():
    model, x, seen = tangent_model("last:2", "class token"), images(), []
    model.base.blocks[1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.base(x)
    torch.testing.assert_close(model.boundary(x), seen[0], rtol=0, atol=0)


def test_half_precision_boundary_is_widened():
    model, x = tangent_model().float(), images().float()
    model.load_theta(random_like(model.theta()))
    half = model.boundary(x).half()
    out = model.forward_from_boundary(half)
    assert out.dtype == torch.float32
    assert torch.equal(out, model.forward_from_boundary(half.float()))


def test_training_mode_changes_nothing_but_the_tangent_layers():
    base = FAMILIES["class token"](drop_rate=0.9, proj_drop_rate=0.9, attn_drop_rate=0.9, drop_path_rate=0.9)
    model, x = TangentModel(base, "last:2", centered=False), torch.randn(3, 3, 16, 16)
    model.load_theta(random_like(model.theta()))
    model.eval()
    expected = model(x)
    wrapped = nn.Sequential(model).train()
    assert model.training
    assert all(part.training for part in model.tangent.modules())
    assert not any(part.training for part in model.base.modules())
    assert torch.equal(wrapped(x), expected)


def test_the_base_is_frozen_and_receives_no_gradient():
    model = tangent_model()
    model(images()).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.theta().values())


def test_no_weight_is_stored_twice():
    model = tangent_model("all")
    assert sum(p.numel() for p in model.parameters()) == 2 * sum(p.numel() for p in model.base.parameters())
    assert len(model.state_dict()) == len(model.base.state_dict()) + len(model.theta())


@pytest.mark.parametrize("make", MAKERS)
def test_a_copy_is_independent(make):
    model, x = make(), images()
    model.load_theta(random_like(model.theta()))
    twin = copy.deepcopy(model)
    expected = model(x)
    with torch.no_grad():
        for parameter in (*model.base.parameters(), *model.theta().values()):
            parameter.add_(1.0)
    assert torch.equal(twin(x), expected)


def test_moving_the_model_moves_what_the_dual_layers_refer_to():
    model = tangent_model().float()
    assert model(images().float()).dtype == torch.float32


def test_load_theta_copies_and_refuses_what_does_not_fit():
    model = tangent_model()
    theta = random_like(model.theta())
    model.load_theta(theta)
    first = next(iter(theta))
    theta[first] += 1
    before = {name: value.detach().clone() for name, value in model.theta().items()}
    assert not torch.equal(before[first], theta[first])
    with pytest.raises(ValueError, match=f"no tangent given for {first}"):
        model.load_theta({name: value for name, value in theta.items() if name != first})
    with pytest.raises(ValueError, match="not linearised: extra"):
        model.load_theta(theta | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="has shape"):
        model.load_theta(theta | {"head.bias": torch.zeros(99)})
    assert all(torch.equal(before[name], value) for name, value in model.theta().items())


@pytest.mark.parametrize("scope", ["last:2", "attention:1", f"last:{DEPTH}"])
@pytest.mark.parametrize(
    "family", ["class token", "registers, no embed class", "distilled", "dinov3", "beit"]
)
def test_fresh_class_token(family, scope):
    model, x = tangent_model(scope, family, centered=False, fresh_cls_token_seed=7), images()
    assert model.is_dual
    assert next(iter(model.theta())) == "fresh_cls_token"
    theta = random_like(model.theta())
    model.load_theta(theta)
    above = Above(model.base, model.cut, model.fresh_token).eval()
    tangents = {k if k == "fresh_cls_token" else f"model.{k}": v for k, v in theta.items()}
    reference = linearize(above, tangents)(tangents, model.boundary(x))
    torch.testing.assert_close(model(x), reference, rtol=1e-10, atol=1e-10)
    without = tangent_model(scope, family, centered=False)
    assert not torch.allclose(without(x), TangentModel.forward(model, x))


def test_fresh_class_token_in_the_fallback():
    model = fallback_model(fresh_cls_token_seed=7)
    model.load_theta(random_like(model.theta()))
    moved = model(images())
    model.load_theta(model.theta() | {"fresh_cls_token": torch.zeros(1, 1, 24)})
    assert not torch.allclose(model(images()), moved)


def test_fresh_class_token_comes_from_its_seed():
    one, two, three = (tangent_model(fresh_cls_token_seed=seed).fresh_token for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


@pytest.mark.parametrize(("scope", "family"), [("head", "class token"), ("all", "class token")])
def test_fresh_class_token_needs_a_first_block(scope, family):
    with pytest.raises(ValueError, match="no first linearised block"):
        tangent_model(scope, family, fresh_cls_token_seed=0)


def test_fresh_class_token_needs_a_class_token():
    with pytest.raises(ValueError, match="no class token"):
        tangent_model("last:1", "no class token", fresh_cls_token_seed=0)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 8)])
def test_wrong_images_are_refused(make, shape):
    with pytest.raises(ValueError, match="images have"):
        make()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("scope", "shape"),
    [("last:1", (2, 24)), ("last:1", (2, 7, 23)), ("head", (2, 7, 24)), ("all", (2, 3, 8, 8))],
)
def test_wrong_boundary_activations_are_refused(scope, shape):
    with pytest.raises(ValueError, match=r"(boundary activations|images) have"):
        tangent_model(scope).forward_from_boundary(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("scope", ["last:9", "attention:4", "last", "blocks:1"])
def test_wrong_scopes_are_refused(scope):
    base = build("class token").train()
    with pytest.raises(ValueError, match="scope"):
        TangentModel(base, scope)
    assert base.training
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_refused(dtype):
    with pytest.raises(ValueError, match=r"float32 weights.*base\.float"):
        TangentModel(build("class token").to(dtype), "last:1")


def test_tied_weights_are_refused():
    base = build("class token")
    base.blocks[1] = base.blocks[2]
    with pytest.raises(ValueError, match=r"blocks\.2\..* is tied"):
        TangentModel(base, "last:1")
    with pytest.raises(ValueError, match="tied"):
        linearize(base, ["head.weight"])


def test_the_fallback_moves_with_the_model():
    model = fallback_model(fresh_cls_token_seed=7).float()
    model.load_theta(random_like(model.theta()))
    assert model(images().float()).dtype == torch.float32

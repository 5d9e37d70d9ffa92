"""The dual operator against explicit Jacobians in float64, and the choice of operators."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import dptaft.tangent.dual_operator as dual_operator
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.factored import FactoredLastBlock
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import TangentOperator

# forward-mode differentiation of torch compiles its rules with a deprecated function
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
N, C = 3, 3


def base(**options):
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2}
    model = VisionTransformer(**(shape | {"num_classes": C} | options)).double().eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def images(n=N):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cotangents(*members):
    return torch.randn(*members, N, C, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def random_theta(shapes, *members):
    g = torch.Generator().manual_seed(2)
    return {k: torch.randn(*members, *s, generator=g, dtype=torch.float64) for k, s in shapes.items()}


def jacobian(model, x, names):
    params = {k: p.detach() for k, p in model.named_parameters()}
    chosen = {k: params[k] for k in names}
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.attn.fused_attn = False  # the fused kernel cannot be batched over rows of the Jacobian
    full = torch.func.jacrev(lambda p: torch.func.functional_call(model, params | p, (x,)))(chosen)
    return torch.cat([full[k].flatten(2) for k in names], dim=2)


def flat(tensors, shapes):
    return torch.cat([tensors[k].flatten(-len(s)) for k, s in shapes.items()], dim=-1)


CASES = {
    "head": ("head", {}),
    "last": ("last:2", {}),
    "average_pooling": ("last:1", {"global_pool": "avg"}),
    "attention": ("attention:1", {}),
    "all": ("all", {}),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    scope, options = CASES[request.param]
    model = TangentModel(base(**options), scope)
    operator = DualOperator(model, batch_size=2)
    return model, operator, operator.extract(model.boundary(images()))


def test_every_product_equals_that_of_the_explicit_jacobian(case):
    model, operator, features = case
    assert isinstance(operator, TangentOperator)
    shapes = operator.parameter_shapes
    J = jacobian(model.base, images(), list(shapes))
    theta, r = random_theta(shapes, 2), cotangents(2)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(
        operator.jvp(features, theta), torch.einsum("ncp,mp->mnc", J, flat(theta, shapes)), **close
    )
    torch.testing.assert_close(
        flat(operator.vjp(features, r), shapes), torch.einsum("ncp,mnc->mp", J, r), **close
    )
    torch.testing.assert_close(operator.gram(features), J @ J.transpose(1, 2), **close)
    norms = torch.einsum("mnc,ncp->mnp", r, J).norm(dim=2)
    torch.testing.assert_close(operator.gradient_norms(features, r), norms, **close)
    torch.testing.assert_close(operator.offset(features), model.base(images()), **close)


def test_without_members_the_axis_is_absent(case):
    _, operator, features = case
    theta, r = random_theta(operator.parameter_shapes, 2), cotangents(2)
    one = {k: v[0] for k, v in theta.items()}
    torch.testing.assert_close(operator.jvp(features, one), operator.jvp(features, theta)[0])
    torch.testing.assert_close(
        operator.gradient_norms(features, r[0]), operator.gradient_norms(features, r)[0]
    )
    alone, together = operator.vjp(features, r[0]), operator.vjp(features, r)
    for name in alone:
        torch.testing.assert_close(alone[name], together[name][0])


def test_grams_in_blocks_of_classes_are_the_same(case, monkeypatch):
    _, operator, features = case
    whole = operator.gram(features)
    parameters = sum(s.numel() for s in operator.parameter_shapes.values())
    monkeypatch.setattr(dual_operator, "_GRAM_BYTES", 2 * parameters * 8)
    torch.testing.assert_close(operator.gram(features), whole, rtol=1e-12, atol=1e-12)


def test_the_tangent_weights_and_offset_choice_of_the_model_do_not_matter():
    model = TangentModel(base(), "last:1", centered=False)
    operator = DualOperator(model)
    features = operator.extract(model.boundary(images()))
    theta = random_theta(operator.parameter_shapes)
    before = operator.jvp(features, theta)
    model.load_theta(theta)
    torch.testing.assert_close(operator.jvp(features, theta), before)
    torch.testing.assert_close(before + operator.offset(features), model(images()).detach())


def test_a_fresh_class_token_is_part_of_the_jacobian():
    model = TangentModel(base(), "last:1", fresh_cls_token_seed=7)
    operator = DualOperator(model)
    features = operator.extract(model.boundary(images()))
    assert "fresh_cls_token" in operator.parameter_shapes
    theta, r = random_theta(operator.parameter_shapes), cotangents()
    gradient = operator.vjp(features, r)
    inner = sum((theta[k] * gradient[k]).sum() for k in theta)
    torch.testing.assert_close((operator.jvp(features, theta) * r).sum(), inner, rtol=1e-10, atol=1e-10)
    quadratic = torch.einsum("na,nab,nb->n", r, operator.gram(features), r)
    torch.testing.assert_close(operator.gradient_norms(features, r).square(), quadratic)
    assert gradient["fresh_cls_token"].abs().max() > 0


@pytest.mark.parametrize("compiled", [CompiledLastBlock, FactoredLastBlock])
def test_compiled_equals_dual(compiled):
    model = TangentModel(base(init_values=0.5, reg_tokens=1), "last:1")
    fast, slow = compiled(model.base), DualOperator(model)
    a, b = (operator.extract(model.boundary(images())) for operator in (fast, slow))
    theta, r = random_theta(fast.parameter_shapes), cotangents()
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(fast.jvp(a, theta), slow.jvp(b, theta), **close)
    torch.testing.assert_close(fast.gram(a), slow.gram(b), **close)
    left, right = fast.vjp(a, r), slow.vjp(b, r)
    assert set(left) == set(right)
    for name in left:
        torch.testing.assert_close(left[name], right[name], **close)


def test_an_example_that_is_not_finite_has_a_zero_jacobian():
    model = TangentModel(base(), "last:2")
    operator = DualOperator(model)
    boundary = model.boundary(images())
    boundary[1, 0, 0] = float("nan")
    features = operator.extract(boundary)
    theta, r = random_theta(operator.parameter_shapes), cotangents()
    assert operator.jvp(features, theta)[1].eq(0).all()
    assert operator.gram(features)[1].eq(0).all()
    good = torch.tensor([0, 2])
    without = operator.vjp(features.index(good), r[good])
    for name, gradient in operator.vjp(features, r).items():
        torch.testing.assert_close(gradient, without[name])


@pytest.mark.parametrize(
    ("scope", "options", "kind"),
    [
        ("head", {}, "head"),
        ("head", {"global_pool": "avg"}, "head"),
        ("last:1", {}, "compiled"),
        ("last:1", {"global_pool": "avg"}, "dual"),
        ("last:1", {"qk_norm": True}, "dual"),
        ("attention:1", {}, "dual"),
        ("last:2", {}, "dual"),
        ("all", {}, "dual"),
    ],
)
def test_the_fastest_exact_operator_is_chosen(scope, options, kind):
    model = TangentModel(base(**options), scope)
    operator = tangent_operator(model)
    assert operator.kind == kind
    assert list(operator.parameter_shapes) == list(model.theta())


def test_few_classes_are_compiled_to_factors_and_many_to_tokens():
    shape = {"embed_dim": 32, "num_heads": 1, "img_size": 64}
    layouts = {}
    for classes in (2, 10, 200):
        operator = tangent_operator(TangentModel(base(num_classes=classes, **shape), "last:1"))
        layouts[classes] = operator.layout
    assert layouts == {2: "classes", 10: "classes", 200: "tokens"}


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        DualOperator(TangentModel(base(), "head"), batch_size=0)

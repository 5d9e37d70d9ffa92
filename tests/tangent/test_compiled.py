"""The compiled last block against forward- and reverse-mode differentiation of the model, in float64."""

from functools import partial

import pytest
import torch
from timm.layers import GELUTanh, RmsNorm, SwiGLUPacked
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer

from dptaft.tangent.compiled import CompiledLastBlock, covariance_product
from dptaft.tangent.factored import FactoredLastBlock
from dptaft.tangent.operator import Features, TangentOperator

# forward-mode differentiation of torch compiles its rules with a deprecated function
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:FutureWarning")
N = 3
VARIANTS = {
    "plain": {},
    "one_head": {"num_heads": 1},
    "register_tokens": {"reg_tokens": 2},
    "layer_scale": {"init_values": 0.3},
    "fc_norm": {"fc_norm": True},
    "no_final_norm": {"final_norm": False},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "gelu_tanh": {"act_layer": GELUTanh},
    "norm_pre": {"pre_norm": True, "act_layer": "quick_gelu"},
    "dropouts_are_off": {
        "drop_rate": 0.3,
        "attn_drop_rate": 0.2,
        "proj_drop_rate": 0.2,
        "drop_path_rate": 0.3,
    },
}


def build(classes=4, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    model = VisionTransformer(**(shape | {"num_classes": classes} | options)).to(dtype).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=dtype)
        p.requires_grad_(False)
    for block in model.blocks:
        block.attn.fused_attn = False  # the fused kernel has no forward-mode derivative
    return model


def images(n=N, dtype=torch.float64):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def boundary_of(model, x):
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    return model.blocks[:-1](x)


def random_theta(shapes, *members, seed=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(*members, *s, generator=g, dtype=dtype) for k, s in shapes.items()}


def logits(model, x):
    base = dict(model.named_parameters())
    return lambda params: torch.func.functional_call(model, base | params, (x,))


def reference_jvp(model, x, theta):
    weights = {k: dict(model.named_parameters())[k] for k in theta}
    return torch.func.jvp(logits(model, x), (weights,), (theta,))[1]


def jacobians(model, x, names):
    """(n, C, P) by reverse mode: the slow, obviously correct Jacobian."""
    weights = {k: dict(model.named_parameters())[k] for k in names}
    full = torch.func.jacrev(logits(model, x))(weights)
    return torch.cat([full[k].flatten(2) for k in names], dim=2)


def dot(a, b):
    return sum((a[k] * b[k]).sum() for k in a)


@pytest.fixture(params=[CompiledLastBlock, FactoredLastBlock], ids=["tokens", "classes"])
def layout(request):
    return request.param


@pytest.fixture(params=VARIANTS, ids=str)
def case(request, layout):
    model = build(**VARIANTS[request.param])
    operator = layout(model)
    return model, operator, operator.extract(boundary_of(model, images()))


def test_it_is_a_tangent_operator_over_exactly_the_last_block_norm_and_head(layout):
    operator = layout(build())
    assert isinstance(operator, TangentOperator)
    expected = {k for k, _ in build().named_parameters() if k.startswith(("blocks.1.", "norm.", "head."))}
    assert set(operator.parameter_shapes) == expected


def test_jvp_equals_forward_mode_differentiation(case):
    model, operator, features = case
    theta = random_theta(operator.parameter_shapes)
    torch.testing.assert_close(
        operator.jvp(features, theta), reference_jvp(model, images(), theta), rtol=1e-10, atol=1e-10
    )


def test_vjp_equals_the_sum_of_transposed_jacobian_products(case):
    model, operator, features = case
    r = torch.randn(N, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = {k: p for k, p in model.named_parameters() if k in operator.parameter_shapes}
    expected = torch.func.vjp(logits(model, images()), weights)[1](r)[0]
    actual = operator.vjp(features, r)
    assert list(actual) == list(operator.parameter_shapes)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-10)


def test_grams_and_norms_equal_those_of_the_explicit_jacobians(case):
    model, operator, features = case
    jacobian = jacobians(model, images(), list(operator.parameter_shapes))
    torch.testing.assert_close(
        operator.gram(features), jacobian @ jacobian.transpose(1, 2), rtol=1e-10, atol=1e-10
    )
    r = torch.randn(2, N, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.einsum("mnc,ncp->mnp", r, jacobian).norm(dim=2)
    torch.testing.assert_close(operator.gradient_norms(features, r), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.gradient_norms(features, r[1]), expected[1], rtol=1e-10, atol=1e-10)


def test_per_class_work_in_pieces_is_the_same(case, monkeypatch):
    model, operator, features = case
    monkeypatch.setattr("dptaft.tangent.operator._PIECE", 1)
    again = operator.extract(boundary_of(model, images()))
    torch.testing.assert_close(operator.gram(again), operator.gram(features), rtol=1e-12, atol=1e-12)
    for name, value in features.tensors.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=1e-12)


def test_offset_is_the_model(case):
    model, operator, features = case
    torch.testing.assert_close(operator.offset(features), model(images()), rtol=1e-10, atol=1e-10)


def test_jvp_is_linear_and_adjoint_to_vjp(case):
    _, operator, features = case
    a, b = (random_theta(operator.parameter_shapes, seed=s) for s in (4, 5))
    mixed = {k: 2 * a[k] - 3 * b[k] for k in a}
    ja, jb = operator.jvp(features, a), operator.jvp(features, b)
    torch.testing.assert_close(operator.jvp(features, mixed), 2 * ja - 3 * jb, rtol=1e-10, atol=1e-10)
    r = torch.randn(N, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    torch.testing.assert_close((ja * r).sum(), dot(a, operator.vjp(features, r)), rtol=1e-10, atol=1e-10)


def test_members_share_one_pass(case):
    _, operator, features = case
    theta = random_theta(operator.parameter_shapes, 3)
    r = torch.randn(3, N, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    outputs, gradients = operator.jvp(features, theta), operator.vjp(features, r)
    for i in range(3):
        one = {k: v[i] for k, v in theta.items()}
        torch.testing.assert_close(outputs[i], operator.jvp(features, one), rtol=1e-12, atol=1e-12)
        alone = operator.vjp(features, r[i])
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient[i], alone[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 100])
def test_single_precision_stays_close_for_any_number_of_classes(classes, layout):
    model = build(classes, torch.float32)
    operator = layout(model)
    features = operator.extract(boundary_of(model, images(dtype=torch.float32)))
    theta = random_theta(operator.parameter_shapes, dtype=torch.float32)
    expected = reference_jvp(model, images(dtype=torch.float32), theta)
    torch.testing.assert_close(operator.jvp(features, theta), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_features_define_one_model_for_every_operation(half, layout):
    model = build(dtype=torch.float32)
    operator = layout(model)
    boundary = boundary_of(model, images(dtype=torch.float32))
    exact, rounded = operator.extract(boundary), operator.extract(boundary.to(half))
    assert rounded.nbytes < exact.nbytes
    theta = random_theta(operator.parameter_shapes, dtype=torch.float32)
    output = operator.jvp(rounded, theta)
    assert output.dtype == torch.float32
    assert not torch.equal(output, operator.jvp(exact, theta))
    r = torch.randn(N, 4, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close((output * r).sum(), dot(theta, operator.vjp(rounded, r)), rtol=1e-4, atol=1e-3)
    quadratic = torch.einsum("na,nab,nb->n", r, operator.gram(rounded).float(), r)
    torch.testing.assert_close(operator.gradient_norms(rounded, r).square(), quadratic, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_has_a_zero_jacobian(value, layout):
    model = build()
    operator = layout(model)
    boundary = boundary_of(model, images())
    features = operator.extract(boundary)
    boundary[1, 3, 2] = value
    damaged = operator.extract(boundary)
    good = torch.tensor([0, 2])
    theta = random_theta(operator.parameter_shapes)
    r = torch.randn(N, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert damaged["finite"].tolist() == [True, False, True]
    assert operator.jvp(damaged, theta)[1].eq(0).all()
    assert operator.gram(damaged)[1].eq(0).all()
    assert operator.offset(damaged)[1].eq(0).all()
    assert operator.gradient_norms(damaged, r)[1].eq(0)
    without = operator.vjp(features.index(good), r[good])
    for name, gradient in operator.vjp(damaged, r).items():
        torch.testing.assert_close(gradient, without[name], rtol=1e-10, atol=1e-12)


def test_grams_in_single_precision_do_not_lose_gradients_that_cancel(layout):
    model = build(dtype=torch.float32)
    model.head.weight.copy_(1e5 * model.head.weight[:1] + model.head.weight)
    operator = layout(model)
    features = operator.extract(boundary_of(model, images(dtype=torch.float32)))
    r = torch.tensor([[1.0, -1.0, 0.0, 0.0]]).expand(N, -1)
    norms = torch.einsum("na,nab,nb->n", r.double(), operator.gram(features), r.double()).sqrt()
    for i in range(N):
        one = slice(i, i + 1)
        explicit = torch.cat(
            [g.double().flatten() for g in operator.vjp(features.index(one), r[one]).values()]
        )
        torch.testing.assert_close(norms[i], explicit.norm(), rtol=2e-2, atol=0)


def test_a_chunked_covariance_product_equals_the_explicit_covariance(monkeypatch):
    monkeypatch.setattr("dptaft.tangent.compiled._CHUNK_BYTES", 2 * 5 * 6 * 8)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 5, 6, generator=g, dtype=torch.float64)
    p = torch.randn(5, 2, 5, generator=g, dtype=torch.float64).softmax(-1)
    v = torch.randn(5, 3, 2, 6, generator=g, dtype=torch.float64)
    mean = torch.einsum("nht,ntd->nhd", p, tokens)
    covariance = torch.einsum("nht,ntd,nte->nhde", p, tokens, tokens) - mean[..., None] * mean[..., None, :]
    expected = 0.5 * torch.einsum("nhde,nmhe->nmhd", covariance, v)
    torch.testing.assert_close(covariance_product(v, tokens, p, 0.5), expected, rtol=1e-12, atol=1e-12)


REFUSED = {
    "global_pool": {"global_pool": "avg", "fc_norm": False},
    "blocks.1.attn.q_norm": {"qk_norm": True},
    "blocks.1.attn.norm": {"scale_attn_norm": True},
    "blocks.1.mlp.norm": {"scale_mlp_norm": True},
    "blocks.1.norm1": {"norm_layer": RmsNorm},
    "blocks.1.mlp": {"mlp_layer": SwiGLUPacked},
    "blocks.1": {"block_fn": ParallelThingsBlock},
    "blocks.1.mlp.act": {"act_layer": partial(torch.nn.PReLU)},
    "head": {"num_classes": 0},
    "attn_pool": {"global_pool": "map"},
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_that_is_not_covered_is_refused_by_name(part, layout):
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    name = "global_pool" if part == "attn_pool" else part
    with pytest.raises(ValueError, match=f"does not cover {name} "):
        layout(VisionTransformer(**(shape | {"num_classes": 4} | REFUSED[part])))


def test_tiny_cotangents_survive_half_precision():
    model = build(init_values=1e-7, dtype=torch.float32)
    model.blocks[-1].ls1.gamma.fill_(1e-7)
    model.blocks[-1].ls2.gamma.fill_(1e-7)
    model.head.weight *= 1e-3
    operator = FactoredLastBlock(model)
    boundary = boundary_of(model, images(dtype=torch.float32))
    theta = random_theta(operator.parameter_shapes, dtype=torch.float32)
    exact, rounded = (operator.jvp(operator.extract(b), theta) for b in (boundary, boundary.half()))
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    gradient = operator.vjp(operator.extract(boundary.half()), torch.ones(N, 4))
    assert gradient["blocks.1.norm2.bias"].abs().max() > 0


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="does not cover the model \\(Linear\\)"):
        CompiledLastBlock(torch.nn.Linear(2, 2))


def test_bad_input_is_named(layout):
    model = build()
    operator = layout(model)
    features = operator.extract(boundary_of(model, images()))
    theta = random_theta(operator.parameter_shapes)
    with pytest.raises(ValueError, match=r"boundary has shape \(3, 5\); expected \(n, tokens, 12\)"):
        operator.extract(torch.zeros(3, 5))
    with pytest.raises(ValueError, match=r"missing \['head.bias'\]"):
        operator.jvp(features, {k: v for k, v in theta.items() if k != "head.bias"})
    with pytest.raises(ValueError, match="wrong shape"):
        operator.jvp(features, theta | {"head.bias": torch.zeros(5, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"cotangents have shape \(2, 4\)"):
        operator.vjp(features, torch.zeros(2, 4))


def test_features_index_concat_and_round():
    model = build()
    features = CompiledLastBlock(model).extract(boundary_of(model, images()))
    again = Features.concat([features.index(slice(0, 1)), features.index(torch.tensor([1, 2]))])
    assert len(again) == N
    assert all(torch.equal(again[k], features[k]) for k in features.tensors)
    half = features.to(dtype=torch.float16)
    assert (half.nbytes - N) * 4 == features.nbytes - N  # all but the booleans shrink
    with pytest.raises(ValueError, match="leading example axis"):
        Features({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(ValueError, match="different tensors"):
        Features.concat([Features({"a": torch.zeros(2)}), Features({"b": torch.zeros(2)})])
    with pytest.raises(ValueError, match="zero feature parts"):
        Features.concat([])

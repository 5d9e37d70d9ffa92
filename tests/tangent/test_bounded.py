import pytest
import torch

from dptaft.tangent.bounded import ROUNDING, SCALE, BoundedOperator, unit_scales
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.factored import FactoredLastBlock
from dptaft.tangent.model import TangentModel
from tests.tangent.families import build, images

IMAGES = 5


def made(kind, dtype=torch.float32):
    base = build("class token").to(dtype)
    scope = {"head": "head", "compiled": "last:1", "factored": "last:1", "dual": "last:2"}[kind]
    model = TangentModel(base, scope)
    if kind == "dual":
        operator = DualOperator(model)
    elif kind == "factored":
        operator = FactoredLastBlock(base)
    else:
        operator = tangent_operator(model)
    with torch.no_grad():
        return operator, model.boundary(images(IMAGES).to(dtype))


def dense(operator, features):
    """(n, C, P): every row of every Jacobian, by one transposed product each."""
    rows = []
    for i in range(len(features)):
        one = features.index(slice(i, i + 1))
        for c in range(operator.num_classes):
            r = torch.zeros(1, operator.num_classes, dtype=operator.dtype)
            r[0, c] = 1
            rows.append(torch.cat([g.double().flatten() for g in operator.vjp(one, r).values()]))
    return torch.stack(rows).view(len(features), operator.num_classes, -1)


KINDS = ["head", "compiled", "factored", "dual"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_jacobian_has_norm_one_and_keeps_its_direction(kind):
    inner, boundary = made(kind)
    operator = BoundedOperator(inner)
    features = operator.extract(boundary)
    bounded, free = dense(operator, features), dense(inner, inner.extract(boundary))
    norms = torch.linalg.matrix_norm(bounded, ord=2)
    assert float(norms.max()) <= 1 + ROUNDING / 4
    assert float(norms.min()) >= 1 - ROUNDING / 4
    own = torch.linalg.matrix_norm(free, ord=2)[:, None, None]
    torch.testing.assert_close(bounded, free / own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_products_belong_to_the_same_bounded_jacobian(kind):
    inner, boundary = made(kind, dtype=torch.float64)
    operator = BoundedOperator(inner)
    features = operator.extract(boundary)
    jacobian = dense(operator, features)
    flat = torch.randn(jacobian.shape[2], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theta, start = {}, 0
    for name, shape in operator.parameter_shapes.items():
        theta[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    torch.testing.assert_close(operator.jvp(features, theta), jacobian @ flat)
    members = {name: torch.stack([value, -2 * value]) for name, value in theta.items()}
    torch.testing.assert_close(operator.jvp(features, members)[1], -2 * (jacobian @ flat))
    r = torch.randn(IMAGES, operator.num_classes, dtype=torch.float64)
    gradients = torch.einsum("ncp,nc->np", jacobian, r)
    torch.testing.assert_close(operator.gradient_norms(features, r), gradients.norm(dim=1))
    torch.testing.assert_close(operator.gram(features), jacobian @ jacobian.transpose(1, 2))
    sums = operator.vjp(features, torch.stack([r, -2 * r]))
    total = torch.cat([value.flatten(1) for value in sums.values()], 1)
    torch.testing.assert_close(total, torch.stack([gradients.sum(0), -2 * gradients.sum(0)]))


def test_scales_do_not_depend_on_the_other_examples():
    inner, boundary = made("compiled")
    operator = BoundedOperator(inner)
    together = operator.extract(boundary)[SCALE]
    alone = torch.cat([operator.extract(boundary[i : i + 1])[SCALE] for i in range(IMAGES)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_rounded_features_are_bounded_as_they_are_stored(precision):
    inner, boundary = made("factored")
    operator = BoundedOperator(inner)
    features = operator.extract(boundary.to(precision))
    norms = torch.linalg.matrix_norm(dense(operator, features), ord=2)
    assert float((norms - 1).abs().max()) <= ROUNDING / 4


def test_a_record_that_is_not_finite_has_no_jacobian():
    inner, boundary = made("compiled")
    boundary[1, 0, 0] = float("nan")
    operator = BoundedOperator(inner)
    features = operator.extract(boundary)
    assert not features["finite"][1]
    assert torch.linalg.matrix_norm(dense(operator, features), ord=2)[1] == 0
    assert torch.isfinite(features[SCALE]).all()


def test_scales_of_zero_tiny_and_broken_grams():
    grams = torch.zeros(4, 2, 2, dtype=torch.float64)
    grams[1] = torch.eye(2) * 1e-30
    grams[2, 0, 0] = float("nan")
    grams[3] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    scales = unit_scales(grams)
    assert scales[0] == 0
    assert scales[2] == 0
    torch.testing.assert_close(scales[[1, 3]], torch.tensor([1e15, 3**-0.5], dtype=torch.float64))


def test_offsets_are_left_as_they_are():
    inner, boundary = made("compiled")
    operator = BoundedOperator(inner)
    features = operator.extract(boundary)
    assert torch.equal(operator.offset(features), inner.offset(inner.extract(boundary)))

"""Jacobians of diameter one, against explicit rows; the float64 twin of an operator."""

import copy

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.diameter import DiameterOperator, double_operator, inverse_diameters
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.model import TangentModel


def small_tangent(scope="last:1", classes=4):
    torch.manual_seed(0)
    base = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3, num_classes=classes
    ).eval()
    for parameter in base.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return TangentModel(base, scope)


def images(count=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def explicit_rows(operator, features):
    """Jacobians (n, C, P) row by row, from transposed products."""
    rows = []
    for i in range(len(features)):
        one = features.index(slice(i, i + 1))
        eye = torch.eye(operator.num_classes, dtype=torch.float64)
        rows.append(
            torch.stack(
                [torch.cat([g.reshape(-1) for g in operator.vjp(one, e[None]).values()]) for e in eye]
            ).double()
        )
    return torch.stack(rows)


def largest_distance(rows):
    return torch.stack([torch.cdist(j, j).max() for j in rows])


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2"])
def test_every_jacobian_has_diameter_one(scope):
    model = small_tangent(scope)
    inner = tangent_operator(model)
    bounded = DiameterOperator(inner)
    boundary = model.boundary(images())
    plain, features = inner.extract(boundary), bounded.extract(boundary)
    before = largest_distance(explicit_rows(inner, plain))
    assert before.min() > 1.5
    rows = explicit_rows(bounded, features)
    assert torch.allclose(largest_distance(rows), torch.ones(5, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(rows, explicit_rows(inner, plain) / before[:, None, None], atol=1e-5)
    assert torch.allclose(bounded.gram(features), rows @ rows.transpose(1, 2), atol=1e-5)
    assert bounded.layout.startswith("diameter")


def test_examples_without_a_diameter_count_nothing():
    grams = torch.stack([torch.ones(3, 3), torch.full((3, 3), torch.nan), torch.eye(3)])
    assert inverse_diameters(grams).tolist() == pytest.approx([0.0, 0.0, 2**-0.5])
    model = small_tangent()
    bounded = DiameterOperator(tangent_operator(model))
    boundary = model.boundary(images())
    boundary[2] = torch.inf
    features = bounded.extract(boundary)
    assert (explicit_rows(bounded, features)[2] == 0).all()


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2"])
def test_float64_twin_is_the_same_map_and_exactly_adjoint(scope):
    model = small_tangent(scope)
    operator = tangent_operator(model)
    features = operator.extract(model.boundary(images()))
    before = copy.deepcopy(model.base.state_dict())
    for given in (operator, DiameterOperator(operator)):
        wide = double_operator(given, model)
        assert type(wide) is type(operator)
        g = torch.Generator().manual_seed(2)
        theta = {
            k: torch.randn(s, generator=g, dtype=torch.float64) for k, s in operator.parameter_shapes.items()
        }
        r = torch.randn(5, 4, generator=g, dtype=torch.float64)
        out, pulled = wide.jvp(features, theta), wide.vjp(features, r)
        assert out.dtype == torch.float64
        assert torch.allclose(out, operator.jvp(features, theta).double(), rtol=1e-3, atol=1e-3)
        left, right = (out * r).sum(), sum((theta[k] * pulled[k]).sum() for k in theta)
        assert abs(left - right) < 1e-12 * out.norm() * r.norm() * 10
    assert all(torch.equal(before[k], v) for k, v in model.base.state_dict().items())


def test_float64_twin_of_the_dual_operator():
    model = small_tangent("last:1")
    assert isinstance(double_operator(DualOperator(model), model), DualOperator)

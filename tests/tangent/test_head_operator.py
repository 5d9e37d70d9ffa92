"""The head operator against the explicit Jacobian of a linear classifier."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.operator import TangentOperator

N, D, C = 5, 8, 3


class Probe(nn.Module):
    """A backbone whose classifier is called ``head``."""

    def __init__(self, bias=True):
        super().__init__()
        self.head = nn.Linear(D, C, bias=bias).double()

    def forward(self, u):
        return self.head(u)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=[True, False], ids=["bias", "no_bias"])
def case(request):
    model = Probe(request.param)
    operator = HeadOperator(model)
    u = random(N, D, seed=0)
    theta = {k: random(2, *s, seed=i) for i, (k, s) in enumerate(operator.parameter_shapes.items())}
    return model, operator, u, operator.extract(u), theta


def jacobian(model, u):
    params = dict(model.named_parameters())
    full = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (u,)))(params)
    return torch.cat([full[k].flatten(2) for k in params], dim=2)


def test_it_matches_the_explicit_jacobian(case):
    model, operator, u, features, theta = case
    assert isinstance(operator, TangentOperator)
    J = jacobian(model, u)
    flat = torch.cat([theta[k].flatten(1) for k in theta], dim=1)
    torch.testing.assert_close(operator.jvp(features, theta), torch.einsum("ncp,mp->mnc", J, flat))
    torch.testing.assert_close(operator.gram(features), J @ J.transpose(1, 2))
    r = random(2, N, C, seed=7)
    gradients = operator.vjp(features, r)
    total = torch.cat([gradients[k].flatten(1) for k in theta], dim=1)
    torch.testing.assert_close(total, torch.einsum("mnc,ncp->mp", r, J))
    norms = torch.einsum("mnc,ncp->mnp", r, J).norm(dim=2)
    torch.testing.assert_close(operator.gradient_norms(features, r), norms)
    torch.testing.assert_close(operator.offset(features), model(u))


def test_without_members_the_axis_is_absent(case):
    _, operator, _, features, theta = case
    one = {k: v[0] for k, v in theta.items()}
    torch.testing.assert_close(operator.jvp(features, one), operator.jvp(features, theta)[0])
    r = random(2, N, C, seed=7)
    torch.testing.assert_close(
        operator.gradient_norms(features, r[0]), operator.gradient_norms(features, r)[0]
    )
    alone, together = operator.vjp(features, r[0]), operator.vjp(features, r)
    for name in alone:
        torch.testing.assert_close(alone[name], together[name][0])


def test_a_half_precision_boundary_stays_half_and_arithmetic_is_float32():
    operator = HeadOperator(Probe().float())
    features = operator.extract(random(N, D, seed=0).half())
    assert features["u"].dtype == torch.float16
    assert operator.offset(features).dtype == torch.float32


def test_an_example_that_is_not_finite_has_a_zero_jacobian(case):
    _, operator, u, features, theta = case
    broken = u.clone()
    broken[1, 2] = float("inf")
    damaged = operator.extract(broken)
    good = torch.tensor([0, 2, 3, 4])
    r = random(2, N, C, seed=7)
    assert operator.jvp(damaged, theta)[:, 1].eq(0).all()
    assert operator.gram(damaged)[1].eq(0).all()
    assert operator.offset(damaged)[1].eq(0).all()
    assert operator.gradient_norms(damaged, r)[:, 1].eq(0).all()
    without = operator.vjp(features.index(good), r[:, good])
    for name, gradient in operator.vjp(damaged, r).items():
        torch.testing.assert_close(gradient, without[name])


def test_bad_input_is_named():
    operator = HeadOperator(Probe())
    with pytest.raises(ValueError, match=r"shape \(5, 9\); expected \(n, 8\)"):
        operator.extract(torch.zeros(5, 9))
    with pytest.raises(ValueError, match="found Identity"):
        HeadOperator(
            VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=3, num_classes=0)
        )

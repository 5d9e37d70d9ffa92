"""Opacus sees every tangent: its per-example gradients and ghost norms against one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

import dptaft.tangent.opacus_samplers  # noqa: F401, registers the samplers
from dptaft.tangent.dual_layers import TangentConstant, TangentScale
from dptaft.tangent.model import TangentModel
from tests.tangent.families import CLASSES, FAMILIES, build, images, random_like

# inputs of the tangent layers are activations of the frozen model, which need no gradient
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


def tangent_model(family, scope, **options):
    model = TangentModel(build(family), scope, **options)
    model.load_theta(random_like(model.theta(), scale=0.1))
    return model


def one_at_a_time(model, x, y):
    """Gradients of each example's loss, by name, with the example as first axis."""
    theta, rows = model.theta(), []
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.autograd.grad(loss, list(theta.values())))
    return {name: torch.stack(column) for name, column in zip(theta, zip(*rows, strict=True), strict=True)}


def batch():
    return images(3), torch.arange(3) % CLASSES


@pytest.mark.parametrize("scope", ["head", "last:1", "attention:2", "all"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_per_example_gradients(family, scope):
    model, (x, y) = tangent_model(family, scope), batch()
    expected = one_at_a_time(model, x, y)
    wrapped = GradSampleModule(model, loss_reduction="mean").train()
    F.cross_entropy(wrapped(x), y).backward()
    for name, parameter in model.theta().items():
        torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("scope", ["head", "last:1", "all"])
@pytest.mark.parametrize("family", ["class token", "registers, no embed class", "siglip", "beit", "eva02"])
def test_ghost_norms(family, scope):
    model, (x, y) = tangent_model(family, scope), batch()
    squares = [g.flatten(1).square().sum(1) for g in one_at_a_time(model, x, y).values()]
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="mean").train()
    F.cross_entropy(wrapped(x), y).backward()
    torch.testing.assert_close(
        wrapped.get_norm_sample(), torch.stack(squares).sum(0).sqrt(), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("family", ["class token", "average pool"])
def test_per_example_gradients_with_a_fresh_class_token(family):
    model, (x, y) = tangent_model(family, "last:2", fresh_cls_token_seed=0), batch()
    expected = one_at_a_time(model, x, y)
    F.cross_entropy(GradSampleModule(model, loss_reduction="mean").train()(x), y).backward()
    for name, parameter in model.theta().items():
        torch.testing.assert_close(parameter.grad_sample, expected[name], rtol=1e-9, atol=1e-10, msg=name)


def test_training_mode_of_the_wrapper_leaves_the_base_in_eval_mode():
    model = tangent_model("class token", "last:1")
    wrapped = GradSampleModule(model).train()
    assert wrapped.training
    assert not any(part.training for part in model.base.modules())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (TangentScale(torch.zeros(4, dtype=torch.float64)), (3, 5, 4)),
        (TangentScale(torch.zeros(4, dtype=torch.float64)), (3, 2, 5, 4)),
        (TangentScale(torch.zeros(4, dtype=torch.float64)), (3, 4)),
        (TangentConstant(torch.zeros(1, 6, 4, dtype=torch.float64)), (3, 5, 4)),
        (TangentConstant(torch.zeros(4, dtype=torch.float64)), (3, 5, 4)),
    ],
)
def test_samplers_agree_with_the_generic_one(layer, shape):
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(layer(x))
    grads = {}
    for generic in (False, True):
        wrapped = GradSampleModule(layer, loss_reduction="sum", force_functorch=generic).train()
        (wrapped(x).sin() * weights).sum().backward()
        grads[generic] = layer.weight.grad_sample
        wrapped.remove_hooks()
        layer.weight.grad_sample = None
    torch.testing.assert_close(grads[False], grads[True], rtol=1e-12, atol=1e-12)

"""The reference is checked against finite differences, and against closed forms where there are any."""

import pytest
import torch
from torch import nn

from dptaft.tangent.linearize import check_tangents, linearize
from tests.tangent.families import build, images, random_like


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_linear_layer_is_its_own_linearisation():
    layer = nn.Linear(3, 2).double().eval()
    x, step = torch.randn(5, 3).double(), random_like(parameters(layer))
    expected = x @ (layer.weight + step["weight"]).T + layer.bias + step["bias"]
    torch.testing.assert_close(linearize(layer, ["weight", "bias"])(step, x), expected)


def test_a_quadratic_has_the_known_derivative():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0, -3.0]))

        def forward(self, x, *, power=2):
            return x * self.w**power

    offset, moved = linearize(Square().eval(), ["w"], split=True)(
        {"w": torch.tensor([1.0, 10.0])}, 5.0, power=3
    )
    torch.testing.assert_close(offset, torch.tensor([40.0, -135.0]))
    torch.testing.assert_close(moved, torch.tensor([5.0 * 3 * 4, 5.0 * 3 * 9 * 10]))


@pytest.mark.parametrize("family", ["class token", "qk-norm", "siglip", "beit", "dinov3"])
def test_agrees_with_central_differences(family):
    model, x, h = build(family), images(), 1e-5
    step = random_like(parameters(model))
    _, moved = linearize(model, step, split=True)(step, x)

    def shifted(size):
        weights = {name: value + size * step[name] for name, value in parameters(model).items()}
        return torch.func.functional_call(model, weights, (x,))

    difference = (shifted(h) - shifted(-h)) / (2 * h)
    assert (moved - difference).abs().max() < 1e-6 * moved.abs().max()


def test_zero_tangents_give_the_model():
    model, x = build("class token"), images()
    zero = {name: torch.zeros_like(value) for name, value in parameters(model).items()}
    torch.testing.assert_close(linearize(model, zero)(zero, x), model(x), rtol=0, atol=1e-12)


def test_is_linear_in_the_tangents():
    model, x = build("class token"), images()
    one, two = random_like(parameters(model), 2), random_like(parameters(model), 3)
    f = linearize(model, one, split=True)
    both = {name: 2 * one[name] - 3 * two[name] for name in one}
    torch.testing.assert_close(f(both, x)[1], 2 * f(one, x)[1] - 3 * f(two, x)[1], rtol=1e-10, atol=1e-10)


def test_gradient_of_the_tangents_is_the_vector_jacobian_product():
    model, x = build("class token"), images()
    step = {name: value.requires_grad_() for name, value in random_like(parameters(model)).items()}
    out = linearize(model, step)(step, x)
    cotangent = torch.randn_like(out)
    got = torch.autograd.grad(out, list(step.values()), cotangent)
    model.requires_grad_(True)
    expected = torch.autograd.grad(model(x), [model.get_parameter(name) for name in step], cotangent)
    for left, right in zip(got, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_the_module_is_left_alone():
    model, x = build("class token"), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = random_like(parameters(model))
    linearize(model, step)(step, x)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_unknown_names_training_mode_and_wrong_tangents_are_refused():
    layer, x = nn.Linear(3, 2), torch.zeros(1, 3)
    with pytest.raises(ValueError, match="not a parameter of Linear: scale"):
        linearize(layer, ["weight", "scale"])
    f = linearize(layer, ["weight"])
    with pytest.raises(ValueError, match="eval mode"):
        f({"weight": torch.zeros(2, 3)}, x)
    layer.eval()
    with pytest.raises(ValueError, match="no tangent given for weight"):
        f({}, x)
    with pytest.raises(ValueError, match="not linearised: bias"):
        f({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, x)
    with pytest.raises(ValueError, match=r"weight has shape \(3, 2\), expected \(2, 3\)"):
        f({"weight": torch.zeros(3, 2)}, x)


def test_check_tangents_accepts_what_fits():
    check_tangents({"a": torch.zeros(2)}, {"a": torch.ones(2)})

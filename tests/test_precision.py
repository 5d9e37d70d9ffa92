"""Private products are full float32, whatever the caller has set, and the caller's settings return."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dptaft.precision import _PRODUCTS, _backend, _matmul_precision, full_float32
from dptaft.tangent.head_operator import HeadOperator
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.opacus_engine import OpacusEngine

NEW = hasattr(torch.backends, "fp32_precision")


def settings():
    if NEW:
        found = [_backend(name).fp32_precision for name in _PRODUCTS]
    else:
        found = [torch.backends.cudnn.allow_tf32]
    return [*found, _matmul_precision(), torch.is_autocast_enabled("cpu")]


@pytest.fixture(params=["medium", "high", "leaf", "autocast"])
def careless(request):
    """A caller who trades precision for speed."""
    before = torch.get_float32_matmul_precision()
    if request.param == "leaf":
        if not NEW:
            pytest.skip("needs torch.backends.*.fp32_precision")
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    elif request.param != "autocast":
        torch.set_float32_matmul_precision(request.param)
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "autocast"):
        yield settings()
    if request.param == "leaf":
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(before)


class Seen(TorchDispatchMode):
    """The settings under which products are taken."""

    def __init__(self):
        super().__init__()
        self.under = []

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        if any(word in str(operation) for word in ("mm", "linear", "conv")):
            self.under.append(settings())
            assert all(t.dtype != torch.bfloat16 for t in given if isinstance(t, torch.Tensor))
        return operation(*given, **(named or {}))


def exact(found):
    *products, matmul, autocast = found
    return matmul == "highest" and not autocast and all(p in ("ieee", False) for p in products)


def head():
    module = nn.Module()
    module.head = nn.Linear(6, 3)
    return module


@pytest.mark.parametrize("kind", ["fused", "hooks", "ghost"])
def test_every_private_product_is_exact_and_the_settings_return(careless, kind):
    inputs, labels = torch.randn(5, 6), torch.arange(5) % 3
    common = {"loss": CrossEntropy(), "l2_clip_norm": 0.5}
    if kind == "fused":
        operator = HeadOperator(head())
        engine = FusedEngine(operator, operator.extract(inputs), labels, **common)
    else:
        engine = OpacusEngine(nn.Linear(6, 3), inputs, labels, num_classes=3, method=kind, **common)
    theta = engine.initial_theta()
    with Seen() as seen:
        engine.clipped_sum(theta, torch.arange(5))
    assert len(seen.under) > 1
    assert all(exact(found) for found in seen.under)
    assert settings() == careless


def test_settings_return_after_an_error(careless):
    inside = []

    @full_float32()
    def fails():
        inside.append(settings())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert exact(inside[0])
    assert settings() == careless

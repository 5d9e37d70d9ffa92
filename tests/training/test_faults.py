"""Memory that runs out at any operation of a step: the sum is right, or there is an error."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.diameter import double_operator
from dptaft.tangent.model import TangentModel
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.one_shot import SoftmaxProblem
from dptaft.training.opacus_engine import FromBoundary, OpacusEngine

COUNT, PIECE, CLASSES = 8, 4, 3
ALL, LABELS = torch.arange(COUNT), torch.arange(COUNT) % CLASSES


def build(scope):
    torch.manual_seed(0)
    base = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=8, depth=1, num_heads=2
    )
    model = TangentModel(base, scope)
    theta = {name: 0.1 * torch.randn_like(p) for name, p in model.theta().items()}
    return model, model.boundary(torch.randn(COUNT, 1, 8, 8)), theta


def engine_of(kind, model, boundary):
    common = {"loss": CrossEntropy(), "l2_clip_norm": 0.5, "physical_batch_size": PIECE}
    if kind == "fused":
        operator = tangent_operator(model)
        return FusedEngine(operator, operator.extract(boundary), LABELS, **common)
    module, theta = FromBoundary(model), model.theta()
    return OpacusEngine(
        module, boundary, LABELS, num_classes=CLASSES, parameters=theta, method=kind, **common
    )


def gap(value, expected):
    """Largest difference, relative to the largest entry."""
    largest = max(float(v.abs().max()) for v in expected.values())
    return max(float((value[k] - expected[k]).abs().max()) for k in expected) / largest


class OutOfMemoryAt(TorchDispatchMode):
    """Fails at one operation, and counts them."""

    def __init__(self, fatal):
        super().__init__()
        self.fatal, self.done = fatal, 0

    def __torch_dispatch__(self, operation, types, given=(), named=None):
        self.done += 1
        if self.done - 1 == self.fatal:
            raise torch.OutOfMemoryError("no memory left for the test")
        return operation(*given, **(named or {}))


def every_fault(work, pieces):
    """Results of `work` with a fault at each operation in turn; None where it raised."""
    with OutOfMemoryAt(-1) as whole:
        work()
    assert whole.done > 20
    found = []
    for fatal in range(whole.done):
        pieces.size = PIECE
        try:
            with OutOfMemoryAt(fatal):
                found.append(work())
        except torch.OutOfMemoryError:
            found.append(None)
    return found


@pytest.mark.parametrize("scope", ["head", pytest.param("last:1", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fused", "hooks", "ghost"])
def test_no_record_counts_twice_in_any_engine(kind, scope):
    model, boundary, theta = build(scope)
    engine = engine_of(kind, model, boundary)
    expected = engine.clipped_sum(theta, ALL).value
    found = every_fault(lambda: engine.clipped_sum(theta, ALL).value, engine._physical)
    right = [value for value in found if value is not None]
    assert all(gap(value, expected) < 1e-6 for value in right)
    assert len(right) > len(found) / 2  # most faults are survived
    assert gap(engine.clipped_sum(theta, ALL).value, expected) < 1e-6


def test_no_record_counts_twice_for_any_member():
    model, boundary, theta = build("head")
    engine = engine_of("fused", model, boundary)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in theta.items()}

    def work():
        return engine.clipped_sum(stacked, ALL, [0.5, 0.25])

    expected = work()
    for found in every_fault(work, engine._physical):
        for i in range(2) if found is not None else ():
            assert gap(found.member(i).value, expected.member(i).value) < 1e-6


def test_no_record_counts_twice_in_a_problem_without_steps():
    model, boundary, _ = build("head")
    operator = double_operator(tangent_operator(model), model)
    features = operator.extract(boundary.double())
    problem = SoftmaxProblem(operator, features, LABELS, regularization=1.0, physical_batch_size=PIECE)
    weights = torch.randn(problem.dimension, dtype=torch.float64)

    def work():
        return problem.gradient(weights, problem.products(weights))

    expected = work()
    for found in every_fault(work, problem._physical):
        assert found is None or torch.allclose(found, expected, rtol=1e-12, atol=1e-12)

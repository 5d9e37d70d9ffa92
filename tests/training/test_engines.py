"""Fused, hooks and ghost clipping against a loop over single examples."""

import itertools
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.cut import Above, find_cut
from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features
from dptaft.tangent.scope import Scope
from dptaft.training.clipping import clip_factors
from dptaft.training.fused import FusedEngine, gram_norms
from dptaft.training.losses import CrossEntropy, HuberSquareLoss, RescaledSquareLoss
from dptaft.training.opacus_engine import FromBoundary, OpacusEngine

COUNT = 12
LOSSES = [CrossEntropy(), RescaledSquareLoss(kappa=5.0), HuberSquareLoss(kappa=5.0, residual_norm=4.0)]
ALL = torch.arange(COUNT)


class DenseOperator:
    """Materialised Jacobians: the obvious operator, for any tangent model."""

    kind = "dense"

    def __init__(self, model, num_classes):
        self.model, self.num_classes = model, num_classes
        self.parameter_shapes = {name: p.shape for name, p in model.theta().items()}

    def extract(self, boundary):
        logits = [self.model.forward_from_boundary(boundary[i : i + 1])[0] for i in range(len(boundary))]
        theta = list(self.model.theta().values())
        rows = [
            [torch.cat([g.flatten() for g in torch.autograd.grad(z, theta, retain_graph=True)]) for z in row]
            for row in logits
        ]
        return Features({"J": torch.stack([torch.stack(row) for row in rows])})

    def offset(self, features):
        return features["J"].new_zeros(len(features), self.num_classes)

    def jvp(self, features, theta):
        lead = theta[next(iter(theta))].ndim - len(next(iter(self.parameter_shapes.values())))
        flat = torch.cat([theta[name].flatten(lead) for name in self.parameter_shapes], dim=-1)
        return torch.einsum("ncp,...p->...nc", features["J"], flat)

    def vjp(self, features, cotangents):
        flat = torch.einsum("ncp,...nc->...p", features["J"], cotangents)
        parts = flat.split([shape.numel() for shape in self.parameter_shapes.values()], dim=-1)
        shapes = self.parameter_shapes.items()
        return {n: part.reshape(*part.shape[:-1], *s) for (n, s), part in zip(shapes, parts, strict=True)}

    def gram(self, features):
        return features["J"] @ features["J"].mT

    def gradient_norms(self, features, cotangents):
        return torch.einsum("ncp,...nc->...np", features["J"], cotangents).norm(dim=-1)


def build(scope, classes, dtype=torch.float32, seed=0):
    """A tiny tangent model with boundary activations, labels and a theta away from zero."""
    torch.manual_seed(seed)
    base = VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=classes, embed_dim=16, depth=2, num_heads=2
    ).to(dtype)
    for p in base.parameters():
        nn.init.normal_(p, std=0.3) if p.ndim < 2 else nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    model = TangentModel(base, scope)
    boundary = model.boundary(torch.randn(COUNT, 1, 12, 12, dtype=dtype))
    theta = {name: 0.1 * torch.randn_like(p) for name, p in model.theta().items()}
    return model, boundary, torch.randint(classes, (COUNT,)), theta


def operator_for(model, scope, classes):
    if scope == "head":
        return HeadOperator(model.base)
    return CompiledLastBlock(model.base) if scope == "last:1" else DenseOperator(model, classes)


def loop(module, parameters, inputs, labels, loss, l2_clip_norm):
    """Sum of clipped gradients and their norms, one example at a time by automatic differentiation."""
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    norms = []
    for i in range(len(inputs)):
        value = loss.value(module(inputs[i : i + 1]), labels[i : i + 1]).sum()
        gradients = torch.autograd.grad(value, list(parameters.values()))
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradients)))
        factor = min(1.0, l2_clip_norm / norms[-1])
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += factor * gradient
    return total, torch.tensor(norms)


def gap(value, expected):
    """Relative L2 difference over all parameters jointly."""
    assert value.keys() == expected.keys()
    difference = sum(float((value[k] - expected[k]).double().square().sum()) for k in expected)
    return math.sqrt(difference / sum(float(v.double().square().sum()) for v in expected.values()))


def engines(model, boundary, labels, classes, scope, loss, clip, **options):
    operator = operator_for(model, scope, classes)
    common = {"loss": loss, "l2_clip_norm": clip, **options}
    features = operator.extract(boundary)
    yield "gram", FusedEngine(operator, features, labels, norms="gram", **common)
    yield "factors", FusedEngine(operator, features, labels, norms="factors", **common)
    shipped = tangent_operator(model)
    yield "shipped", FusedEngine(shipped, shipped.extract(boundary), labels, norms="factors", **common)
    for method in ("hooks", "ghost"):
        engine = OpacusEngine(
            FromBoundary(model),
            boundary,
            labels,
            num_classes=classes,
            parameters=model.theta(),
            method=method,
            **common,
        )
        yield method, engine
        engine.close()


CASES = [
    *itertools.product(["head", "last:1"], [2, 10, 100], LOSSES),
    *itertools.product(["attention:1", "last:2", "all"], [2, 10], LOSSES),
    *itertools.product(["attention:1", "last:2", "all"], [100], LOSSES[:1]),
]


@pytest.mark.parametrize(("scope", "classes", "loss"), CASES, ids=lambda value: getattr(value, "name", value))
def test_all_engines_agree_with_the_loop(scope, classes, loss):
    model, boundary, labels, theta = build(scope, classes)
    model.load_theta(theta)
    _, norms = loop(FromBoundary(model), model.theta(), boundary, labels, loss, 1.0)
    clip = float(norms.median())
    assert norms.min() < clip < norms.max()  # some examples are clipped, some are not
    expected, _ = loop(FromBoundary(model), model.theta(), boundary, labels, loss, clip)
    for name, engine in engines(model, boundary, labels, classes, scope, loss, clip):
        clipped = engine.clipped_sum(theta, ALL)
        assert gap(clipped.value, expected) < 1e-5, name
        assert clipped.sensitivity >= clip
        assert clipped.num_nonfinite == 0


def test_agreement_in_double_precision_is_much_closer():
    model, boundary, labels, theta = build("last:1", 10, torch.float64)
    model.load_theta(theta)
    expected, _ = loop(FromBoundary(model), model.theta(), boundary, labels, LOSSES[0], 0.5)
    for name, engine in engines(model, boundary, labels, 10, "last:1", LOSSES[0], 0.5):
        assert gap(engine.clipped_sum(theta, ALL).value, expected) < 1e-11, name


def test_pieces_order_and_subsets_do_not_change_the_sum():
    model, boundary, labels, theta = build("last:1", 10)
    model.load_theta(theta)
    batch = torch.tensor([7, 2, 9, 0, 5])
    expected, _ = loop(FromBoundary(model), model.theta(), boundary[batch], labels[batch], LOSSES[0], 0.5)
    for size in (1, 2, 512):
        for name, engine in engines(
            model, boundary, labels, 10, "last:1", LOSSES[0], 0.5, physical_batch_size=size
        ):
            assert gap(engine.clipped_sum(theta, batch).value, expected) < 1e-5, (name, size)


def test_full_batch_in_any_order():
    model, boundary, labels, theta = build("head", 3)
    engine = FusedEngine(
        operator_for(model, "head", 3),
        operator_for(model, "head", 3).extract(boundary),
        labels,
        loss=LOSSES[0],
        l2_clip_norm=0.5,
    )
    expected = engine.clipped_sum(theta, ALL).value
    assert gap(engine.clipped_sum(theta, ALL.flip(0)).value, expected) < 1e-6


def test_empty_batch_is_a_sum_of_zeros_in_every_engine():
    model, boundary, labels, theta = build("last:1", 3)
    for name, engine in engines(model, boundary, labels, 3, "last:1", LOSSES[0], 1.0):
        clipped = engine.clipped_sum(theta, torch.empty(0, dtype=torch.int64))
        assert {k: v.shape for k, v in clipped.value.items()} == dict(engine.parameter_shapes), name
        assert all(bool((v == 0).all()) for v in clipped.value.values())


def test_an_example_named_twice_is_refused():
    model, boundary, labels, theta = build("head", 3)
    for _, engine in engines(model, boundary, labels, 3, "head", LOSSES[0], 1.0):
        with pytest.raises(ValueError, match="same example more than once"):
            engine.clipped_sum(theta, torch.tensor([1, 2, 1]))


def test_members_share_one_pass():
    model, boundary, labels, theta = build("last:1", 4)
    operator = operator_for(model, "last:1", 4)
    features = operator.extract(boundary)
    other = {name: 2 * torch.randn_like(value) for name, value in theta.items()}
    both = {name: torch.stack([theta[name], other[name]]) for name in theta}
    for norms in ("gram", "factors"):
        engine = FusedEngine(operator, features, labels, loss=LOSSES[0], l2_clip_norm=0.5, norms=norms)
        clipped = engine.clipped_sum(both, ALL[:7])
        assert clipped.members == 2
        for i, single in enumerate((theta, other)):
            alone = engine.clipped_sum(single, ALL[:7])
            assert alone.members is None
            assert gap(clipped.member(i).value, alone.value) < 1e-5


def test_one_example_moves_the_sum_by_at_most_the_sensitivity():
    model, boundary, labels, theta = build("last:1", 10)
    for name, engine in engines(model, boundary, labels, 10, "last:1", LOSSES[1], 0.3):
        whole = engine.clipped_sum(theta, ALL)
        for left_out in range(COUNT):
            rest = engine.clipped_sum(theta, ALL[left_out != ALL])
            moved = sum(float((whole.value[k] - rest.value[k]).double().square().sum()) for k in whole.value)
            assert math.sqrt(moved) <= whole.sensitivity, name
            assert math.sqrt(moved) > 0.29


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_examples_contribute_exactly_zero(bad):
    model, boundary, labels, theta = build("last:1", 5)
    model.load_theta(theta)
    kept = ALL[(ALL != 3) & (ALL != 8)]
    for name, engine in engines(model, boundary, labels, 5, "last:1", LOSSES[0], 0.5, physical_batch_size=5):
        expected = engine.clipped_sum(theta, kept)
        spoiled = boundary.clone()
        spoiled[[3, 8], 0] = bad
        if isinstance(engine, OpacusEngine):
            engine._inputs = spoiled
        else:
            for tensor in engine._features.tensors.values():
                tensor[[3, 8]] = bad
            if engine._grams is not None:
                engine._grams = engine._compute_grams()
        clipped = engine.clipped_sum(theta, ALL)
        assert clipped.num_nonfinite == 2, name
        assert gap(clipped.value, expected.value) < 1e-6, name


def test_out_of_memory_halves_the_pieces_and_changes_nothing():
    model, boundary, labels, theta = build("last:1", 5)
    for name, engine in engines(model, boundary, labels, 5, "last:1", LOSSES[0], 0.5):
        expected = engine.clipped_sum(theta, ALL)
        where = "_piece" if isinstance(engine, FusedEngine) else f"_{name}_piece"
        original, sizes = getattr(engine, where), []

        def limited(*given, original=original, sizes=sizes):
            chosen = given[-1]
            size = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
            sizes.append(size)
            result = original(*given)
            if size > 3:
                raise torch.OutOfMemoryError("no memory left for the test")
            return result

        setattr(engine, where, limited)
        clipped = engine.clipped_sum(theta, ALL)
        assert gap(clipped.value, expected.value) < 1e-6, name
        assert sizes[:3] == [12, 6, 3]
        assert sum(size for size in sizes if size <= 3) == COUNT


def test_other_errors_are_not_taken_for_lack_of_memory():
    model, boundary, labels, theta = build("head", 5)
    _, engine = next(engines(model, boundary, labels, 5, "head", LOSSES[0], 0.5))
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size|match"):
        engine.clipped_sum({**theta, "head.weight": torch.zeros(2, 2)}, ALL)


# ---------------------------------------------- ordinary fine-tuning and coverage of parameters


def nonlinear(scope, classes=5, **given):
    torch.manual_seed(1)
    base = VisionTransformer(
        img_size=12,
        patch_size=4,
        in_chans=1,
        num_classes=classes,
        embed_dim=16,
        depth=2,
        num_heads=2,
        **given,
    )
    for name, p in base.named_parameters():
        p.requires_grad_(name.startswith(("blocks.1.", "norm.", "head.")) or scope == "all")
    module = Above(base, find_cut(base, Scope.parse(scope)))
    images = torch.randn(COUNT, 1, 12, 12)
    inputs = images if scope == "all" else base.blocks[0](base._pos_embed(base.patch_embed(images))).detach()
    return module, inputs, torch.randint(classes, (COUNT,))


@pytest.mark.parametrize("method", ["hooks", "ghost"])
@pytest.mark.parametrize(("scope", "given"), [("last:1", {}), ("last:1", {"init_values": 0.1}), ("all", {})])
def test_ordinary_fine_tuning_agrees_with_the_loop(method, scope, given):
    module, inputs, labels = nonlinear(scope, **given)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    _, norms = loop(module, trained, inputs, labels, LOSSES[0], 1.0)
    clip = float(norms.median())
    expected, _ = loop(module, trained, inputs, labels, LOSSES[0], clip)
    engine = OpacusEngine(
        module, inputs, labels, num_classes=5, loss=LOSSES[0], l2_clip_norm=clip, method=method
    )
    clipped = engine.clipped_sum(engine.parameters, ALL)
    assert gap(clipped.value, expected) < 1e-5
    assert all(bool((v != 0).any()) for v in clipped.value.values())


def test_dropout_stays_off():
    module, inputs, labels = nonlinear("last:1", proj_drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5)
    engine = OpacusEngine(module, inputs, labels, num_classes=5, loss=LOSSES[0], l2_clip_norm=1.0)
    first, second = (engine.clipped_sum(engine.parameters, ALL).value for _ in range(2))
    assert gap(first, second) == 0.0


class Hidden(nn.Module):
    """Uses a parameter outside of the layer that owns it, where hooks see nothing."""

    def __init__(self):
        super().__init__()
        self.seen, self.unseen = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.seen(x) + x @ self.unseen.weight.T


class HalfHidden(Hidden):
    """Uses a parameter in its layer and once more outside of it."""

    def forward(self, x):
        return self.seen(x) + self.unseen(x) + x @ self.unseen.weight.T


@pytest.mark.parametrize("method", ["hooks", "ghost"])
@pytest.mark.parametrize("module", [Hidden, HalfHidden])
def test_a_parameter_that_hooks_do_not_see_is_an_error(method, module):
    engine = OpacusEngine(
        module(),
        torch.randn(6, 4),
        torch.zeros(6, dtype=torch.int64),
        num_classes=3,
        loss=LOSSES[0],
        l2_clip_norm=1.0,
        method=method,
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=r"not see the per-example gradient of unseen\.weight"):
            engine.clipped_sum(engine.parameters, torch.arange(6))


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_batch_normalisation_is_refused_with_the_reason(layer):
    module = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"1 is a .*BatchNorm.*mixes the examples of a batch"):
        OpacusEngine(
            module,
            torch.randn(6, 4),
            torch.zeros(6, dtype=torch.int64),
            num_classes=3,
            loss=LOSSES[0],
            l2_clip_norm=1.0,
        )


def test_bad_input_is_refused_at_construction():
    model, boundary, labels, _ = build("head", 3)
    operator = operator_for(model, "head", 3)
    features = operator.extract(boundary)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        FusedEngine(operator, features, labels + 3, loss=LOSSES[0], l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="12 int64 values"):
        FusedEngine(operator, features, labels[:5], loss=LOSSES[0], l2_clip_norm=1.0)
    with pytest.raises(ValueError, match="l2_clip_norm"):
        FusedEngine(operator, features, labels, loss=LOSSES[0], l2_clip_norm=0.0)
    with pytest.raises(ValueError, match="norms must be"):
        FusedEngine(operator, features, labels, loss=LOSSES[0], l2_clip_norm=1.0, norms="fast")
    with pytest.raises(ValueError, match="no trainable parameter"):
        OpacusEngine(
            nn.Linear(4, 3).requires_grad_(False),
            torch.randn(COUNT, 4),
            labels,
            num_classes=3,
            loss=LOSSES[0],
            l2_clip_norm=1.0,
        )


def test_grams_that_are_too_small_are_refused():
    model, boundary, labels, _ = build("last:1", 3)

    class Wrong(CompiledLastBlock):
        def gram(self, features):
            return 0.9 * super().gram(features)

    operator = Wrong(model.base)
    with pytest.raises(ValueError, match="disagree with explicit gradients"):
        FusedEngine(operator, operator.extract(boundary), labels, loss=LOSSES[0], l2_clip_norm=1.0)


def test_gram_norms_are_accurate_where_the_gram_is_ill_conditioned():
    generator = torch.Generator().manual_seed(0)
    J = torch.randn(5, 10, 300, generator=generator) + 30 * torch.randn(5, 1, 300, generator=generator)
    r = torch.randn(5, 10, generator=generator)
    r = r - r.mean(1, keepdim=True)
    exact = torch.einsum("ncp,nc->np", J.double(), r.double()).norm(dim=1)
    norms = gram_norms(J @ J.mT, r)
    assert ((norms.double() - exact).abs() / exact).max() < 1e-4
    assert (clip_factors(norms, 1.0) * exact).max() < 1 + 2.0**-13

"""Engines and optimiser together: whole private steps."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.model import TangentModel
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.opacus_engine import FromBoundary, OpacusEngine
from dptaft.training.optimizers import OptimizerConfig, build_optimizer, member_parameters
from dptaft.training.sampling import Poisson

COUNT, CLASSES, STEPS = 20, 4, 6
ENGINES = ["fused", "hooks", "ghost"]


def setup(kind, scope, clip):
    """Engine, its parameters, and the pieces of an ordinary training loop."""
    torch.manual_seed(3)
    base = VisionTransformer(
        img_size=12, patch_size=4, in_chans=1, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2
    )
    for p in base.parameters():
        nn.init.normal_(p, std=0.3)
    model = TangentModel(base, scope)
    boundary = model.boundary(torch.randn(COUNT, 1, 12, 12))
    labels = torch.randint(CLASSES, (COUNT,))
    common = {"loss": CrossEntropy(), "l2_clip_norm": clip, "physical_batch_size": 7}
    if kind == "fused":
        operator = tangent_operator(model)
        engine = FusedEngine(operator, operator.extract(boundary), labels, **common)
        parameters = {name: nn.Parameter(value) for name, value in engine.initial_theta().items()}
    else:
        engine = OpacusEngine(
            FromBoundary(model),
            boundary,
            labels,
            num_classes=CLASSES,
            parameters=model.theta(),
            method=kind,
            **common,
        )
        parameters = engine.parameters
    return engine, parameters, model, boundary, labels


def train(kind, scope, clip, *, noise_multiplier, source, sampler=None, learning_rate=0.01):
    engine, parameters, *_ = setup(kind, scope, clip)
    optimizer = build_optimizer(
        parameters,
        OptimizerConfig("momentum", learning_rate),
        noise_multiplier=noise_multiplier,
        l2_clip_norm=clip,
        expected_batch_size=10.0,
        source=source,
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        batch = (
            sampler.next_batch() if sampler else torch.randperm(COUNT, generator=generator)[:10].sort().values
        )
        optimizer.private_step(engine.clipped_sum(parameters, batch))
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("scope", ["head", "last:1", "attention:1"])
@pytest.mark.parametrize("kind", ENGINES)
def test_without_clipping_and_noise_training_is_ordinary_training(kind, scope):
    private = train(kind, scope, 1e6, noise_multiplier=0.0, source=NoiseSource())
    _, _, model, boundary, labels = setup("fused", scope, 1.0)
    theta = {name: nn.Parameter(torch.zeros_like(p)) for name, p in model.theta().items()}
    optimizer = torch.optim.SGD(theta.values(), lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        batch = torch.randperm(COUNT, generator=generator)[:10].sort().values
        model.load_theta({name: p.detach() for name, p in theta.items()})
        loss = nn.functional.cross_entropy(model.forward_from_boundary(boundary[batch]), labels[batch])
        gradients = torch.autograd.grad(loss, list(model.theta().values()))
        for p, gradient in zip(theta.values(), gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    for name, p in theta.items():
        torch.testing.assert_close(private[name], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scope", ["head", "last:1", "attention:1"])
def test_engines_take_the_same_private_steps(scope):
    runs = [train(kind, scope, 0.1, noise_multiplier=1.0, source=InsecureSeededNoise(9)) for kind in ENGINES]
    for other in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("scope", ["head", "last:1", "attention:1"])
def test_every_trainable_parameter_is_clipped_and_moves(kind, scope):
    engine, parameters, *_ = setup(kind, scope, 1e-3)
    whole = engine.clipped_sum(parameters, torch.arange(COUNT))
    single = engine.clipped_sum(parameters, torch.arange(1))
    norm = torch.cat([value.flatten() for value in single.value.values()]).norm()
    assert norm == pytest.approx(1e-3, rel=1e-4)  # clipped, all parameters jointly
    assert all(bool((value != 0).any()) for value in whole.value.values())
    moved = train(kind, scope, 1e-3, noise_multiplier=0.0, source=NoiseSource())
    assert all(bool((value != 0).any()) for value in moved.values())


@pytest.mark.parametrize("kind", ENGINES)
def test_empty_poisson_batches_move_every_weight(kind):
    sampler = Poisson(COUNT, 1e-9, NoiseSource())
    moved = train(kind, "head", 1.0, noise_multiplier=1.0, source=NoiseSource(), sampler=sampler)
    assert all(bool((value != 0).all()) for value in moved.values())


def test_members_of_a_sweep_train_like_separate_runs():
    config = [OptimizerConfig("momentum", 0.01), OptimizerConfig("adam", 0.02)]

    def optimizer_for(parameters, member):
        return build_optimizer(
            parameters,
            config[member],
            noise_multiplier=1.0 + member,
            l2_clip_norm=0.1,
            expected_batch_size=10.0,
            source=InsecureSeededNoise(member),
        )

    engine, *_ = setup("fused", "last:1", 0.1)
    stacked = engine.initial_theta(members=2)
    optimizers = [optimizer_for(member_parameters(stacked, member), member) for member in range(2)]
    for _ in range(STEPS):
        clipped = engine.clipped_sum(stacked, torch.arange(COUNT))
        for member, optimizer in enumerate(optimizers):
            optimizer.private_step(clipped.member(member))
    for member in range(2):
        alone = {name: nn.Parameter(value) for name, value in engine.initial_theta().items()}
        optimizer = optimizer_for(alone, member)
        for _ in range(STEPS):
            optimizer.private_step(engine.clipped_sum(alone, torch.arange(COUNT)))
        for name, p in alone.items():
            torch.testing.assert_close(stacked[name][member], p.detach(), rtol=1e-4, atol=1e-5)

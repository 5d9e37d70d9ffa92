"""The private step: one noise per batch, public normaliser, schedules, averages."""

import math

import pytest
import torch
from torch import nn

from dptaft.training.clipping import ClippedSum, l2_sensitivity
from dptaft.training.noise import InsecureSeededNoise, NoiseSource, noise_std
from dptaft.training.optimizers import (
    IterateAverage,
    OptimizerConfig,
    Schedule,
    build_optimizer,
    project_to_ball,
)

CLIP = 0.5


def make(config=None, size=3, **given):
    theta = {"a": nn.Parameter(torch.ones(size)), "b": nn.Parameter(torch.zeros(2, size))}
    options = {"noise_multiplier": 0.0, "expected_batch_size": 4.0, "source": NoiseSource(), **given}
    return theta, build_optimizer(theta, config or OptimizerConfig(), l2_clip_norm=CLIP, **options)


def sums(theta, scale=1.0):
    return ClippedSum({name: torch.full_like(p.data, scale) for name, p in theta.items()}, CLIP)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (OptimizerConfig(learning_rate=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
        (OptimizerConfig("momentum", 0.3, momentum=0.8), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.8)),
        (
            OptimizerConfig("adam", 0.3, betas=(0.8, 0.9)),
            lambda p: torch.optim.Adam(p, lr=0.3, betas=(0.8, 0.9)),
        ),
        (
            OptimizerConfig(learning_rate=0.3, l2_regularization=0.1),
            lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.1),
        ),
    ],
)
def test_without_noise_the_step_is_the_ordinary_one(config, reference):
    theta, optimizer = make(config)
    plain = [nn.Parameter(p.detach().clone()) for p in theta.values()]
    ordinary = reference(plain)
    for step in range(5):
        clipped = sums(theta, scale=float(step) - 1.0)
        optimizer.private_step(clipped)
        for p, value in zip(plain, clipped.value.values(), strict=True):
            p.grad = value / 4.0
        ordinary.step()
        for p, q in zip(plain, theta.values(), strict=True):
            torch.testing.assert_close(q, p)


def test_regularisation_is_outside_clipping_and_noise():
    theta, optimizer = make(OptimizerConfig(learning_rate=0.5, l2_regularization=0.2))
    optimizer.private_step(sums(theta, 0.0))
    torch.testing.assert_close(theta["a"].data, torch.full((3,), 1.0 - 0.5 * 0.2))


def test_noise_of_the_step_has_the_stated_scale_and_normaliser():
    theta, optimizer = make(OptimizerConfig(learning_rate=2.0), size=100_000, noise_multiplier=3.0)
    before = theta["b"].detach().clone()
    optimizer.private_step(sums(theta, 0.0))
    moved = (theta["b"] - before).detach().flatten()
    std = noise_std(
        sensitivity=l2_sensitivity(CLIP, "zero-out"), noise_multiplier=3.0, dimension=optimizer.dimension
    )
    assert optimizer.noise_std == std
    assert std >= 3.0 * CLIP
    expected = 2.0 * std / 4.0
    assert abs(moved.std() / expected - 1) < 6 / math.sqrt(2 * len(moved))
    # a step with 2 % less noise would be rejected
    assert abs(0.98 * moved.std() / expected - 1) > 6 / math.sqrt(2 * len(moved))


def test_replace_one_doubles_the_noise():
    moves = {}
    for adjacency in ("zero-out", "replace-one"):
        theta, optimizer = make(noise_multiplier=1.0, adjacency=adjacency, source=InsecureSeededNoise(1))
        value = {name: torch.zeros_like(p) for name, p in theta.items()}
        optimizer.private_step(ClippedSum(value, CLIP, adjacency))
        moves[adjacency] = theta["b"].detach()
        assert optimizer.noise_std == pytest.approx(CLIP * (2 if adjacency == "replace-one" else 1), rel=1e-3)
    torch.testing.assert_close(moves["replace-one"], 2 * moves["zero-out"])


def test_empty_batch_steps_and_adds_noise():
    theta, optimizer = make(noise_multiplier=1.0)
    before = {name: p.detach().clone() for name, p in theta.items()}
    optimizer.private_step(sums(theta, 0.0))
    assert all(bool((p != before[name]).all()) for name, p in theta.items())


def test_virtual_batches_add_noise_once():
    theta, optimizer = make(noise_multiplier=1.0, source=InsecureSeededNoise(1))
    for _ in range(4):
        optimizer.accept(sums(theta, 0.25))
    optimizer.step()
    whole, other = make(noise_multiplier=1.0, source=InsecureSeededNoise(1))
    other.private_step(sums(whole, 1.0))
    for name in theta:
        torch.testing.assert_close(theta[name], whole[name])


def test_no_sum_is_used_twice_and_no_step_goes_without_one():
    theta, optimizer = make()
    for take in (optimizer.private_step, lambda clipped: (optimizer.accept(clipped), optimizer.step())):
        take(sums(theta))
        with pytest.raises(ValueError, match="no clipped sum was accepted"):
            optimizer.step()


def test_every_step_has_new_noise():
    theta, optimizer = make(size=1000, noise_multiplier=1.0)
    moves = []
    for _ in range(3):
        before = theta["a"].detach().clone()
        optimizer.private_step(sums(theta, 0.0))
        moves.append(theta["a"].detach() - before)
    correlation = torch.corrcoef(torch.stack(moves)) - torch.eye(3)
    assert correlation.abs().max() < 6 / math.sqrt(1000)


def test_torch_generator_has_no_influence():
    moves = []
    for _ in range(2):
        torch.manual_seed(0)
        theta, optimizer = make(noise_multiplier=1.0)
        optimizer.private_step(sums(theta, 0.0))
        moves.append(theta["b"].detach().clone())
    assert not torch.equal(*moves)


@pytest.mark.parametrize(
    ("clipped", "message"),
    [
        (ClippedSum({"a": torch.ones(3), "b": torch.ones(2, 3)}, 2 * CLIP), "clipped to 1.0"),
        (ClippedSum({"a": torch.ones(3), "b": torch.ones(2, 3)}, CLIP, "replace-one"), "under replace-one"),
        (ClippedSum({"a": torch.ones(3)}, CLIP), "different parameters"),
        (ClippedSum({"a": torch.ones(3), "b": torch.ones(3)}, CLIP), "has shape"),
        (ClippedSum({"a": torch.ones(1, 3), "b": torch.ones(1, 2, 3)}, CLIP, members=1), "take one member"),
    ],
)
def test_sums_that_do_not_fit_are_refused_before_anything_changes(clipped, message):
    theta, optimizer = make()
    with pytest.raises(ValueError, match=message):
        optimizer.private_step(clipped)
    assert all(p.summed_grad is None for p in theta.values())


@pytest.mark.parametrize(
    "bad", [{"expected_batch_size": 0.0}, {"expected_batch_size": math.nan}, {"noise_multiplier": -1.0}]
)
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(**bad)


def test_parameters_must_be_those_of_the_optimizer():
    theta, optimizer = make()
    with pytest.raises(ValueError, match="exactly the named parameters"):
        type(optimizer)(
            {"a": theta["a"]},
            optimizer.original_optimizer,
            noise_multiplier=1.0,
            l2_clip_norm=1.0,
            expected_batch_size=1.0,
            source=NoiseSource(),
        )


def test_schedules():
    assert Schedule("cosine", final=0.0).factor(4, 5) == pytest.approx(0.0)
    assert Schedule("cosine", final=0.2).factor(2, 5) == pytest.approx(0.6)
    assert [Schedule(warmup_steps=2).factor(i, 4) for i in range(4)] == [0.5, 1.0, 1.0, 1.0]
    assert Schedule("linear", final=0.0).factor(0, 1) == 1.0
    with pytest.raises(ValueError, match="step must be in"):
        Schedule().factor(5, 5)


def test_schedules_reach_the_step():
    config = OptimizerConfig(
        learning_rate=2.0,
        learning_rate_schedule=Schedule("linear", final=0.5),
        noise_schedule=Schedule("linear", final=3.0),
    )
    _, optimizer = make(config, noise_multiplier=1.0)
    optimizer.set_step(config, 1.0, step=2, steps=3)
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert optimizer.noise_multiplier == 3.0
    assert config.noise_multipliers(1.0, 3) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "lion"},
        {"learning_rate": 0.0},
        {"learning_rate": math.inf},
        {"momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"l2_regularization": -1.0},
        {"averaging": "best"},
        {"noise_schedule": Schedule("linear", final=0.0)},
        {"noise_schedule": Schedule(warmup_steps=3)},
    ],
)
def test_bad_configurations(bad):
    with pytest.raises(ValueError, match=r"optimizer|" + next(iter(bad))):
        OptimizerConfig(**bad)


def test_only_plain_last_iterates_are_called_plain():
    assert OptimizerConfig().is_plain_gradient_descent
    assert OptimizerConfig(l2_regularization=0.1).is_plain_gradient_descent
    assert not OptimizerConfig("momentum").is_plain_gradient_descent
    assert not OptimizerConfig("adam").is_plain_gradient_descent
    assert not OptimizerConfig(averaging="tail").is_plain_gradient_descent


def test_averages():
    iterates = [torch.tensor([float(k * k)]) for k in range(10)]
    tail = IterateAverage(OptimizerConfig(averaging="tail"), steps=10)
    ema = IterateAverage(OptimizerConfig(averaging="ema", ema_decay=0.7), steps=10)
    last = IterateAverage(OptimizerConfig(), steps=10)
    for step, value in enumerate(iterates):
        for average in (tail, ema, last):
            average.update({"w": value}, step)
    weights = torch.tensor([0.7 ** (9 - k) for k in range(10)])
    expected = (weights * torch.cat(iterates)).sum() / weights.sum()
    torch.testing.assert_close(tail.value({"w": iterates[-1]})["w"], torch.cat(iterates[5:]).mean()[None])
    torch.testing.assert_close(ema.value({"w": iterates[-1]})["w"], expected[None])
    torch.testing.assert_close(last.value({"w": iterates[-1]})["w"], iterates[-1])


def test_projection_keeps_short_vectors():
    theta = {"a": torch.tensor([0.3]), "b": torch.tensor([0.4])}
    project_to_ball(theta, 1.0)
    assert theta["a"].item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match="radius"):
        project_to_ball(theta, 0.0)

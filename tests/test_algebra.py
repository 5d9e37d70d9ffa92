import math

import numpy as np
import pytest
import torch
from builders import small_data
from safetensors.numpy import save_file

import dptaft
from dptaft.algebra import AlgebraError, TangentWeights, coefficients, read_weights, weighted_sum
from dptaft.backbones import load_backbone
from dptaft.learner import Learner
from dptaft.training.plan import ModelConfig, PerformanceConfig


def learner_of(classes=3, **model):
    config = ModelConfig(**model)
    backbone = load_backbone("starter", num_classes=classes, seed=config.seed)
    return Learner(backbone, config, PerformanceConfig())


def random_theta(learner, seed, size=0.05):
    generator = torch.Generator().manual_seed(seed)
    return {k: size * torch.randn(p.shape, generator=generator) for k, p in learner.parameters.items()}


def as_weights(learner, theta):
    classifier = learner.backbone.model.get_classifier()
    fixed = {"head/weight": classifier.weight, "head/bias": classifier.bias}
    return TangentWeights(
        {k: v.numpy() for k, v in theta.items()}, {k: v.detach().numpy() for k, v in fixed.items()}
    )


def as_theta(weights):
    return {k: torch.from_numpy(v) for k, v in weights.trained.items()}


@pytest.mark.parametrize(
    ("model", "factors"),
    [
        ({}, (0.25, 0.25, 0.25, 0.25)),
        ({"scope": "last:2"}, (0.25, 0.25, 0.25, 0.25)),
        ({"scope": "head"}, (1, 1, 1, 1)),
        ({}, (1, -2, 3, 0.5)),
        ({"centered": False}, (0.25, 0.25, 0.25, 0.25)),
        ({"centered": False}, (1, -2, 3, -1)),
        ({"scope": "attention:1", "fresh_class_token": True}, (0.7, 0.1, 0.1, 0.1)),
    ],
)
def test_a_sum_of_weights_has_the_sum_of_the_outputs(model, factors):
    learner = learner_of(**model)
    features = learner.features(small_data(20).train).features
    thetas = [random_theta(learner, seed) for seed in range(4)]
    total = weighted_sum(
        (factor, as_weights(learner, theta)) for factor, theta in zip(factors, thetas, strict=True)
    )
    ensemble = sum(
        factor * learner.logits(features, theta).double()
        for factor, theta in zip(factors, thetas, strict=True)
    )
    composed = learner.logits(features, as_theta(total)).double()
    assert ensemble.abs().max() > 0.5
    assert float((composed - ensemble).abs().max()) < 1e-5


def test_an_offset_counted_twice_is_no_ensemble():
    learner = learner_of(centered=False)
    features = learner.features(small_data(20).train).features
    thetas = [random_theta(learner, seed) for seed in range(2)]
    total = weighted_sum((1.0, as_weights(learner, theta)) for theta in thetas)
    outputs = sum(learner.logits(features, theta) for theta in thetas)
    assert float((learner.logits(features, as_theta(total)) - outputs).abs().max()) > 0.1
    with pytest.raises(AlgebraError, match="must add up to 1, not 2"):
        coefficients("add", 2, None, centered=False)


def test_removal_by_composing_the_rest_is_the_subtraction_of_the_paper():
    """theta <- (S theta - theta_s)/(S - 1), against the sum of the others."""
    learner = learner_of()
    parts = [as_weights(learner, random_theta(learner, seed)) for seed in range(7)]
    whole = weighted_sum((1 / 7, part) for part in parts)
    rest = weighted_sum((1 / 6, part) for part in parts[:3] + parts[4:])
    for name, value in rest.trained.items():
        subtracted = (7 * whole.trained[name].astype(np.float64) - parts[3].trained[name]) / 6
        assert np.abs(subtracted - value).max() < 1e-6


def test_sums_are_those_of_float64():
    fixed = {"head/weight": np.ones((2, 3), np.float32), "head/bias": np.zeros(2, np.float32)}
    rng = np.random.default_rng(0)
    parts = [TangentWeights({"a": rng.normal(size=999).astype(np.float32)}, fixed) for _ in range(50)]
    exact = [math.fsum(float(part.trained["a"][i]) / 50 for part in parts) for i in range(999)]
    total = weighted_sum((1 / 50, part) for part in parts).trained["a"]
    assert total.dtype == np.float32
    unit = np.spacing(np.abs(np.array(exact)).astype(np.float32)).astype(float)
    assert (np.abs(total - np.array(exact)) <= 0.5001 * unit).all()  # rounded once


def test_old_logits_do_not_change_when_classes_are_added():
    """Row c of the Jacobian depends on row c of the head alone, in every scope."""
    for scope in ("head", "last:1", "last:2", "all"):
        old, new = learner_of(3, scope=scope), learner_of(5, scope=scope)
        theta = random_theta(old, 1)
        grown = {k: torch.zeros(p.shape) for k, p in new.parameters.items()}
        for name, value in theta.items():
            grown[name][tuple(slice(n) for n in value.shape)] = value
        data = small_data(12).train
        one = old.logits(old.features(data).features, theta)
        two = new.logits(new.features(data).features, grown)
        assert float((one - two[:, :3]).abs().max()) < 1e-5
        zero = {k: torch.zeros(p.shape) for k, p in new.parameters.items()}
        whole = weighted_sum([(1.0, as_weights(new, zero)), (1.0, as_weights(old, theta))])
        assert all(torch.equal(as_theta(whole)[k], v) for k, v in grown.items())
        assert float((two[:, 3:]).abs().max()) > 0 or scope == "head"  # shared blocks move new logits too


@pytest.mark.parametrize("width", [128, 37])
def test_a_longer_random_head_keeps_its_rows(width):
    import timm

    from dptaft.tangent.initialise import initialise_head

    heads = []
    for classes in (3, 10):
        model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=width, num_heads=1)
        initialise_head(model, classes, seed=5)
        heads.append(model.head.weight.detach())
    assert torch.equal(heads[0], heads[1][:3])
    assert abs(float(heads[1].std()) * width**0.5 - 1) < 0.1


def changed(weights, **changes):
    trained, fixed = dict(weights.trained), dict(weights.fixed)
    for name, value in changes.items():
        (trained if name in trained else fixed)[name.replace("__", "/")] = value
    return TangentWeights(trained, fixed)


def test_weights_of_another_map_are_refused():
    learner = learner_of()
    one = as_weights(learner, random_theta(learner, 0))
    other_seed = as_weights(learner_of(seed=1), random_theta(learner, 1))
    with pytest.raises(AlgebraError, match="different head weight"):
        weighted_sum([(0.5, one), (0.5, other_seed)])
    bias = changed(one, head__bias=one.fixed["head/bias"] + np.float32(1e-7))
    with pytest.raises(AlgebraError, match="different head bias"):
        weighted_sum([(0.5, one), (0.5, bias)])
    with pytest.raises(AlgebraError, match="different fixed"):
        weighted_sum([(0.5, one), (0.5, changed(one, bound=np.ones(1)))])
    head_only = TangentWeights({k: v for k, v in one.trained.items() if "head" in k}, one.fixed)
    with pytest.raises(AlgebraError, match="one scope"):
        weighted_sum([(0.5, one), (0.5, head_only)])
    name = next(k for k in one.trained if k.endswith("mlp.fc1.bias"))
    short = TangentWeights(dict(one.trained) | {name: one.trained[name][:3]}, one.fixed)
    with pytest.raises(AlgebraError, match="shapes"):
        weighted_sum([(0.5, one), (0.5, short)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("median", 2, None), "unknown composition"),
        (("weighted", 2, None), "give weights"),
        (("average", 2, [0.5, 0.5]), "give weights"),
        (("weighted", 2, [0.5]), "1 weights for 2 runs"),
        (("weighted", 2, [0.5, math.nan]), "finite"),
        (("weighted", 2, [0.5, 0.0]), "not zero"),
    ],
)
def test_factors_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(AlgebraError, match=message):
        coefficients(*arguments, centered=True)


def test_too_large_a_sum_is_refused():
    fixed = {"head/weight": np.ones((2, 3)), "head/bias": np.zeros(2)}
    huge = TangentWeights({"a": np.full(2, 3e38, np.float32)}, fixed)
    with pytest.raises(AlgebraError, match="not finite"):
        weighted_sum([(1.0, huge), (1.0, huge)])
    with pytest.raises(AlgebraError, match="no run"):
        weighted_sum([])


def test_a_file_without_tangent_weights_is_refused(tmp_path):
    save_file({"x": np.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(AlgebraError, match="no tangent weights"):
        read_weights(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with pytest.raises(AlgebraError, match="cannot read"):
        read_weights(tmp_path / "y.safetensors")


def test_a_file_is_read_as_it_was_written(tmp_path):
    run = dptaft.train(small_data(), epsilon=8, steps=2, output=tmp_path / "run")
    weights = read_weights(run.path / "model.safetensors")
    again = tmp_path / "again.safetensors"
    again.write_bytes(weights.content())
    twice = read_weights(again)
    for one, two in ((weights.trained, twice.trained), (weights.fixed, twice.fixed)):
        assert set(one) == set(two)
        assert all(np.array_equal(one[k], two[k]) for k in one)
    assert weights.num_classes == 3

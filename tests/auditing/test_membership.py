"""Attacks on the released model: exact formulas, shadow models like single runs, power where there is a leak."""

import math

import numpy as np
import pytest
import torch
from builders import small_images
from scipy.stats import norm

import dptaft
from dptaft.auditing.membership import (
    MembershipResult,
    _halves,
    confidence,
    lira,
    membership_attack,
    rmia,
)
from dptaft.auditing.recipe import load_recipe
from dptaft.auditing.shadows import train_shadows
from dptaft.data import ArrayPixels, ImageData, Split
from dptaft_accounting.tradeoff import GaussianProfile, tpr_at_fpr


def guessed_labels(count=80, held=40, seed=5):
    """Labels that images say nothing about: whoever knows them has seen the record."""
    images, _ = small_images(count + held, 3, seed)
    images = np.random.default_rng(seed).uniform(0, 1, images.shape).astype(np.float32)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, count + held))
    whole = Split(ArrayPixels(images), labels)
    names = ("a", "b", "c")
    return ImageData("guess", names, whole.take(range(count)), whole.take(range(count, count + held)), True)


def test_confidence_is_the_logit_of_the_label():
    z, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    p = z.softmax(1).gather(1, labels[:, None])[:, 0]
    assert torch.allclose(confidence(z, labels), p.log() - (1 - p).log())


def test_lira_is_the_likelihood_ratio_of_pooled_normals():
    torch.manual_seed(0)
    shadow, inside = torch.randn(8, 5, dtype=torch.float64), _halves(8, 5)
    shadow = shadow + inside * 1.5
    target = torch.randn(5, dtype=torch.float64)
    residuals, means = [], []
    for i in range(5):
        with_it, without = shadow[inside[:, i], i].numpy(), shadow[~inside[:, i], i].numpy()
        means.append((with_it.mean(), without.mean()))
        residuals += [*(with_it - with_it.mean()), *(without - without.mean())]
    std = float(np.sqrt(np.mean(np.square(residuals))))
    expected = [
        norm.logpdf(t, a, std) - norm.logpdf(t, b, std)
        for t, (a, b) in zip(target.tolist(), means, strict=True)
    ]
    assert lira(target, shadow, inside) == pytest.approx(expected)


def test_rmia_counts_the_population_below():
    torch.manual_seed(1)
    shadow, inside, target = torch.randn(6, 7), _halves(6, 7), torch.randn(7)
    ratios = []
    for i in range(7):
        out = torch.sigmoid(shadow[~inside[:, i], i]).mean()
        ratios.append(float(torch.sigmoid(target[i]) / ((1.3 * out + 0.7) / 2)))
    expected = [sum(other < own for other in ratios) / 7 for own in ratios]
    assert rmia(target, shadow, inside) == pytest.approx(expected)


def test_every_record_is_in_half_of_the_shadow_models():
    inside = _halves(10, 200)
    assert (inside.sum(0) == 5).all()
    assert inside.double().mean(1).min() > 0.3


def test_shadow_models_are_runs_on_their_records(trained, data):
    """Without noise, a member of the batch equals the product's engine trained on its records alone."""
    from dataclasses import replace

    recipe = load_recipe(trained(), data)
    prepared = replace(recipe.prepared, plan=replace(recipe.prepared.plan, noise_multiplier=0.0))
    features = prepared.learner.features(data.train).features
    inside = _halves(4, len(data.train))
    weights = train_shadows(prepared, recipe.request, features, data.train.labels, inside)
    own = inside[2].nonzero().squeeze(1)
    engine = prepared.learner.engine(
        features.index(own),
        data.train.labels[own],
        loss=_loss(recipe),
        l2_clip_norm=prepared.l2_clip_norm,
        adjacency="zero-out",
    )
    theta = {name: torch.zeros_like(p) for name, p in prepared.learner.parameters.items()}
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    share = float(inside.double().mean()) * len(data.train)
    for _ in range(prepared.plan.steps):
        total = engine.clipped_sum(theta, torch.arange(len(own))).value
        for name in theta:
            velocity[name] = prepared.optimizer.momentum * velocity[name] + total[name] / share
            theta[name] = theta[name] - prepared.optimizer.learning_rate * velocity[name]
    for name, value in theta.items():
        assert torch.allclose(weights[name][2].double(), value.double(), rtol=1e-4, atol=1e-5)


def _loss(recipe):
    from dptaft.training.losses import LOSSES

    return LOSSES[recipe.request.model.loss]()


@pytest.fixture(scope="module")
def leaking(tmp_path_factory):
    """Almost no noise and labels without meaning: the attack must work."""
    data = guessed_labels()
    run = dptaft.train(
        data, epsilon=2000.0, scope="head", steps=240, output=tmp_path_factory.mktemp("leak") / "run"
    )
    return membership_attack(run, data=data, shadows=12), data


def test_a_leak_is_seen_and_stays_below_its_bound(leaking):
    result, _ = leaking
    for attack in ("LiRA", "RMIA"):
        assert result.auc(attack) > 0.65, attack
        assert result.tpr(attack, 0.1) > 0.2
        assert result.tpr(attack, 0.1) <= tpr_at_fpr(result.profile, 0.1)


def test_private_models_leak_little(tmp_path):
    data = guessed_labels()
    run = dptaft.train(data, epsilon=0.5, scope="head", steps=10, output=tmp_path / "run")
    result = membership_attack(run, data=data, shadows=8)
    for attack in ("LiRA", "RMIA"):
        assert abs(result.auc(attack) - 0.5) < 0.25


def test_rates_and_plot(leaking, tmp_path):
    result, _ = leaking
    document = result.to_dict()
    assert document["members"] == 80
    assert document["smallest_fpr"] == pytest.approx(1 / 40)
    assert all("at most" in line for line in document["summary"])
    for name in ("x.png", "x.svg"):
        result.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    hand = MembershipResult(
        {"A": np.array([3.0, 2.0, 1.0, 0.0])}, {"A": np.array([2.5, 0.5])}, GaussianProfile(1.0), 4, "r"
    )
    assert [hand.tpr("A", f) for f in (0.1, 0.5, 1.0)] == [0.25, 0.75, 1.0]
    assert hand.auc("A") == pytest.approx(4 / 8)


def test_what_cannot_be_attacked_is_refused(trained, data, leaking):
    run = trained()
    with pytest.raises(ValueError, match="shadows must be"):
        membership_attack(run, data=data, shadows=2)
    with pytest.raises(ValueError, match="evaluation images"):
        membership_attack(run, data="synthetic")
    assert math.isfinite(leaking[0].auc("LiRA"))

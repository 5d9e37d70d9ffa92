"""Small certified chains, simulated many times with and without one record: no test beats the bound."""

import numpy as np
import pytest
import torch
from scipy.stats import beta

from dptaft.training.certified import design
from dptaft.training.losses import CrossEntropy
from dptaft.training.plan import PrivacyConfig, Sampling
from dptaft_accounting import CyclicGaussian, FullBatchGaussian, PoissonGaussian, best_bound
from dptaft_accounting.tradeoff import tpr_at_fpr

CHAINS, RECORDS, STEPS, NOISE = 30_000, 4, 24, 1.5
JACOBIAN = torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1, 0])
CASES = {
    "full-batch": (
        Sampling("full-batch"),
        FullBatchGaussian(NOISE, steps=STEPS, released="last-iterate"),
    ),
    "poisson": (
        Sampling("poisson", 0.5),
        PoissonGaussian(NOISE, 0.5, STEPS, released="last-iterate"),
    ),
    "cyclic": (
        Sampling("cyclic-partition", 0.5, parts=2),
        CyclicGaussian(NOISE, 2, STEPS // 2, partition="secret-random", released="last-iterate"),
    ),
}


def planned(sampling):
    return design(
        PrivacyConfig(epsilon=3.0, steps=STEPS),
        CrossEntropy(),
        2,
        num_records=RECORDS,
        delta=1e-5,
        sampling=sampling,
        optimizer={"l2_regularization": 0.1},
    )


def participation(kind, generator):
    """Which records take part in a step, (chains, records), for every step."""
    order = torch.rand(CHAINS, RECORDS, generator=generator).argsort(1)
    for step in range(STEPS):
        if kind == "poisson":
            yield torch.rand(CHAINS, RECORDS, generator=generator) < 0.5
        elif kind == "cyclic":
            yield (order % 2) == step % 2
        else:
            yield torch.ones(CHAINS, RECORDS, dtype=torch.bool)


def chains(plan, kind, with_record, seed, noise_multiplier=NOISE):
    """Last iterates of all chains, one weight each; the record is the first one, far from the others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0 if with_record else 0.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    theta = torch.zeros(CHAINS, dtype=torch.float64)
    labels, loss = LABELS.repeat(CHAINS), CrossEntropy()
    for chosen in participation(kind, generator):
        logits = theta[:, None, None] * scale[None, :, None] * JACOBIAN
        r = loss.cotangent(logits.reshape(-1, 2), labels).view(CHAINS, RECORDS, 2)
        total = ((r @ JACOBIAN) * scale * chosen).sum(1)
        noise = torch.randn(CHAINS, generator=generator, dtype=torch.float64)
        noise = noise * noise_multiplier * plan.l2_clip_norm
        theta = theta - plan.step_size * ((total + noise) / plan.normaliser + plan.regularization * theta)
    return theta.numpy()


@pytest.mark.parametrize("kind", CASES)
def test_no_threshold_beats_the_bound(kind):
    sampling, mechanism = CASES[kind]
    plan = planned(sampling)
    report = best_bound(mechanism, plan.certify(mechanism), delta=1e-5)
    assert report.name.startswith("last-iterate")
    inside, outside = chains(plan, kind, True, 1), chains(plan, kind, False, 2)
    advantages = []
    for threshold in np.quantile(inside, (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)):
        hits, false = (int((sample > threshold).sum()) for sample in (inside, outside))
        tpr = beta.ppf(1e-5, hits, CHAINS - hits + 1)
        fpr = beta.ppf(1 - 1e-5, false + 1, CHAINS - false)
        allowed = tpr_at_fpr(report.profile, float(fpr))
        assert tpr <= allowed
        advantages.append((hits - false) / CHAINS / (allowed - fpr))
    assert max(advantages) > 0.3  # the attack is no straw man


def test_the_simulation_would_see_a_quarter_of_the_noise():
    """The check above has teeth: with a quarter of the noise it is violated."""
    sampling, mechanism = CASES["full-batch"]
    plan = planned(sampling)
    report = best_bound(mechanism, plan.certify(mechanism), delta=1e-5)
    inside, outside = (
        chains(plan, "full-batch", present, seed, NOISE / 4) for present, seed in ((True, 1), (False, 2))
    )
    threshold = float(np.median(inside))
    tpr, fpr = float((inside > threshold).mean()), float((outside > threshold).mean())
    assert tpr > tpr_at_fpr(report.profile, fpr) + 0.02

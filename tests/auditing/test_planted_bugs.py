"""Negative controls: mechanisms with a known defect must be found, and by which part of the audit."""

import pytest
import torch

import dptaft
import dptaft.training.optimizers as optimizers
from dptaft.training.clipping import ClippedSum
from dptaft.training.fused import FusedEngine
from dptaft.training.sampling import CyclicPartition, Poisson

QUICK = {"count": 300, "repetitions": 2}


def audit(run, data, **options):
    return dptaft.audit(run, data=data, **(QUICK | options))


@pytest.mark.parametrize("epsilon", [3.0, 8.0])
def test_noise_ten_times_too_small(trained, data, monkeypatch, epsilon):
    run = trained(epsilon=epsilon)
    assert audit(run, data).verdict != "violation"
    honest = optimizers.gaussian_mechanism

    def quiet(values, *, noise_multiplier, **given):
        return honest(values, noise_multiplier=noise_multiplier / 10, **given)

    monkeypatch.setattr(optimizers, "gaussian_mechanism", quiet)
    for observer in ("all-iterates", "last-iterate")[: 2 if epsilon == 3 else 1]:
        report = audit(run, data, observer=observer)
        assert report.evidence.verdict == "violation", observer
        assert report.evidence.epsilon > 1.5 * epsilon
        assert report.sensitivity.holds  # the noise is at fault, not the sums


def test_noise_left_out_of_one_parameter(trained, data, monkeypatch):
    run = trained()
    honest = optimizers.gaussian_mechanism

    def forgetful(values, **given):
        noised = honest(values, **given)
        noised["head.bias"].copy_(values["head.bias"])
        return noised

    monkeypatch.setattr(optimizers, "gaussian_mechanism", forgetful)
    report = audit(run, data)
    assert "head.bias" in report.noise.problem
    assert report.verdict == "violation"


def test_noise_used_twice(trained, data, monkeypatch):
    """Every step is noised as declared, but two steps together are not."""
    run = trained()
    honest, kept = optimizers.gaussian_mechanism, {}

    def repeated(values, **given):
        if not kept:
            noised = honest(values, **{k: v for k, v in given.items() if k != "out"})
            kept.update({name: noised[name] - values[name] for name in values})
        return {name: (values[name] + kept[name]).to(given["out"][name].dtype) for name in values}

    monkeypatch.setattr(optimizers, "gaussian_mechanism", repeated)
    report = audit(run, data)
    assert "the step before used" in report.noise.problem
    assert report.verdict == "violation"


def plant(monkeypatch, clipped_sum):
    """Replace the engine's sums by `clipped_sum(honest sum function, engine, theta, indices)`."""
    honest = FusedEngine.clipped_sum

    def faulty(self, theta, indices):
        return clipped_sum(lambda chosen: honest(self, theta, chosen), self, theta, indices)

    monkeypatch.setattr(FusedEngine, "clipped_sum", faulty)


def rebuilt(like, value):
    return ClippedSum(value, like.l2_clip_norm, like.adjacency)


def raw_gradients(engine, theta, indices):
    """Sum without clipping, for one batch."""
    features = engine._features.index(indices)
    cotangents = engine.loss.cotangent(engine.operator.jvp(features, theta), engine._labels[indices])
    return engine.operator.vjp(features, cotangents)


def test_clipping_skipped_for_one_layer(trained, data, monkeypatch):
    run = trained()

    def skips(honest, engine, theta, indices):
        clipped = honest(indices)
        if not len(indices):
            return clipped
        raw = raw_gradients(engine, {k: v.detach() for k, v in theta.items()}, indices)
        return rebuilt(clipped, dict(clipped.value) | {"head.bias": raw["head.bias"]})

    plant(monkeypatch, skips)
    report = audit(run, data)
    assert not report.sensitivity.holds
    assert report.sensitivity.measured > 1.05 * report.sensitivity.declared
    assert report.verdict == "violation"


def test_layers_clipped_apart_without_sharing_the_norm(trained, data, monkeypatch):
    """Every layer to the full clip norm: the joint norm is sqrt(2) times too long."""
    run = trained()

    def apart(honest, engine, theta, indices):
        theta = {k: v.detach() for k, v in theta.items()}
        total = {k: torch.zeros_like(v) for k, v in theta.items()}
        for i in indices:
            for name, gradient in raw_gradients(engine, theta, i[None]).items():
                total[name] += gradient * (engine.l2_clip_norm / gradient.norm().clamp(min=1e-12)).clamp(
                    max=1
                )
        return ClippedSum(total, engine.l2_clip_norm, engine.adjacency)

    plant(monkeypatch, apart)
    report = audit(run, data)
    assert report.sensitivity.measured > 1.4 * report.sensitivity.declared
    assert report.verdict == "violation"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_averages_over_microbatches_double_the_sensitivity(trained, data, monkeypatch, size):
    """Each microbatch's mean gradient is clipped: one record can turn it from one side to the other."""
    run = trained()

    def averages(honest, engine, theta, indices):
        theta = {k: v.detach() for k, v in theta.items()}
        total = {k: torch.zeros_like(v) for k, v in theta.items()}
        for part in indices.split(size):
            if not len(part):
                continue
            mean = {k: v / len(part) for k, v in raw_gradients(engine, theta, part).items()}
            norm = torch.stack([v.square().sum() for v in mean.values()]).sum().sqrt()
            factor = (engine.l2_clip_norm / norm.clamp(min=1e-12)).clamp(max=1)
            for k, v in mean.items():
                total[k] += factor * v
        return ClippedSum(total, engine.l2_clip_norm, engine.adjacency)

    plant(monkeypatch, averages)
    report = audit(run, data)
    assert report.sensitivity.measured > 1.5 * report.sensitivity.declared
    assert report.verdict == "violation"


@pytest.mark.parametrize("sampling", ["full-batch", "poisson"])
def test_mean_over_the_realised_batch(trained, data, monkeypatch, sampling):
    options = {"sampling": "poisson", "expected_batch_size": 12} if sampling == "poisson" else {}
    run = trained(**options)
    normaliser = run.statement.mechanism["normaliser"]

    def realised(honest, engine, theta, indices):
        clipped = honest(indices)
        scale = normaliser / max(len(indices), 1)
        return rebuilt(clipped, {k: scale * v for k, v in clipped.value.items()})

    plant(monkeypatch, realised)
    report = audit(run, data)
    assert report.sensitivity.measured > 1.5 * report.sensitivity.declared
    assert report.verdict == "violation"


@pytest.mark.slow
def test_poisson_replaced_by_shuffling(trained, data, monkeypatch):
    run = trained(sampling="poisson", expected_batch_size=12, steps=40)
    assert audit(run, data).verdict != "violation"

    def shuffled(self):
        if not hasattr(self, "_cyclic"):
            self._cyclic = CyclicPartition(self.num_examples, round(1 / self.sampling_rate), self._source)
        return self._cyclic.next_batch()

    monkeypatch.setattr(Poisson, "next_batch", shuffled)
    report = audit(run, data)
    assert "vary too little" in report.sampling.problem
    assert report.verdict == "violation"


def test_records_that_take_part_too_often(trained, data, monkeypatch):
    """Batches twice as large as accounted show in the scores, not only in the batches."""
    run = trained(sampling="poisson", expected_batch_size=12, steps=40)
    honest = Poisson.__init__

    def generous(self, num_examples, sampling_rate, source):
        honest(self, num_examples, min(1.0, 4 * sampling_rate), source)

    monkeypatch.setattr(Poisson, "__init__", generous)
    report = audit(run, data)
    assert report.evidence.verdict == "violation"
    assert not report.sampling.holds


def test_noise_for_another_adjacency(trained, data, monkeypatch):
    """Replace-one is claimed, the noise is scaled to the sensitivity of zero-out."""
    run = trained(adjacency="replace-one")
    assert audit(run, data).verdict != "violation"
    honest = optimizers.l2_sensitivity

    monkeypatch.setattr(optimizers, "l2_sensitivity", lambda clip, adjacency: honest(clip, "zero-out"))
    report = audit(run, data)
    assert report.evidence.verdict == "violation"
    assert not report.sensitivity.holds
    assert report.sensitivity.measured > 1.9 * report.sensitivity.declared


def test_a_mechanism_that_forgets_the_noise_at_every_other_step(trained, data, monkeypatch):
    run = trained()
    honest, calls = optimizers.gaussian_mechanism, []

    def sometimes(values, *, noise_multiplier, **given):
        calls.append(1)
        return honest(values, noise_multiplier=noise_multiplier if len(calls) % 2 else 0.0, **given)

    monkeypatch.setattr(optimizers, "gaussian_mechanism", sometimes)
    report = audit(run, data)
    assert "times its noise at step 2" in report.noise.problem
    assert report.verdict == "violation"

"""Runs that share steps are the runs that they would be alone."""

import json
import math
import os
import signal

import pytest
import torch
from builders import small_data

import dptaft
from dptaft.training.account import NoAccount
from dptaft.training.clipping import ClippedSum, clip_factors, l2_sensitivity
from dptaft.training.losses import CrossEntropy
from dptaft.training.members import Point, can_share_steps, run_members
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError, PrivacyConfig, Request
from dptaft.training.preparation import build_learner, prepare
from dptaft.training.steps import TrainingInterruptedError
from dptaft_accounting import mechanism_from_dict

DATA = small_data(24)


def request(epsilon=8.0, *, steps=6, clip=None, seed=None, scope="head", **optimizer):
    model = {"scope": scope} if isinstance(scope, str) else scope
    return Request(
        PrivacyConfig(epsilon, steps=steps, l2_clip_norm=clip, insecure_seed=seed),
        ModelConfig(**model),
        optimizer,
        PerformanceConfig(),
        "small",
    )


def points(tmp_path, requests, account=None):
    return [Point(r, tmp_path / f"p{i}", account or NoAccount("test")) for i, r in enumerate(requests)]


@pytest.mark.parametrize("scope", ["head", "last:1"])
def test_batched_clipped_sums_are_those_of_single_runs(scope):
    learner = build_learner(DATA, request(scope=scope))
    cached = learner.features(DATA.train)
    norms = [0.05, 1.0, 100.0]
    common = {"loss": CrossEntropy(), "adjacency": "zero-out"}
    engine = learner.engine(cached.features, DATA.train.labels, l2_clip_norm=1.0, **common)
    theta = {n: 0.1 * torch.randn(3, *s) for n, s in engine.parameter_shapes.items()}
    everything = torch.arange(24)
    batched = engine.clipped_sum(theta, everything, norms)
    assert batched.l2_clip_norm == tuple(norms)
    for i, norm in enumerate(norms):
        alone = learner.engine(cached.features, DATA.train.labels, l2_clip_norm=norm, **common)
        single = alone.clipped_sum({n: t[i] for n, t in theta.items()}, everything)
        mine = batched.member(i)
        assert mine.sensitivity == single.sensitivity == l2_sensitivity(norm, "zero-out")
        size = math.sqrt(sum(float(v.square().sum()) for v in single.value.values()))
        gap = math.sqrt(sum(float((mine.value[n] - v).square().sum()) for n, v in single.value.items()))
        assert gap < 1e-5 * size


def test_a_clip_norm_for_each_member():
    factors = clip_factors(torch.tensor([[2.0, 4.0], [2.0, math.inf]]), (1.0, 2.0))
    assert factors.tolist() == [[0.5, 0.25], [1.0, 0.0]]
    with pytest.raises(ValueError, match="2 clip norms for 3 members"):
        ClippedSum({"w": torch.zeros(3, 1)}, (1.0, 2.0), members=3)
    both = ClippedSum({"w": torch.zeros(2, 1)}, (1.0, 2.0), members=2)
    with pytest.raises(ValueError, match="take one member"):
        _ = both.sensitivity
    engine = build_learner(DATA, request()).engine
    cached = build_learner(DATA, request()).features(DATA.train)
    engine = engine(
        cached.features, DATA.train.labels, loss=CrossEntropy(), l2_clip_norm=1.0, adjacency="zero-out"
    )
    with pytest.raises(ValueError, match="1 clip norms for None members"):
        engine.clipped_sum(engine.initial_theta(), torch.arange(3), [1.0])


@pytest.mark.parametrize("scope", ["head", "last:1"])
def test_seeded_members_end_where_they_would_alone(tmp_path, scope):
    """With seeded noise, every member has the weights of its own separate run."""
    requests = [
        request(8.0, seed=1, scope=scope),
        request(2.0, seed=2, scope=scope, steps=9, kind="adam", learning_rate=0.01),
        request(math.inf, seed=3, scope=scope, clip=0.3, averaging="tail"),
        request(1.0, seed=4, scope=scope, steps=3, kind="sgd", l2_regularization=0.1, learning_rate=0.5),
    ]
    runs = run_members(DATA, points(tmp_path, requests))
    for i, (run, asked) in enumerate(zip(runs, requests, strict=True)):
        alone = dptaft.train(
            DATA,
            epsilon=asked.privacy.epsilon,
            steps=asked.privacy.steps,
            l2_clip_norm=asked.privacy.l2_clip_norm,
            insecure_seed=asked.privacy.insecure_seed,
            scope=scope,
            optimizer=asked.optimizer,
            output=tmp_path / f"alone{i}",
        )
        mine, theirs = run.predictor.weights, alone.predictor.weights
        for name, value in theirs.items():
            assert torch.allclose(mine[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max() + 1))
        assert run.config["optimizer"] == alone.config["optimizer"]
        assert run.config["privacy"] == alone.config["privacy"]


class Recorder(NoAccount):
    """Notes every charge; can refuse."""

    def __init__(self, refuse=None):
        super().__init__("test")
        self.calls, self.refuse = [], refuse

    def note(self, what, spending):
        if what == self.refuse:
            raise ValueError(f"the budget refuses to {what}")
        steps = None if spending.mechanism is None else spending.mechanism.steps
        self.calls.append((what, steps))

    def reserve(self, plan):
        self.note("reserve", plan)

    def authorise(self, spent):
        self.note("authorise", spent)

    def commit(self, spent):
        self.note("commit", spent)
        return {"ledger": "none: test"}

    def close(self):
        self.calls.append(("close", None))


def test_every_member_has_its_own_statement_and_account(tmp_path):
    accounts = [Recorder(), Recorder()]
    given = [request(8.0, steps=4), request(1.0, steps=6, clip=0.7)]
    runs = run_members(
        DATA, [Point(r, tmp_path / str(i), a) for i, (r, a) in enumerate(zip(given, accounts, strict=True))]
    )
    for run, asked, account in zip(runs, given, accounts, strict=True):
        statement = run.statement
        record = mechanism_from_dict(statement.mechanism["record"])
        assert record.steps == asked.privacy.steps == statement.mechanism["steps_executed"]
        assert 0.99 * asked.privacy.epsilon < statement.claim["epsilon"] <= asked.privacy.epsilon
        assert statement.recompute().holds
        clip = statement.mechanism["l2_clip_norm"]
        assert statement.mechanism["noise_std"] >= record.noise_multiplier * clip
        assert account.calls[0] == ("reserve", record.steps)
        assert account.calls[1:-2] == [("authorise", i + 1) for i in range(record.steps)]
        assert account.calls[-2:] == [("commit", record.steps), ("close", None)]
    assert runs[1].statement.mechanism["l2_clip_norm"] == 0.7
    assert runs[0].config["privacy"]["epsilon"] == 8.0


def test_members_draw_noise_of_their_own(tmp_path):
    """Equal requests differ by independent noise: the variance of the difference is twice that of one."""
    asked = request(0.5, steps=1, clip=1.0, kind="sgd", learning_rate=1.0)
    runs = run_members(DATA, points(tmp_path, [asked] * 3))
    flat = [torch.cat([v.flatten() for v in run.predictor.weights.values()]) for run in runs]
    std = runs[0].statement.mechanism["noise_std"] / len(DATA.train)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert 0.8 < float((flat[a] - flat[b]).std()) / (math.sqrt(2) * std) < 1.2


@pytest.mark.parametrize("refuse", ["reserve", "authorise"])
def test_a_member_that_is_refused_does_not_stop_the_others(tmp_path, refuse):
    good, bad = Recorder(), Recorder(refuse)
    given = [
        Point(request(8.0), tmp_path / "a", bad),
        Point(request(8.0), tmp_path / "b", good),
        Point(request(8.0, kind="adam", momentum=0.5), tmp_path / "c", Recorder()),
        Point(
            request(8.0, kind="sgd", learning_rate=1e30, l2_regularization=1e9), tmp_path / "d", Recorder()
        ),
    ]
    refused, run, odd, diverged = run_members(DATA, given)
    assert "refuses" in str(refused)
    assert run.statement.mechanism["steps_executed"] == 6
    assert "momentum has no meaning" in str(odd)
    assert "not finite" in str(diverged) or "diverged" in str(diverged)
    assert not (tmp_path / "a").exists()
    assert bad.calls[-1] == ("close", None)
    assert not (tmp_path / "a.partial").exists()


def test_interrupted_members_go_on_and_are_charged_what_they_did(tmp_path):
    given = points(tmp_path, [request(8.0, steps=30), request(2.0, steps=5), request(4.0, steps=30)])

    def stop(stage, done, total):
        if stage == "training" and done == 5 + 2 * 8:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterruptedError, match="stopped after"):
        run_members(DATA, given, progress=stop)
    progress = json.loads((tmp_path / "p0.partial" / "progress.json").read_text())
    assert sum(b - a for a, b in progress["authorised"]) == 8
    runs = run_members(DATA, given)
    assert [run.statement.mechanism["steps_executed"] for run in runs] == [30, 5, 30]
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_share_steps_is_refused(tmp_path):
    with pytest.raises(PlanError, match="same data, model"):
        run_members(DATA, points(tmp_path, [request(), request(scope="last:1")]))
    sampled = Request(
        PrivacyConfig(8.0, sampling="poisson", expected_batch_size=4),
        ModelConfig(scope="head"),
        {},
        PerformanceConfig(),
        "small",
    )
    (error,) = run_members(DATA, points(tmp_path, [sampled]))
    assert "full-batch" in str(error)
    plain = request(scope={"scope": "head", "method": "non-linear"})
    assert not can_share_steps(prepare(DATA, plain))
    with pytest.raises(PlanError, match="built for another model"):
        prepare(DATA, plain, build_learner(DATA, request()))

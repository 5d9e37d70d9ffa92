"""Runs without steps, from the command line and the API: statement, account, refusals, noise of whole runs."""

import json
import math

import numpy as np
import pytest
import torch
from builders import small_data
from click.testing import CliRunner
from safetensors.torch import load_file

import dptaft
from dptaft.cli import main
from dptaft.tangent.bounded import SCALE
from dptaft.tangent.diameter import double_operator
from dptaft.training import one_shot_run
from dptaft.training.one_shot import SoftmaxProblem
from dptaft.training.plan import PlanError
from dptaft_accounting import SoftmaxObjectivePerturbation, best_bound, mechanism_from_dict

METHODS = ("objective-perturbation", "output-perturbation")


def train(output, data=None, **options):
    options = {"epsilon": 8.0, "scope": "head", "method": METHODS[0], "ledger": None} | options
    return dptaft.train(small_data() if data is None else data, output=output, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["head", "last:1"])
def test_statement_says_what_was_done(tmp_path, method, scope):
    run = train(tmp_path / "run", method=method, scope=scope)
    group = run.statement.mechanism
    assert run.accuracy > 0.5
    assert group["method"] == method
    assert "steps_executed" not in group
    assert "l2_clip_norm" not in group
    assert group["stopping_rule"].startswith("none: there are no steps")
    assert group["record"]["kind"].removeprefix("softmax-") == method
    mechanism = mechanism_from_dict(group["record"])
    assert best_bound(mechanism, delta=run.statement.claim["delta"]).epsilon <= 8.0
    assert run.statement.claim["epsilon"] <= 8.0
    record = mechanism.to_dict()
    if isinstance(mechanism, SoftmaxObjectivePerturbation):
        assert group["objective_noise_std"] == record["noise_std"] > 0
        assert group["output_noise_std"] == record["output_noise_std"] > 0
        assert group["regularization"] == record["regularization"]
    else:
        assert group["output_noise_std"] == record["noise_std"] > 0
        assert group["regularization"] == pytest.approx(record["regularization"] * 60)
    assert group["gradient_tolerance"] > 0
    assert run.statement.recompute().epsilon == run.statement.claim["epsilon"]
    image = torch.zeros(1, 28, 28)
    assert set(run.predict([image])[0].scores) == set(run.classes)
    again = dptaft.load_run(run.path)
    assert again.config["model"]["method"] == method


def test_prediction_uses_the_normalised_model(tmp_path):
    run, data = train(tmp_path / "run"), small_data()
    learner, weights = run.predictor.learner, run.predictor.weights
    features = learner.features(data.evaluation).features
    assert SCALE in features.tensors
    u = features["u"].double()
    u = torch.cat([u, torch.ones(len(u), 1)], 1)
    u = u / (math.sqrt(2) * u.norm(dim=1, keepdim=True))
    joint = torch.cat([weights["head.weight"], weights["head.bias"][:, None]], 1).double()
    logits = learner.logits(features, weights).double()
    assert torch.allclose(logits, u @ joint.T, atol=1e-4)
    accuracy = (logits.argmax(1) == data.evaluation.labels).double().mean()
    assert float(accuracy) == run.accuracy


def recovered_noise(path, data):
    """What b must have been, from the released weights of a run and the records."""
    run = dptaft.load_run(path)
    learner = run.predictor.learner
    features = learner.features(data.train).features
    wide = double_operator(learner.operator, learner.tangent)
    lam = run.statement.mechanism["regularization"]
    rest = SoftmaxProblem(wide, features, data.train.labels, regularization=lam)
    named = load_file(path / "model.safetensors")
    weights = torch.cat([named[f"trained/{k}"].double().reshape(-1) for k in wide.parameter_shapes])
    return -rest.gradient(weights, rest.products(weights)), run


def test_noise_of_whole_runs(tmp_path):
    """All coordinates of b of several runs have the stated deviation; 2 % less is told apart."""
    data, found = small_data(), []
    for i in range(4):
        train(tmp_path / str(i), data, scope="last:1", epsilon=3.0)
        noise, run = recovered_noise(tmp_path / str(i), data)
        found.append(noise / run.statement.mechanism["objective_noise_std"])
    values = torch.cat(found)
    measured = math.sqrt(float(values.square().mean()))
    error = 1 / math.sqrt(2 * len(values))
    assert abs(measured - 1) < 5 * error + 2e-4  # the output noise adds a little
    assert abs(0.98 * measured - 1) > 5 * error + 2e-4
    assert abs(float(np.corrcoef(found[0], found[1])[0, 1])) < 5 / math.sqrt(len(found[0]))


class Recorder:
    """An account that notes what it was told."""

    def __init__(self):
        self.calls = []

    def reserve(self, plan):
        self.calls.append(("reserve", plan.mechanism))

    def authorise(self, spent):
        self.calls.append(("authorise", spent.mechanism))

    def commit(self, spent):
        self.calls.append(("commit", spent.mechanism))
        return {"ledger": "none: a test"}

    def close(self):
        self.calls.append(("close", None))


def request(**model):
    from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request

    return Request(
        PrivacyConfig(epsilon=8.0),
        ModelConfig(scope="head", method=METHODS[0], **model),
        {},
        PerformanceConfig(),
        "small",
    )


def test_everything_is_charged_before_the_records_are_used(tmp_path, monkeypatch):
    account, seen = Recorder(), []
    original = one_shot_run.train_once

    def watched(*args, **options):
        seen.append([name for name, _ in account.calls])
        return original(*args, **options)

    monkeypatch.setattr(one_shot_run, "train_once", watched)
    run = one_shot_run.run_one_shot(
        small_data(), request(), tmp_path / "run", tmp_path / "run.partial", account=account
    )
    assert seen == [["reserve", "authorise"]]
    assert [name for name, _ in account.calls] == ["reserve", "authorise", "commit", "close"]
    assert {m for _, m in account.calls if m is not None} == {
        mechanism_from_dict(run.statement.mechanism["record"])
    }

    def broken(*args, **options):
        raise PlanError("stopped")

    account.calls.clear()
    monkeypatch.setattr(one_shot_run, "train_once", broken)
    with pytest.raises(PlanError, match="stopped"):
        one_shot_run.run_one_shot(
            small_data(), request(), tmp_path / "two", tmp_path / "two.partial", account=account
        )
    assert [name for name, _ in account.calls] == ["reserve", "authorise", "close"]
    assert not (tmp_path / "two").exists()


def test_ledger_is_charged(tmp_path):
    run = train(tmp_path / "run", ledger="auto")
    assert run.statement.composition["ledger_entry"]
    total = run.statement.composition["total"]["epsilon"]
    train(tmp_path / "two", ledger="auto")
    two = dptaft.load_run(tmp_path / "two").statement.composition["total"]["epsilon"]
    assert two > total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5}, "steps 5 has no meaning for objective-perturbation"),
        ({"l2_clip_norm": 1.0}, "l2_clip_norm 1 has no meaning"),
        ({"sampling": "poisson", "expected_batch_size": 8}, "has no meaning"),
        ({"optimizer": {"learning_rate": 1.0}}, "takes no steps: leave out learning_rate"),
        ({"loss": "huber-square"}, "not for the loss huber-square"),
        ({"certified": True}, "certified"),
        ({"engine": "hooks"}, "engine hooks does not bound"),
        ({"adjacency": "add-remove", "public_size": 60, "method": METHODS[1]}, "use zero-out"),
        ({"resume": True}, "no interrupted run"),
        ({"method": "dual"}, "unknown method"),
    ],
)
def test_refusals_come_before_any_image_is_read(tmp_path, options, message, monkeypatch):
    def unread(*args, **more):
        raise AssertionError("a private image was read")

    monkeypatch.setattr("dptaft.learner.Learner.features", unread)
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_leftovers_of_another_run_cannot_be_resumed(tmp_path):
    (tmp_path / "run.partial").mkdir()
    with pytest.raises(PlanError, match="no steps to continue"):
        train(tmp_path / "run", resume=True)


def test_other_adjacencies_uncentred_models_and_runs_without_privacy(tmp_path):
    swap = train(tmp_path / "swap", adjacency="replace-one")
    assert swap.statement.claim["adjacency"] == "replace-one"
    assert train(tmp_path / "size", adjacency="add-remove", public_size=50).statement is not None
    assert train(tmp_path / "raw", centered=False).accuracy is not None
    plain = train(tmp_path / "plain", epsilon=math.inf)
    assert plain.statement is None
    assert plain.accuracy > 0.9
    seeded = [train(tmp_path / str(i), insecure_seed=3) for i in range(2)]
    one, two = (load_file(run.path / "model.safetensors") for run in seeded)
    assert seeded[0].statement is None
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_command_line(tmp_path):
    output = tmp_path / "run"
    options = ["train", "--epsilon", "3", "--method", METHODS[0], "--scope", "head", "--no-ledger"]
    result = CliRunner().invoke(main, [*options, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "no steps, solved to gradient" in result.output
    assert "epsilon" in result.output
    verified = CliRunner().invoke(main, ["verify", str(output)])
    assert verified.exit_code == 0, verified.output
    report = CliRunner().invoke(main, ["report", str(output)])
    assert report.exit_code == 0, report.output
    result = CliRunner().invoke(main, [*options, "--output", str(tmp_path / "two"), "--json"])
    facts = json.loads(result.stdout)
    assert facts["steps"] is None
    assert facts["objective_noise_std"] > facts["output_noise_std"] > 0
    refused = CliRunner().invoke(main, [*options, "--steps", "9", "--output", str(tmp_path / "three")])
    assert refused.exit_code == 2
    assert "no meaning" in refused.output

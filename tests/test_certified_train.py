"""Certified runs from the request to the statement and back to predictions."""

import json
import math
import signal
import tomllib
from dataclasses import replace

import pytest
import torch
from builders import small_data
from click.testing import CliRunner
from safetensors.torch import load_file

import dptaft
from dptaft.backbones import load_backbone
from dptaft.cli import main
from dptaft.learner import Learner
from dptaft.predictor import load_predictor
from dptaft.tangent.bounded import SCALE, BoundedOperator
from dptaft.training.certified import design
from dptaft.training.defaults import synthetic_images
from dptaft.training.losses import CrossEntropy
from dptaft.training.plan import (
    ModelConfig,
    PerformanceConfig,
    PlanError,
    PrivacyConfig,
    Request,
    Sampling,
)
from dptaft.training.preparation import prepare
from dptaft.training.steps import TrainingInterruptedError
from dptaft_accounting import best_bound
from dptaft_accounting.accountants.last_iterate import batch_overflow
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import CertificateError

DATA = small_data()


def train(output, **options):
    return dptaft.train(DATA, output=output, **{"epsilon": 30.0, "certified": True, "ledger": None} | options)


def planned(epsilon=30.0, model=None, optimizer=None, performance=None, **privacy):
    request = Request(
        privacy=PrivacyConfig(epsilon=epsilon, certified=True, **privacy),
        model=ModelConfig(**{"scope": "head", "unit_jacobian": True} | (model or {})),
        optimizer=optimizer or {},
        performance=PerformanceConfig(**(performance or {})),
        data="small",
    )
    return prepare(DATA, request)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "one")


def test_the_statement_claims_the_last_iterate_with_its_certificate(finished):
    statement = finished.statement
    assert statement.claim["released"] == "last-iterate"
    bounds = {bound["name"]: bound["epsilon"] for bound in statement.accounting["bounds"]}
    assert statement.claim["epsilon"] == min(bounds.values())
    assert bounds["composition"] > bounds["last-iterate noisy gradient descent"]
    assert 29.9 < statement.claim["epsilon"] <= 30
    assert statement.recompute().holds
    certificate = ConvexityCertificate.from_dict(statement.accounting["certificate"])
    details = statement.mechanism
    config = finished.config["optimizer"]
    assert certificate.step_size == config["learning_rate"]
    assert certificate.strong_convexity == config["l2_regularization"]
    assert certificate.l2_clip_norm == details["l2_clip_norm"]
    assert certificate.gradient_bound >= math.sqrt(2)
    assert certificate.smoothness >= 0.5
    assert config["kind"] == "sgd"
    assert config["averaging"] == "last"
    assert statement.composition["hyperparameter_choice"] == "public defaults"
    assert details["noise_std"] >= details["record"]["noise_multiplier"] * details["l2_clip_norm"]


def test_the_bound_is_a_part_of_the_stored_model(finished):
    assert tomllib.loads((finished.path / "run.toml").read_text())["model"]["unit_jacobian"] is True
    again = dptaft.load_run(finished.path)
    predicted = again.predict([DATA.evaluation.pixels[i] for i in range(len(DATA.evaluation))])
    hits = [p.label == DATA.classes[int(y)] for p, y in zip(predicted, DATA.evaluation.labels, strict=True)]
    assert sum(hits) / len(hits) == finished.accuracy
    labels = [DATA.classes[int(y)] for y in DATA.evaluation.labels]
    loss = [-math.log(p.scores[label]) for p, label in zip(predicted, labels, strict=True)]
    assert sum(loss) / len(loss) == pytest.approx(finished.metrics[0]["cross_entropy"], rel=1e-5)


def test_prediction_without_the_bound_is_another_model(finished):
    """What the evaluation would give if prediction forgot to rescale: the test above sees the difference."""
    config = dict(finished.config)
    config["model"] = config["model"] | {"unit_jacobian": False}
    forgetful = load_predictor(finished.path, config)
    image = [DATA.evaluation.pixels[0]]
    assert forgetful.predict(image)[0].scores != finished.predict(image)[0].scores


def test_trained_features_are_bounded(finished):
    learner = finished.predictor.learner
    assert isinstance(learner.operator, BoundedOperator)
    features = learner.features(DATA.train).features
    assert SCALE in features.tensors
    largest = torch.linalg.eigvalsh(learner.operator.gram(features))[:, -1]
    assert float((largest - 1).abs().max()) < 1e-5


def test_released_weights_are_in_the_precision_of_the_model(finished):
    tensors = load_file(finished.path / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_ten_times_the_epochs_cost_less_than_five_percent():
    prepared = planned(epsilon=3.0)
    design, plan = prepared.design, prepared.plan
    report = best_bound(plan.mechanism(), design.certificate, delta=plan.delta)
    longer = replace(plan.mechanism(), steps=10 * plan.steps)
    more = best_bound(longer, design.certify(longer), delta=plan.delta)
    assert report.epsilon == pytest.approx(3.0, rel=1e-3)
    assert more.epsilon < 1.05 * report.epsilon
    assert more.named("composition").epsilon > 2 * report.named("composition").epsilon


def test_an_interrupted_run_charges_its_lost_steps_within_the_plan():
    prepared = planned(epsilon=8.0, steps=20)
    executed = (*range(12), *range(10, 18))  # two steps were lost and repeated, two are never reached
    spending = prepared.spending(executed)
    assert spending.certificate.steps == spending.mechanism.steps == 20
    whole = best_bound(prepared.plan.mechanism(), prepared.certificate, delta=1e-5).epsilon
    assert best_bound(spending.mechanism, spending.certificate, delta=1e-5).epsilon == whole
    assert prepared.plan.last_step(10, tuple(range(12))) == 18


@pytest.mark.parametrize("sampling", ["poisson", "cyclic-partition"])
def test_sampled_runs_are_certified(tmp_path, sampling):
    run = train(tmp_path / "run", sampling=sampling, expected_batch_size=20, scope="head", steps=60)
    statement = run.statement
    names = [bound["name"] for bound in statement.accounting["bounds"]]
    assert statement.accounting["bound"] in names
    assert any(name.startswith("last-iterate") for name in names)
    assert statement.recompute().holds
    certificate = statement.accounting["certificate"]
    assert certificate["sampling"] == sampling.removesuffix("-partition")
    if sampling == "poisson":
        assert 20 < certificate["max_batch_size"] <= 61
    else:
        assert certificate["max_batch_size"] == 20


def test_poisson_batches_above_the_cap_are_paid_in_delta():
    found = design(
        PrivacyConfig(epsilon=3.0, steps=50, certified=True),
        CrossEntropy(),
        3,
        num_records=60,
        delta=1e-5,
        sampling=Sampling("poisson", 5 / 60),
    )
    assert 5 < found.max_batch_size < 60
    assert batch_overflow(60, 5 / 60, found.max_batch_size, 50) <= 1e-8
    assert batch_overflow(60, 5 / 60, found.max_batch_size - 3, 50) > 1e-8
    top = found.step_size * (2 * found.regularization + 0.5 * found.max_batch_size / 5)
    assert 1.99 < top <= 2


def test_one_more_record_is_certified_under_add_remove():
    prepared = planned(adjacency="add-remove", public_size=60)
    certificate = prepared.certificate
    assert certificate.max_batch_size == 61
    eta, lam = certificate.step_size, certificate.strong_convexity
    assert certificate.contractions[0] >= abs(1 - eta * (lam + 0.5 * 61 / 60))
    assert eta * (2 * lam + 0.5 * 61 / 60) <= 2
    with pytest.raises(PlanError, match="at most the public size 50"):
        planned(adjacency="add-remove", public_size=50)


def test_a_statement_says_that_the_public_size_must_bound_the_records(tmp_path):
    options = {"adjacency": "add-remove", "public_size": 70, "scope": "head", "steps": 3}
    claim = train(tmp_path / "one", **options).statement.claim
    assert claim["data_accesses"]["number_of_records"] == "public, declared by the user"
    words = [row["assumption"] for row in claim["assumptions"] if row["where"] == "--public-size"]
    assert any("never more records than the public number" in text for text in words)
    with pytest.raises(PlanError, match="this refusal is not covered by any claim"):
        train(tmp_path / "two", **options | {"public_size": 50}, ledger=tmp_path / "ledger.sqlite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]  # nothing was charged
    plain = train(tmp_path / "three", **options, certified=False).statement.claim
    assert plain["data_accesses"]["number_of_records"] == "none"


def test_replace_one_pays_twice_the_sensitivity():
    single, double = planned(), planned(adjacency="replace-one")
    assert double.design.regularization == pytest.approx(2 * single.design.regularization)
    assert double.certificate.adjacency == "replace-one"


@pytest.mark.parametrize("loss", ["cross-entropy", "huber-square"])
def test_the_bound_of_every_loss_is_below_the_clip_norm(loss):
    prepared = planned(model={"loss": loss})
    certificate = prepared.certificate
    assert certificate.gradient_bound < prepared.l2_clip_norm < 1.01 * certificate.gradient_bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": {"kind": "momentum"}}, "plain gradient steps: momentum"),
        ({"optimizer": {"momentum": 0.5}}, "plain gradient steps: momentum 0.5"),
        ({"optimizer": {"kind": "adam"}}, "plain gradient steps: adam"),
        ({"optimizer": {"averaging": "tail"}}, "only the last iterate is released"),
        ({"optimizer": {"averaging": "ema"}}, "only the last iterate is released"),
        ({"optimizer": {"l2_regularization": 0.0}}, "strong convexity: l2_regularization 0"),
        ({"optimizer": {"learning_rate": 4.5}}, "the step expands distances"),
        ({"l2_clip_norm": 1.0}, "clipping would act and break convexity"),
        ({"model": {"loss": "rescaled-square"}}, "gradients of the loss rescaled-square are unbounded"),
        ({"performance": {"engine": "hooks"}}, "does not bound Jacobians"),
        ({"performance": {"engine": "ghost"}}, "does not bound Jacobians"),
    ],
)
def test_what_breaks_an_assumption_is_refused_by_its_name(options, message):
    with pytest.raises((CertificateError, PlanError), match=message):
        planned(**options)


def test_a_non_linear_model_and_a_free_jacobian_are_refused(tmp_path):
    with pytest.raises(PlanError, match="linear in the weights"):
        train(tmp_path / "run", method="non-linear")
    with pytest.raises(PlanError, match="unit Jacobians"):
        planned(model={"unit_jacobian": False})


def test_the_command_shows_both_bounds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["train", "--epsilon", "3", "--certified", "--scope", "head", "--steps", "auto"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert "(last-iterate noisy gradient descent)" in result.output
    assert "(composition)" in result.output
    refused = CliRunner().invoke(main, [*options, "--momentum", "0.9"])
    assert refused.exit_code == 2
    assert "plain gradient steps" in refused.output


def test_the_budget_command_shows_the_plan_and_its_reasons():
    result = CliRunner().invoke(
        main, ["budget", "--certified", "--records", "1437", "--epsilon", "3", "--classes", "10"]
    )
    assert result.exit_code == 0, result.output
    for word in ("lambda", "step size", "steps", "noise multiplier", "contraction"):
        assert word in result.output
    shown = json.loads(
        CliRunner()
        .invoke(main, ["budget", "--certified", "--records", "60", "--epsilon", "30", "--json"])
        .output
    )
    design = planned().design
    assert shown["plan"]["regularization"] == design.regularization
    assert shown["plan"]["step_size"] == design.step_size
    assert shown["plan"]["steps"] == design.steps
    assert shown["bounds"]["composition"] > shown["epsilon"]


def test_the_plan_reads_no_image():
    """Only the number of records and classes is looked at before the budget is reserved."""

    class Unread:
        def __len__(self):
            return 60

        def __getitem__(self, index):
            raise AssertionError("an image was read")

    blind = replace(DATA, train=replace(DATA.train, pixels=Unread()), evaluation=None)
    request = Request(
        privacy=PrivacyConfig(epsilon=30.0, certified=True),
        model=ModelConfig(scope="head", unit_jacobian=True),
        optimizer={},
        performance=PerformanceConfig(),
        data="small",
    )
    assert prepare(blind, request).design == planned().design


def test_blocks_get_half_the_norm_of_the_head():
    prepared = planned(model={"scope": "last:1"})
    base = load_backbone("starter", num_classes=3)
    ratio = prepared.head["weight"] / base.model.get_classifier().weight.detach()
    assert float(ratio.std()) < 1e-6  # one public factor
    grams = []
    for scope in ("head", "last:1"):
        learner = Learner(
            prepared.learner.backbone, ModelConfig(scope=scope), PerformanceConfig(device="cpu")
        )
        images = synthetic_images(32, learner.backbone.preprocessing)
        grams.append(learner.operator.gram(learner.operator.extract(learner.tangent.boundary(images))))
    head, both = (torch.linalg.eigvalsh(part)[:, -1].mean() for part in (grams[0], grams[1] - grams[0]))
    assert float((both / head).sqrt()) == pytest.approx(0.5, rel=1e-3)


def test_a_stopped_run_continues_with_the_weights_it_had(tmp_path):
    def stop(stage, step, total):
        if stage == "training" and step == 7:
            signal.raise_signal(signal.SIGTERM)

    options = {"scope": "head", "steps": 20}
    with pytest.raises(TrainingInterruptedError):
        train(tmp_path / "run", progress=stop, **options)
    seen = []
    run = train(
        tmp_path / "run",
        resume=True,
        progress=lambda stage, step, total: seen.append(step) if stage == "training" else None,
        **options,
    )
    assert seen == list(range(8, 21))
    assert run.statement.accounting["certificate"]["steps"] == 20
    assert run.statement.recompute().holds

"""Runs that start from the head of an earlier private run: the model, and a claim that covers both stages."""

import dataclasses
import json
import math
import shutil
import signal

import pytest
import torch
from builders import small_data
from click.testing import CliRunner
from safetensors.torch import save_file

import dptaft
from dptaft.cli import main
from dptaft.sweep.recipe import RecipeError, _check_options
from dptaft.training.checkpoint import ResumeError
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError, PrivacyConfig, Request
from dptaft.training.preparation import prepare
from dptaft.training.steps import TrainingInterruptedError
from dptaft.training.two_stages import head_request
from dptaft.training.vouching import data_accesses
from dptaft.training.warm_start import FirstStage, head_of_run, share
from dptaft.verification import FAILED, verify
from dptaft_accounting import PrivacyStatement, epsilon_to_mu
from dptaft_accounting.canonical import content_id
from dptaft_accounting.errors import CertificateError
from dptaft_accounting.ledger import Ledger

DATA = small_data()
IMAGES = [DATA.train.pixels[i] for i in range(8)]
DELTA = 1e-5


def train(output, **options):
    return dptaft.train(DATA, output=output, **{"epsilon": 30.0, "scope": "head", "steps": 12} | options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(folder):
    return train(folder / "first", epsilon=15.0)


@pytest.fixture(scope="module")
def certified(folder, first):
    return train(folder / "second", scope="last:1", certified=True, steps=20, head=str(first.path))


@pytest.fixture(scope="module")
def standard(folder, first):
    return train(folder / "standard", head=str(first.path))


def gaussian_epsilon(mu, delta):
    """Solves delta = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu) by bisection."""
    low, high = 0.0, 200.0

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for _ in range(200):
        middle = (low + high) / 2
        value = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu)
        low, high = (middle, high) if value > delta else (low, middle)
    return high


def mu_of_steps(record):
    return math.sqrt(record["steps"]) / record["noise_multiplier"]


def mu_of_last_iterate(record, certificate):
    steps, c = record["steps"], 1 - certificate["step_size"] * certificate["strong_convexity"]
    ratio = (1 - c**steps) / (1 + c**steps) * (1 + c) / (1 - c)
    return math.sqrt(ratio) / record["noise_multiplier"]


def request_for(head, epsilon=30.0, privacy=None, **model):
    return Request(
        PrivacyConfig(epsilon=epsilon, delta=DELTA, steps=12, **(privacy or {})),
        ModelConfig(**{"scope": "last:1", "head": str(head), "centered": False} | model),
        {},
        PerformanceConfig("cpu"),
        "small",
    )


def test_the_claim_is_the_sum_of_both_stages_by_hand(certified, first):
    record = certified.statement.mechanism["record"]
    assert record["kind"] == "sequence"
    one, two = record["parts"]
    assert one == first.statement.mechanism["record"]
    mu = math.hypot(mu_of_steps(one), mu_of_last_iterate(two["base"], two["certificate"]))
    assert certified.statement.claim["delta"] == DELTA
    expected = gaussian_epsilon(mu, DELTA)
    assert expected * (1 - 1e-9) <= certified.statement.claim["epsilon"] <= expected * (1 + 1e-4)


def test_the_noise_of_the_second_stage_meets_the_total(certified, standard):
    for run in (certified, standard):
        assert 29.98 < run.statement.claim["epsilon"] <= 30.0


def test_a_standard_second_stage_composes_too(standard, first):
    one, two = standard.statement.mechanism["record"]["parts"]
    assert one == first.statement.mechanism["record"]
    expected = gaussian_epsilon(math.hypot(mu_of_steps(one), mu_of_steps(two)), DELTA)
    assert standard.statement.claim["epsilon"] == pytest.approx(expected, rel=1e-6)


def test_the_statement_recomputes_and_verify_passes(certified, standard, folder):
    for run in (certified, standard):
        assert run.statement.recompute().holds
        assert verify(run.path, ledger=folder / "ledger.sqlite").passed
    assert "certificate" in {check.name for check in verify(certified.path).checks}


def test_a_statement_without_the_first_stage_is_found_out(certified):
    groups = json.loads(certified.statement.to_json())
    groups["mechanism"]["record"]["parts"] = groups["mechanism"]["record"]["parts"][1:]
    groups["admin"]["id"] = content_id(groups)
    forged = PrivacyStatement.from_json(json.dumps(groups)).recompute()
    assert forged.epsilon < 0.9 * certified.statement.claim["epsilon"]
    assert not forged.holds


def test_details_are_held_against_the_last_stage(certified):
    groups = json.loads(certified.statement.to_json())
    groups["mechanism"]["noise_std"] *= 0.5
    groups["admin"]["id"] = content_id(groups)
    problems = PrivacyStatement.from_json(json.dumps(groups)).recompute().problems
    assert any("noise_std" in line for line in problems)


def test_the_statement_names_the_first_stage_and_covers_the_head(certified, first, tmp_path):
    statement = certified.statement
    assert statement.composition["first_stage"]["id"] == first.statement.id
    assert statement.claim["data_accesses"]["head"] == "covered"
    assert not any("given head" in line for line in statement.claim["not_protected"])
    assert any(first.statement.id in line for line in statement.admin["caveats"])
    save_file(head_of_run(str(first.path)), str(tmp_path / "head.safetensors"))
    file = train(tmp_path / "file", head=str(tmp_path / "head.safetensors"), centered=False, ledger=None)
    assert file.statement.claim["data_accesses"]["head"] == "not covered"
    assert any("given head" in line for line in file.statement.claim["not_protected"])


def test_what_the_first_stage_left_open_stays_open(first):
    assert first.statement.claim["data_accesses"]["hyperparameters"] == "not covered"
    stage = FirstStage("first", first.statement)
    found = data_accesses(DATA, request_for(first.path), tuned=False, first=stage)
    assert found["hyperparameters"] == "not covered"
    assert found["head"] == "covered"


def test_the_ledger_charges_each_stage_once(certified, first, folder):
    second = certified.statement.composition["this_run"]
    _, two = certified.statement.mechanism["record"]["parts"]
    own = mu_of_last_iterate(two["base"], two["certificate"])
    assert float(second["mu"]) == pytest.approx(own, rel=1e-3)
    entries = {entry.run: entry for entry in Ledger(folder / "ledger.sqlite").account("small").entries}
    one = float(entries["first"].authorised.mu)
    assert one == pytest.approx(mu_of_steps(first.statement.mechanism["record"]), rel=1e-4)
    assert float(entries["second"].authorised.mu) == float(second["mu"])


def test_the_ledger_check_compares_the_second_stage(certified, folder):
    groups = json.loads(certified.statement.to_json())
    groups["mechanism"]["record"]["parts"][1]["base"]["noise_multiplier"] *= 1.5
    groups["admin"]["id"] = content_id(groups)
    (folder / "forged.json").write_text(PrivacyStatement.from_json(json.dumps(groups)).to_json())
    failed = [
        check
        for check in verify(folder / "forged.json", ledger=folder / "ledger.sqlite").checks
        if check.status == FAILED
    ]
    assert any(check.name == "ledger" and "mechanism record" in check.message for check in failed)


def test_the_model_starts_at_the_logits_of_the_first_run(first):
    prepared = prepare(DATA, request_for(first.path, unit_jacobian=False))
    learner = prepared.learner
    features = learner.features(DATA.train).features
    zero = {name: torch.zeros(shape) for name, shape in learner.operator.parameter_shapes.items()}
    start = learner.logits(features, zero).softmax(1)[:8]
    for row, found in zip(start, first.predict(IMAGES), strict=True):
        assert row.tolist() == pytest.approx(list(found.scores.values()), abs=1e-5)


def test_an_uncentred_first_run_gives_its_whole_head(tmp_path):
    run = train(tmp_path / "run", epsilon=15.0, ledger=None, centered=False)
    learner = prepare(DATA, request_for(run.path)).learner
    features = learner.features(DATA.train).features
    scores = learner.operator.offset(features).softmax(1)[:8]
    for row, found in zip(scores, run.predict(IMAGES), strict=True):
        assert row.tolist() == pytest.approx(list(found.scores.values()), abs=1e-5)


def test_a_finished_run_predicts_as_it_was_evaluated(certified):
    held = DATA.evaluation
    found = dptaft.load_run(certified.path).predict([held.pixels[i] for i in range(len(held))])
    hits = [DATA.classes.index(one.label) == int(y) for one, y in zip(found, held.labels, strict=True)]
    assert sum(hits) / len(hits) == certified.accuracy


def test_the_logits_of_a_given_run_are_kept_unless_asked_otherwise(certified, standard):
    assert certified.config["model"]["centered"] is False
    assert standard.config["model"]["centered"] is False


def test_the_blocks_see_the_head_of_the_first_run(first):
    warm, cold = prepare(DATA, request_for(first.path)), prepare(DATA, request_for("random"))
    assert torch.equal(warm.head["weight"], head_of_run(str(first.path))["weight"])
    assert not torch.equal(warm.head["weight"], cold.head["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "random"}, "backbone"),
        ({"reinitialised_blocks": 1}, "reinitialised_blocks|backbone"),
        ({"privacy": {"adjacency": "replace-one"}}, "adjacency"),
        ({"epsilon": 15.0}, "leaves nothing"),
        ({"epsilon": 2.0}, "leaves nothing"),
    ],
)
def test_a_first_run_that_does_not_fit_is_refused(first, options, message):
    with pytest.raises(PlanError, match=message):
        prepare(DATA, request_for(first.path, **options))


def test_other_classes_are_refused(first):
    with pytest.raises(PlanError, match="classes"):
        prepare(dataclasses.replace(DATA, classes=("x", "y", "z")), request_for(first.path))
    with pytest.raises(PlanError, match="classes"):
        prepare(small_data(classes=4), request_for(first.path))


def test_a_first_run_that_is_no_plain_head_is_refused(certified, tmp_path):
    with pytest.raises(PlanError, match="scope last:1"):
        prepare(DATA, request_for(certified.path))
    unit = train(tmp_path / "unit", certified=True, ledger=None)
    with pytest.raises(PlanError, match="without --certified"):
        prepare(DATA, request_for(unit.path))


def test_a_head_of_a_warm_started_run_is_refused(standard):
    with pytest.raises(PlanError, match="from random"):
        prepare(DATA, request_for(standard.path))


def test_a_first_run_without_a_claim_is_refused(tmp_path):
    run = train(tmp_path / "seeded", insecure_seed=1)
    with pytest.raises(PlanError, match="no privacy claim"):
        prepare(DATA, request_for(run.path))


def test_a_changed_first_run_is_refused(first, tmp_path):
    copy = shutil.copytree(first.path, tmp_path / "copy")
    groups = json.loads((copy / "privacy.json").read_text())
    groups["mechanism"]["record"]["noise_multiplier"] *= 2
    groups["admin"]["id"] = content_id(groups)
    (copy / "privacy.json").write_text(PrivacyStatement.from_json(json.dumps(groups)).to_json())
    with pytest.raises(PlanError, match="does not follow"):
        prepare(DATA, request_for(copy))


def test_procedures_that_account_single_runs_refuse_a_run_as_head(first, tmp_path):
    with pytest.raises(PlanError, match="does not start from a run"):
        train(tmp_path / "one", head=str(first.path), method="output-perturbation", steps=None)
    with pytest.raises(PlanError, match="shards"):
        dptaft.train_shards(DATA, 2, epsilon=30.0, output=tmp_path / "shards", head=str(first.path))
    with pytest.raises(RecipeError, match="single runs"):
        _check_options({"head": str(first.path)}, "method 'x'")
    with pytest.raises(RecipeError, match="single runs"):
        _check_options({"warm_start": 0.5}, "method 'x'")


def test_one_command_trains_both_stages(tmp_path):
    arguments = ["train", "--epsilon", "3", "--certified", "--warm-start", "0.3", "--json"]
    arguments += ["--scope", "last:1", "--steps", "8", "--data", _archive(tmp_path), "--classes", "a,b,c"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    head, run = dptaft.load_run(tmp_path / "run.head"), dptaft.load_run(tmp_path / "run")
    assert facts["epsilon"] == run.statement.claim["epsilon"] <= 3
    assert run.statement.composition["first_stage"]["id"] == head.statement.id
    share_of_head = mu_of_steps(head.statement.mechanism["record"]) ** 2 / epsilon_to_mu(3.0, DELTA) ** 2
    assert share_of_head == pytest.approx(0.3, rel=1e-3)
    assert verify(tmp_path / "run").passed
    assert verify(tmp_path / "run.head").passed
    assert run.config["model"]["centered"] is False


def _archive(folder):
    import numpy as np

    images = torch.stack([DATA.train.pixels[i] for i in range(len(DATA.train))]).squeeze(1).numpy()
    np.savez(folder / "data.npz", images=(255 * images).astype("uint8"), labels=DATA.train.labels.numpy())
    return str(folder / "data.npz")


def test_either_stage_is_resumed(tmp_path):
    options = {"scope": "last:1", "certified": True, "steps": 8, "warm_start": 0.5}

    def stop_at(number):
        seen = []

        def stop(stage, step, total):
            if stage == "training":
                seen.append(step)
                if len(seen) == number:
                    signal.raise_signal(signal.SIGTERM)

        return stop

    with pytest.raises(TrainingInterruptedError):
        train(tmp_path / "run", progress=stop_at(3), **options)
    assert (tmp_path / "run.head.partial").is_dir()
    with pytest.raises(TrainingInterruptedError):  # the head has 50 steps
        train(tmp_path / "run", progress=stop_at(50), resume=True, **options)
    assert (tmp_path / "run.head").is_dir()
    assert (tmp_path / "run.partial").is_dir()
    head = dptaft.load_run(tmp_path / "run.head")
    run = train(tmp_path / "run", resume=True, **options)
    assert run.statement.composition["first_stage"]["id"] == head.statement.id
    assert run.statement.claim["epsilon"] <= 30
    assert verify(run.path).passed


def test_another_first_stage_cannot_slip_into_a_resumed_run(tmp_path, first):
    def stop(stage, step, total):
        if stage == "training" and step == 5:
            signal.raise_signal(signal.SIGTERM)

    copy = shutil.copytree(first.path, tmp_path / "head")
    options = {"head": str(copy), "ledger": None}
    with pytest.raises(TrainingInterruptedError):
        train(tmp_path / "run", progress=stop, **options)
    shutil.rmtree(copy)
    train(copy, epsilon=15.0, ledger=None)
    with pytest.raises(ResumeError):
        train(tmp_path / "run", resume=True, **options)


def test_bad_fractions_and_leftovers_are_refused(tmp_path, first):
    options = {"scope": "last:1", "ledger": None}
    for fraction in (0.0, 1.0, -0.5, math.nan):
        with pytest.raises(PlanError, match="fraction"):
            train(tmp_path / "run", warm_start=fraction, **options)
    with pytest.raises(PlanError, match="leave out"):
        train(tmp_path / "run", warm_start=0.5, head=str(first.path), **options)
    with pytest.raises(PlanError, match="blocks"):
        train(tmp_path / "run", warm_start=0.5, **options | {"scope": "head"})
    with pytest.raises(PlanError, match="tangent"):
        train(tmp_path / "run", warm_start=0.5, method="non-linear", **options)
    with pytest.raises(CertificateError, match="momentum"):
        train(tmp_path / "run", warm_start=0.5, certified=True, optimizer={"momentum": 0.9}, **options)
    assert not list(tmp_path.glob("run*"))
    (tmp_path / "run.head").mkdir()
    with pytest.raises(ValueError, match="exists"):
        train(tmp_path / "run", warm_start=0.5, **options)


def test_the_first_stage_has_the_adjacency_and_delta_of_the_whole():
    asked = Request(
        PrivacyConfig(epsilon=3.0, adjacency="add-remove", public_size=70),
        ModelConfig(scope="last:1", unit_jacobian=True),
        {"learning_rate": 0.5},
        PerformanceConfig("cpu"),
        "small",
    )
    found = head_request(asked, 60, 0.5)
    assert (found.privacy.adjacency, found.privacy.public_size, found.privacy.delta) == (
        "add-remove",
        70,
        DELTA,
    )
    assert not found.model.unit_jacobian
    assert found.privacy.epsilon == share(3.0, DELTA, 0.5)
    assert found.optimizer == {}

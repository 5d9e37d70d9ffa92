import json
import math
import os
import signal
import subprocess
import sys
import tomllib

import pytest
import torch
from builders import small_data, small_images, write_folder
from safetensors.torch import load_file, save_file

import dptaft
from dptaft.backbones import load_backbone
from dptaft.learner import Learner
from dptaft.training.defaults import automatic_rate
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError, PrivacyConfig
from dptaft.training.trainer import partial_folder
from dptaft.verification import verify
from dptaft_accounting import best_bound, mechanism_from_dict


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "one"
    return dptaft.train(small_data(), epsilon=8, steps=12, output=output)


def test_run_folder_is_whole_and_loads_again(finished):
    assert sorted(p.name for p in finished.path.iterdir()) == [
        "metrics.jsonl",
        "model.safetensors",
        "privacy.json",
        "run.toml",
    ]
    again = dptaft.load_run(finished.path)
    assert again.statement == finished.statement
    assert again.accuracy == finished.accuracy
    assert not partial_folder(finished.path).exists()
    assert sorted(p.name for p in finished.path.parent.iterdir()) == ["ledger.sqlite", "one"]


def test_statement_is_true_of_the_run(finished):
    statement = finished.statement
    record = mechanism_from_dict(statement.mechanism["record"])
    assert record.steps == 12
    assert statement.recompute().holds
    assert 7.9 < statement.claim["epsilon"] <= 8
    assert best_bound(record, delta=1e-5).epsilon == statement.claim["epsilon"]
    details = statement.mechanism
    assert details["noise_std"] >= record.noise_multiplier * details["l2_clip_norm"]
    assert details["noise_std"] == pytest.approx(record.noise_multiplier * details["l2_clip_norm"], rel=2e-3)
    assert statement.claim["data_accesses"]["hyperparameters"] == "not covered"  # steps were given
    assert statement.claim["data_accesses"]["training"] == "covered"


def flat_weights(run):
    tensors = load_file(run.path / "model.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if k.startswith("trained/")]).double()


PLAIN_STEP = {"steps": 1, "optimizer": {"kind": "sgd", "learning_rate": 1.0}}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjacency": "replace-one"},
        {"adjacency": "add-remove", "public_size": 80},
        {"sampling": "poisson", "expected_batch_size": 1, "l2_clip_norm": 1e-6},
        {"method": "non-linear"},
    ],
)
def test_the_released_weights_hold_exactly_the_noise_that_is_accounted(tmp_path, options):
    """Two runs of one step differ by their noise alone: its size is measured, not read from the code."""
    runs = [dptaft.train(small_data(), epsilon=1, output=tmp_path / n, **PLAIN_STEP, **options) for n in "ab"]
    details = runs[0].statement.mechanism
    measured = float((flat_weights(runs[0]) - flat_weights(runs[1])).std()) / math.sqrt(2)
    stated = details["record"]["noise_multiplier"] * details["l2_clip_norm"] / details["normaliser"]
    assert measured == pytest.approx(stated, rel=0.012)  # seven standard errors for 2e5 weights


@pytest.mark.parametrize("options", [{}, {"method": "non-linear"}, {"scope": "last:2", "engine": "ghost"}])
def test_one_record_moves_one_noiseless_step_by_at_most_its_clip_norm(tmp_path, options):
    common = {"epsilon": math.inf, "adjacency": "add-remove", "public_size": 60, "l2_clip_norm": 0.7}
    whole, less = small_data(60), small_data(60)
    less = dptaft.ImageData("less", less.classes, less.train.take(range(59)), less.evaluation, True)
    a, b = (
        flat_weights(dptaft.train(data, output=tmp_path / name, **common, **PLAIN_STEP, **options))
        for data, name in ((whole, "a"), (less, "b"))
    )
    moved = float((a - b).norm()) * 60
    assert 0.69 < moved <= 0.7 * (1 + 1e-4)


def test_nothing_secret_is_written(finished):
    text = "".join(p.read_text() for p in finished.path.iterdir() if p.suffix != ".safetensors")
    config = tomllib.loads((finished.path / "run.toml").read_text())
    assert "insecure" not in text
    assert "train_loss" not in text
    assert config["model"]["seed"] == 0  # the public seed of the head
    assert {
        json.loads(line)["split"] for line in (finished.path / "metrics.jsonl").read_text().splitlines()
    } == {"evaluation"}


def test_every_trained_tensor_moved(finished):
    weights = load_file(finished.path / "model.safetensors")
    trained = {k: v for k, v in weights.items() if k.startswith("trained/")}
    assert len(trained) == 16  # one block, the last norm, the head
    assert all(bool((v != 0).any()) for v in trained.values())


def test_two_runs_never_share_noise(tmp_path):
    runs = [dptaft.train(small_data(), epsilon=1, steps=2, output=tmp_path / name) for name in "ab"]
    a, b = (load_file(run.path / "model.safetensors")["trained/head.weight"] for run in runs)
    assert not torch.equal(a, b)


def test_seeded_runs_repeat_and_claim_nothing(tmp_path):
    runs = [
        dptaft.train(small_data(), epsilon=1, steps=2, insecure_seed=5, output=tmp_path / name)
        for name in "ab"
    ]
    a, b = (load_file(run.path / "model.safetensors")["trained/head.weight"] for run in runs)
    assert torch.equal(a, b)
    assert runs[0].statement is None
    assert "no privacy is claimed" in runs[0].no_claim


def test_infinite_epsilon_learns_and_claims_nothing(tmp_path):
    run = dptaft.train(small_data(), epsilon=math.inf, steps=40, output=tmp_path / "run")
    assert run.statement is None
    assert "non-private" in run.no_claim
    assert run.accuracy == 1.0


def test_prediction_is_that_of_the_trained_model(tmp_path):
    data = small_data()
    run = dptaft.train(data, epsilon=math.inf, steps=40, output=tmp_path / "run")
    images, labels = small_images(9, seed=3)
    predicted = dptaft.load_run(run.path).predict([torch.from_numpy(x)[None] for x in images])
    assert [p.label for p in predicted] == [data.classes[label] for label in labels]
    assert all(abs(sum(p.scores.values()) - 1) < 1e-5 for p in predicted)


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "head"},
        {"scope": "attention:1"},
        {"scope": "last:2", "engine": "ghost"},
        {"method": "non-linear", "physical_batch_size": 16},
        {"sampling": "poisson", "expected_batch_size": 4},
        {"sampling": "cyclic-partition", "expected_batch_size": 20},
        {"adjacency": "replace-one", "loss": "huber-square"},
        {"adjacency": "add-remove", "public_size": 50},
        {"feature_precision": "float16"},
        {"centered": False, "reinitialised_blocks": 1},
        {"fresh_class_token": True, "scope": "last:2"},
        {"optimizer": {"kind": "adam", "learning_rate": 0.01, "averaging": "tail"}},
    ],
)
def test_every_kind_of_run_makes_a_claim_that_holds(tmp_path, options):
    run = dptaft.train(small_data(24), epsilon=4, steps=3, output=tmp_path / "run", **options)
    assert run.statement.recompute().holds
    assert 3.9 < run.statement.claim["epsilon"] <= 4
    record, details = run.statement.mechanism["record"], run.statement.mechanism
    assert details["noise_std"] == pytest.approx(
        record["noise_multiplier"] * details["l2_clip_norm"], rel=2e-3
    )
    image = torch.from_numpy(small_images(1)[0])
    assert dptaft.load_run(run.path).predict([image])[0].label in run.classes


def test_feature_cache_is_used_and_changes_nothing(tmp_path):
    options = {"epsilon": 1, "steps": 3, "insecure_seed": 1, "feature_cache": str(tmp_path / "cache")}
    first = dptaft.train(small_data(), output=tmp_path / "a", **options)
    second = dptaft.train(small_data(), output=tmp_path / "b", **options)
    plain = dptaft.train(small_data(), output=tmp_path / "c", **options | {"feature_cache": None})
    a, b, c = (load_file(r.path / "model.safetensors")["trained/head.weight"] for r in (first, second, plain))
    assert torch.equal(a, b)
    assert torch.equal(a, c)
    assert (tmp_path / "cache").stat().st_mode & 0o77 == 0


def test_a_given_head_is_used_kept_and_declared(tmp_path):
    head = {"weight": torch.randn(3, 128), "bias": torch.zeros(3)}
    save_file(head, tmp_path / "head.safetensors")
    run = dptaft.train(
        small_data(), epsilon=1, steps=2, head=str(tmp_path / "head.safetensors"), output=tmp_path / "run"
    )
    assert torch.equal(load_file(run.path / "model.safetensors")["head/weight"], head["weight"])
    assert run.statement.claim["data_accesses"]["head"] == "not covered"
    with pytest.raises(ValueError, match=r"head weight has shape \(3, 128\)"):
        dptaft.train(
            small_data(classes=4), epsilon=1, head=str(tmp_path / "head.safetensors"), output=tmp_path / "b"
        )


def test_uncentred_models_predict_with_the_offset_they_were_trained_with(tmp_path):
    options = {"epsilon": math.inf, "steps": 40, "centered": False, "output": tmp_path / "run"}
    run = dptaft.train(small_data(), **options)
    images, labels = small_images(9, seed=3)
    predicted = run.predict([torch.from_numpy(x)[None] for x in images])
    assert [p.label for p in predicted] == [run.classes[label] for label in labels]


def test_bad_requests_are_refused_before_anything_is_written(tmp_path):
    data, output = small_data(), tmp_path / "run"
    for message, options in {
        "unknown model 'resnet_x'": {"model": "resnet_x"},
        "deeper than the model": {"scope": "last:9"},
        "unknown scope": {"scope": "tail:1"},
        "unknown loss": {"loss": "hinge"},
        "larger than the 60 records": {"sampling": "poisson", "expected_batch_size": 61},
        "fused engine needs a tangent model": {"method": "non-linear", "engine": "fused"},
        "no weights 'missing.safetensors'": {"weights": "missing.safetensors"},
        "device 'warp' cannot be used": {"device": "warp"},
    }.items():
        with pytest.raises(ValueError, match=message):
            dptaft.train(data, epsilon=1, steps=2, output=output, **options)
    assert list(tmp_path.iterdir()) == []
    output.mkdir()
    with pytest.raises(ValueError, match=r"output folder .* exists"):
        dptaft.train(data, epsilon=1, steps=2, output=output)


def test_every_setting_of_the_user_is_named(tmp_path):
    options = {"scope": "head", "seed": 7, "l2_clip_norm": 0.5, "sampling": "full-batch", "steps": 2}
    run = dptaft.train(small_data(), epsilon=1, output=tmp_path / "run", **options)
    caveats = " ".join(run.statement.admin["caveats"])
    assert all(name in caveats for name in options)
    plain = dptaft.train(small_data(), epsilon=1, output=tmp_path / "plain")
    assert plain.statement.claim["data_accesses"]["hyperparameters"] == "public"
    assert plain.statement.composition["hyperparameter_choice"] == "public defaults"


def test_diverged_weights_are_no_run(tmp_path):
    with pytest.raises(ValueError, match="the weights diverged"):
        dptaft.train(
            small_data(),
            epsilon=1,
            steps=8,
            output=tmp_path / "run",
            optimizer={"learning_rate": 1e30, "l2_regularization": 1.0},
        )
    assert not (tmp_path / "run").exists()


def test_an_unreadable_evaluation_image_costs_nothing(tmp_path):
    write_folder(tmp_path / "pets" / "train")
    write_folder(tmp_path / "pets" / "test")
    (tmp_path / "pets" / "test" / "cat" / "000.png").write_text("no image")
    with pytest.raises(ValueError, match=r"000\.png"):
        dptaft.train(str(tmp_path / "pets"), epsilon=1, steps=2, output=tmp_path / "run")
    assert not partial_folder(tmp_path / "run").exists()


def test_a_large_delta_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match="above 1/n"):
        dptaft.train(small_data(), epsilon=1, delta=0.1, steps=2, output=tmp_path / "run")


SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
import dptaft
from builders import small_data
def slow(stage, done, total):
    if stage == "training":
        print(done, flush=True)
        time.sleep(0.05)
dptaft.train(small_data(), epsilon=2, steps=80, output=sys.argv[1], progress=slow)
"""


def interrupted_run(tmp_path, number, after):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if int(line) >= after:
            process.send_signal(number)
            break
    process.communicate(timeout=1200)
    assert process.returncode != 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_runs_resume_within_the_budget(tmp_path, number):
    interrupted_run(tmp_path, number, after=30)
    with pytest.raises(PlanError, match="holds an interrupted run"):
        dptaft.train(small_data(), epsilon=2, steps=80, output=tmp_path / "run")
    with pytest.raises(ValueError, match="start"):
        dptaft.train(small_data(), epsilon=3, steps=80, output=tmp_path / "run", resume=True)
    done = []
    run = dptaft.train(
        small_data(),
        epsilon=2,
        steps=80,
        output=tmp_path / "run",
        resume=True,
        progress=lambda stage, step, total: done.append(step) if stage == "training" else None,
    )
    assert run.statement.claim["epsilon"] <= 2
    assert run.statement.mechanism["steps_executed"] == 80
    # a killed process loses the steps since its last checkpoint; they stay charged
    assert done[0] >= 26
    assert (done[-1] == 80) == (number != signal.SIGKILL)
    assert verify(run.path).passed, verify(run.path).failures
    assert not partial_folder(run.path).exists()


def test_ranges_beyond_the_plan_are_refused_in_one_line(tmp_path):
    interrupted_run(tmp_path, signal.SIGTERM, after=30)
    partial = partial_folder(tmp_path / "run")
    content = json.loads((partial / "progress.json").read_text())
    ranges = [*content["authorised"], [0, 10**12]]
    (partial / "progress.json").write_text(json.dumps(content | {"authorised": ranges}))
    with pytest.raises(ValueError, match=r"progress.json is damaged .*, 80 are planned") as error:
        dptaft.train(small_data(), epsilon=2, steps=80, output=tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_automatic_sampling_is_a_public_rule():
    learner = Learner(load_backbone("starter", num_classes=10), ModelConfig(), PerformanceConfig())
    private = PrivacyConfig(3.0)
    assert automatic_rate(learner, private, 60_000, 100) == 1.0
    rate = automatic_rate(learner, private, 10**7, 100)
    assert 256 / 10**7 <= rate < 0.1
    assert automatic_rate(learner, private, 10**7, 100) == rate
    deep = Learner(load_backbone("starter", num_classes=10), ModelConfig(scope="last:2"), PerformanceConfig())
    assert automatic_rate(deep, private, 10**7, 100) < rate / 50


def test_changed_data_cannot_be_resumed(tmp_path):
    interrupted_run(tmp_path, signal.SIGTERM, after=5)
    with pytest.raises(ValueError, match="belongs to other data"):
        dptaft.train(small_data(64), epsilon=2, steps=80, output=tmp_path / "run", resume=True)


def test_a_full_disk_leaves_no_run(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match="No space left"):
        dptaft.train(small_data(), epsilon=1, steps=2, output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.iterdir()) == []


def test_changed_weights_are_noticed(tmp_path):
    run = dptaft.train(small_data(), epsilon=1, steps=2, output=tmp_path / "run")
    file = run.path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="not the file this run wrote"):
        dptaft.load_run(run.path)
    with pytest.raises(ValueError, match="no run at"):
        dptaft.load_run(tmp_path / "nowhere")
    (run.path / "privacy.json").unlink()
    with pytest.raises(ValueError, match="incomplete or damaged"):
        dptaft.load_run(run.path)

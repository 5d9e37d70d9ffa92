"""`dptaft plan`: sizes are exact, privacy is that of the run, warnings name the remedy; no time is asserted."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from builders import small_data
from click.testing import CliRunner

import dptaft
from dptaft import estimate, estimate_probe, estimate_room
from dptaft.cli import main
from dptaft.estimate import blank_data, combine, estimate_training
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError, PrivacyConfig, Request
from dptaft.training.preparation import prepare


def request(data, *, scope="head", cache=None, precision="float32", epsilon=3.0, **privacy):
    return Request(
        privacy=PrivacyConfig(epsilon, **privacy),
        model=ModelConfig(scope=scope, feature_precision=precision),
        optimizer={},
        performance=PerformanceConfig("cpu", feature_cache=cache),
        data=data.name,
    )


@pytest.fixture(scope="module", autouse=True)
def _hurried():
    """No time is asserted, so that the shortest rehearsal will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimate_probe, "_SECONDS", 0.05)
        patch.setattr(estimate_probe, "_DISK_BYTES", 1 << 20)
        yield


@pytest.fixture(scope="module")
def rehearsed(_hurried):
    data = blank_data(1000, 3)
    asked = request(data, scope="last:1")
    return asked, estimate_training(data, asked)


def extrapolated(rehearsed, data, asked, available=10**12, **options):
    prepared = prepare(data, asked)
    return combine(prepared, asked, data, rehearsed[1].probe, available=available, **options)


@pytest.mark.parametrize(
    ("scope", "precision"),
    [
        ("head", "float32"),
        ("last:1", "float32"),
        ("last:1", "float16"),
        pytest.param("last:2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_disk_is_that_of_the_run(scope, precision, tmp_path):
    data, cache = small_data(), str(tmp_path / "cache")
    asked = request(data, scope=scope, cache=cache, precision=precision, steps=2)
    found = estimate_training(data, asked)
    dptaft.train(
        data,
        epsilon=3,
        scope=scope,
        steps=2,
        feature_precision=precision,
        feature_cache=cache,
        output=tmp_path / "run",
        ledger=None,
    )
    used = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    small = 2 * estimate._MANIFEST_BYTES  # a manifest is a few kilobytes, whatever the records
    assert abs(found.disk["cache"] - used) <= 0.02 * used + small
    weights = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert found.disk["weights"] == pytest.approx(weights, rel=0.02, abs=8192)


@pytest.mark.slow
def test_memory_is_that_of_the_run(tmp_path):
    program = (
        "import resource, sys, json, torch; torch.set_num_threads(1)\n"
        "from dptaft.cli import main\n"
        "try: main(sys.argv[1:], standalone_mode=True)\n"
        "except SystemExit: pass\n"
        "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
    )

    def run(*arguments):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
        text, _, peak = done.stdout.rpartition("PEAK")
        return json.loads(text), int(peak)

    planned, _ = run("plan", "--data", "digits", "--steps", "5", "--json")
    run_facts, peak = run("train", "--data", "digits", "--epsilon", "3", "--steps", "5", "--json")
    assert planned["memory"]["peak"] == pytest.approx(peak, rel=0.2)
    assert planned["privacy"]["noise_multiplier"] == run_facts["noise_multiplier"]
    assert planned["privacy"]["delta"] == run_facts["delta"]


def test_the_plan_is_the_one_that_training_makes(rehearsed):
    for options in ({}, {"sampling": "poisson", "expected_batch_size": 100}, {"adjacency": "replace-one"}):
        data = blank_data(5000, 3)
        asked = request(data, **options)
        plan, found = prepare(data, asked).plan, extrapolated(rehearsed, data, asked)
        assert found.privacy["noise_multiplier"] == plan.noise_multiplier
        assert found.privacy["steps"] == plan.steps
        assert found.privacy["expected_batch_size"] == plan.normaliser
        assert found.privacy["sampling"] == plan.sampling.kind


def test_memory_and_disk_grow_with_the_records_and_a_cache_moves_them(rehearsed, tmp_path):
    probe, sizes = rehearsed[1].probe, []
    for records in (10**4, 10**5):
        data = blank_data(records, 3)
        options = {"scope": "last:1", "sampling": "full-batch"}
        ram = extrapolated(rehearsed, data, request(data, **options))
        disk = extrapolated(rehearsed, data, request(data, **options, cache=str(tmp_path)))
        assert ram.disk["cache"] == 0
        assert disk.disk["cache"] == records * probe.record_bytes + estimate._MANIFEST_BYTES
        sizes.append((ram.memory["peak"], disk.memory["peak"]))
    grown = [more - less for less, more in zip(*sizes, strict=True)]
    assert grown[0] == 90_000 * (probe.record_bytes + probe.gram_bytes + estimate_room.INDEX_BYTES)
    assert grown[1] <= 90_000 * estimate._DIGEST_BYTES


def test_blank_records_take_no_memory_and_no_image():
    data = blank_data(10**9, 4)
    assert len(data.train) == 10**9
    assert data.train.labels.untyped_storage().nbytes() == 8
    with pytest.raises(ValueError, match="only counted"):
        data.train.pixels[0]


def test_warnings_name_what_is_missing_and_the_remedy(rehearsed, tmp_path, monkeypatch):
    data = blank_data(10**7, 3)
    in_memory, on_disk = request(data, scope="last:1"), request(data, scope="last:1", cache=str(tmp_path))
    monkeypatch.setattr(estimate_room, "available_memory", lambda: 10**9)
    (line,) = extrapolated(rehearsed, data, in_memory, available=10**9).warnings
    assert "10000000 records need" in line
    assert "--feature-cache" in line
    usage = estimate.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    (line,) = extrapolated(rehearsed, data, on_disk).warnings
    assert "1 GB of disk are free" in line
    assert "float16" in line
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda path: usage._replace(free=10**15))
    (line,) = extrapolated(rehearsed, data, on_disk, available=10**9).warnings
    assert "reads the disk again" in line
    assert extrapolated(rehearsed, data, on_disk, available=10**13).warnings == ()


def test_processes_share_work_but_not_memory(rehearsed):
    data = blank_data(10**6, 3)
    asked = request(data, scope="last:1")
    one, two = (extrapolated(rehearsed, data, asked, processes=n, price_per_hour=36) for n in (1, 2))
    assert (one.communication, two.communication) == (0, 12 * one.probe.trained)
    assert two.memory["peak"] - one.memory["peak"] == one.probe.resident_bytes
    assert two.seconds["features"] <= one.seconds["features"]
    assert one.cost == pytest.approx(one.seconds["total"] / 100)
    with pytest.raises(PlanError, match="number of processes"):
        estimate_training(data, asked, processes=0)


def test_a_cache_beyond_memory_is_read_again_in_every_step(rehearsed, tmp_path):
    data = blank_data(10**6, 3)
    asked = request(data, scope="last:1", cache=str(tmp_path))
    base, probe = rehearsed[1], replace(rehearsed[1].probe, read_seconds=1e-9)
    prepared = prepare(data, asked)
    fits, outgrows = (
        combine(prepared, asked, data, probe, available=available).seconds["training"]
        for available in (10**13, 10**6)
    )
    plan = prepared.plan
    reread = plan.steps * data.train.labels.shape[0] * plan.sampling.rate * base.probe.record_bytes * 1e-9
    assert outgrows - fits == pytest.approx(reread)


def test_command_prints_a_table_and_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    common = ["plan", "--records", "2000", "--num-classes", "3", "--scope", "head", "--steps", "3"]
    text = runner.invoke(main, [*common, "--price-per-hour", "2.5"])
    assert text.exit_code == 0, text.output
    for word in ("privacy", "noise multiplier", "time", "memory", "disk", "cost"):
        assert word in text.output
    found = json.loads(runner.invoke(main, [*common, "--json"]).output)
    assert found["privacy"]["steps"] == 3
    assert found["seconds"]["total"] == pytest.approx(
        sum(value for name, value in found["seconds"].items() if name != "total")
    )
    assert not list(tmp_path.iterdir())  # nothing is left behind


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--records and --data"),
        (["--records", "10", "--data", "digits"], "--records and --data"),
        (["--records", "10", "--sampling", "poisson"], "--batch-size"),
        (["--records", "10", "--model", "no_such_model"], "unknown model"),
    ],
)
def test_bad_requests_are_one_line(arguments, words):
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert result.exit_code == 2
    assert words in result.output


def test_other_methods_and_no_privacy_are_planned_too():
    data = blank_data(200, 3)
    asked = request(data, epsilon=float("inf"), steps=2)
    found = estimate_training(data, replace(asked, model=replace(asked.model, method="non-linear")))
    assert found.privacy["epsilon"] is None
    assert found.setting["engine"] == "hooks"
    assert torch.isfinite(torch.tensor(list(found.seconds.values()))).all()

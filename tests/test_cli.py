import json
import subprocess
import sys

import numpy as np
import pytest
from builders import small_images, write_folder
from click.testing import CliRunner

from dptaft.cli import main


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "bands.npz"
    images, labels = small_images(60)
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def trained(archive, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", "--epsilon", 8, "--data", archive, "--steps", 10, "--output", output)
    assert result.exit_code == 0, result.output
    return output, result.output


def test_table_shows_the_claim(trained):
    output, text = trained
    for part in (
        "held-out evaluation images",
        "at delta 1e-05 (composition)",
        "Gaussian differential privacy",
        "noise multiplier",
        "10 (full-batch)",
        "zero-out, unit: one training record",
        "AES-256-CTR",
        "given by the user: steps",
        str(output),
    ):
        assert part in text


def test_shown_epsilon_is_not_below_the_true_one(trained):
    output, text = trained
    shown = float(next(line for line in text.splitlines() if line.startswith("epsilon")).split()[1])
    assert shown >= json.loads((output / "privacy.json").read_text())["claim"]["epsilon"]


def test_json_output_of_training(archive, tmp_path):
    result = run(
        "train", "--epsilon", 2, "--data", archive, "--steps", 2, "--output", tmp_path / "r", "--json"
    )
    facts = json.loads(result.output)
    assert 1.9 < facts["epsilon"] <= 2
    assert facts["steps"] == 2


def test_scheduled_noise_is_accounted_and_shown(archive, tmp_path):
    result = run(
        "train", "--epsilon", 2, "--data", archive, "--steps", 3, "--noise-schedule", "linear:0.5",
        "--learning-rate-schedule", "cosine:0.1", "--output", tmp_path / "r",
    )  # fmt: skip
    assert "(schedule)" in result.output
    record = json.loads((tmp_path / "r" / "privacy.json").read_text())["mechanism"]["record"]
    assert record["noise_multiplier"][2] == pytest.approx(record["noise_multiplier"][0] / 2)


def test_baseline_and_seeded_runs_are_marked(archive, tmp_path):
    common = ("train", "--data", archive, "--steps", 2)
    assert "NO CLAIM" in run(*common, "--epsilon", "inf", "--output", tmp_path / "a").output
    seeded = run(*common, "--epsilon", 1, "--insecure-seed", 3, "--output", tmp_path / "b").output
    assert "NO CLAIM" in seeded
    assert "epsilon " not in seeded


def test_predict(trained, tmp_path):
    output, _ = trained
    write_folder(tmp_path, count=3, classes=("x", "y", "z"))
    images = sorted(tmp_path.glob("*/*.png"))
    lines = run("predict", output, *images).output.splitlines()
    assert len(lines) == 3
    rows = json.loads(run("predict", output, *images, "--json").output)
    assert [row["label"] for row in rows] == [line.split("\t")[1] for line in lines]
    assert set(rows[0]["scores"]) == {"0", "1", "2"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --epsilon"),
        (("--epsilon", "abc"), "'abc' is not a valid float"),
        (("--epsilon", 0), "epsilon must be a positive number, got 0"),
        (("--epsilon", "nan"), "got nan"),
        (("--epsilon", 1, "--delta", 2), "delta must lie strictly between 0 and 1, got 2"),
        (("--epsilon", 1, "--data", "/no/such/place"), "no data set or path '/no/such/place'"),
        (("--epsilon", 1, "--model", "no_model"), "unknown model 'no_model'"),
        (("--epsilon", 1, "--scope", "last:99"), "deeper than the model"),
        (("--epsilon", 1, "--output", "/proc/none/run"), "cannot write to"),
        (("--epsilon", 1, "--noise-schedule", "linear:0"), "noise_schedule must not come near zero"),
        (("--epsilon", 1, "--learning-rate-schedule", "steep"), "cannot read the schedule 'steep'"),
        (("--epsilon", 1, "--optimizer", "sgd", "--momentum", 0.5), "momentum has no meaning for"),
        (("--epsilon", 1, "--resume"), "--resume needs the --output"),
        (("--epsilon", 1, "--optimizer", "sgd", "--learning-rate", -1), "learning_rate must be"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(options, message):
    result = run("train", *options)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("Error")]) == 1


def test_unreadable_image_is_named(tmp_path):
    root = write_folder(tmp_path / "pets")
    (root / "cat" / "000.png").write_text("this is no image")
    result = run("train", "--epsilon", 1, "--steps", 2, "--data", root, "--output", tmp_path / "run")
    assert result.exit_code == 2
    assert "000.png" in result.output
    assert not (tmp_path / "run").exists()


def test_resuming_nothing_is_refused(archive, tmp_path):
    result = run("train", "--epsilon", 1, "--data", archive, "--output", tmp_path / "x", "--resume")
    assert result.exit_code == 2
    assert "no interrupted run" in result.output


def test_large_delta_warns_on_one_line(archive, tmp_path):
    result = run(
        "train", "--epsilon", 1, "--delta", 0.5, "--data", archive, "--steps", 2, "--output", tmp_path / "r"
    )
    assert result.exit_code == 0
    assert "Warning: delta 0.5 is above 1/n" in result.output


def test_models_lists_paths_and_costs():
    rows = json.loads(run("models", "starter", "--scope", "last:2", "--json").output)
    assert rows[0]["path"] == "dual"
    assert rows[0]["trained"] > 390_000
    assert "compiled" in run("models", "starter").output
    deep = run("models", "starter", "--scope", "last:40")
    assert "not supported: scope last:40 is deeper than the model" in deep.output
    assert run("models", "nothing-like-this").exit_code == 2


def test_clear_cache_removes_only_caches(tmp_path, archive):
    cache = tmp_path / "cache"
    run(
        "train", "--epsilon", 1, "--data", archive, "--steps", 2, "--feature-cache", cache,
        "--output", tmp_path / "r",
    )  # fmt: skip
    assert cache.is_dir()
    assert "freed" in run("clear-cache", cache).output
    assert not cache.exists()
    assert run("clear-cache", tmp_path).exit_code == 2


def test_help_needs_no_heavy_import():
    code = "import sys; import dptaft.cli as c; c.main(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"
    for command in ("train", "predict", "budget", "models", "clear-cache"):
        assert command in out


def test_a_run_in_a_terminal_free_shell_prints_no_progress(archive, tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "dptaft", "train", "--epsilon", "1", "--data", archive, "--steps", "2",
         "--output", tmp_path / "r"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stderr == ""

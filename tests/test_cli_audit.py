"""`dptaft audit`: what it prints, its exit status, its refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from builders import small_images
from click.testing import CliRunner

import dptaft
from dptaft.cli import main
from dptaft.training import optimizers


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    images, labels = small_images(40)
    np.savez(folder / "data.npz", images=images.clip(0, 1), labels=labels)
    return dptaft.train(
        str(folder / "data.npz"),
        classes=["x", "y", "z"],
        epsilon=3.0,
        scope="head",
        steps=6,
        output=folder / "run",
    )


def audit(run, *options):
    data = () if "--data" in options else ("--data", run.path.parent / "data.npz")
    return CliRunner().invoke(main, ["audit", *map(str, (run.path, *data, *options))])


def test_a_run_does_not_hold_the_path_of_its_data(run):
    result = CliRunner().invoke(main, ["audit", str(run.path)])
    assert result.exit_code == 2
    assert result.output.startswith(
        "Error: the records of the run are needed (no data set or path 'data.npz'"
    )
    assert "give --data" in result.output


def test_a_sound_run_is_consistent(run):
    result = audit(run, "--canaries", 300, "--repetitions", 4, "--significance", 1e-6)
    assert result.exit_code == 0, result.output
    lines = dict(line.split("  ", 1) for line in result.output.splitlines() if not line.startswith("note"))
    assert lines["verdict"].strip() == "consistent"
    for name in ("lower bound", "claimed", "attainable", "exercised", "sensitivity", "noise", "batches"):
        assert lines[name].strip()
    assert "2.9999" in lines["claimed"]
    assert "keep them internal" in result.output


def test_json_and_membership(run, tmp_path):
    plot = tmp_path / "roc.png"
    options = ("--json", "--membership", 4, "--plot", plot, "--canaries", 300)
    result = audit(run, *options, "--repetitions", 2, "--significance", 1e-6)
    assert result.exit_code == 0, result.output
    document = json.loads(result.output)
    assert document["epsilon_lower_bound"] < document["epsilon_claimed"] < document["epsilon_attainable"]
    assert document["membership"]["shadows"] == 4
    assert plot.stat().st_size > 5000
    assert "published" in document["spends"]


def test_facts_about_private_records_are_not_attached(run, monkeypatch):
    """The folder of a run is published; what an audit measures on the records carries no noise."""
    from dptaft.auditing import repeat

    with monkeypatch.context() as patch:
        patch.setattr(repeat.Repeater, "observe", None)  # nothing is trained before the refusal
        result = audit(run, "--attach", "--canaries", 300, "--repetitions", 2)
    assert result.exit_code == 2
    assert "--data synthetic" in result.output
    assert len(result.output.splitlines()) == 1
    assert not (run.path / "audit.json").exists()
    result = audit(run, "--attach", "--data", "synthetic", "--canaries", 300, "--repetitions", 2)
    assert result.exit_code == 0, result.output
    assert "read no private record" in result.output
    attached = json.loads((run.path / "audit.json").read_text())
    assert attached["statement_id"] == dptaft.load_run(run.path).id
    (run.path / "audit.json").unlink()


def test_a_violation_is_exit_status_one(run, monkeypatch):
    honest = optimizers.gaussian_mechanism
    monkeypatch.setattr(
        optimizers,
        "gaussian_mechanism",
        lambda values, *, noise_multiplier, **given: honest(
            values, noise_multiplier=noise_multiplier / 8, **given
        ),
    )
    result = audit(run, "--canaries", 300, "--repetitions", 2)
    assert result.exit_code == 1
    assert "violation" in result.output.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "x.png"), "add --membership"),
        (("--membership", "4", "--plot", "x.pdf"), ".png or .svg"),
        (("--significance", "0"), "significance"),
        (("--observer", "black-box", "--kind", "tangent"), "cannot see tangent"),
        (("--data", "/no/such/data"), "--data synthetic"),
    ],
)
def test_wrong_options_are_one_line(run, options, message):
    result = audit(run, *options)
    assert result.exit_code == 2
    assert message in result.output


def test_no_run_at_all(tmp_path):
    result = CliRunner().invoke(main, ["audit", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert "no run at" in result.output


def test_the_module_is_loaded_on_use_only():
    code = (
        "import sys, dptaft; print(any(name in sys.modules for name in ('torch', 'dptaft.auditing.report')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rank_tasks
import torch
from builders import small_images, write_folder
from click.testing import CliRunner
from ranks import free_port, succeeded, together, variables
from safetensors.torch import load_file

from dptaft.cli import main
from dptaft.distributed.launch import Launch, LaunchError, launched
from dptaft.training.trainer import partial_folder

TRAIN = ["train", "--scope", "head", "--device", "cpu", "--no-ledger"]


def environment(extra=None):
    kept = {name: value for name, value in os.environ.items() if name not in variables(0, 1, 0)}
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(extra or {})}


def launch(size, *words):
    """torchrun, as a user calls it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--master-port", str(free_port()), "-m", "dptaft", *words]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def archive(tmp_path):
    images, labels = small_images(300)
    np.savez(tmp_path / "small.npz", images=images, labels=labels)
    return str(tmp_path / "small.npz")


def test_the_same_command_line_works_with_one_process_and_with_two(tmp_path, archive):
    words = [*TRAIN, "--data", archive, "--epsilon", "inf", "--steps", "4", "--json"]
    alone = CliRunner().invoke(main, [*words, "--output", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    process = launch(2, *words, "--output", str(tmp_path / "two"))
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    said = json.loads(out)  # once, by the first process
    assert said["evaluation_accuracy"] == json.loads(alone.stdout)["evaluation_accuracy"]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "small.npz", "two"]


@pytest.mark.slow
def test_a_request_to_stop_reaches_the_launcher_and_leaves_a_checkpoint(tmp_path, archive):
    output = tmp_path / "run"
    process = launch(
        2, *TRAIN, "--data", archive, "--epsilon", "3", "--steps", "100000", "--output", str(output)
    )
    progress = partial_folder(output) / "progress.json"
    while not (partial_folder(output) / "checkpoint.safetensors").exists():  # all processes have taken steps
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=1200)
    (stopped,) = [line for line in err.splitlines() if line.startswith("stopped after")]
    done = int(stopped.split()[2])
    assert out == ""
    assert done > 0
    assert json.loads(progress.read_text())["authorised"][-1][1] == done  # the rest was given back
    assert (partial_folder(output) / "checkpoint.safetensors").exists()


def test_an_unreadable_image_of_one_process_is_one_line_and_exit_code_2(tmp_path):
    write_folder(tmp_path / "images", 400)
    Path(tmp_path / "images" / "dog" / "399.png").write_bytes(b"damaged")
    words = [*TRAIN, "--data", str(tmp_path / "images"), "--epsilon", "inf", "--steps", "2"]
    first, other = succeeded(together(2, rank_tasks.command, [*words, "--output", str(tmp_path / "run")]))
    (code, out, err), (others_code, others_out, others_err) = first, other
    assert (code, others_code) == (2, 0)
    assert len(err.splitlines()) == 1
    assert "399.png" in err
    assert out + others_out + others_err == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["sweep", "digits"],
        ["audit", "runs/x"],
        ["compose", "runs/x"],
        ["train", "--epsilon", "3", "--shards", "4"],
        ["train", "--epsilon", "3", "--method", "objective-perturbation"],
        ["train", "--epsilon", "3", "--method", "output-perturbation"],
    ],
)
def test_what_is_not_divided_is_refused_in_one_line(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for rank, code in ((0, 2), (1, 0)):
        for name, value in variables(rank, 2, free_port()).items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        if rank == 0:
            assert "one process, not in 2" in result.output
            assert len(result.output.splitlines()) == 1
        else:
            assert result.output == ""
    assert not list(tmp_path.iterdir())


def test_a_process_started_alone_needs_no_group(monkeypatch):
    for name, value in variables(0, 1, 1).items():
        monkeypatch.setenv(name, value)
    assert launched() is None
    assert CliRunner().invoke(main, ["predict", "--help"]).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"RANK": "two"}, "'two'"),
        ({"RANK": "5"}, "process 5 of 4"),
        ({"LOCAL_RANK": "9"}, "on this machine 9 of 4"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(changes, message):
    values = {**variables(1, 4, 1), **changes}
    with pytest.raises(LaunchError, match=message):
        launched({name: value for name, value in values.items() if value is not None})
    assert launched(variables(1, 4, 1)) == Launch(1, 4, 1, 4)


def test_importing_the_command_does_not_import_torch():
    code = "import sys, dptaft.distributed, dptaft.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0

"""However a command ends, it is one line and an exit code; nothing private reaches the terminal."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import small_data, write_folder
from click.testing import CliRunner

import dptaft
from dptaft.cli import main

QUICK = ("train", "--epsilon", "3", "--steps", "2", "--scope", "head")


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def one_line(result, code):
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    (line,) = [line for line in result.output.splitlines() if line]
    return line


@pytest.fixture
def archive(tmp_path):
    import numpy as np

    data = small_data()
    np.savez(
        tmp_path / "bands.npz",
        images=torch.stack([data.train.pixels[i] for i in range(len(data.train))])[:, 0].numpy(),
        labels=data.train.labels.numpy(),
    )
    return tmp_path / "bands.npz"


@pytest.mark.parametrize(
    "error", [RuntimeError, TypeError, KeyError, IndexError, RecursionError, AssertionError]
)
def test_an_error_that_nobody_foresaw_is_one_line_and_a_private_file(tmp_path, monkeypatch, error):
    def broken(*_, **__):
        raise error("patient 4711")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dptaft, "train", broken, raising=False)
    line = one_line(run(*QUICK), 70)
    assert error.__name__ in line
    assert "4711" not in line
    assert "please report it" in line
    (file,) = (tmp_path / "cache" / "dptaft").iterdir()
    assert str(file) in line
    assert "patient 4711" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_folder_that_takes_no_traceback_is_no_second_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(dptaft, "train", lambda **_: [][0], raising=False)
    assert "could not be written" in one_line(run(*QUICK), 70) or (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")]
)
def test_running_out_of_memory_names_the_remedies(monkeypatch, error):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr(dptaft, "train", broken, raising=False)
    assert "--physical-batch-size" in one_line(run(*QUICK), 2)


def test_a_run_that_is_trained_and_not_written_has_a_code_of_its_own(archive, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    words = (*QUICK, "--data", archive, "--output", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("dptaft.training.result.new_run", full)
        line = one_line(run(*words), 3)
    assert "No space left on device" in line
    assert "--resume), which writes it at no cost" in line
    assert run(*words, "--resume").exit_code == 0
    assert "3 trained and charged but not written" in run("--help").output


def test_an_interrupt_says_what_is_kept(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dptaft, "train", interrupted, raising=False)
    line = one_line(run(*QUICK), 130)
    assert "stays charged" in line
    assert "--resume" in line


def test_an_empty_or_foreign_checkpoint_is_named(archive, tmp_path):
    for name, content in (("empty.pth", b""), ("text.pth", b"hello"), ("empty.safetensors", b"")):
        (tmp_path / name).write_bytes(content)
        words = ("--model", "vit_tiny_patch16_224", "--weights", tmp_path / name)
        assert name in one_line(run(*QUICK, "--data", archive, *words), 2)
    torch.save([1, 2], tmp_path / "list.pth")
    words = ("--model", "vit_tiny_patch16_224", "--weights", tmp_path / "list.pth")
    assert "holds no named tensors" in one_line(run(*QUICK, "--data", archive, *words), 2)


def test_a_model_with_two_heads_is_refused_and_does_not_end_a_list(archive):
    model = ("--model", "crossvit_tiny_240", "--scope", "head")
    assert "crossvit_tiny_240" in one_line(
        run("train", "--epsilon", "3", "--data", archive, *model, "--weights", "random"), 2
    )
    assert "crossvit_tiny_240" in one_line(run("plan", "--records", "10", *model), 2)
    assert "crossvit_tiny_240" in one_line(run("models", "crossvit_tiny_240"), 2)
    listed = run("models", "*_tiny_2[24][04]", "--scope", "head")
    assert listed.exit_code == 0
    assert "skipped crossvit_tiny_240: CrossVit has no single linear classification head" in listed.output
    assert "pit_ti" in listed.output or "xcit_tiny" in listed.output or "hiera_tiny_224" in listed.output


def test_no_model_hub_is_one_line(archive, monkeypatch, tmp_path):
    import socket

    from huggingface_hub import constants

    def unreachable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dptaft.backbones.getproxies", dict)
    line = one_line(run(*QUICK, "--data", archive, "--model", "vit_tiny_patch16_224"), 2)
    for words in ("vit_tiny_patch16_224", "out of reach", "starter-scattering", "--weights FILE"):
        assert words in line
    assert constants.HF_HUB_OFFLINE is False


def shell(line, folder):
    here = os.pathsep.join([str(Path(dptaft.__file__).parents[1]), *sys.path])
    environment = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    line = line.replace("dptaft", f"{sys.executable} -m dptaft", 1)
    return subprocess.run(["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True)


TRAIN = "dptaft train --epsilon 3 --steps 2 --scope head --data pets --delta 0.2 --output run"


def streams(tmp_path, redirection):
    """A training whose streams are closed, broken or full; the run must be there whatever it prints."""
    write_folder(tmp_path / "pets", count=20)
    done = shell(f"{TRAIN} {redirection}", tmp_path)
    assert dptaft.load_run(tmp_path / "run").statement is not None
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    "redirection",
    [
        "<&- >&- 2>&-",
        pytest.param("2>&-", marks=pytest.mark.slow),
        pytest.param(">&-", marks=pytest.mark.slow),
        pytest.param("2> >(exec true)", marks=pytest.mark.slow),
    ],
)
def test_closed_streams_stop_no_training(tmp_path, redirection):
    done = streams(tmp_path, redirection)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_goes_stops_no_training(tmp_path):
    gone = streams(tmp_path, "| true; exit ${PIPESTATUS[0]}")
    assert gone.returncode in (0, 141)  # it is a matter of who is quicker
    assert "Error" not in gone.stderr


def test_a_full_output_stops_no_training(tmp_path):
    full = streams(tmp_path, "> /dev/full")
    assert full.returncode == 2
    assert "the run is complete in run" in full.stderr


def test_a_terminal_without_the_characters_of_a_name_stops_no_training(tmp_path):
    write_folder(tmp_path / "pets", count=20)
    words = "train --epsilon 3 --steps 2 --scope head --data pets --delta 0.2 --output café"
    done = shell(f"export PYTHONIOENCODING=ascii:strict; dptaft {words}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "caf" in done.stdout

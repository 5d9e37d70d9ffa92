"""Checkpoint and resume: same result, every repeated step charged, changed runs refused."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from dptaft.training import checkpoint
from dptaft.training.checkpoint import (
    Checkpointer,
    GracefulStop,
    ResumeError,
    check_resumable,
    data_fingerprint,
)
from dptaft.training.clipping import ClippedSum
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.optimizers import IterateAverage, OptimizerConfig, build_optimizer
from dptaft.training.sampling import CyclicPartition, FullBatch, Poisson

CONFIG = {"learning_rate": 0.1, "data": "abc"}


def make(kind="momentum", averaging="tail"):
    config = OptimizerConfig(kind, 0.1, averaging=averaging)
    theta = {"a/b": nn.Parameter(torch.ones(3)), "c": nn.Parameter(torch.zeros(2, 2))}
    optimizer = build_optimizer(
        theta, config, noise_multiplier=0.0, l2_clip_norm=1.0, expected_batch_size=2.0, source=NoiseSource()
    )
    return theta, optimizer, IterateAverage(config, steps=10)


def advance(state, start, stop):
    theta, optimizer, average = state
    for step in range(start, stop):
        value = {name: torch.sin(p.detach() * (step + 1)) for name, p in theta.items()}
        optimizer.private_step(ClippedSum(value, 1.0))
        average.update(theta, step)


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("averaging", ["tail", "ema"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, kind, averaging):
    whole = make(kind, averaging)
    advance(whole, 0, 10)
    first = make(kind, averaging)
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 7)
    advance(first, 0, 7)
    one.save(7, *first)
    advance(first, 7, 9)  # lost in the crash
    one.close()
    second = make(kind, averaging)
    two = Checkpointer(tmp_path, CONFIG)
    assert two.restore(*second) == 7
    advance(second, 7, 10)
    for name in whole[0]:
        torch.testing.assert_close(second[0][name], whole[0][name], rtol=0, atol=0)
        torch.testing.assert_close(second[2].value(second[0])[name], whole[2].value(whole[0])[name])
    two.close()


def test_steps_lost_in_a_crash_are_charged(tmp_path):
    state = make()
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 5)
    advance(state, 0, 5)
    one.save(5, *state)
    one.authorise(5, 9)
    advance(state, 5, 7)
    one.close()  # killed here
    two = Checkpointer(tmp_path, CONFIG)
    assert two.started
    assert two.restore(*make()) == 5
    assert two.progress.charged_steps == 9
    two.authorise(5, 10)
    assert two.progress.authorised == ((0, 5), (5, 9), (5, 10))
    assert two.progress.charged_steps == 14
    two.close()


def test_steps_that_did_not_run_before_a_clean_stop_are_not_charged(tmp_path):
    state = make()
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 10)
    advance(state, 0, 4)
    one.save(4, *state)
    one.close()
    two = Checkpointer(tmp_path, CONFIG)
    assert two.progress.charged_steps == 4
    two.close()


def test_a_crash_while_saving_leaves_the_old_checkpoint_and_the_higher_charge(tmp_path, monkeypatch):
    state = make()
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 3)
    advance(state, 0, 3)
    one.save(3, *state)
    one.authorise(3, 9)

    def fail(*given):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        one.save(6, *state)
    monkeypatch.undo()
    one.close()
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    two = Checkpointer(tmp_path, CONFIG)
    assert two.restore(*make()) == 3
    assert two.progress.charged_steps == 9
    two.close()


@pytest.mark.parametrize("key", ["learning_rate", "data"])
def test_changed_configuration_or_data_is_refused_by_name(tmp_path, key):
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 1)
    one.close()
    with pytest.raises(ResumeError, match=f"{key} was .* when the run started"):
        Checkpointer(tmp_path, {**CONFIG, key: "other"})
    with pytest.raises(ResumeError, match="new was null"):
        Checkpointer(tmp_path, {**CONFIG, "new": 1})


@pytest.mark.parametrize("name", ["progress.json", "checkpoint.safetensors"])
@pytest.mark.parametrize("damage", ["truncate", "delete"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    state = make()
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 1)
    advance(state, 0, 1)
    one.save(1, *state)
    one.close()
    path = tmp_path / name
    if damage == "delete" and name == "checkpoint.safetensors":
        path.unlink()
        assert Checkpointer(tmp_path, CONFIG).progress.charged_steps == 1  # starts again, still charged
        return
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        path.unlink()
    with pytest.raises(ResumeError, match=r"damaged|missing"):
        Checkpointer(tmp_path, CONFIG)


def lose_a_step(folder):
    """Ten steps, of which the last three are lost in a crash and run again by another process."""
    state = make()
    one = Checkpointer(folder, CONFIG)
    one.authorise(0, 7)
    advance(state, 0, 7)
    one.save(7, *state)
    one.authorise(7, 10)
    one.close()
    two = Checkpointer(folder, CONFIG)
    two.authorise(7, 10)
    two.close()
    assert two.progress.charged_steps == 13


@pytest.mark.parametrize("listed", [[[0, 7], [7, 10]], [[0, 7]], [[0, 1]], []])
def test_a_lost_step_cannot_be_hidden_by_editing_the_progress_alone(tmp_path, listed):
    lose_a_step(tmp_path)
    path = tmp_path / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"authorised": listed}))
    three = Checkpointer(tmp_path, CONFIG)
    assert three.progress.charged_steps == 13
    three.close()


def test_a_run_killed_between_its_first_two_lists_can_be_continued(tmp_path, monkeypatch):
    """No step has run before both are written; whatever one of them lists is charged."""
    write, done = checkpoint.write_atomically, []

    def killed_after_one(path, content):
        if done:
            raise KeyboardInterrupt
        done.append(path)
        write(path, content)

    first = Checkpointer(tmp_path, CONFIG)
    monkeypatch.setattr(checkpoint, "write_atomically", killed_after_one)
    with pytest.raises(KeyboardInterrupt):
        first.authorise(0, 4)
    monkeypatch.undo()
    first.close()
    again = Checkpointer(tmp_path, CONFIG)
    assert again.progress.charged_steps == 4
    again.close()


def test_neither_file_alone_can_be_taken_away_and_older_runs_have_one(tmp_path):
    lose_a_step(tmp_path)
    progress, copy = tmp_path / "progress.json", tmp_path / "authorised.json"
    kept = progress.read_text()
    progress.unlink()
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(ResumeError, match="missing"):
        Checkpointer(tmp_path, CONFIG)
    progress.write_text(kept)
    copy.write_text("[[0, 7]]")
    for _ in range(2):
        again = Checkpointer(tmp_path, CONFIG)
        assert again.progress.charged_steps == 13
        again.close()
        copy.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "listed",
    [
        [[0, 7], [9, 10]],
        [[5, 7]],
        [[-1, 7]],
        [[7, 0]],
        [[0, 0]],
        [[0, 1.5]],
        [[0, True]],
        [[0]],
        [0],
        {"0": 1},
        None,
        "x",
    ],
)
@pytest.mark.parametrize("name", ["progress.json", "authorised.json"])
def test_ranges_that_cannot_be_are_damage(tmp_path, listed, name):
    lose_a_step(tmp_path)
    path = tmp_path / name
    content = json.loads(path.read_text()) | {"authorised": listed} if name == "progress.json" else listed
    path.write_text(json.dumps(content))
    with pytest.raises(ResumeError, match="damaged") as error:
        Checkpointer(tmp_path, CONFIG)
    assert "\n" not in str(error.value)


def test_only_one_process_at_a_time(tmp_path):
    one = Checkpointer(tmp_path, CONFIG)
    with pytest.raises(ResumeError, match="another process"):
        Checkpointer(tmp_path, CONFIG)
    one.close()
    Checkpointer(tmp_path, CONFIG).close()


def test_files_are_private_and_hold_no_random_state(tmp_path):
    state = make()
    folder = tmp_path / "run" / "checkpoint"
    one = Checkpointer(folder, CONFIG)
    one.authorise(0, 1)
    advance(state, 0, 1)
    one.save(1, *state)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"pickle" not in path.read_bytes()
        assert b"seed" not in path.read_bytes()
    assert set(json.loads((folder / "progress.json").read_text())) == {
        "format",
        "fingerprint",
        "authorised",
        "processes",
    }
    one.remove()
    assert not folder.exists()


def test_unauthorised_steps_cannot_be_saved(tmp_path):
    one = Checkpointer(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="never authorised"):
        one.save(1, *make())
    one.authorise(0, 2)
    with pytest.raises(ValueError, match="never authorised"):
        one.save(3, *make())
    with pytest.raises(ValueError, match="do not follow"):
        one.authorise(-1, 2)
    one.close()


def test_other_parameters_are_refused(tmp_path):
    state = make()
    one = Checkpointer(tmp_path, CONFIG)
    one.authorise(0, 1)
    advance(state, 0, 1)
    one.save(1, *state)
    theta, optimizer, average = make()
    with pytest.raises(ResumeError, match="other parameters"):
        one.restore({"c": theta["c"]}, optimizer, average)
    with pytest.raises(ResumeError, match="another shape"):
        one.restore({"a/b": torch.zeros(4), "c": theta["c"]}, optimizer, average)
    one.close()


def test_what_cannot_be_resumed():
    check_resumable(FullBatch(3), NoiseSource())
    check_resumable(Poisson(3, 0.5, NoiseSource()), NoiseSource())
    with pytest.raises(ResumeError, match="secret partition"):
        check_resumable(CyclicPartition(3, 2, NoiseSource()), NoiseSource())
    with pytest.raises(ResumeError, match="seeded noise"):
        check_resumable(FullBatch(3), InsecureSeededNoise(1))


def test_data_fingerprint_sees_values_order_and_types():
    a, b = torch.arange(4.0), torch.arange(4)
    seen = {data_fingerprint(x) for x in ([a], [b], [a, b], [b, a], [a.flip(0)], [a.double()])}
    assert len(seen) == 6
    assert data_fingerprint([a]) == data_fingerprint([a.clone()])


def test_termination_asks_for_a_stop_and_the_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_handler_that_is_set_meanwhile_stays():
    """A process that lost another one ignores the launcher until the account is closed."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with GracefulStop():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_most_processes_of_all_attempts_are_remembered(tmp_path):
    for processes, known in ((3, 3), (2, 3), (4, 4), (1, 4)):
        checkpointer = Checkpointer(tmp_path, CONFIG, processes)
        assert checkpointer.processes == known
        checkpointer.authorise(0, 8)
        checkpointer.close()


def test_a_killed_process_leaves_its_steps_charged(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, signal
        from dptaft.training.checkpoint import Checkpointer
        checkpointer = Checkpointer({str(tmp_path)!r}, {CONFIG!r})
        checkpointer.authorise(0, 8)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -signal.SIGKILL
    one = Checkpointer(tmp_path, CONFIG)
    assert one.progress == type(one.progress)(0, ((0, 8),))
    one.close()

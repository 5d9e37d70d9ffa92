"""Executions that are lost, doubled, late or still alive: one of them counts, and nothing is forgotten."""

import contextlib
import json
import os

import pytest
from backending import make

from dptaft.backends import BackendConfig, BackendError, holding
from dptaft.backends.attempts import DONE, TWICE, Attempts, WithdrawnError, execute
from dptaft.backends.base import Report
from dptaft.backends.driver import Work, run_work
from dptaft.prepaid import PaymentError, PrepaidAccount
from dptaft.training.account import Spending
from dptaft_accounting import FullBatchGaussian

ELSEWHERE = {"host": "node7", "boot": "another", "namespace": "x", "pid": "12", "started": "3"}
PAID = Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "home").mkdir()
    return Attempts(tmp_path / "attempts", tmp_path / "home")


def leave_state(folder, name, steps):
    partial = folder / f"{name}.partial"
    partial.mkdir(exist_ok=True)
    (partial / "progress.json").write_text(str(steps))
    (partial / "checkpoint.safetensors").write_text(f"weights {steps}")
    (partial / "lock").touch()


def begin_elsewhere(attempt):
    """As an execution on another machine."""
    attempt.begin()
    (attempt.folder / "owner.json").write_text(json.dumps(ELSEWHERE))


def test_a_permission_is_used_once(place, tmp_path):
    attempt = place.grant(["a"])
    assert execute(attempt, make, ()) == (DONE, {})
    assert execute(attempt, make, ("a second time",)) == (TWICE, {})
    assert (attempt.work / "a" / "text").read_text() == "made"
    pending = place.grant(["b"])
    assert place.settle(pending, certain=False) == set()
    assert execute(pending, make, ()) == (TWICE, {})
    assert not (tmp_path / "home" / "b").exists()


def test_an_execution_that_may_still_run_is_neither_released_nor_followed_by_another(place, tmp_path):
    attempt = place.grant(["a"])
    begin_elsewhere(attempt)
    make(attempt)
    assert place.settle(attempt, certain=False) is None
    (text,) = place.recover(lambda job: False).values()
    assert "process 12 on node7" in text
    assert str(attempt.folder / "ended") in text
    assert not (tmp_path / "home" / "a").exists()
    (attempt.folder / "ended").touch()  # the remedy of the message
    assert place.recover(lambda job: False) == {}
    assert (tmp_path / "home" / "a" / "text").read_text() == "made"
    assert not attempt.folder.exists()


def test_a_backend_that_lost_sight_of_a_job_does_not_lead_to_a_second_one(place, tmp_path):
    class Blind:
        """Loses every job at once; the job goes on."""

        submitted = 0

        def submit(self, function, attempt, *arguments):
            begin_elsewhere(attempt)
            Blind.submitted += 1
            return "7"

        def finished(self, timeout):
            return [Report("7", error="node failure", ended=False)]

        def has_ended(self, job):
            return job == "7"

        def close(self):
            pass

    ((outcome),) = list(run_work([Work(("a",), make, ())], Blind(), place, BackendConfig("submitit")))
    assert "may still run" in outcome["a"]
    assert Blind.submitted == 1
    assert place.recover(Blind().has_ended) == {}  # later, the cluster knows


def test_a_second_start_of_a_job_says_nothing_about_the_first(place):
    class Requeued:
        """Starts a job twice and reports the second."""

        def submit(self, function, attempt, *arguments):
            begin_elsewhere(attempt)
            self.value = function(attempt, *arguments)
            return "1"

        def finished(self, timeout):
            return [Report("1", self.value, ended=True)]

        def close(self):
            pass

    ((outcome),) = list(run_work([Work(("a",), make, ())], Requeued(), place, BackendConfig("submitit")))
    assert "may still run" in outcome["a"]


def test_the_next_execution_has_a_copy_of_the_state_that_the_last_one_cannot_reach(place, tmp_path):
    leave_state(tmp_path / "home", "a", 10)
    first = place.grant(["a"])
    begin_elsewhere(first)
    leave_state(first.work, "a", 20)
    late = (first.work / "a.partial" / "progress.json").open("a")  # a file that it holds open
    assert place.settle(first, certain=True) == set()
    second = place.grant(["a"])
    late.write("and more")
    late.close()
    assert (second.work / "a.partial" / "progress.json").read_text() == "20"
    assert (second.work / "a.partial" / "checkpoint.safetensors").read_text() == "weights 20"
    assert not (second.work / "a.partial" / "lock").exists()
    with pytest.raises(FileNotFoundError):
        leave_state(first.work, "a", 30)
    account = PrepaidAccount({}, PAID, None, None, first.lease)
    for action in (account.authorise, account.commit, account.reserve):
        with pytest.raises(WithdrawnError, match="was withdrawn"):
            action(PAID)
    second.begin()
    PrepaidAccount({}, PAID, None, None, second.lease).authorise(PAID)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("moment", range(6))
def test_a_parent_that_dies_while_it_settles_forgets_nothing(place, tmp_path, monkeypatch, moment, finished):
    leave_state(tmp_path / "home", "a", 10)
    attempt = place.grant(["a"])
    attempt.begin()
    leave_state(attempt.work, "a", 20)
    if finished:
        make(attempt)
    original, calls = os.rename, []

    def dying(*paths):
        calls.append(paths)
        if len(calls) > moment:
            raise KeyboardInterrupt
        original(*paths)

    monkeypatch.setattr(os, "rename", dying)
    with contextlib.suppress(KeyboardInterrupt):
        place.settle(attempt, certain=True)
    monkeypatch.undo()
    if attempt.folder.exists():
        attempt.end()
    assert place.recover(lambda job: False) == {}
    home = tmp_path / "home"
    assert [path.name for path in home.iterdir()] == (["a"] if finished else ["a.partial"])
    if not finished:
        assert (home / "a.partial" / "progress.json").read_text() == "20"
    assert not list((tmp_path / "attempts").iterdir())


def test_records_that_were_touched_are_not_touched_again_on_the_same_payment(tmp_path):
    trace, partial = tmp_path / "finished" / "a", tmp_path / "a.partial"
    account = PrepaidAccount({}, PAID, trace, partial)
    account.reserve(PAID)
    account.authorise(PAID)
    with pytest.raises(PaymentError, match="was begun, and its state is lost"):
        account.reserve(PAID)
    partial.mkdir()
    with pytest.raises(PaymentError, match="was begun, and its state is lost"):
        account.reserve(PAID)
    (partial / "lock").touch()  # killed right after the trace, before a step was listed
    account.reserve(PAID)
    account.commit(PAID)
    with pytest.raises(PaymentError, match="was trained, and its run folder is gone"):
        account.reserve(PAID)
    (partial / "progress.json").touch()
    account.reserve(PAID)


def test_one_parent_at_a_time_whatever_locks_do(tmp_path, monkeypatch):
    with (
        holding.hold(tmp_path),
        pytest.raises(holding.HeldError, match="wait for it"),
        holding.hold(tmp_path),
    ):
        pass
    monkeypatch.setattr(holding, "on_local_disk", lambda path: False)
    monkeypatch.setattr(holding, "_try_lock", lambda descriptor: True)  # a disk whose locks mean nothing
    with (
        holding.hold(tmp_path),
        pytest.raises(holding.HeldError, match="wait for it"),
        holding.hold(tmp_path),
    ):
        pass
    (tmp_path / "owner.json").write_text(json.dumps(ELSEWHERE))
    with (
        pytest.raises(holding.HeldError, match=r"process 12 on node7 works on .*owner.json once"),
        holding.hold(tmp_path),
    ):
        pass
    gone = holding.identity() | {"pid": "1", "started": "never"}
    (tmp_path / "owner.json").write_text(json.dumps(gone))
    with holding.hold(tmp_path):
        assert json.loads((tmp_path / "owner.json").read_text())["pid"] == str(os.getpid())
    assert not (tmp_path / "owner.json").exists()


def test_a_killed_parent_on_a_local_disk_is_replaced_after_a_restart(tmp_path, monkeypatch):
    (tmp_path / "owner.json").write_text(json.dumps(ELSEWHERE))
    monkeypatch.setattr(holding, "on_local_disk", lambda path: True)
    with holding.hold(tmp_path):
        pass


def test_disks_are_local_only_where_that_is_certain(tmp_path):
    device = tmp_path.stat().st_dev
    line = f"36 35 {os.major(device)}:{os.minor(device)} / /mnt rw - {{}} /dev/x rw\n"
    assert holding.on_local_disk(tmp_path, line.format("ext4"))
    for other in ("nfs4", "lustre", "fuse.unheard-of"):
        assert not holding.on_local_disk(tmp_path, line.format(other))
    assert not holding.on_local_disk(tmp_path, "")
    assert not holding.on_local_disk(tmp_path / "missing")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("cloud", {}, "there is no backend 'cloud'; choose one of local, submitit, ray"),
        ("local", {"partition": "gpu"}, "the backend local knows no option 'partition'; it has retries"),
        ("submitit", {"cpus": "four"}, "cpus is 'four'; it must be a whole number"),
        ("submitit", {"timeout_min": 0}, "timeout_min is 0; it must be positive"),
        ("submitit", {"mem_gb": True}, "mem_gb is True; it must be a number"),
        ("submitit", {"cluster": "mine"}, "must be slurm or local"),
        ("ray", {"resources": {"tpu": "one"}}, "must map names to numbers"),
        ("ray", {"retries": -1}, "retries is -1; it must be positive"),
    ],
)
def test_options_are_checked_before_anything_starts(kind, options, words):
    with pytest.raises(BackendError, match=words):
        BackendConfig(kind, options=options)


def test_options_of_the_command_line_win_over_the_recipe():
    table = {"kind": "submitit", "jobs": 8, "partition": "cpu", "cpus": 2}
    assert BackendConfig.parse(None, None, (), table) == BackendConfig(
        "submitit", 8, {"partition": "cpu", "cpus": 2}
    )
    assert BackendConfig.parse("ray", None, (), table) == BackendConfig("ray")
    mine = BackendConfig.parse(None, 3, ("partition=gpu", "gpus=1"), table)
    assert mine == BackendConfig("submitit", 3, {"partition": "gpu", "cpus": 2, "gpus": 1})
    assert BackendConfig.parse("ray", None, ("resources={tpu = 1}",), table).options == {
        "resources": {"tpu": 1}
    }
    with pytest.raises(BackendError, match="write key=value"):
        BackendConfig.parse("ray", None, ("gpus",))
    with pytest.raises(BackendError, match="jobs must be at least 1, got 0"):
        BackendConfig.parse(None, 0)


def test_a_missing_package_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    import sys

    for kind, extra in (("submitit", "slurm"), ("ray", "ray")):
        monkeypatch.setitem(sys.modules, kind, None)
        with pytest.raises(BackendError, match=rf"pip install 'dptaft\[{extra}\]'"):
            BackendConfig(kind).open(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match="no Slurm on this machine"):
        BackendConfig("submitit").open(tmp_path)

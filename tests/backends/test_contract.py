"""What every backend promises, and what the parent makes of it: one result per name, whoever dies."""

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import backending
import pytest

from dptaft.backends import BackendConfig
from dptaft.backends.attempts import Attempts
from dptaft.backends.driver import Work, run_work
from dptaft.training.steps import TrainingInterruptedError

HELPERS = str(Path(backending.__file__).parent)


@pytest.fixture(scope="module", params=["local", "submitit", "ray"])
def config(request):
    """Two jobs at once; Ray is started once, and what it warns of about itself is left aside."""
    kind = request.param
    package = {"local": "sys"}.get(kind, kind)
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, before]))
    options = {"submitit": {"cluster": "local", "timeout_min": 60}}.get(kind, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "ray":
            import ray

            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        yield BackendConfig(kind, 2, options)
        if kind == "ray":
            ray.shutdown()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


@pytest.fixture
def place(tmp_path):
    (tmp_path / "home").mkdir()
    return Attempts(tmp_path / "attempts", tmp_path / "home")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_killed_jobs_are_continued_and_others_do_not_notice(config, place, tmp_path):
    """One dies once, one always, one fails, one raises, one is well: each has its own fate."""
    for name in ("once", "always"):
        (tmp_path / name).mkdir()
    work = [
        Work(("well", "broken"), backending.make, ("fine", ("broken",))),
        Work(("once",), backending.die_then_make, (str(tmp_path / "once"), 1)),
        Work(("always",), backending.die_then_make, (str(tmp_path / "always"), 99)),
        Work(("bang",), backending.explode, ()),
    ]
    settings = BackendConfig(config.kind, config.jobs, {**config.options, "retries": 1})
    found, seen = {}, []
    with contextlib.closing(settings.open(tmp_path / "jobs")) as backend:
        for outcomes in run_work(work, backend, place, settings):
            found |= outcomes
            seen.append(outcomes)
    assert len(seen) == 4  # as they end, not all at the end
    assert found.pop("always").startswith("lost 2 times, at last: its ")
    assert found == {"well": None, "broken": "cannot be made", "once": None, "bang": "no such luck"}
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["always.partial", "once", "well"]
    assert (tmp_path / "home" / "well" / "text").read_text() == "fine"
    # the second execution began with the state of the first, and what both did is kept for the next command
    assert sorted(path.read_text() for path in (tmp_path / "once").iterdir()) == ["", "+"]
    assert (tmp_path / "home" / "always.partial" / "progress.json").read_text() == "++"
    assert not any((tmp_path / "attempts").iterdir())


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_signal_stops_running_jobs_and_withdraws_the_others(config, place, tmp_path):
    work = [Work((name,), backending.wait_long, (str(tmp_path / f"mark-{name}"),)) for name in "abcd"]

    def interrupt():
        end = time.monotonic() + 1200
        while not list(tmp_path.glob("mark-*")) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(TrainingInterruptedError, match="the same command goes on"):
        list(run_work(work, config.open(tmp_path / "jobs"), place, config))
    assert not list(tmp_path.glob("mark-*.end"))  # nothing waited for its end
    assert len(list(tmp_path.glob("mark-*"))) <= 2
    assert place.recover(lambda job: False) == {}
    assert not any((tmp_path / "home").iterdir())


def test_logs_and_pickles_are_private_and_hold_paths_only(tmp_path, place):
    pytest.importorskip("submitit")
    config = BackendConfig("submitit", 1, {"cluster": "local"})
    with contextlib.closing(config.open(tmp_path / "jobs")) as backend:
        list(run_work([Work(("a",), backending.make, ())], backend, place, config))
    assert (tmp_path / "jobs").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "attempts").stat().st_mode & 0o777 == 0o700
    assert any((tmp_path / "jobs").rglob("*.pkl"))
    assert all(path.stat().st_size < 10_000 for path in (tmp_path / "jobs").rglob("*.pkl"))


def test_an_attempt_needs_no_torch():
    """Jobs that are withdrawn, or begin a second time, end at once."""
    code = "import sys, dptaft.backends.attempts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_a_job_of_slurm_ends_by_the_word_of_slurm():
    """Jobs of other backends may have the number of some job that Slurm completed long ago."""
    pytest.importorskip("submitit")
    from dptaft.backends.slurm import SubmititBackend

    backend, asked = SubmititBackend.__new__(SubmititBackend), []

    def slurm_job(folder, number):
        asked.append(number)
        return SimpleNamespace(state="COMPLETED")

    backend._cluster, backend._folder = "slurm", Path()
    backend._submitit = SimpleNamespace(SlurmJob=slurm_job)
    assert [backend.has_ended(job) for job in ("slurm:71", "local:71", "71")] == [True, False, False]
    assert asked == ["71"]


def test_jobs_are_not_queued_again_by_slurm(tmp_path):
    """The text that sbatch gets."""
    slurm = pytest.importorskip("submitit.slurm.slurm")
    from dptaft.backends.slurm import slurm_parameters

    options = {"partition": "p", "account": "us", "cpus": 4, "gpus": 1, "mem_gb": 8, "timeout_min": 30}
    given = slurm_parameters(options)
    import submitit

    executor = submitit.AutoExecutor(tmp_path, cluster="debug")
    executor.update_parameters(**given)  # knows all names
    text = slurm._make_sbatch_string(
        "run", tmp_path, additional_parameters=given["slurm_additional_parameters"]
    )
    assert "#SBATCH --no-requeue\n" in text
    assert all(value in given.values() for value in options.values())

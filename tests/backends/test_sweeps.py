"""Sweeps through every backend: the same points, one charge, nothing trained twice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import tomli_w
from backending import entries
from builders import small_images
from click.testing import CliRunner
from safetensors.numpy import load_file
from sweeping import recipe

from dptaft.backends import BackendConfig
from dptaft.cli import main
from dptaft.runs import load_run
from dptaft.sweep.points import expand
from dptaft.sweep.recipe import RecipeError
from dptaft.sweep.runner import RUNS, run_sweep
from dptaft.training.steps import TrainingInterruptedError
from dptaft.verification import verify

CONFIGS = {
    "local": BackendConfig(jobs=2),
    "submitit": BackendConfig("submitit", 2, {"cluster": "local"}),
    "ray": BackendConfig("ray", 2),
}


def few(folder, count=24):
    """A small data set that every process can read, declared in a recipe."""
    images, labels = small_images(count)
    np.savez(folder / "few.npz", images=images.clip(0, 1), labels=labels)
    return [{"name": "few", "source": str(folder / "few.npz"), "classes": ["a", "b", "c"]}]


def weights(folder, point):
    return load_file(folder / RUNS / point.id / "model.safetensors")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One recipe, with a run without noise, in this process."""
    root = tmp_path_factory.mktemp("backends")
    made = recipe(epsilons=[3.0], reference=True, data=few(root))
    run_sweep(made, root / "serial")
    return made, root


@pytest.mark.parametrize(
    "kind", ["local", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("submitit", "ray"))]
)
def test_all_backends_train_the_same_points(swept, kind):
    """Without noise to the last bit; with it, the same plans and claims."""
    made, root = swept
    if kind != "local":
        pytest.importorskip(kind)
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray, about itself
        result = run_sweep(
            made, root / kind, backend=CONFIGS[kind], report=lambda done, total, _: seen.append((done, total))
        )
    points = expand(made)
    assert [outcome.error for outcome in result.outcomes] == [None] * 2
    assert seen == [(2, 2)]
    assert {path.name for path in (root / kind / RUNS).iterdir()} == {point.id for point in points}
    assert {path.name for path in (root / kind).iterdir()} == {"lock", "recipe.toml", "runs"}
    for point in points:
        mine, first = (load_run(root / where / RUNS / point.id) for where in (kind, "serial"))
        if point.epsilon == float("inf"):
            one, two = weights(root / kind, point), weights(root / "serial", point)
            assert all(np.array_equal(one[name], two[name]) for name in two)
        else:
            assert mine.statement.mechanism["record"] == first.statement.mechanism["record"]
            assert mine.statement.claim["epsilon"] == first.statement.claim["epsilon"]
            assert verify(mine.path).passed


def kill_workers(folder, done):
    """SIGKILL the first execution that has begun."""
    while not done.is_set():
        for owner in folder.glob("attempts/*/owner.json"):
            if list(owner.parent.glob("work/*.partial/progress.json")):
                done.set()
                os.kill(int(json.loads(owner.read_text())["pid"]), signal.SIGKILL)
                return
        time.sleep(0.002)


def long_recipe(root, **options):
    return recipe("publish-all", epsilons=[1.0, 3.0], steps=600, data=few(root), **options)


def test_a_killed_worker_costs_nothing_more_and_stops_no_other(tmp_path):
    """The pool goes on, the point goes on, the ledger has one entry, and the claim counts the lost steps."""
    made, folder, done = long_recipe(tmp_path), tmp_path / "sweep", threading.Event()
    killer = threading.Thread(target=kill_workers, args=(folder, done), daemon=True)
    killer.start()
    result = run_sweep(made, folder, backend=BackendConfig(jobs=2))
    killed = done.is_set()
    done.set()
    killer.join()
    assert killed
    assert [outcome.error for outcome in result.outcomes] == [None, None]
    (entry,) = entries(tmp_path)
    whole = result.wholes["few"]
    assert float(entry.authorised.epsilon) == pytest.approx(whole.epsilon, rel=1e-6)
    for point in expand(made):
        statement = load_run(folder / RUNS / point.id).statement
        assert statement.mechanism["steps_executed"] <= 600  # repeated ones included
        assert statement.claim["epsilon"] <= 3.0
        assert statement.composition["sweep"]["ledger_entry"] == entry.id
        assert verify(folder / RUNS / point.id).passed
    before = {path: path.stat().st_mtime_ns for path in (folder / RUNS).glob("*/privacy.json")}
    again = run_sweep(made, folder, backend=BackendConfig(jobs=2))
    assert len(again.kept) == 2
    assert {path: path.stat().st_mtime_ns for path in (folder / RUNS).glob("*/privacy.json")} == before
    assert len(entries(tmp_path)) == 1


def test_ctrl_c_leaves_what_the_same_command_goes_on_with(tmp_path):
    """SIGINT to the parent: running points save their steps; in one process or several, they go on from there."""
    made, folder = long_recipe(tmp_path), tmp_path / "sweep"

    ended = threading.Event()

    def interrupt():
        while not ended.wait(0.002):
            if list(folder.glob("attempts/*/work/*.partial/checkpoint.safetensors")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(TrainingInterruptedError, match="the same command goes on"):
            run_sweep(made, folder, backend=BackendConfig(jobs=2))
    finally:
        ended.set()
        thread.join()
    assert not (folder / "attempts").exists()
    saved = [
        json.loads(path.read_text())["authorised"] for path in folder.glob("runs/*.partial/progress.json")
    ]
    assert saved
    assert all(0 < ranges[-1][1] < 600 for ranges in saved)
    result = run_sweep(made, folder)
    assert [outcome.error for outcome in result.outcomes] == [None, None]
    executed = [load_run(path).statement.mechanism["steps_executed"] for path in (folder / RUNS).iterdir()]
    assert executed == [600, 600]  # nothing repeated: the state was saved after its last step
    assert len(entries(tmp_path)) == 1


@pytest.mark.slow
def test_a_killed_parent_takes_its_workers_along_and_is_followed_by_the_same_command(tmp_path):
    made, folder, path = long_recipe(tmp_path), tmp_path / "sweep", tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(dict(made.content)))
    command = [sys.executable, "-m", "dptaft", "sweep", str(path), "--output", str(folder), "--jobs", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    while (
        not list(folder.glob("attempts/*/work/*.partial/checkpoint.safetensors")) and process.poll() is None
    ):
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert list(folder.glob("attempts/*/begun"))
    result = run_sweep(made, folder)
    assert [outcome.error for outcome in result.outcomes] == [None, None]
    assert not (folder / "attempts").exists()
    assert not list(folder.glob("runs/*.partial"))
    assert len(entries(tmp_path)) == 1
    for run in (folder / RUNS).iterdir():
        assert load_run(run).statement.mechanism["steps_executed"] <= 600


def test_points_that_may_still_be_trained_are_named_and_left_alone(swept, tmp_path):
    from dptaft.backends.attempts import Attempts

    made, _ = swept
    folder = tmp_path / "sweep"
    first = expand(made)[0]
    (folder / RUNS).mkdir(parents=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(dict(made.content)))
    attempt = Attempts(folder / "attempts", folder / RUNS).grant([first.id])
    attempt.begin()
    (attempt.folder / "owner.json").write_text(json.dumps({"host": "node7", "pid": "12", "boot": "another"}))
    result = run_sweep(made, folder)
    assert [outcome.point for outcome in result.failed] == [first.id]
    assert "process 12 on node7" in result.failed[0].error
    assert first.id in json.loads((folder / "failures.json").read_text())
    (attempt.folder / "ended").touch()
    assert run_sweep(made, folder).failed == ()


def test_other_machines_refuse_other_data_and_lost_one_shot_points(tmp_path):
    """The same path leads to other records; and what cannot go on is not begun again."""
    from dptaft.backends.attempts import Attempts
    from dptaft.identity import content_digest
    from dptaft.prepaid import Payment, PaymentError
    from dptaft.sweep.points import group, load_source
    from dptaft.sweep.work import Worker, run_task

    shot = {"name": "shot", "scope": "head", "method": "output-perturbation"}
    made = recipe(methods=(shot,), epsilons=[3.0], steps=None, data=few(tmp_path))
    (point,), (task,) = expand(made), group(expand(made))
    content = content_digest(load_source(point.data, True).train)
    attempt = Attempts(tmp_path / "attempts", tmp_path).grant([point.id])
    attempt.begin()
    with pytest.raises(PaymentError, match="holds other records than those that were charged"):
        run_task(attempt, task, Payment({}, {}, None, "0" * 64), True, 1, 1 << 28)
    plans = Worker(tmp_path, True).plans(task)
    paid = {point.id: plans[point.id].spending()}
    payment = Payment({}, paid, tmp_path / "finished", content)
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / point.id).write_bytes(b"begun")  # by an execution that was killed
    failed = run_task(attempt, task, payment, True, 1, 1 << 28)
    assert "was begun, and its state is lost: a second result costs again" in failed[point.id]
    (tmp_path / "finished" / point.id).unlink()
    assert run_task(attempt, task, payment, True, 1, 1 << 28) == {}
    assert (tmp_path / "finished" / point.id).read_bytes() == b"finished"


def test_a_process_that_served_another_sweep_forgets_its_images(tmp_path):
    """Processes of a Ray that the caller started outlive a sweep; names of data sets are those of one recipe."""
    from dptaft.backends.attempts import Attempts
    from dptaft.prepaid import Payment
    from dptaft.sweep.points import group
    from dptaft.sweep.work import run_task

    given = few(tmp_path)
    for number, (source, error) in enumerate(((given[0]["source"], None), ("nowhere.npz", "nowhere"))):
        made = recipe(epsilons=[3.0], data=[{**given[0], "source": source}])
        (point,), (task,) = expand(made), group(expand(made))
        attempt = Attempts(tmp_path / str(number) / "attempts", tmp_path).grant([point.id])
        attempt.begin()
        failed = run_task(attempt, task, Payment({}, {}), True, 1, 1 << 28)
        assert (error is None and failed == {}) or error in failed[point.id]


def test_command_line_chooses_the_backend(tmp_path):
    path = tmp_path / "mine.toml"
    content = dict(recipe(data=few(tmp_path)).content) | {"backend": {"kind": "submitit", "queue": "long"}}
    path.write_text(tomli_w.dumps(content))
    for extra, words in (
        ((), "the backend submitit knows no option 'queue'"),
        (("--backend", "local", "--backend-option", "cpus=1"), "the backend local knows no option 'cpus'"),
        (("--backend", "local", "--jobs", "0"), "jobs must be at least 1"),
    ):
        out = CliRunner().invoke(main, ["sweep", str(path), *extra, "--output", str(tmp_path / "out")])
        assert out.exit_code == 2, out.output
        assert words in " ".join(out.output.split())
    assert not (tmp_path / "out").exists()
    chosen = dict(recipe("select-best", epsilon=3.0, candidates={"mean": 3.0}, data=few(tmp_path)).content)
    path.write_text(tomli_w.dumps(chosen))
    out = CliRunner().invoke(main, ["sweep", str(path), "--jobs", "2", "--output", str(tmp_path / "out")])
    assert out.exit_code == 2
    assert "would tell the secret number of candidates" in " ".join(out.output.split())


def test_where_points_are_trained_is_no_part_of_what_was_paid_for(tmp_path):
    from dptaft.sweep.recipe import parse_recipe

    made = recipe("publish-all", epsilons=[3.0], data=few(tmp_path))
    run_sweep(made, tmp_path / "sweep")
    other = parse_recipe(dict(made.content) | {"backend": {"kind": "local", "jobs": 2}}, made.name)
    assert len(run_sweep(other, tmp_path / "sweep").kept) == 1
    with pytest.raises(RecipeError, match="no table"):
        parse_recipe(dict(made.content) | {"backend": "ray"}, made.name)

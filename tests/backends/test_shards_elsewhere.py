"""Shards trained at the same time: the same weights, the same composition, one charge each."""

import json
import math
import os
import shutil
import signal
import threading

import numpy as np
import pytest
from backending import entries
from builders import small_images
from click.testing import CliRunner
from safetensors.numpy import load_file

import dptaft
from dptaft.backends import BackendConfig
from dptaft.cli import main
from dptaft.prepaid import PaymentError
from dptaft.shards import ShardError, compose, load_collection, train_shards
from dptaft.shards.records import read_trail
from dptaft.training.steps import TrainingInterruptedError
from dptaft.verification import verify
from dptaft_accounting.ledger import Budget, Ledger

TWO = BackendConfig(jobs=2)
CLASSES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    images, labels = small_images(60)
    np.savez(folder / "few.npz", images=images.clip(0, 1), labels=labels)
    return str(folder / "few.npz")


def train(few, parent, **options):
    given = {"classes": CLASSES, "public_seed": 1, "epsilon": 3.0, "steps": 5, "scope": "head"} | options
    return train_shards(few, 3, output=parent, **given)


def model(path):
    return (path / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def both(few, tmp_path_factory):
    """The same shards one after the other and at the same time, each on a ledger of its own; with noise."""
    found = {}
    for name, backend in (("serial", BackendConfig()), ("parallel", TWO)):
        parent = tmp_path_factory.mktemp(name) / "shards"
        found[name] = train(few, parent, backend=backend)
    return found


@pytest.mark.slow
def test_without_noise_parallel_shards_are_those_of_serial_training_to_the_last_bit(few, tmp_path):
    given = {"epsilon": math.inf, "delta": 1e-5, "ledger": None}
    one = train(few, tmp_path / "one", **given)
    two = train(few, tmp_path / "two", backend=TWO, **given)
    assert [model(path) for path in one.runs()] == [model(path) for path in two.runs()]
    assert len({model(path) for path in one.runs()}) == 3
    weights = [
        load_file(compose(made.runs(), tmp_path / f"sum{i}").path / "model.safetensors")
        for i, made in enumerate((one, two))
    ]
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_composition_costs_the_same_and_every_shard_is_charged_once(both, tmp_path):
    claims, charged = {}, {}
    for name, made in both.items():
        folder = made.path.parent
        found = entries(folder)
        assert sorted(entry.part[1] for entry in found) == ["1", "2", "3"]
        assert {entry.state for entry in found} == {"committed"}
        (standing,) = {Ledger(folder / "ledger.sqlite").account(entry.dataset).spent for entry in found}
        charged[name] = standing
        for path in made.runs():
            assert verify(path, ledger=folder / "ledger.sqlite").passed
        claims[name] = compose(made.runs(), tmp_path / name).statement.claim
        assert [line["action"] for line in read_trail(made.path)].count("train") == 3
    assert charged["parallel"] == charged["serial"]
    for key in ("epsilon", "delta"):
        assert claims["parallel"][key] == claims["serial"][key]
    one, two = (dptaft.load_run(both[name].runs()[0]).statement for name in ("serial", "parallel"))
    assert one.mechanism["record"] == two.mechanism["record"]
    assert one.composition["total"] == two.composition["total"]


def test_a_finished_call_trains_and_charges_nothing_again(both, few):
    made = both["parallel"]
    before = [model(path) for path in made.runs()]
    for backend in (TWO, BackendConfig()):
        train(few, made.path, resume=True, backend=backend)
    assert [model(path) for path in made.runs()] == before
    assert [line["action"] for line in read_trail(made.path)].count("train") == 3
    (made.path / "2").rename(made.path.parent / "taken")
    with pytest.raises(PaymentError, match="a second result costs again"):
        train(few, made.path, resume=True)
    with pytest.raises(ShardError, match="leave --no-ledger out"):
        train(few, made.path, resume=True, ledger=None)
    (made.path.parent / "taken").rename(made.path / "2")
    assert len(entries(made.path.parent)) == 3


def test_a_budget_that_is_too_small_stops_all_shards_before_any_is_trained(few, tmp_path):
    from dptaft.data import load_data
    from dptaft.identity import content_digest

    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    name = ledger.register(content_digest(load_data(few, classes=CLASSES).train), "few")
    ledger.declare(name, Budget.from_epsilon(1.0, 1e-5))
    with pytest.raises(ValueError, match=r"budget|exceed"):
        train(few, tmp_path / "shards", backend=TWO)
    assert [path.name for path in (tmp_path / "shards").iterdir() if path.is_dir()] == [".parallel"]
    assert len(ledger.account(name).entries) == 0


@pytest.mark.slow
def test_shards_that_are_interrupted_go_on_in_one_process(few, tmp_path):
    parent, ended = tmp_path / "shards", threading.Event()

    def interrupt():
        while not ended.wait(0.002):
            if list(parent.glob(".parallel/attempts/*/work/*.partial/checkpoint.safetensors")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(TrainingInterruptedError, match="the same command goes on"):
            train(few, parent, steps=600, backend=TWO)
    finally:
        ended.set()
        thread.join()
    saved = [json.loads(path.read_text())["authorised"] for path in parent.glob("*.partial/progress.json")]
    assert saved
    made = train(few, parent, steps=600, resume=True)
    executed = [dptaft.load_run(path).statement.mechanism["steps_executed"] for path in made.runs()]
    assert executed == [600] * 3
    assert len(entries(tmp_path)) == 3
    assert not (parent / ".parallel" / "attempts").exists()


def test_other_processes_refuse_other_data(few, tmp_path):
    """The path of the data leads elsewhere on the machine of the job."""
    images, labels = small_images(60, seed=5)
    mine = tmp_path / "mine.npz"
    shutil.copyfile(few, mine)
    parent = tmp_path / "shards"
    made = train(str(mine), parent, ledger=None)
    from dptaft.backends.attempts import Attempts
    from dptaft.prepaid import Payment
    from dptaft.shards.parallel import train_one
    from dptaft.shards.requests import stored_request

    np.savez(mine, images=images.clip(0, 1), labels=labels)
    attempt = Attempts(tmp_path / "attempts", parent).grant(["1"])
    with pytest.raises(ShardError, match="is not what shard 1 was made from"):
        train_one(attempt, parent, "1", stored_request(made, str(mine)), Payment({}, {}), 1)


def test_images_in_memory_stay_in_one_process(tmp_path):
    from builders import small_data

    with pytest.raises(ShardError, match="cannot load images that were given in memory"):
        train_shards(small_data(), 2, output=tmp_path / "s", epsilon=3.0, steps=2, ledger=None, backend=TWO)


def test_a_single_training_has_no_backend():
    wrong = CliRunner().invoke(main, ["train", "--epsilon", "3", "--jobs", "2"])
    assert wrong.exit_code == 2
    assert "are for the trainings of --shards" in " ".join(wrong.output.split())


@pytest.mark.slow
def test_a_shard_that_comes_later_is_trained_elsewhere_as_well(both):
    made = both["parallel"]
    images, labels = small_images(30, seed=9)
    np.savez(made.path.parent / "new.npz", images=images.clip(0, 1), labels=labels)
    given = ["--data", str(made.path.parent / "new.npz"), "--classes", "a,b,c", "--jobs", "2", "--json"]
    out = CliRunner().invoke(main, ["train", "--shards-of", str(made.path), *given])
    assert out.exit_code == 0, out.output
    assert len(json.loads(out.stdout)["runs"]) == 4
    assert len(load_collection(made.path).shards) == 4

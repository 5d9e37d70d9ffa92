"""What fails after the privacy was spent costs nothing more: a resumed run writes the very same weights."""

import contextlib
import dataclasses
import errno
import functools
import importlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import small_data, small_images, write_folder
from click.testing import CliRunner
from safetensors.torch import load_file
from sweeping import recipe

import dptaft
import dptaft.runs
import dptaft.storage
import dptaft.training.checkpoint
import dptaft.training.finish
import dptaft.training.result
from dptaft.backends import BackendConfig
from dptaft.budgeting import default_ledger
from dptaft.cli import main
from dptaft.runs import OutputLostError
from dptaft.shards import compose, load_collection, remove_record, train_shards
from dptaft.shards.records import Records
from dptaft.sweep.runner import run_sweep
from dptaft.training.account import NoAccount
from dptaft.training.members import Point, run_members
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request
from dptaft.training.trainer import partial_folder
from dptaft_accounting.ledger import Ledger

QUICK = {"epsilon": 2, "steps": 3, "scope": "head"}
KINDS = {
    "full-batch": QUICK,
    "cyclic": QUICK | {"sampling": "cyclic-partition", "expected_batch_size": 20},
    "certified": {"epsilon": 2, "scope": "head", "certified": True, "steps": 3},
    "objective": {"epsilon": 2, "scope": "head", "method": "objective-perturbation"},
    "output": {"epsilon": 2, "scope": "head", "method": "output-perturbation"},
}


class Failing:
    """Stands for a function or method: from the nth call after `left` was set to n on, every call fails."""

    def __init__(self, function, error):
        self.function, self.error, self.left = function, error, None

    def __get__(self, instance, owner):
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *arguments, **options):
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise self.error
        return self.function(*arguments, **options)


def spent(folder):
    ledger = Ledger(default_ledger(folder / "run"))
    name = ledger.datasets()[0]
    return ledger.account(name).entries, ledger.account(name).spent


def weights(run):
    return (run.path / "model.safetensors").read_bytes()


PLACES = {
    "weights": ("pathlib.Path.write_bytes", OSError(errno.ENOSPC, "No space left on device")),
    "text": ("pathlib.Path.write_text", OSError(errno.EACCES, "Permission denied")),
    "encoding": ("pathlib.Path.write_text", UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates")),
    "bug": ("dptaft.training.finish.utility_of", KeyError("no such field")),
    "sync": ("dptaft.runs._sync", OSError(errno.EIO, "Input/output error")),
    "name": ("pathlib.Path.rename", OSError(errno.ENOSPC, "No space left on device")),
}


def finish_fails(monkeypatch, tmp_path, place, nth, options):
    """Train where one write after the training fails; returns the error and the weights that were trained."""
    target, error = PLACES[place]
    failing = Failing(_found(target), error)
    with monkeypatch.context() as patch:
        patch.setattr(target, failing)
        kept = dptaft.training.result.settle

        def armed(output, partial, *arguments, **more):
            failing.left = nth
            kept_weights.update(load_file(partial / "result.safetensors"))
            return kept(output, partial, *arguments, **more)

        kept_weights = {}
        for module in ("trainer", "one_shot_run"):
            patch.setattr(f"dptaft.training.{module}.settle", armed)
        with pytest.raises(OutputLostError, match="privacy is spent, but not written") as raised:
            dptaft.train(small_data(), output=tmp_path / "run", **options)
    return str(raised.value), kept_weights


def _found(target):
    module, _, name = target.rpartition(".")
    if module == "pathlib.Path":
        return getattr(Path, name)
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("place", "nth"), [("weights", 1), ("name", 1)])
def test_a_run_that_could_not_be_written_is_written_at_no_cost(tmp_path, monkeypatch, kind, place, nth):
    _check(tmp_path, monkeypatch, place, nth, KINDS[kind])


@pytest.mark.parametrize(
    ("place", "nth"),
    [
        ("text", 1),
        ("text", 2),
        ("text", 3),
        ("encoding", 1),
        ("bug", 1),
        ("sync", 1),
        ("sync", 5),
        ("sync", 6),
    ],
)
def test_every_write_may_fail(tmp_path, monkeypatch, place, nth):
    _check(tmp_path, monkeypatch, place, nth, QUICK)


def _check(tmp_path, monkeypatch, place, nth, options):
    message, trained = finish_fails(monkeypatch, tmp_path, place, nth, options)
    if place == "sync" and nth == 6:  # the folder has its name already, only its parent was not synchronised
        assert dptaft.load_run(tmp_path / "run").statement is not None
        return
    assert "--resume), which writes it at no cost" in message
    assert not (tmp_path / "run").exists()
    before = spent(tmp_path)
    assert [entry.state for entry in before[0]] == ["committed"]
    run = dptaft.train(small_data(), output=tmp_path / "run", resume=True, **options)
    after = spent(tmp_path)
    assert after[1] == before[1]
    assert len(after[0]) == 1
    found = {k.removeprefix("trained/"): v for k, v in load_file(run.path / "model.safetensors").items()}
    assert all(bool((found[name] == value).all()) for name, value in trained.items())
    assert run.statement.recompute().holds
    assert run.statement.composition["ledger_entry"] == before[0][0].id
    assert run.accuracy is not None
    assert not partial_folder(run.path).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger.sqlite", "run"]


@pytest.mark.parametrize("kind", ["full-batch", "cyclic", "objective"])
def test_a_charge_that_cannot_be_made_final_is_made_by_the_next_attempt(tmp_path, monkeypatch, kind):
    from dptaft_accounting.ledger import LedgerError

    def full(*_, **__):
        raise LedgerError("cannot write the ledger: database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", full)
        with pytest.raises(OutputLostError, match=r"disk is full.*--resume"):
            dptaft.train(small_data(), output=tmp_path / "run", **KINDS[kind])
    before = spent(tmp_path)[1]
    run = dptaft.train(small_data(), output=tmp_path / "run", resume=True, **KINDS[kind])
    assert spent(tmp_path)[1] == before
    assert run.statement.recompute().holds


@pytest.mark.parametrize("kind", ["full-batch", "objective"])
def test_a_result_that_cannot_be_kept_is_written_all_the_same(tmp_path, monkeypatch, kind):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(dptaft.training.result, "save", full)
    run = dptaft.train(small_data(), output=tmp_path / "run", **KINDS[kind])
    assert run.statement.recompute().holds


def test_a_solution_has_its_room_before_it_is_paid_for(tmp_path, monkeypatch):
    """A disk that fills while the problem is solved takes the solution: room was held for it."""
    replace, full = dptaft.training.checkpoint._replace, []

    def checked(path, content):
        if full and (path.parent / "room").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(path, content)

    original = dptaft.training.one_shot_run.train_once

    def solved(*arguments, **options):
        full.append(True)
        return original(*arguments, **options)

    monkeypatch.setattr(dptaft.training.checkpoint, "_replace", checked)
    monkeypatch.setattr(dptaft.training.one_shot_run, "train_once", solved)
    with monkeypatch.context() as patch:
        patch.setattr(dptaft.training.result, "new_run", _no_room)
        with pytest.raises(OutputLostError, match="writes it at no cost"):
            dptaft.train(small_data(), output=tmp_path / "run", **KINDS["output"])
    run = dptaft.train(small_data(), output=tmp_path / "run", resume=True, **KINDS["output"])
    assert run.statement.recompute().holds


@contextlib.contextmanager
def _no_room(path):
    raise OSError(errno.ENOSPC, "No space left on device")
    yield path


@pytest.mark.parametrize("kind", ["full-batch", "objective"])
def test_a_folder_named_in_another_encoding_costs_nothing(tmp_path, kind):
    write_folder(tmp_path / "pets", count=20)
    os.rename(os.fsencode(tmp_path / "pets" / "cat"), os.fsencode(tmp_path / "pets") + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"caf\\udce9") as raised:
        dptaft.train(str(tmp_path / "pets"), output=tmp_path / "run", **KINDS[kind])
    assert "rename" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets"]


@pytest.mark.parametrize("place", ["weights", "text", "encoding", "bug", "sync"])
def test_what_cannot_be_written_is_found_before_anything_is_charged(tmp_path, monkeypatch, place):
    target, error = PLACES[place]
    failing = Failing(_found(target), error)
    failing.left = 1
    monkeypatch.setattr(target, failing)
    with pytest.raises((ValueError, KeyError)) as raised:
        dptaft.train(small_data(), output=tmp_path / "run", **QUICK)
    assert not isinstance(raised.value, OutputLostError)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(ValueError, match=r"need .* MB in .*, which has 0\.0001 MB free; make room"):
        dptaft.train(small_data(), output=tmp_path / "run", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_result_is_not_written_for_another_request(tmp_path, monkeypatch):
    finish_fails(monkeypatch, tmp_path, "weights", 1, QUICK)
    with pytest.raises(ValueError, match=r"(plan|privacy) was .* start a new run"):
        dptaft.train(small_data(), output=tmp_path / "run", resume=True, **QUICK | {"epsilon": 4})
    with pytest.raises(ValueError, match=r"labels was|belongs to other data"):
        dptaft.train(small_data(64), output=tmp_path / "run", resume=True, **QUICK)
    run = dptaft.train(small_data(), output=tmp_path / "run", resume=True, **QUICK)
    assert run.statement.claim["epsilon"] <= 2


@pytest.mark.parametrize("kind", ["full-batch", "output"])
def test_a_kept_result_is_not_charged_to_other_images(tmp_path, monkeypatch, kind):
    """The same labels and settings, begun without a ledger: the ledger would name images that it did not see."""
    options = KINDS[kind]
    finish_fails(monkeypatch, tmp_path, "weights", 1, options | {"ledger": None})
    others = small_data()
    others.train.pixels._array[0] = 1 - others.train.pixels._array[0]
    for ledger in ("auto", None):
        with pytest.raises(ValueError, match=r"images was .* start a new run"):
            dptaft.train(others, output=tmp_path / "run", resume=True, ledger=ledger, **options)
    run = dptaft.train(small_data(), output=tmp_path / "run", resume=True, ledger=None, **options)
    assert run.statement is not None


def test_drafts_of_killed_writes_are_removed_and_others_stay(tmp_path):
    stale, other = tmp_path / ".run-abcdefgh", tmp_path / ".run-again-abcdefgh"
    for folder in (stale, other):
        folder.mkdir()
        (folder / "run.toml").write_text("half")
    with dptaft.storage.draft_folder(tmp_path, ".run-") as alive:
        assert not stale.exists()
        dptaft.train(small_data(), output=tmp_path / "run", ledger=None, **QUICK)
        assert alive.exists()
    assert other.exists()
    assert not alive.exists()
    half = tmp_path / ".state.json.abcdefgh"
    half.write_text("half")
    with dptaft.storage.draft_file(tmp_path, ".state.json.") as (_, living):
        dptaft.training.checkpoint.write_atomically(tmp_path / "state.json", b"{}")
        assert living.exists()
    assert not half.exists()


def settle_fails_once(monkeypatch, patched):
    """The first run that is written fails, the others do not."""
    original, failed = dptaft.training.result.new_run, []

    @contextlib.contextmanager
    def new_run(path):
        if not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        with original(path) as folder:
            yield folder

    patched.setattr(dptaft.training.result, "new_run", new_run)
    return failed


def test_shards_that_could_not_be_written_are_written_at_no_cost(tmp_path, monkeypatch):
    options = {"epsilon": 2, "steps": 3, "scope": "head", "output": tmp_path / "run", "public_seed": 1}
    with monkeypatch.context() as patch:
        failed = settle_fails_once(monkeypatch, patch)
        with pytest.raises(OutputLostError, match="shard 1: the run was trained"):
            train_shards(small_data(), 2, **options)
    kept = load_file(partial_folder(failed[0]) / "result.safetensors")
    (entry,) = spent(tmp_path)[0]
    made = train_shards(small_data(), 2, resume=True, **options)
    entries = spent(tmp_path)[0]
    assert [e.state for e in entries] == ["committed", "committed"]
    assert entries[0].charge == entry.charge
    found = load_file(made.runs()[0] / "model.safetensors")
    assert all(bool((found[f"trained/{name}"] == value).all()) for name, value in kept.items())


def test_members_of_a_sweep_that_could_not_be_written_are_written_at_no_cost(tmp_path, monkeypatch):
    data = small_data()

    def points():
        return [
            Point(
                Request(
                    PrivacyConfig(epsilon, steps=3),
                    ModelConfig(scope="head"),
                    {},
                    PerformanceConfig(),
                    "small",
                ),
                tmp_path / f"run{epsilon}",
                NoAccount("a test"),
            )
            for epsilon in (1.0, 2.0)
        ]

    with monkeypatch.context() as patch:
        failed = settle_fails_once(monkeypatch, patch)
        lost, fine = run_members(data, points())
    assert isinstance(lost, OutputLostError)
    kept = load_file(partial_folder(failed[0]) / "result.safetensors")
    again, known = run_members(data, points())
    assert fine.path == tmp_path / "run2.0"
    assert isinstance(known, ValueError)  # it exists
    found = load_file(again.path / "model.safetensors")
    assert all(bool((found[f"trained/{name}"] == value).all()) for name, value in kept.items())
    assert again.accuracy is not None


def test_parallel_shards_and_sweeps_try_to_write_before_they_pay(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    np.savez(tmp_path / "few.npz", images=small_images(12)[0].clip(0, 1), labels=small_images(12)[1])
    data = [{"name": "few", "source": str(tmp_path / "few.npz"), "classes": ["a", "b", "c"]}]
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(ValueError, match="cannot be written"):
        run_sweep(recipe("publish-all", epsilons=[1.0], steps=2, data=data), tmp_path / "sweep")
    with pytest.raises(ValueError, match="cannot be written"):
        train_shards(
            str(tmp_path / "few.npz"), 2, classes=["a", "b", "c"], output=tmp_path / "run", epsilon=1,
            steps=2, scope="head", backend=BackendConfig("local", jobs=2),
        )  # fmt: skip
    assert not (tmp_path / "ledger.sqlite").exists()


def test_shards_with_names_that_cannot_be_written_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="is no UTF-8 text; rename"):
        dataclasses.replace(small_data(), classes=("a", "caf\udce9", "c"))
    with pytest.raises(ValueError, match=r"the output .* is not UTF-8; choose another one"):
        dptaft.train(small_data(), output=tmp_path / "caf\udce9", **QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_was_trained_again_is_not_paid_for_twice(tmp_path, monkeypatch):
    options = {"epsilon": 2, "steps": 3, "scope": "head", "output": tmp_path / "parent", "public_seed": 1}
    train_shards(small_data(), 2, **options)
    whole = compose(load_collection(tmp_path / "parent").runs(), tmp_path / "whole")
    out = tmp_path / "rest"
    with monkeypatch.context() as patch:
        patch.setattr(Records, "save", lambda self, folder: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(OSError, match="No space"):
            remove_record(whole, 5, out, retrain=True, data=small_data())
    before = spent(tmp_path)
    assert len(before[0]) == 3
    with monkeypatch.context() as patch:
        patch.setattr("dptaft.shards.composition.new_run", _no_room)
        with pytest.raises(OutputLostError, match="are charged, but no run was composed") as raised:
            remove_record(whole, 5, out, retrain=True, data=small_data())
    assert f"dptaft compose {tmp_path / 'parent'} -o RUN" in str(raised.value)
    again = compose(load_collection(tmp_path / "parent").runs(), tmp_path / "made")
    assert len(again.config["composition"]["parts"]) == 2
    assert spent(tmp_path)[1] == before[1]
    assert len(spent(tmp_path)[0]) == 3


def test_nothing_is_removed_from_a_folder_of_shards_before_it_is_composed(tmp_path):
    train_shards(small_data(), 2, output=tmp_path / "parent", ledger=None, **QUICK)
    result = CliRunner().invoke(
        main, ["remove", str(tmp_path / "parent"), "--shard", "1", "-o", str(tmp_path / "x")]
    )
    assert result.exit_code == 2
    assert "compose it first (dptaft compose" in result.output
    assert "damaged" not in result.output

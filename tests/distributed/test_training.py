import math

import pytest
import rank_tasks
import torch
from ranks import DIED, Failed, free_port, succeeded, together
from safetensors.torch import load_file

import dptaft
from dptaft.training.checkpoint import ResumeError
from dptaft.training.trainer import partial_folder
from dptaft.verification import verify
from dptaft_accounting.ledger import Ledger

COMMON = {"epsilon": 4, "device": "cpu", "scope": "head"}
ONE_STEP = {"steps": 1, "optimizer": {"kind": "sgd", "learning_rate": 1.0}}


def weights(path):
    tensors = load_file(f"{path}/model.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(tensors.items()) if k.startswith("trained/")]).double()


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "last:1"},
        {"sampling": "poisson", "expected_batch_size": 10, "l2_clip_norm": 1e-6, "scope": "last:1"},
    ],
)
def test_noise_is_added_exactly_once(tmp_path, options):
    """Two runs of one step from the same sums differ by their noise alone, which is measured."""
    given = {**COMMON, **ONE_STEP, **options, "ledger": None}
    first, second = succeeded(together(2, rank_tasks.train_twice, tmp_path, given, free_port()))
    paths = [path for path, _ in first]
    assert [path for path, _ in second] == paths
    assert [calls for _, calls in first + second] == [1, 1, 0, 0]  # of the Gaussian mechanism
    run = dptaft.load_run(paths[0])
    details = run.statement.mechanism
    measured = float((weights(paths[0]) - weights(paths[1])).std()) / math.sqrt(2)
    stated = details["record"]["noise_multiplier"] * details["l2_clip_norm"] / details["normaliser"]
    assert measured == pytest.approx(stated, rel=0.05)
    assert run.statement.implementation["processes"] == 2
    assert run.config["processes"] == {"count": 2}
    assert any("2 processes" in row["assumption"] for row in run.statement.claim["assumptions"])
    assert verify(run.path).passed


@pytest.mark.parametrize(
    "sampling",
    [
        {"sampling": "full-batch"},
        pytest.param({"sampling": "poisson", "expected_batch_size": 60}, marks=pytest.mark.slow),
    ],
)
def test_certified_runs_have_the_certificate_of_one_process(tmp_path, sampling):
    options = {**COMMON, "certified": True, "steps": 40, **sampling}
    alone = dptaft.train(rank_tasks.data(), **options, output=tmp_path / "one")
    (path, calls), *_ = succeeded(
        together(2, rank_tasks.train, tmp_path, {**options, "output": tmp_path / "two"})
    )
    run = dptaft.load_run(path)
    assert calls == 40
    assert run.statement.accounting["certificate"] == alone.statement.accounting["certificate"]
    assert run.statement.mechanism["record"] == alone.statement.mechanism["record"]


def test_a_lost_process_leaves_a_charged_run_that_other_numbers_of_processes_resume(tmp_path):
    options = {**COMMON, "steps": 60, "sampling": "poisson", "expected_batch_size": 30}
    options |= {"output": tmp_path / "run", "ledger": tmp_path / "ledger.sqlite"}
    first, second, third = together(3, kill_at_seven, tmp_path, options)
    assert second == DIED
    assert first.kind == third.kind == "RankLostError"
    assert "--resume" in first.text
    partial = partial_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert partial.is_dir()
    ledger = Ledger(tmp_path / "ledger.sqlite")
    (entry,) = ledger.account(ledger.datasets()[0]).entries
    assert entry.state != "committed"
    assert float(entry.authorised.epsilon) > 0
    # two processes continue it until they are asked to stop, then one alone
    stopped, other = together(2, stop_at_twenty, tmp_path, {**options, "resume": True})
    assert (stopped.kind, other.kind) == ("TrainingInterruptedError", "RunEndedError")
    run = dptaft.train(rank_tasks.data(), **options, resume=True)
    details = run.statement.mechanism
    assert details["steps_executed"] >= 58
    assert run.statement.claim["epsilon"] <= 4
    assert any("interrupted" in line for line in run.statement.admin["caveats"])
    assert run.statement.implementation["processes"] == 3  # sums travelled between so many
    assert any("3 processes" in row["assumption"] for row in run.statement.claim["assumptions"])
    assert not partial.exists()
    assert verify(run.path, ledger=tmp_path / "ledger.sqlite").passed


def kill_at_seven(folder, options):
    return rank_tasks.train(folder, options, kill=(1, 7))


def test_the_others_end_when_the_first_process_is_lost(tmp_path):
    options = {**COMMON, "steps": 30, "output": tmp_path / "run"}
    first, second = together(2, kill_the_first, tmp_path, options)
    assert (first, second.kind) == (DIED, "RankLostError")
    assert (partial_folder(tmp_path / "run") / "progress.json").exists()
    with pytest.raises(ValueError, match="--resume"):
        dptaft.train(rank_tasks.data(), **options)


def kill_the_first(folder, options):
    return rank_tasks.train(folder, options, kill=(0, 7))


def stop_at_twenty(folder, options):
    return rank_tasks.train(folder, options, stop=20)


def test_an_error_of_one_process_is_that_of_the_run(tmp_path):
    alone = {**COMMON, "steps": 3}
    with pytest.raises(ValueError, match="image 280") as single:
        rank_tasks.train_broken({**alone, "output": tmp_path / "alone"}, False)
    options = {**alone, "output": tmp_path / "run"}
    first, second = together(2, rank_tasks.train_broken, options, False)
    assert (first.for_users, first.text) == (True, " ".join(str(single.value).split()))
    assert second.text == str(single.value)
    assert not (tmp_path / "run").exists()
    assert not partial_folder(tmp_path / "run").exists()
    first, second = together(2, rank_tasks.train_out_of_memory, options)
    assert first.for_users
    assert "process 1 is out of memory" in first.text
    first, second = together(2, rank_tasks.train_wrong, {**options, "output": tmp_path / "bug"})
    assert (first.kind, second.kind) == ("RuntimeError", "TypeError")
    assert "process 1 failed" in first.text
    first, second = together(2, rank_tasks.train_other_data, {**options, "output": tmp_path / "other"})
    assert first.for_users
    assert "process 1 has other labels" in first.text


@pytest.mark.parametrize("ledger", [None, "ledger.sqlite"])
def test_records_in_another_order_are_refused_before_any_step(tmp_path, ledger):
    ledger = ledger and tmp_path / ledger
    options = {**COMMON, "steps": 2, "output": tmp_path / "run", "ledger": ledger}
    first, second = together(2, rank_tasks.train_permuted, options)
    assert first.for_users
    assert "see the records in different orders" in first.text
    assert second.kind == "RunEndedError"
    assert not (tmp_path / "run").exists()


def test_copies_that_all_processes_have_in_the_same_places_are_records_of_their_own(tmp_path):
    options = {**COMMON, "steps": 2, "output": tmp_path / "run", "ledger": None}
    succeeded(together(2, rank_tasks.train_permuted, options, 3))


def test_unreadable_images_of_all_processes_are_counted(tmp_path):
    options = {**COMMON, "steps": 2, "output": tmp_path / "run"}
    results = together(2, counted_warnings, options)
    assert results == [["1 of 300 training images and 0 evaluation images of small cannot be read"], []]


def counted_warnings(options):
    import warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rank_tasks.train_broken(options, True)
    texts = [str(warning.message) for warning in seen]
    return [text.split(";")[0] for text in texts if "training images" in text]


def test_a_secret_partition_cannot_be_resumed(tmp_path):
    options = {**COMMON, "steps": 20, "sampling": "cyclic-partition", "expected_batch_size": 30}
    options |= {"output": tmp_path / "run"}
    first, _ = together(2, stop_at_five, tmp_path, options)
    assert first.kind == "TrainingInterruptedError"
    first, second = together(2, rank_tasks.train, tmp_path, {**options, "resume": True})
    assert isinstance(first, Failed)
    assert (first.kind, second.kind) == (ResumeError.__name__, "RunEndedError")


def stop_at_five(folder, options):
    return rank_tasks.train(folder, options, stop=5)

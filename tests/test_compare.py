"""Comparison: side by side, and a total that is valid for all runs together."""

import json

import pytest
from click.testing import CliRunner
from run_folders import CONVEX, FULL, POISSON, make_baseline, make_run, proof

from dptaft.cli import main
from dptaft.comparison import UNKNOWN, compare
from dptaft_accounting import best_bound
from dptaft_accounting.mechanisms import FullBatchGaussian, SequenceComposition


def cli(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_four_runs_of_epsilon_three(tmp_path):
    """Squared mu adds up: four runs of epsilon 3 cost 6.71 together, not 12."""
    noise = 50**0.5 / 0.719
    runs = [make_run(tmp_path / str(i), FullBatchGaussian(noise, 50), name=str(i)) for i in range(4)]
    total = compare(runs).totals[0]
    assert total.epsilon == pytest.approx(6.71, abs=0.01)
    assert total.plain_epsilon == pytest.approx(12, abs=0.01)
    assert total.dataset == UNKNOWN
    assert total.runs == 4


def test_the_total_is_the_sequence_of_all_records(tmp_path):
    runs = [make_run(tmp_path / "a", FULL), make_run(tmp_path / "b", POISSON)]
    total = compare(runs).totals[0]
    assert total.epsilon == best_bound(SequenceComposition((FULL, POISSON)), delta=1e-5).epsilon
    assert "sequence of 2" in total.method
    assert total.epsilon > max(run.statement.claim["epsilon"] for run in runs)


def test_last_iterate_claims_add_up_as_gaussian_curves(tmp_path):
    runs = [make_run(tmp_path / name, CONVEX, certificate=proof(), name=name) for name in "ab"]
    single = runs[0].statement.claim["epsilon"]
    total = compare(runs).totals[0]
    assert single < total.epsilon < 2 * single
    assert "squared mu" in total.method


def test_the_total_never_falls_below_a_single_claim(tmp_path):
    runs = [make_run(tmp_path / "a", CONVEX, certificate=proof()), make_run(tmp_path / "b", POISSON)]
    total = compare(runs).totals[0]
    assert total.epsilon >= max(run.statement.claim["epsilon"] for run in runs)


def charged(dataset, ledger="one", shared=()):
    known = {} if shared is None else {"data_sets_with_shared_records": list(shared)}
    return {"ledger": ledger, "ledger_entry": "7", "ledger_head": "ab", "data_set": dataset, **known}


def test_data_sets_are_told_apart_by_one_ledger(tmp_path):
    runs = [
        make_run(tmp_path / name, composition=charged(dataset), name=name)
        for name, dataset in (("a", "x"), ("b", "y"), ("c", "x"))
    ]
    totals = {total.dataset: total.runs for total in compare(runs).totals}
    assert totals == {"x of ledger one": 2, "y of ledger one": 1}


def test_data_sets_that_share_records_are_one(tmp_path):
    shares = {"a": charged("x"), "b": charged("y"), "c": charged("z", shared=["x"]), "d": charged("x")}
    runs = [make_run(tmp_path / name, composition=c, name=name) for name, c in shares.items()]
    totals = {total.dataset: total.runs for total in compare(runs).totals}
    assert totals == {"x, z of ledger one (they share records)": 3, "y of ledger one": 1}


@pytest.mark.parametrize(
    "other", [charged("y", "two"), charged("y", shared=None), {"ledger": "none: declined"}]
)
def test_where_the_ledger_cannot_tell_the_data_are_assumed_the_same(tmp_path, other):
    runs = [
        make_run(tmp_path / "a", composition=charged("x"), name="a"),
        make_run(tmp_path / "b", composition=other, name="b"),
    ]
    totals = compare(runs).totals
    assert [(t.dataset, t.runs) for t in totals] == [(UNKNOWN, 2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mechanism": FullBatchGaussian(10.0, 50, adjacency="replace-one")}, "differ in adjacency"),
        ({"unit": "one patient"}, "differ in unit"),
        ({"records_per_unit": 2}, "differ in records_per_unit"),
    ],
)
def test_no_total_over_different_promises(tmp_path, changes, words):
    total = compare([make_run(tmp_path / "a"), make_run(tmp_path / "b", **changes)]).totals[0]
    assert total.epsilon is None
    assert words in total.method


def test_a_run_without_a_claim_leaves_no_total(tmp_path):
    folders = make_run(tmp_path / "a").path, make_baseline(tmp_path / "n").path
    result = cli(*folders)
    assert "NO CLAIM" in result.output
    assert "a run claims nothing" in result.output
    assert json.loads(cli(*folders, "--json").output)["totals"][0]["epsilon"] is None


def test_the_larger_delta_is_the_delta_of_the_total(tmp_path):
    runs = [make_run(tmp_path / "a", delta=1e-6), make_run(tmp_path / "b", delta=1e-5)]
    assert compare(runs).totals[0].delta == 1e-5


def test_table_and_refusals(tmp_path):
    a, b = make_run(tmp_path / "a").path, make_run(tmp_path / "b", POISSON, accuracy=0.8).path
    lines = cli(a, b).output.splitlines()
    assert lines[0].split() == ["run", "epsilon", "delta", "adjacency", "bound", "accuracy"]
    assert lines[1].endswith("90.00%")
    assert lines[2].endswith("80.00%")
    assert "plain addition" in lines[-1]
    shown = float(lines[-1].split("epsilon ")[1].split()[0])
    assert shown >= json.loads(cli(a, b, "--json").output)["totals"][0]["epsilon"]
    assert cli(a, a).exit_code == 2
    assert cli(a, "nowhere").exit_code == 2
    assert cli().exit_code == 2

"""Published formats stay readable: what the first version wrote still loads, verifies, predicts and resumes.

`golden/first` holds runs of every method on 60 synthetic images, their ledger, and a run that was killed.
"""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import dptaft
from dptaft.cli import main
from dptaft.verification import verify
from dptaft_accounting.ledger import Ledger

FIRST = Path(__file__).parent / "golden" / "first"
EXPECTED = json.loads((FIRST / "expected.json").read_text())


@pytest.fixture
def first(tmp_path):
    """A copy with the permissions that git does not keep."""
    place = shutil.copytree(FIRST, tmp_path / "first")
    (place / "ledger.sqlite").chmod(0o600)
    partial = place / "killed.partial"
    partial.chmod(0o700)
    named = partial / "ledger.json"
    named.write_text(named.read_text().replace("LEDGER", str(place / "ledger.sqlite")))
    for item in partial.iterdir():
        item.chmod(0o600)
    return place


@pytest.mark.parametrize("name", EXPECTED)
def test_runs_verify_with_their_old_claim_and_id(first, name):
    found = verify(first / name)
    assert found.passed, found.failures
    assert found.id == EXPECTED[name]["id"]
    assert found.statement.claim["epsilon"] == EXPECTED[name]["epsilon"]
    assert found.epsilon <= EXPECTED[name]["epsilon"] * (1 + 1e-9)


@pytest.mark.parametrize("name", EXPECTED)
def test_runs_predict_what_they_predicted(first, name):
    pixels = dptaft.load_data(str(first / "data.npz"), classes=("a", "b", "c")).train.pixels
    labels = [found.label for found in dptaft.load_run(first / name).predict([pixels[i] for i in range(6)])]
    assert labels == EXPECTED[name]["labels"]


def test_parts_of_a_shard_folder_verify_and_compose(first):
    for part in ("1", "2", "3"):
        assert verify(first / "shards" / part).passed
    result = CliRunner().invoke(main, ["compose", str(first / "shards"), "-o", str(first / "again")])
    assert result.exit_code == 0, result.output


def test_the_ledger_keeps_its_entries_and_takes_new_ones(first):
    ledger = Ledger(first / "ledger.sqlite")
    assert ledger.verify() == []
    (known,) = ledger.datasets()
    spent = ledger.account(known).spent.mu
    assert float(spent) == pytest.approx(2.34491, rel=1e-5)
    options = ["--data", str(first / "data.npz"), "--classes", "a,b,c", "--scope", "head", "--steps", "2"]
    result = CliRunner().invoke(main, ["train", "--epsilon", "1", *options, "--output", str(first / "new")])
    assert result.exit_code == 0, result.output
    assert ledger.datasets() == [known]
    assert ledger.account(known).spent.mu > spent
    assert ledger.verify() == []


def test_a_killed_run_is_resumed(first, monkeypatch):
    monkeypatch.chdir(first)
    options = ["--epsilon", "3", "--data", "data.npz", "--classes", "a,b,c", "--scope", "head"]
    command = ["train", *options, "--steps", "2000", "--output", "killed", "--resume"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert verify(first / "killed").passed
    assert not (first / "killed.partial").exists()
    assert Ledger(first / "ledger.sqlite").unmarked() == []

import json
import shutil
import sqlite3

import numpy as np
import pytest
from builders import small_images
from click.testing import CliRunner

from dptaft.cli import main
from dptaft.data import load_data
from dptaft_accounting.ledger import Cost, Ledger
from dptaft_accounting.mechanisms import FullBatchGaussian


def run(*arguments):
    return CliRunner().invoke(main, ["ledger", *(str(a) for a in arguments)])


def train(archive, output, *options):
    arguments = ("train", "--data", archive, "--scope", "head", "--steps", 3, "--output", output, *options)
    return CliRunner().invoke(main, [str(a) for a in arguments])


def write_archive(path, seed=0):
    images, labels = small_images(60, seed=seed)
    np.savez(path, images=images, labels=labels)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "bands.npz")


@pytest.fixture(scope="module")
def project(archive, tmp_path_factory):
    """A budget of 3, a finished run of 2, a refused run."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "ledger.sqlite"
    made = run("init", "--ledger", path, "--data", archive, "--epsilon", 3, "--delta", 1e-5)
    assert made.exit_code == 0, made.output
    first = train(archive, folder / "first", "--epsilon", 2)
    assert first.exit_code == 0, first.output
    second = train(archive, folder / "second", "--epsilon", 2.9)
    assert second.exit_code == 2, second.output
    return folder, made.output, first.output, second.output


def test_init_shows_the_budget(project):
    _, made, _, _ = project
    assert "bands (1 version)" in made
    assert "epsilon 3 at delta 1e-05, filter gdp (mu 0.718757), zero-out, one training record" in made
    assert "epsilon 3 at delta 1e-05 for one more full-batch run" in made


def test_training_shows_what_is_left(project):
    folder, _, first, _ = project
    line = next(line for line in first.splitlines() if line.startswith("budget"))
    assert f"spent on bands (ledger {folder / 'ledger.sqlite'}); one more run at delta 1e-05 may have" in line
    assert "may have epsilon 2.05" in line


def test_training_shows_which_ledger_was_charged_without_a_budget_too(archive, tmp_path):
    """A run folder elsewhere has another ledger, where nothing is declared: both are said."""
    beside = train(archive, tmp_path / "elsewhere" / "run", "--epsilon", 1)
    line = next(line for line in beside.output.splitlines() if line.startswith("budget"))
    assert (
        f"(ledger {tmp_path / 'elsewhere' / 'ledger.sqlite'}); no budget is declared (`dptaft ledger" in line
    )
    shared = tmp_path / "shared.sqlite"
    far = train(archive, tmp_path / "elsewhere" / "two", "--epsilon", 1, "--ledger", shared)
    line = next(line for line in far.output.splitlines() if line.startswith("budget"))
    assert f"(ledger {Ledger(shared).id})" in line


def test_a_run_that_does_not_fit_is_refused_in_one_line(project):
    folder, _, _, second = project
    assert second.startswith("Error: the run would bring the total of 'bands' to epsilon 3.6")
    assert "above its budget of 3" in second
    assert second.count("\n") == 1
    assert not (folder / "second").exists()
    fits = float(second.split("that fits is ")[1])
    assert (
        fits
        == json.loads(run("show", "--ledger", folder / "ledger.sqlite", "--json").output)["data_sets"][0][
            "remaining"
        ]["epsilon"]
    )


def test_show(project):
    folder, *_ = project
    text = run("show", "--ledger", folder / "ledger.sqlite").output
    assert "spent      epsilon 1.99998 at delta 1e-05 (mu 0.50" in text
    assert "remaining  epsilon 2.05" in text
    assert text.splitlines()[-1].endswith("first")
    assert "committed" in text
    facts = json.loads(run("show", "--ledger", folder / "ledger.sqlite", "--json").output)
    assert facts["head"] == Ledger(folder / "ledger.sqlite").head
    assert facts["data_sets"][0]["budget"]["epsilon"] == 3.0
    assert [entry["state"] for entry in facts["data_sets"][0]["runs"]] == ["committed"]


def test_verify_checks_rows_and_statements(project, tmp_path):
    folder, *_ = project
    fine = run("verify", "--ledger", folder / "ledger.sqlite")
    assert fine.exit_code == 0
    assert "1 statement checked" in fine.output
    facts = json.loads(run("verify", "--ledger", folder / "ledger.sqlite", "--json").output)
    assert facts["verified"] is True
    assert facts["runs"] == [str(folder / "first")]
    lost = run("verify", "--ledger", folder / "ledger.sqlite", "--head", "0" * 64)
    assert lost.exit_code == 1
    assert lost.output.startswith("FAILED  no row has the hash 000")


def test_verify_catches_a_restored_copy_and_a_changed_row(project, archive, tmp_path):
    folder, *_ = project
    old = tmp_path / "old.sqlite"
    run("init", "--ledger", old, "--data", archive)
    restored = run("verify", folder / "first", "--ledger", old)
    assert restored.exit_code == 1
    assert "an older copy was restored" in restored.output
    changed = shutil.copy(folder / "ledger.sqlite", tmp_path / "changed.sqlite")
    connection = sqlite3.connect(changed)
    connection.execute("DROP TRIGGER rows_stay")
    connection.execute('UPDATE rows SET body = replace(body, \'"epsilon":"1\', \'"epsilon":"0\')')
    connection.commit()
    connection.close()
    found = run("verify", "--ledger", changed, "--json")
    assert found.exit_code == 1
    assert "was changed: its hash does not match" in json.loads(found.output)["problems"][0]
    assert run("show", "--ledger", changed).exit_code == 2


def test_export_holds_all_rows_and_no_key(project, tmp_path):
    folder, *_ = project
    path = folder / "ledger.sqlite"
    text = run("export", "--ledger", path).output
    found = json.loads(text)
    assert found["head"] == found["rows"][-1]["hash"] == Ledger(path).head
    key = sqlite3.connect(path).execute("SELECT key FROM secret").fetchone()[0]
    assert key not in text
    assert run("export", "--ledger", path, "--output", tmp_path / "x.json").exit_code == 0
    assert json.loads((tmp_path / "x.json").read_text()) == found
    assert run("export", "--ledger", path, "--output", tmp_path / "x.json").exit_code == 2


def test_versions_names_and_replaced_budgets(archive, tmp_path):
    path, other = tmp_path / "l.sqlite", write_archive(tmp_path / "bands.npz", seed=1)
    common = ("init", "--ledger", path, "--data")
    assert run(*common, archive, "--mu", 0.7).exit_code == 0
    assert run(*common, archive, "--epsilon", 5).exit_code == 2
    assert "declared 2 times" in run(*common, archive, "--epsilon", 5, "--replace").output
    refused = train(other, tmp_path / "x", "--epsilon", 1, "--ledger", path)
    assert refused.exit_code == 2
    assert "--version-of bands --data" in refused.output
    assert "2 versions" in run(*common, other, "--version-of", "bands").output
    third = write_archive(tmp_path / "more.npz", seed=2)
    assert (
        "data set   mine" in run(*common, third, "--name", "mine", "--epsilon", 1, "--filter", "sum").output
    )
    facts = json.loads(run("show", "--ledger", path, "--json").output)
    assert [entry["data_set"] for entry in facts["data_sets"]] == ["bands", "mine"]
    assert facts["data_sets"][1]["filter"] == "sum"


def test_an_abandoned_run_is_closed(archive, tmp_path):
    from dptaft.budgeting import open_ledger
    from dptaft.identity import content_digest

    ledger = open_ledger(tmp_path / "l.sqlite")
    content = content_digest(load_data(str(archive)).train)
    ledger.register(content, "bands")
    mechanism = FullBatchGaussian(10.0, steps=4)
    cost = Cost.of(mechanism, delta=1e-5)
    first = ledger.reserve(content, cost, mechanism, run="r")
    second = ledger.reserve(content, cost, mechanism, run="s")
    ledger.authorise(second.id, second.token, cost)
    assert "with unfinished" in run("show", "--ledger", ledger.path).output
    alive = run("close", first.id, "--ledger", ledger.path)
    assert alive.exit_code == 2
    assert "still runs; end it first, or say --force" in alive.output
    assert "released: nothing was spent" in run("close", first.id, "--ledger", ledger.path, "--force").output
    closed = run("close", second.id, "--ledger", ledger.path, "--force", "--json")
    assert json.loads(closed.output)["state"] == "closed"
    assert run("close", "unknown", "--ledger", ledger.path).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("init", "--epsilon", 3), "give --data"),
        (("init", "--data", "digits", "--epsilon", 3, "--mu", 1), "give one of them"),
        (("init", "--data", "digits", "--mu", 1, "--filter", "sum"), "needs --filter gdp"),
        (("init", "--data", "digits", "--delta", 1e-5), "belong to a budget"),
        (("init", "--data", "digits", "--name", "a", "--version-of", "b"), "leave --name out"),
        (("init", "--data", "digits", "--epsilon", -1), "epsilon must be greater than 0, got -1"),
        (
            ("init", "--data", "digits", "--epsilon", 1, "--delta", 2),
            "delta must lie strictly between 0 and 1",
        ),
        (("init", "--data", "/no/such/place", "--epsilon", 1), "no data set or path"),
        (("show",), "there is no ledger"),
        (("verify",), "there is no ledger"),
        (("export",), "there is no ledger"),
        (("close", "abc"), "there is no ledger"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(options, message, tmp_path):
    result = run(*options, "--ledger", tmp_path / "none.sqlite")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "none.sqlite").exists()


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_garbage_and_foreign_files(command, tmp_path):
    (tmp_path / "x.sqlite").write_bytes(b"no database at all, " * 400)
    result = run(command, "--ledger", tmp_path / "x.sqlite")
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "no SQLite file" in result.output


def test_train_takes_one_of_ledger_and_no_ledger(archive, tmp_path):
    both = train(archive, tmp_path / "x", "--epsilon", 1, "--ledger", tmp_path / "l", "--no-ledger")
    assert both.exit_code == 2
    assert "exclude each other" in both.output
    without = train(archive, tmp_path / "x", "--epsilon", 1, "--no-ledger", "--json")
    facts = json.loads(without.output)
    assert facts["ledger"]["ledger"] == "none: declined by the user"
    assert any("no budget ledger recorded this run" in line for line in facts["caveats"])


def test_an_empty_ledger(tmp_path):
    made = run("init", "--ledger", tmp_path / "l.sqlite", "--json")
    assert json.loads(made.output)["id"] == Ledger(tmp_path / "l.sqlite").id
    assert run("init", "--ledger", tmp_path / "l.sqlite").exit_code == 2

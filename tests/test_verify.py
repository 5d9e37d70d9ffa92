"""`dptaft verify`: every change of a run is found, whatever file it is in; forged claims are recomputed."""

import contextlib
import hashlib
import json
import random
import shutil
import sqlite3
import subprocess
import sys

import pytest
from click.testing import CliRunner
from run_folders import (
    CONVEX,
    FULL,
    POISSON,
    details,
    leaves,
    make_baseline,
    make_run,
    other,
    proof,
    replaced,
)

from dptaft import budgeting, ledger_check
from dptaft.cli import main
from dptaft.report.facts import facts
from dptaft.runs import RunError, load_run
from dptaft.verification import verify
from dptaft_accounting.canonical import content_id, dumps
from dptaft_accounting.convexity import LossConstants
from dptaft_accounting.ledger import Cost, Ledger
from dptaft_accounting.policy import Policy

FILES = ("run.toml", "privacy.json", "model.safetensors", "metrics.jsonl")


def cli(*arguments):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one").path


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def refused(path):
    """Whether verification fails or refuses the input, and loading refuses it as well."""
    try:
        bad = not verify(path).passed
    except RunError:
        bad = True
    try:
        load_run(path)
    except ValueError:
        return bad
    return False


def test_a_sound_run_passes(run):
    found = verify(run)
    assert found.passed, found.failures
    assert {c.name for c in found.checks if c.status == "passed"} == {
        "statement",
        "files",
        "claim",
        "second accountant",
        "agreement",
    }
    assert found.second.epsilon == pytest.approx(found.epsilon, rel=1e-8)
    result = cli(run)
    assert result.exit_code == 0
    assert result.output.splitlines()[-1].startswith("verified: epsilon at most")


def test_every_field_of_the_statement_is_bound(copy):
    document = json.loads((copy / "privacy.json").read_text())
    paths = list(leaves(document))
    assert len(paths) > 60
    for path, value in paths:
        (copy / "privacy.json").write_text(replaced(document, path, other(value)))
        assert refused(copy), path


def test_every_field_of_a_run_without_a_claim_is_bound(tmp_path):
    folder = make_baseline(tmp_path / "n").path
    document = json.loads((folder / "privacy.json").read_text())
    for path, value in leaves(document):
        (folder / "privacy.json").write_text(replaced(document, path, other(value)))
        assert refused(folder), path


# what a forger who renames the content can still change: words and facts that the record does not decide
FREE = {
    ("claim", "unit"), ("claim", "not_protected"), ("claim", "public"), ("claim", "data_accesses"),
    ("claim", "assumptions"), ("accounting", "version"), ("mechanism", "clipping"), ("mechanism", "noise_std"),
    ("mechanism", "normaliser"), ("mechanism", "sensitivity"), ("mechanism", "l2_clip_norm"),
    ("mechanism", "steps_planned"), ("mechanism", "sampler"), ("implementation", "noise_source"),
    ("implementation", "sampling_source"), ("implementation", "versions"), ("utility", "metric"),
    ("utility", "split"), ("utility", "private"), ("claim", "epsilon"),
}  # fmt: skip


def flattering(path, value):
    """Another value, for bounds on the loss a smaller one: a larger one would be valid."""
    is_bound = path[0] in ("accounting", "risk") and isinstance(value, float) and "bayes_error" not in path
    return value / 2 if is_bound and value else other(value)


def test_a_renamed_forgery_must_still_follow_from_the_record(copy):
    """Resealed: the hash fits again, so only meaning can betray the change."""
    document = json.loads((copy / "privacy.json").read_text())
    for path, value in leaves(document):
        if path[:2] in FREE or path == ("admin", "id") or (path[-1] == "regret" and value == 0):
            continue
        (copy / "privacy.json").write_text(replaced(document, path, flattering(path, value), seal=True))
        with contextlib.suppress(RunError):
            assert not verify(copy).passed, path


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("claim", "epsilon"), 1.0),
        (("claim", "epsilon"), 200.0),
        (("claim", "delta"), 1e-9),
        (("mechanism", "noise_std"), 14.9),
        (("mechanism", "sensitivity"), 1.4),
        (("mechanism", "l2_clip_norm"), 1.6),
        (("mechanism", "sampler"), "poisson"),
        (("mechanism", "steps_executed"), 51),
        (("risk", "tpr_at_fpr", 0, "tpr"), 0.0),
    ],
)
def test_renamed_forgeries_of_numbers(copy, path, value):
    document = json.loads((copy / "privacy.json").read_text())
    (copy / "privacy.json").write_text(replaced(document, path, value, seal=True))
    assert not verify(copy).passed


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(copy, name):
    file = copy / name
    content, draw = file.read_bytes(), random.Random(name)
    places = range(len(content)) if len(content) < 300 else draw.sample(range(len(content)), 150)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        assert refused(copy), (name, place)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [lambda b: b + b"\n", lambda b: b" " + b, lambda b: b[:-1], lambda b: b""])
def test_added_and_lost_bytes_are_found(copy, name, change):
    file = copy / name
    file.write_bytes(change(file.read_bytes()))
    assert refused(copy)


@pytest.mark.parametrize(
    "names",
    [
        ("run.toml",),
        ("privacy.json",),
        ("model.safetensors",),
        ("metrics.jsonl",),
        ("run.toml", "model.safetensors", "metrics.jsonl"),
    ],
)
def test_files_of_another_run_are_found(copy, tmp_path, names):
    twin = make_run(tmp_path / "twin", name="two", weights=1.0, accuracy=0.8).path
    for name in names:
        shutil.copy(twin / name, copy / name)
    assert refused(copy)


def test_a_missing_file_is_unusable_input(copy):
    for name in FILES:
        (copy / name).rename(copy / "away")
        result = cli(copy)
        assert result.exit_code == 2
        assert name in result.output
        (copy / "away").rename(copy / name)


def test_the_configuration_must_say_what_the_statement_says(copy):
    """A forger who rewrites statement and hashes still has to change all files alike."""
    text = (copy / "run.toml").read_text()
    document = json.loads((copy / "privacy.json").read_text())
    for old, new in (
        ('"cross-entropy"', '"other"'),
        ('"zero-out"', '"replace-one"'),
        ("epsilon = 100.0", "epsilon = 1.0"),
    ):
        (copy / "run.toml").write_text(text.replace(old, new))
        document["admin"]["files"]["run.toml"] = hashlib.sha256((copy / "run.toml").read_bytes()).hexdigest()
        document["admin"]["id"] = content_id(document)
        (copy / "privacy.json").write_text(dumps(document))
        found = verify(copy)
        assert [c.name for c in found.failures] == ["agreement"], old


def test_no_claim_is_no_verified_claim(tmp_path):
    folder = make_baseline(tmp_path / "n").path
    result = cli(folder)
    assert result.exit_code == 1
    assert "no privacy is claimed: epsilon is infinite" in result.output


def test_a_statement_alone(run, tmp_path):
    alone = shutil.copy(run / "privacy.json", tmp_path / "statement.json")
    found = verify(alone)
    assert found.passed
    assert any(c.status == "note" and "statement alone" in c.message for c in found.checks)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ('{"claim": {"eps', "not JSON"),
        ("[1, 2]", "must be object"),
        ('{"hello": 1}', "lacks the field"),
        ('{"no_claim": "x"}', "no_claim and admin"),
        ('{"no_claim": "x", "admin": {"schema_version": 1}}', "admin.id must be text"),
        ('{"no_claim": "x", "admin": {"schema_version": 7, "id": ""}}', "schema version 7"),
        ('{"admin": {"schema_version": 2}}', "schema version 2"),
        ("[" * 50_000, "not JSON"),
        ('{"a": NaN}', "not a number"),
        ("\udcff", "cannot read"),
    ],
)
def test_unusable_statements_get_one_line_and_exit_code_2(tmp_path, text, words):
    file = tmp_path / "x.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    result = cli(file)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.splitlines()) == 1


def test_gates_by_epsilon_and_policy(run, tmp_path):
    epsilon = load_run(run).statement.claim["epsilon"]
    assert cli(run, "--max-epsilon", epsilon).exit_code == 0
    assert cli(run, "--max-epsilon", epsilon * 0.999).exit_code == 1
    assert cli(run, "--max-epsilon", 0).exit_code == 1
    assert cli(run, "--max-epsilon", epsilon, "--at-delta", 1e-6).exit_code == 1
    assert cli(run, "--at-delta", 1e-6).exit_code == 2
    rules = tmp_path / "policy.toml"
    rules.write_text("max_epsilon = 100.0\nallowed_not_covered = []\n")
    result = cli(run, "--policy", rules)
    assert result.exit_code == 1
    assert "evaluation is not covered" in result.output
    rules.write_text("max_epsilon = 100.0\nsurprise = 1\n")
    assert cli(run, "--policy", rules).exit_code == 2


def test_json_output(run):
    found = json.loads(cli(run, "--json", "--max-epsilon", 0.1).output)
    assert found["verified"] is False
    assert [c["name"] for c in found["checks"] if c["status"] == "failed"] == ["policy"]
    assert found["recomputed_epsilon"] == found["claimed"]["epsilon"]


def test_certificates_are_issued_again(tmp_path):
    folder = make_run(tmp_path / "c", CONVEX, certificate=proof()).path
    found = verify(folder)
    assert found.passed, found.failures
    assert any(c.name == "certificate" and c.status == "passed" for c in found.checks)
    document = json.loads((folder / "privacy.json").read_text())
    assert document["accounting"]["bound"] != "composition"
    raw = ("accounting", "certificate")
    for path, value in leaves(document["accounting"]["certificate"], raw):
        if path[2] == "origin" and path[3] not in ("loss", "feature_bound"):
            continue
        (folder / "privacy.json").write_text(replaced(document, path, other(value), seal=True))
        failed = {c.name for c in verify(folder).failures}
        assert failed & {"certificate", "claim", "agreement"}, path


def test_a_smoother_certificate_than_its_parts_allow_is_found(tmp_path):
    """Halving smoothness and regularity by hand keeps a valid object, but not one that can be issued."""
    folder = make_run(tmp_path / "c", CONVEX, certificate=proof()).path
    document = json.loads((folder / "privacy.json").read_text())
    text = replaced(document, ("accounting", "certificate", "smoothness"), 0.1, seal=True)
    (folder / "privacy.json").write_text(text)
    assert any("smoothness" in c.message for c in verify(folder).failures if c.name == "certificate")


def test_the_second_accountant_finds_a_defect_of_the_first(run, monkeypatch, tmp_path):
    """If our composition were too small, statement and recomputation would agree; the other path would not."""
    from dptaft_accounting.accountants import composition

    true = composition.gaussian_mu
    monkeypatch.setattr(composition, "gaussian_mu", lambda m: true(m) and 0.99 * true(m))
    folder = make_run(tmp_path / "wrong").path
    failed = [c.name for c in verify(folder).failures]
    assert failed == ["second accountant"]


def test_the_linear_instance_finds_a_defect_of_the_last_iterate_bound(monkeypatch, tmp_path):
    from dptaft_accounting.accountants import last_iterate

    true = last_iterate.noisy_gd_mu
    assert verify(make_run(tmp_path / "right", CONVEX, certificate=proof()).path).passed
    monkeypatch.setattr(last_iterate, "noisy_gd_mu", lambda *given: 0.99 * true(*given))
    folder = make_run(tmp_path / "wrong", CONVEX, certificate=proof()).path
    assert [c.name for c in verify(folder).failures] == ["second accountant"]


def test_the_second_accountant_covers_poisson_sampling(tmp_path):
    found = verify(make_run(tmp_path / "p", POISSON).path)
    assert found.passed
    assert found.second.epsilon == pytest.approx(found.epsilon, rel=1e-3)
    assert found.second.epsilon <= found.epsilon


@pytest.fixture
def charged(tmp_path):
    """A run with the ledger that it was charged to beside it."""
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    ledger.register("content", "scans")
    cost = Cost.of(FULL, delta=1e-5)
    entry = ledger.reserve("content", cost, FULL, run="one")
    ledger.authorise(entry.id, entry.token, cost)
    entry = ledger.commit(entry.id, entry.token, cost, FULL)
    fields = budgeting.composition_fields(ledger, entry, 1e-5)
    return make_run(tmp_path / "one", composition=fields).path, tmp_path / "ledger.sqlite", fields


def test_the_ledger_beside_the_run_is_asked(charged):
    folder, path, _ = charged
    assert any(c.name == "ledger" and c.status == "passed" for c in verify(folder).checks)
    assert verify(folder, policy=Policy(require_ledger=True)).passed
    path.rename(path.with_name("elsewhere.sqlite"))
    assert [c.status for c in verify(folder).checks if c.name == "ledger"] == ["note"]
    assert verify(folder, ledger=path.with_name("elsewhere.sqlite")).passed
    assert cli(folder, "--ledger", path).exit_code == 2


@pytest.mark.parametrize("field", ["ledger", "ledger_entry", "ledger_entry_hash", "ledger_head", "data_set"])
def test_every_link_to_the_ledger_is_checked(charged, field):
    folder, _, fields = charged
    document = json.loads((folder / "privacy.json").read_text())
    text = replaced(document, ("composition", field), other(fields[field]), seal=True)
    (folder / "privacy.json").write_text(text)
    assert [c.name for c in verify(folder).failures] == ["ledger"]


def test_another_mechanism_than_the_one_charged_is_found(charged, tmp_path):
    _, path, fields = charged
    folder = make_run(tmp_path / "cheap", type(FULL)(9.0, 50), composition=fields).path
    assert "mechanism record" in " ".join(c.message for c in verify(folder, ledger=path).failures)


def test_another_ledger_and_a_run_without_one(charged, run, tmp_path):
    folder, path, _ = charged
    stranger = Ledger.create(tmp_path / "other.sqlite").path
    assert [c.name for c in verify(folder, ledger=stranger).failures] == ["ledger"]
    assert "was not charged" in cli(run, "--ledger", path).output


def test_changed_ledger_rows_are_found(charged):
    folder, path, _ = charged
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER rows_stay")
        connection.execute("UPDATE rows SET body = replace(body, 'scans', 'scanS')")
    connection.close()
    assert [c.name for c in verify(folder).failures] == ["ledger"]


def test_the_name_of_the_project_ledger_is_the_one_training_uses():
    assert ledger_check.LEDGER_NAME == budgeting.LEDGER_NAME


def test_foreign_text_cannot_steer_the_terminal(copy):
    document = json.loads((copy / "privacy.json").read_text())
    text = replaced(document, ("claim", "unit"), "one\x1b[2J\x1b[31m record", seal=True)
    (copy / "privacy.json").write_text(text)
    assert "\x1b" not in cli(copy).output


def test_it_needs_no_torch(run):
    code = (
        "import sys; sys.modules['torch'] = None; from dptaft.verification import verify; "
        f"assert verify({str(run)!r}).passed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["cross-entropy", "huber-square"])
def test_constants_of_losses_are_those_of_training(name):
    from dptaft.training.losses import LOSSES
    from dptaft_accounting.convexity import trained_constants

    loss, known = LOSSES[name](), trained_constants(name, 7)
    assert known.gradient == pytest.approx(loss.cotangent_bound(7), rel=1e-12)
    assert known.curvature == pytest.approx(loss.smoothness(7), rel=1e-12)


def test_certificates_of_the_other_loss_need_the_number_of_classes(tmp_path):
    issued = proof(loss="huber-square", constants=LossConstants(15.0, 1.0, scalar=False), l2_clip_norm=20.0)
    group = details(CONVEX, issued) | {"l2_clip_norm": 20.0, "noise_std": 200.0, "sensitivity": 20.0}
    folder = make_run(tmp_path / "c", CONVEX, certificate=issued, details=group).path
    assert verify(folder).passed
    alone = shutil.copy(folder / "privacy.json", tmp_path / "alone.json")
    assert [c.name for c in verify(alone).failures] == ["certificate"]


@pytest.mark.parametrize(
    ("audit", "status", "shown"),
    [
        ({"verdict": "consistent"}, "passed", True),
        ({"verdict": "inconclusive"}, "note", True),
        ({"verdict": "violation"}, "failed", True),
        ({"verdict": "consistent", "statement_id": "sha256:0"}, "note", False),
    ],
)
def test_an_audit_that_was_added_to_the_run(copy, audit, status, shown):
    names = {"statement_id": json.loads((copy / "privacy.json").read_text())["admin"]["id"]}
    (copy / "audit.json").write_text(json.dumps(names | audit))
    assert [c.status for c in verify(copy).checks if c.name == "audit"] == [status]
    policy = verify(copy, policy=Policy(require_audit=True))
    assert policy.passed is (status == "passed")
    assert bool(facts(load_run(copy)).audit) is shown
    (copy / "audit.json").write_text("{")
    assert cli(copy).exit_code == 2

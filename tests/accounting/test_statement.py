"""Statements: schema, exact round trip, recomputation, and that tampering shows."""

import json
import math

import jsonschema
import pytest

from dptaft_accounting.accountants import crosscheck
from dptaft_accounting.canonical import content_id
from dptaft_accounting.convexity import ConvexityCertificate
from dptaft_accounting.errors import AccountingError, StatementError
from dptaft_accounting.mechanisms import FullBatchGaussian, PoissonGaussian, SequenceComposition
from dptaft_accounting.schema import load_schema, validate
from dptaft_accounting.statement import PrivacyStatement

FULL = FullBatchGaussian(14.0, 100)


def build(mechanism=FULL, **changes):
    return PrivacyStatement.build(mechanism, **{"delta": 1e-5, "cross_check": False, **changes})


def convex():
    mechanism = PoissonGaussian(1.0, 0.05, 100, released="last-iterate")
    proof = ConvexityCertificate.issue(
        loss="multinomial-logistic",
        feature_bound=0.7,
        l2_clip_norm=1.0,
        regularization=0.1,
        step_size=1.0,
        normaliser=50.0,
        sampling="poisson",
        steps=100,
        records=1000,
        max_batch_size=150,
        sampling_rate=0.05,
    )
    return build(mechanism, certificate=proof, details={"l2_clip_norm": 1.0, "normaliser": 50.0})


FULL_DETAILS = {
    "claim": {
        "not_protected": ["that training took place"],
        "public": ["weights of the backbone"],
        "data_accesses": {"training": "covered", "evaluation": "not covered"},
    },
    "details": {"l2_clip_norm": 2.0, "noise_std": 28.0, "steps_planned": 100, "steps_executed": 100},
    "composition": {"ledger_entry": "7", "remaining": {"mu": 0.3}},
    "audit": {"method": "one run", "verdict": "consistent", "lower_bound": 0.4},
    "implementation": {"versions": {"torch": "2.6"}, "nan_policy": "stop"},
    "utility": {"metric": "accuracy", "value": 0.9, "private": False},
    "admin": {"run": "run-1", "caveats": ["none"]},
}


@pytest.mark.parametrize(
    "statement",
    [build(), build(**FULL_DETAILS), convex(), build(SequenceComposition((FULL, FULL)), records_per_unit=3)],
    ids=["plain", "details", "convex", "sequence"],
)
def test_round_trip_schema_and_recomputation(statement):
    text = statement.to_json()
    again = PrivacyStatement.from_json(text)
    assert again == statement
    assert again.to_json() == text
    jsonschema.Draft202012Validator.check_schema(load_schema())
    jsonschema.validate(json.loads(text), load_schema())
    result = again.recompute()
    assert result.holds, result.problems
    assert result.epsilon == statement.claim["epsilon"]


def test_contents_follow_from_the_mechanism():
    statement = convex()
    accounting = statement.accounting
    assert accounting["bound"] == "last-iterate hidden participation"
    assert statement.claim["epsilon"] < accounting["epsilon_composition"]
    assert accounting["epsilon_composition"] < accounting["epsilon_without_amplification"]
    assert accounting["mu"]["regret"] >= 0
    assert accounting["certificate"]["origin"]["loss"] == "multinomial-logistic"
    assert [point["delta"] for point in accounting["delta_to_epsilon"]] == [1e-4, 1e-5, 1e-6, 1e-7, 1e-8]
    at_claim = next(point for point in accounting["delta_to_epsilon"] if point["delta"] == 1e-5)
    assert at_claim["epsilon"] == statement.claim["epsilon"]
    assert statement.claim["released"] == "last-iterate"


def tampered(path, value):
    data = json.loads(build(**FULL_DETAILS).to_json())
    target = data
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    data["admin"]["id"] = content_id(data)
    return PrivacyStatement.from_json(json.dumps(data)).recompute()


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("claim", "epsilon"), 1.0, "below the recomputed"),
        (("claim", "delta"), 1e-9, "below the recomputed"),
        (("claim", "adjacency"), "replace-one", "claim.adjacency"),
        (("claim", "records_per_unit"), 2, "below the recomputed"),
        (("claim", "released"), "last-iterate", "claim.released"),
        (("mechanism", "record", "noise_multiplier"), 7.0, "below the recomputed"),
        (("mechanism", "record", "steps"), 1000, "below the recomputed"),
        (("mechanism", "noise_std"), 14.0, "noise_std 14 is below"),
        (("mechanism", "steps_executed"), 101, "steps_executed 101 exceeds"),
        (("accounting", "bound"), "wishful thinking", "accounting.bound"),
        (("accounting", "mu"), {"mu": 0.1, "residual_delta": 0.0, "regret": 0.0}, "accounting.mu"),
        (("accounting", "epsilon_composition"), 0.5, "epsilon_composition"),
        (("risk", "advantage"), 0.01, "risk.advantage"),
        (("risk", "tpr_at_fpr"), [], "risk.tpr_at_fpr"),
        (("accounting", "bounds"), [{"name": "composition", "epsilon": 0.5}], "accounting.bounds"),
        (("accounting", "delta_to_epsilon"), [], "delta_to_epsilon"),
    ],
)
def test_tampering_is_found(path, value, words):
    result = tampered(path, value)
    assert not result.holds
    assert any(words in problem for problem in result.problems), result.problems


def test_a_claim_above_the_recomputed_epsilon_still_holds():
    assert tampered(("claim", "epsilon"), 5.0).holds


@pytest.mark.parametrize("factor", [1 - 9e-7, 1 - 2e-8])
def test_a_claim_a_little_below_the_recomputed_epsilon_is_refused(factor):
    claimed = build(**FULL_DETAILS).claim["epsilon"]
    assert any("below the recomputed" in p for p in tampered(("claim", "epsilon"), claimed * factor).problems)
    assert tampered(("claim", "epsilon"), claimed).holds


def test_weaker_readings_than_the_recomputed_ones_are_valid():
    statement = build(**FULL_DETAILS)
    rows = [{**row, "epsilon": row["epsilon"] * 1.01} for row in statement.accounting["delta_to_epsilon"]]
    assert tampered(("accounting", "delta_to_epsilon"), rows).holds
    assert not tampered(("accounting", "delta_to_epsilon"), rows[1:]).holds
    stronger = [
        {**row, "epsilon": row["epsilon"] * 0.99999} for row in statement.accounting["delta_to_epsilon"]
    ]
    assert not tampered(("accounting", "delta_to_epsilon"), stronger).holds
    assert tampered(("risk", "advantage"), statement.risk["advantage"] * 1.01).holds
    assert not tampered(("risk", "advantage"), 1.0).holds
    far = [{**row, "epsilon": row["epsilon"] * 1.2} for row in rows]
    assert not tampered(("accounting", "delta_to_epsilon"), far).holds
    assert not tampered(("risk", "bayes_error"), 0.5).holds
    bounds = [{"name": "composition", "epsilon": 4.0}, {"name": "magic", "epsilon": 1.0}]
    assert not tampered(("accounting", "bounds"), bounds).holds
    assert not tampered(("accounting", "bounds"), []).holds


def test_clip_norm_must_be_the_certificates():
    data = json.loads(convex().to_json())
    data["mechanism"]["l2_clip_norm"] = 0.5
    problems = PrivacyStatement.from_json(json.dumps(data)).recompute().problems
    assert any("l2_clip_norm 0.5 is not the certificate's 1" in problem for problem in problems)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"details": {"seed": 3}}, "seed must never be published"),
        ({"implementation": {"a": {"noise_seed": 3}}}, "noise_seed must never be published"),
        ({"details": {"noise_std": -1.0}}, "noise_std is -1.0, against exclusiveMinimum"),
        ({"details": {"noise_std": math.nan}}, "cannot carry exactly"),
        ({"details": {"l2_clip_norm": "1"}}, "must be number"),
        ({"claim": {"epsilon": 0.1}}, "claim.epsilon is derived"),
        ({"claim": {"wish": 1}}, "no field 'wish'"),
        ({"claim": {"data_accesses": {"training": "maybe"}}}, "must be one of"),
        ({"audit": {"verdict": "fine"}}, "must be one of"),
        ({"audit": {"canaries": 1.5}}, "must be integer"),
        ({"utility": {"x": object()}}, "cannot carry exactly"),
        ({"delta": 0.0}, "delta must lie"),
    ],
)
def test_bad_fields_are_refused(changes, words):
    with pytest.raises(AccountingError, match=words):
        build(**changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "not JSON"),
        ("[]", "must be object"),
        ("{}", "lacks the field 'claim'"),
        (build().to_json().replace('"epsilon": ', '"epsilon": NaN, "x": ', 1), "NaN"),
        ('{"claim": {}, "claim": {}}', "repeats a field"),
        (
            build().to_json().replace('"schema_version": 1', '"schema_version": 2'),
            "schema version 2, .* update",
        ),
        (build().to_json().replace('"schema_version": 1', '"schema_version": 0'), "must be one of"),
        (build().to_json()[:-9], "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"admin": {"x": "\\ud800"}}', "no Unicode"),
        (build().to_json().replace('"steps": 100', f'"steps": 1{"0" * 400}'), "cannot carry exactly"),
        (build().to_json().replace('"steps": 100', f'"steps": 1{"0" * 5000}'), "not JSON"),
    ],
)
def test_bad_text_is_refused(text, words):
    with pytest.raises(StatementError, match=words):
        PrivacyStatement.from_json(text)


def test_no_finite_claim_no_statement():
    with pytest.raises(StatementError, match="no finite epsilon"):
        build(PoissonGaussian(1.0, 0.1, 1000), delta=1e-300)


def test_schema_validator_knows_every_keyword_of_the_schema():
    with pytest.raises(StatementError, match="unknown keyword 'pattern'"):
        validate("x", {"pattern": "y"})


def test_cross_checks_agree_and_are_recorded():
    statement = build(PoissonGaussian(1.0, 0.05, 200), cross_check=True)
    checks = {c["accountant"]: c for c in statement.accounting["cross_checks"]}
    assert checks["dp-accounting"]["note"] == "agrees"
    assert checks["dp-accounting"]["epsilon"] == pytest.approx(statement.claim["epsilon"], rel=5e-3)
    assert set(checks) == {"dp-accounting", "prv-accountant"}
    full = build(cross_check=True).accounting["cross_checks"]
    assert full[0]["epsilon"] == pytest.approx(build().claim["epsilon"], rel=5e-3)


def test_a_failing_peer_is_no_cross_check(monkeypatch):
    def fails(mechanism, delta):
        raise RuntimeError("Discrete mean differs significantly from continuous mean.\nmore")

    monkeypatch.setattr(crosscheck, "_prv_accountant", fails)
    found = crosscheck.cross_checks(PoissonGaussian(1.0, 0.05, 20), 1e-5, 10.0)
    assert found[1].epsilon is None
    assert found[1].note == "no cross-check: Discrete mean differs significantly from continuous mean."


def test_a_peer_above_our_bound_forbids_the_claim():
    with pytest.raises(AccountingError, match="no claim is made"):
        crosscheck.cross_checks(FULL, 1e-5, 1.0)
    unknown = crosscheck.cross_checks(SequenceComposition((FULL, PoissonGaussian(1.0, 0.1, 2))), 1e-5, 9.0)
    assert unknown[0].note.startswith("no cross-check: not available")


def test_the_id_names_the_content_and_nothing_else():
    statement = build(**FULL_DETAILS)
    assert statement.id == statement.admin["id"]
    assert statement.id.startswith("sha256:")
    assert build(**FULL_DETAILS).id == statement.id
    again = json.loads(statement.to_json())
    shuffled = json.dumps(dict(reversed(again.items())), indent=7)
    assert PrivacyStatement.from_json(shuffled).id == statement.id
    assert PrivacyStatement.from_json(shuffled).to_json() == statement.to_json()
    again["claim"]["unit"] = "one household"
    changed = PrivacyStatement.from_json(json.dumps(again))
    assert changed.id != statement.id
    assert "admin.id is not the hash" in changed.recompute().problems[0]


def test_epsilon_at_any_delta():
    statement = build()
    assert statement.epsilon_at(1e-5) == statement.claim["epsilon"]
    assert statement.epsilon_at(1e-7) > statement.claim["epsilon"] > statement.epsilon_at(1e-3)
    cautious = PrivacyStatement.from_json(
        statement.to_json().replace(f'"epsilon": {statement.claim["epsilon"]}', '"epsilon": 50.0')
    )
    assert cautious.epsilon_at(1e-5) == 50.0
    assert cautious.epsilon_at(1e-6) == 50.0
    assert cautious.epsilon_at(1e-4) < 50.0

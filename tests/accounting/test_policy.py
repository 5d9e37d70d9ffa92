"""Policies: every rule in both directions, and that a statement is never taken at its word."""

import dataclasses
import json

import pytest

from dptaft_accounting.canonical import content_id
from dptaft_accounting.errors import PolicyError
from dptaft_accounting.mechanisms import FullBatchGaussian, PoissonGaussian
from dptaft_accounting.policy import Policy, Violation
from dptaft_accounting.statement import PrivacyStatement

AES = "AES-256-CTR, key from operating-system entropy"
ACCESSES = {"training": "covered", "evaluation": "not covered", "classes": "public, declared by the user"}


FULL = FullBatchGaussian(14.0, 100)


def build(mechanism=FULL, **changes):
    values = {
        "delta": 1e-5,
        "cross_check": False,
        "claim": {"data_accesses": ACCESSES},
        "implementation": {"noise_source": AES, "sampling_source": "none: every record in every step"},
    }
    return PrivacyStatement.build(mechanism, **(values | changes))


STATEMENT = build()
EPSILON = STATEMENT.claim["epsilon"]


def rules(policy, statement=STATEMENT):
    return [violation.rule for violation in policy.violations(statement)]


def test_an_empty_policy_accepts_a_sound_statement():
    assert rules(Policy()) == []


@pytest.mark.parametrize(
    ("accepting", "refusing"),
    [
        ({"max_epsilon": EPSILON}, {"max_epsilon": EPSILON * (1 - 1e-9)}),
        ({"max_epsilon": EPSILON * 1.2, "delta": 1e-6}, {"max_epsilon": EPSILON, "delta": 1e-6}),
        ({"max_epsilon": EPSILON, "delta": 1e-4}, {"max_epsilon": 2.0, "delta": 1e-4}),
        ({"max_delta": 1e-5}, {"max_delta": 9e-6}),
        ({"max_advantage": 0.3}, {"max_advantage": 0.2}),
        ({"allowed_adjacency": ["zero-out", "replace-one"]}, {"allowed_adjacency": ("replace-one",)}),
        ({"min_records_per_unit": 1}, {"min_records_per_unit": 2}),
        ({"allowed_not_covered": ("evaluation",)}, {"allowed_not_covered": ()}),
        ({"allowed_declared": ("classes",)}, {"allowed_declared": ("evaluation",)}),
        ({"require_secure_noise": True}, {"require_ledger": True}),
        ({"require_audit": False}, {"require_audit": True}),
    ],
)
def test_each_rule_accepts_and_refuses(accepting, refusing):
    assert rules(Policy(**accepting)) == []
    found = Policy(**refusing).violations(STATEMENT)
    assert [v.rule for v in found] == [next(iter(refusing))]
    assert isinstance(found[0], Violation)
    assert "\n" not in found[0].message


@pytest.mark.parametrize(
    ("group", "value", "policy", "rule"),
    [
        ("implementation", {"noise_source": "numpy"}, {"require_secure_noise": True}, "require_secure_noise"),
        ("implementation", {}, {"require_secure_noise": True}, "require_secure_noise"),
        ("composition", {"ledger_entry": "7"}, {"require_ledger": True}, "require_ledger"),
        ("composition", {"ledger": "none: declined"}, {"require_ledger": True}, "require_ledger"),
        ("audit", {"verdict": "inconclusive"}, {"require_audit": True}, "require_audit"),
        ("audit", {"verdict": "violation"}, {}, "statement"),
        ("claim", {}, {"allowed_not_covered": ()}, "allowed_not_covered"),
    ],
)
def test_what_is_missing_or_wrong_is_refused(group, value, policy, rule):
    assert rule in rules(Policy(**policy), build(**{group: value}))


def test_ledger_and_audit_are_accepted():
    statement = build(composition={"ledger_entry": "7", "ledger_head": "ab"}, audit={"verdict": "consistent"})
    assert rules(Policy(require_ledger=True, require_audit=True), statement) == []


def changed(path, value, *, seal):
    data = json.loads(STATEMENT.to_json())
    data[path[0]][path[1]] = value
    if seal:
        data["admin"]["id"] = content_id(data)
    return PrivacyStatement.from_json(json.dumps(data))


def test_a_changed_statement_violates_every_policy():
    assert rules(Policy(), changed(("claim", "unit"), "one million records", seal=False)) == ["statement"]
    assert "statement" in rules(Policy(), changed(("claim", "epsilon"), 0.1, seal=True))


def test_epsilon_comes_from_the_record_not_from_the_print():
    forged = changed(("claim", "epsilon"), 0.1, seal=True)
    assert {"statement", "max_epsilon"} <= set(rules(Policy(max_epsilon=1.0), forged))


def test_a_claim_above_the_record_is_taken_at_its_word():
    cautious = changed(("claim", "epsilon"), 50.0, seal=True)
    assert cautious.recompute().holds
    assert rules(Policy(max_epsilon=10.0), cautious) == ["max_epsilon"]


def test_a_record_that_cannot_be_accounted_is_a_violation():
    broken = changed(("mechanism", "record"), {"kind": "unknown"}, seal=True)
    assert rules(Policy(), broken) == ["statement"]


def test_a_delta_without_finite_epsilon_is_refused():
    policy = Policy(max_epsilon=1e9, delta=1e-300)
    assert rules(policy, build(PoissonGaussian(1.0, 0.1, 1000))) == ["max_epsilon"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_epsilon": -1}, "at least 0"),
        ({"max_epsilon": "3"}, "must be a number"),
        ({"max_epsilon": True}, "must be a number"),
        ({"max_epsilon": float("nan")}, "finite"),
        ({"delta": 1e-5}, "give max_epsilon"),
        ({"max_epsilon": 1, "delta": 2}, "between 0 and 1"),
        ({"max_delta": 0}, "between 0 and 1"),
        ({"allowed_adjacency": ["swap"]}, "must be one of"),
        ({"allowed_adjacency": "zero-out"}, "list of names"),
        ({"allowed_not_covered": [1]}, "list of names"),
        ({"min_records_per_unit": 0}, "at least 1"),
        ({"require_ledger": "yes"}, "true or false"),
    ],
)
def test_malformed_policies_are_refused(fields, words):
    with pytest.raises(PolicyError, match=words):
        Policy(**fields)


def test_toml_files(tmp_path):
    file = tmp_path / "policy.toml"
    file.write_text(
        'max_epsilon = 8\ndelta = 1e-6\nallowed_adjacency = ["zero-out"]\nrequire_ledger = true\n'
    )
    policy = Policy.from_toml(file)
    assert policy == Policy(8.0, 1e-6, allowed_adjacency=("zero-out",), require_ledger=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.max_epsilon = 9.0
    for text, words in (
        ("max_epsilon = ", "not TOML"),
        ("max_eps = 1", "no rule 'max_eps'"),
        ("\udcff", "not TOML"),
    ):
        file.write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(PolicyError, match=words):
            Policy.from_toml(file)
    with pytest.raises(PolicyError, match="cannot read"):
        Policy.from_toml(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("audit", "found"),
    [
        ({"verdict": "consistent", "statement_id": STATEMENT.id}, []),
        ({"verdict": "consistent"}, []),
        ({"verdict": "consistent", "statement_id": "sha256:other"}, ["require_audit"]),
        ({"verdict": "violation", "statement_id": STATEMENT.id}, ["statement"]),
        ({}, ["require_audit"]),
    ],
)
def test_an_audit_beside_the_statement_counts_if_it_names_it(audit, found):
    assert [v.rule for v in Policy(require_audit=True).violations(STATEMENT, audit)] == found

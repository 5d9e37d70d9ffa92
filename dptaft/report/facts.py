"""What a report says, before it is laid out: plain text and numbers, taken from the statement of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dptaft.report.curves import Curves, curves
from dptaft.report.text import down, percent_up, up
from dptaft.runs import Run, read_audit
from dptaft_accounting import PrivacyStatement


class ReportError(ValueError):
    """No report can be made; the message says why and what to do."""


@dataclass(frozen=True)
class Number:
    """A headline: what it is called, its value, and a few words about it."""

    label: str
    value: str
    words: str


@dataclass(frozen=True)
class Risk:
    """One way to read the guarantee: what is measured, its bound, a sentence, and the bound as a fraction."""

    label: str
    value: str
    sentence: str
    fraction: float


@dataclass(frozen=True)
class Facts:
    """Everything that a report shows.

    Attributes:
        run: name of the run.
        time: when it ended.
        subject: model and data in a few words.
        claimed: whether privacy is claimed.
        sentence: the claim, or its absence, for a reader who knows no mathematics.
        formal: the claim in the field's terms; empty without one.
        numbers: headlines.
        risks: what an attacker can gain at most.
        accesses: (use of the data, status).
        assumptions: (assumption, who vouches, where to look).
        not_protected: what the claim does not protect.
        public: what it takes to be public.
        budget: (label, text) before and after the run.
        mechanism: (label, text) of what was done.
        accounting: (label, text) of how epsilon was bounded.
        utility: (label, text) of how good the model is.
        audit: (label, text) of an empirical audit; empty where there was none.
        caveats: what a reader must know.
        identity: (label, text): id and hashes.
        path: folder of the run, for the commands that check it.
        curves: what the plots show; None without a claim.
    """

    run: str
    time: str
    subject: str
    claimed: bool
    sentence: str
    formal: str
    path: str
    numbers: tuple[Number, ...] = ()
    risks: tuple[Risk, ...] = ()
    accesses: tuple[tuple[str, str], ...] = ()
    assumptions: tuple[tuple[str, str, str], ...] = ()
    not_protected: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    budget: tuple[tuple[str, str], ...] = ()
    mechanism: tuple[tuple[str, str], ...] = ()
    accounting: tuple[tuple[str, str], ...] = ()
    utility: tuple[tuple[str, str], ...] = ()
    audit: tuple[tuple[str, str], ...] = ()
    caveats: tuple[str, ...] = ()
    identity: tuple[tuple[str, str], ...] = ()
    curves: Curves | None = None


_USES = {
    "training": "training on the records",
    "normalisation": "constants that normalise images",
    "classes": "list of classes",
    "clipping_choice": "choice of the clip norm",
    "hyperparameters": "choice of hyperparameters",
    "head": "classifier that training starts from",
    "early_stopping": "early stopping",
    "number_of_records": "number of records",
    "backbone": "weights that training starts from",
    "evaluation": "accuracy on held-out images",
}
_GUESS = {
    "zero-out": "whether {unit} was used for training",
    "add-remove": "whether {unit} was used for training",
    "replace-one": "which of two candidates for {unit} was used for training",
}
_RELEASES = {
    "last-iterate": "the final model",
    "all-iterates": "the model and every intermediate state of its training",
    "the result alone": "the final model",
}


def facts(run: Run) -> Facts:
    """Collect the facts of a finished run.

    Raises:
        ReportError: the claim does not follow from its own record.
        AccountingError: the record cannot be accounted.
    """
    config = run.config
    subject = f"{config['model']['name']}, trained on {config['data']['name']}"
    shared = {
        "run": str(config["run"]["id"]),
        "time": str(config["run"]["time"]),
        "subject": subject,
        "path": str(run.path),
    }
    identity = (("id", run.id), *((name, f"SHA-256 {digest}") for name, digest in sorted(run.files.items())))
    statement = run.statement
    if statement is None:
        return Facts(
            **shared,
            claimed=False,
            sentence="This model carries no privacy claim. Treat it as if it contained the records it was "
            f"trained on. Reason: {run.no_claim}.",
            formal="",
            utility=_accuracy(run.accuracy, False),
            identity=identity,
        )
    result = statement.recompute()
    if not result.holds:
        raise ReportError(f"no report on a claim that does not hold: {result.problems[0]}; see dptaft verify")
    claim = statement.claim
    return Facts(
        **shared,
        claimed=True,
        sentence=_sentence(statement),
        formal=_formal(statement),
        numbers=_numbers(statement),
        risks=_risks(statement),
        accesses=_accesses(claim.get("data_accesses", {})),
        assumptions=tuple(
            (item["assumption"], item["vouched_by"], item["where"]) for item in claim.get("assumptions", [])
        ),
        not_protected=tuple(claim.get("not_protected", ())),
        public=tuple(claim.get("public", ())),
        budget=_budget(statement.composition),
        mechanism=_mechanism(statement.mechanism),
        accounting=_accounting(statement),
        utility=_accuracy(statement.utility.get("value"), bool(statement.utility.get("private"))),
        audit=_audit_rows(_audit(run, statement)),
        caveats=tuple(statement.admin.get("caveats", ())),
        identity=identity,
        curves=curves(statement),
    )


def _accesses(given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Known uses in a fixed order, then all others."""
    order = [name for name in _USES if name in given] + [name for name in given if name not in _USES]
    return tuple((_USES.get(name, name.replace("_", " ")), given[name]) for name in order)


def _owner(claim: Mapping[str, Any]) -> str:
    size = claim["records_per_unit"]
    return f"any {claim['unit']}" if size == 1 else f"any group of {size} records"


def _sentence(statement: PrivacyStatement) -> str:
    claim, risk = statement.claim, statement.risk
    guess = _GUESS[claim["adjacency"]].format(unit=_owner(claim))
    right = percent_up(1 - risk["bayes_error"])
    return (
        f"Whoever studies {_RELEASES.get(claim['released'], claim['released'])}, with unlimited means and "
        f"knowing every other record, can tell {guess} in at most {right} of cases; guessing blindly is "
        "right in 50\u00a0%."
    )


def _formal(statement: PrivacyStatement) -> str:
    claim = statement.claim
    return (
        f"({up(claim['epsilon'], 6)}, {up(claim['delta'], 3)})-differential privacy under "
        f"{claim['adjacency']} adjacency for {claim['unit']}"
        + (f" ({claim['records_per_unit']} records)" if claim["records_per_unit"] > 1 else "")
        + f"; released: {claim['released']}; bound: {statement.accounting['bound']}"
    )


def _numbers(statement: PrivacyStatement) -> tuple[Number, ...]:
    claim, mu = statement.claim, statement.accounting.get("mu")
    found = [
        Number(
            "epsilon", up(claim["epsilon"], 4), f"at delta {up(claim['delta'], 3)}; smaller is more private"
        ),
    ]
    if mu is not None:
        exact = "exactly Gaussian" if mu["regret"] == 0 else f"regret {up(mu['regret'], 2)}"
        found.append(Number("mu", up(mu["mu"], 4), f"Gaussian differential privacy, {exact}"))
    found.append(
        Number(
            "best guess",
            percent_up(1 - statement.risk["bayes_error"]),
            "right about one record; blind: 50\u00a0%",
        )
    )
    value = statement.utility.get("value")
    if value is not None:
        found.append(Number("accuracy", f"{value:.1%}".replace("%", "\u00a0%"), "on held-out images"))
    return tuple(found)


def _risks(statement: PrivacyStatement) -> tuple[Risk, ...]:
    risk = statement.risk
    found = [
        Risk(
            f"{_one_in(point['fpr'])} false alarms",
            percent_up(point["tpr"]),
            f"An attacker who wrongly accuses {_one_in(point['fpr'])} outsiders finds at most "
            f"{percent_up(point['tpr'])} of the members.",
            point["tpr"],
        )
        for point in risk["tpr_at_fpr"]
    ]
    gain, error = risk["advantage"], risk["bayes_error"]
    found += [
        Risk(
            "advantage",
            percent_up(gain),
            f"No attack's share of hits exceeds its share of false alarms by more than {percent_up(gain)}.",
            gain,
        ),
        Risk(
            "smallest error",
            f"{down(100 * error, 3)}\u00a0%",
            "At even odds beforehand, every guess about one record is wrong in at least this share of cases.",
            error,
        ),
    ]
    return tuple(found)


def _one_in(rate: float) -> str:
    return f"1 in {round(1 / rate):,}"


def _accuracy(value: float | None, private: bool) -> tuple[tuple[str, str], ...]:
    if value is None:
        return (("accuracy", "not measured"),)
    how = "measured privately" if private else "published as it is: the held-out images are not protected"
    return (("accuracy", f"{value:.2%}".replace("%", "\u00a0%") + f" on held-out images; {how}"),)


def _mechanism(group: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    record = group["record"]
    rows = [("mechanism", record["kind"])]
    noise = record.get("noise_multiplier")
    if isinstance(noise, list):
        rows.append(("noise multiplier", f"{min(noise):.5g} to {max(noise):.5g}, one per step"))
    elif noise is not None:
        rows.append(("noise multiplier", f"{noise:.5g}"))
    rows += [
        (label, f"{group[name]:.5g}" if isinstance(group[name], float) else str(group[name]))
        for name, label in _DETAILS.items()
        if name in group
    ]
    if "sampling_rate" in record:
        rows.append(("sampling rate", f"{record['sampling_rate']:.5g}"))
    known = {"record", "dtypes", *_DETAILS}
    rows += [(name.replace("_", " "), _words(group[name])) for name in group if name not in known]
    return tuple(rows)


_DETAILS = {
    "clipping": "clipping",
    "l2_clip_norm": "clip norm",
    "noise_std": "standard deviation of the noise on the sum",
    "sensitivity": "sensitivity of the sum",
    "sampler": "sampling",
    "expected_batch_size": "expected batch size",
    "normaliser": "public divisor of the sum",
    "steps_planned": "steps planned",
    "steps_executed": "steps executed",
    "stopping_rule": "stopping rule",
}


def _accounting(statement: PrivacyStatement) -> tuple[tuple[str, str], ...]:
    group, made = statement.accounting, statement.implementation
    rows = [(f"epsilon by {bound['name']}", up(bound["epsilon"], 6)) for bound in group["bounds"]]
    plain_sum = group.get("epsilon_without_amplification")
    if plain_sum is not None:
        rows.append(("epsilon without sampling", up(plain_sum, 6)))
    for check in group.get("cross_checks", []):
        value = "no value" if check["epsilon"] is None else up(check["epsilon"], 6)
        rows.append((f"{check['accountant']} {check['version']}", f"{value}: {check['note']}"))
    rows.append(("accountant", f"{group['accountant']} {group['version']}, {group['error_direction']}"))
    for name, label in (
        ("noise_source", "noise drawn from"),
        ("sampling_source", "samples drawn from"),
        ("float_mitigation", "floating point"),
        ("nan_policy", "undefined values"),
    ):
        if name in made:
            rows.append((label, str(made[name])))
    return tuple(rows)


_BUDGET = {
    "budget": "budget of the data set",
    "spent_before": "spent before this run",
    "this_run": "this run",
    "total": "spent after this run",
    "total_with_unfinished_runs": "with unfinished runs",
    "remaining": "remaining",
    "budget_note": "note",
    "runs_before": "runs before this one",
    "data_set": "data set",
    "filter": "rule of addition",
    "hyperparameter_choice": "hyperparameters",
    "hyperparameter_cost": "cost of choosing them",
    "ledger": "ledger",
    "ledger_entry": "ledger entry",
    "ledger_head": "head of the ledger",
}
_LEFT = ("budget", "remaining")  # what may still be spent is rounded down
_INTERNAL = ("ledger_entry_hash",)


def _budget(group: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    known = [(label, _amount(group[name], name in _LEFT)) for name, label in _BUDGET.items() if name in group]
    others = [
        (name.replace("_", " "), _words(value))
        for name, value in group.items()
        if name not in _BUDGET and name not in _INTERNAL
    ]
    return tuple(known + others)


def _amount(value: Any, left: bool) -> str:
    """A privacy amount as epsilon at delta with mu; other values as they are."""
    if not isinstance(value, Mapping) or "epsilon" not in value:
        return _words(value)
    rounded = down if left else up
    text = f"epsilon {rounded(value['epsilon'], 4)}"
    if isinstance(value.get("delta"), (int, float)):
        text += f" at delta {rounded(value['delta'], 3)}"
    if isinstance(value.get("mu"), (int, float)):
        text += f", mu {rounded(value['mu'], 4)}"
    return text


def _audit(run: Run, statement: PrivacyStatement) -> Mapping[str, Any]:
    """The audit of this statement: from the statement itself, or from the file that an audit added."""
    beside = read_audit(run.path)
    return beside if beside.get("statement_id") == run.id else statement.audit


_AUDIT = {
    "verdict": "verdict",
    "epsilon_lower_bound": "epsilon is at least",
    "lower_bound": "epsilon is at least",
    "epsilon_claimed": "claimed for the same attack",
    "epsilon_attainable": "largest value this audit could find",
    "attainable": "largest value this audit could find",
    "significance": "significance",
    "observer": "attacker sees",
    "observable": "attacker sees",
    "method": "method",
    "repetitions": "repetitions",
    "notes": "notes",
}
_CHECKS = ("sensitivity", "sampling", "noise")
_AUDIT_DETAILS = ("run", "statement_id", "test", "any_mechanism", "delta", "data", "canaries", *_CHECKS)


def _audit_rows(group: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    rows = []
    for name, label in _AUDIT.items():
        value = group.get(name)
        if value is not None:
            low = isinstance(value, float) and label == "epsilon is at least"
            rows.append((label, down(value) if low else _words(value)))
    for name in _CHECKS:
        check = group.get(name)
        if isinstance(check, Mapping) and "holds" in check:
            rows.append((f"check of {name}", "holds" if check["holds"] is True else "FAILED"))
    known = {*_AUDIT, *_AUDIT_DETAILS}
    return (*rows, *((n.replace("_", " "), _words(v)) for n, v in group.items() if n not in known))


def _words(value: Any) -> str:
    """A JSON value as a phrase."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return up(value, 6) if isinstance(value, float) and value > 0 else str(value)

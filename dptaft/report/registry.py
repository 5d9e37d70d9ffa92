"""A run as a draft entry for the Differential Privacy Deployments Registry.

Field names and enumerated values are those of `schemas/deployments-schema.yaml` in the public repository
opendp/deployments-registry-data, revision 3e9c812 of July 2026 (which renamed `dp_flavor` to `dp_variant`).
Fields that only the publisher knows say so; nothing is made up.
"""

from __future__ import annotations

import re
from typing import Any

from dptaft.report import yaml
from dptaft.report.facts import Facts, ReportError, facts
from dptaft.report.text import plain, up
from dptaft.runs import Run

_BY_PUBLISHER = "TO BE FILLED IN by the publisher"


def render_registry(run: Run) -> str:
    """The entry as YAML, status `Draft`.

    Raises:
        ReportError: the run claims no privacy.
    """
    return yaml.dumps(entry(run))


def entry(run: Run) -> dict[str, Any]:
    """The entry as plain values; see `render_registry`."""
    statement = run.statement
    if statement is None:
        raise ReportError(
            "a run without a privacy claim is no deployment of differential privacy; not exported"
        )
    found = facts(run)
    slug = re.sub(r"[^a-z0-9]+", "-", found.run.lower()).strip("-")
    return {
        "url_slug": slug or "run",
        "status": "Draft",
        "tier": 3,
        "deployment": {
            "basic": {
                "name": plain(found.run),
                "data_curators": [_BY_PUBLISHER],
                "intended_use": _BY_PUBLISHER,
                "data_product_type": "Machine learning model",
                "data_product_region": _BY_PUBLISHER,
                "description": plain(f"Image classifier: {found.subject}, {len(run.classes)} classes."),
                "publication_date": plain(found.time)[:10],
            },
            "dp_variant": {
                "variant_name": "Approximate DP",
                "data_domain": "Sets of labelled images of which each is one record.",
                "unprotected_quantities": _unprotected(found),
            },
            "privacy_loss": _loss(run, found),
            "deployment_model": {
                "model_name": "Central",
                "model_name_details": _trusted(run),
                "actors": plain(f"The curator who trains is trusted with the records. {found.sentence}"),
                "release_type": "One release",
                "data_source_type": "Static",
                "access_type": "Non-interactive",
            },
            "accounting": {
                "post_processing": "Predictions of the released model are post-processing.",
                "composition": _lines(found.accounting) + "\n\n" + _lines(found.budget),
            },
            "implementation": {
                "preprocessing_and_hyperparameter_tuning": _lines(found.accesses),
                "mechanisms": _lines(found.mechanism),
                "justification": _lines([(a, f"{by} ({where})") for a, by, where in found.assumptions]),
            },
            "administrative": {
                "notes": plain(f"Statement {run.id}; recomputable with `dptaft verify`.")
                + "".join(f"\n- {plain(line)}" for line in found.caveats),
                "registry_authors": [_BY_PUBLISHER],
            },
        },
    }


def _trusted(run: Run) -> str:
    made = run.statement.implementation if run.statement else {}
    if made.get("processes", 1) > 1:
        return f"{made['processes']} trusted processes of the curator read the records; one adds the noise."
    return "One trusted machine reads the records and adds the noise."


def _loss(run: Run, found: Facts) -> dict[str, Any]:
    claim = run.statement.claim if run.statement else {}
    return {
        "privacy_unit": plain(claim["unit"]),
        "privacy_unit_details": plain(
            f"{claim['adjacency']}: {_NEIGHBOURS[claim['adjacency']]}; "
            f"records of one owner that are covered together: {claim['records_per_unit']}"
        ),
        "privacy_parameters": {"epsilon": float(up(claim["epsilon"], 6)), "delta": float(claim["delta"])},
        "privacy_parameters_details": plain(found.formal)
        + "".join(f"\n- {plain(risk.sentence)}" for risk in found.risks),
    }


_NEIGHBOURS = {
    "zero-out": "neighbouring data sets differ in one record that is replaced by a null record",
    "add-remove": "neighbouring data sets differ in one record that is added or removed",
    "replace-one": "neighbouring data sets differ in one record that is replaced by another one",
}


def _unprotected(found: Facts) -> str:
    uses = [f"{use}: {status}" for use, status in found.accesses if status not in ("covered", "none")]
    return "\n".join(f"- {plain(line)}" for line in (*found.not_protected, *uses)) or "None"


def _lines(rows: Any) -> str:
    return "\n".join(f"- {plain(label)}: {plain(text)}" for label, text in rows) or "None"

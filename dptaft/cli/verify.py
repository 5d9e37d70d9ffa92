"""`dptaft verify`: recompute a claim and check that nothing of the run was changed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up
from dptaft.report.text import plain

if TYPE_CHECKING:
    from dptaft.verification import Verification
    from dptaft_accounting.policy import Policy


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--max-epsilon", type=float, help="Fail where epsilon is larger.")
@click.option("--at-delta", type=float, help="Read epsilon at this delta.  [default: the statement's]")
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), help="TOML file of rules to meet.")
@click.option("--ledger", type=click.Path(path_type=Path), help="Budget ledger to look the run up in.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def verify(
    path: Path,
    max_epsilon: float | None,
    at_delta: float | None,
    policy_file: Path | None,
    ledger: Path | None,
    as_json: bool,
) -> None:
    """Recompute the claim of a run (a folder, or its privacy.json) and check that nothing was changed.

    Exit code 0: everything holds. 1: something does not. 2: the input cannot be read.
    """
    from dptaft.verification import verify as check

    found = check(path, policy=_policy(policy_file, max_epsilon, at_delta), ledger=ledger)
    echo(json.dumps(found.to_dict(), indent=2) if as_json else table(found))
    if not found.passed:
        raise SystemExit(1)


def _policy(path: Path | None, max_epsilon: float | None, at_delta: float | None) -> Policy | None:
    if path is None and max_epsilon is None and at_delta is None:
        return None
    from dptaft_accounting.policy import Policy

    policy = Policy() if path is None else Policy.from_toml(path)
    given = {"max_epsilon": max_epsilon, "delta": at_delta}
    return replace(policy, **{name: value for name, value in given.items() if value is not None})


def table(found: Verification) -> str:
    """One line for each check, then the verdict."""
    marks = {"passed": "ok", "failed": "FAILED", "note": "note"}
    width = max(len(check.name) for check in found.checks)
    lines = [f"{marks[check.status]:<6}  {check.name:<{width}}  {check.message}" for check in found.checks]
    return "\n".join(plain(line, spaces=True) for line in (*lines, _verdict(found)))


def _verdict(found: Verification) -> str:
    if not found.passed:
        count = len(found.failures)
        return f"NOT VERIFIED: {count} check{'s' if count > 1 else ''} failed"
    claim = found.statement.claim if found.statement else {}
    return (
        f"verified: epsilon at most {up(claim['epsilon'], 6)} at delta {up(claim['delta'], 3)}, "
        f"{claim['adjacency']}, unit: {claim['unit']}"
    )

"""`dptaft budget --certified`: every number of a certified run, and why, without data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up

_FOREIGN = ("noise_multiplier", "table", "plot", "convex", "regularization", "step_size", "diameter")
_MORE = 10


def certified_budget(options: Mapping[str, Any]) -> None:
    """Plan a certified run and print the plan, its reasons and what it costs."""
    for name in _FOREIGN:
        if options[name]:
            raise click.UsageError(
                f"--{name.replace('_', '-')} has no meaning with --certified; leave it out"
            )
    if options["epsilon"] is None:
        raise click.UsageError("--certified needs --epsilon")
    result = certified_summary(options)
    if options["as_json"]:
        echo(json.dumps(result, indent=2, allow_nan=False))
        return
    for line in result["reasons"]:
        echo(f"plan               {line}")
    echo(f"epsilon            {up(result['epsilon'], 6)} at delta {result['delta']:g} ({result['bound']})")
    for name, value in result["bounds"].items():
        if name != result["bound"] and value is not None:
            echo(f"  beside it        {name}: {up(value, 6)}")
    echo(f"noise multiplier   {up(result['plan']['noise_multiplier'], 6)}")
    longer = result["ten_times_the_steps"]
    echo(
        f"{_MORE} x the steps      epsilon {up(longer['epsilon'], 6)}; by composition "
        f"{up(longer['epsilon_composition'], 6)}"
    )


def certified_summary(options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan of a certified run as plain values.

    Args:
        options: records, epsilon, delta, adjacency, steps, sampling, batch_size, loss, classes.
    """
    from dptaft.cli.budget import loss_name
    from dptaft.training.certified import design
    from dptaft.training.losses import LOSSES
    from dptaft.training.plan import PrivacyConfig, default_delta, make_plan, resolve_sampling
    from dptaft_accounting import best_bound

    records, loss = options["records"], loss_name(options["loss"])
    if loss not in LOSSES:
        raise click.UsageError(f"--certified plans cross-entropy or huber-square, not {loss!r}")
    privacy = PrivacyConfig(
        epsilon=options["epsilon"],
        delta=options["delta"],
        adjacency=options["adjacency"],
        steps=options["steps"],
        sampling=options["sampling"],
        expected_batch_size=options["batch_size"],
        public_size=records if options["adjacency"] == "add-remove" else None,
    )
    delta = default_delta(records) if privacy.delta is None else privacy.delta
    found = design(
        privacy,
        LOSSES[loss](),
        options["classes"],
        num_records=records,
        delta=delta,
        sampling=resolve_sampling(privacy, records),
    )
    plan = make_plan(
        privacy, num_records=records, steps=found.steps, sampling=found.sampling, certify=found.certify
    )
    mechanism = plan.mechanism()
    report = best_bound(mechanism, found.certificate, delta=delta)
    longer = replace(plan, steps=_MORE * plan.steps, noise_factors=plan.noise_factors * _MORE).mechanism()
    more = best_bound(longer, found.certify(longer), delta=delta)
    return {
        "epsilon": report.epsilon,
        "delta": delta,
        "bound": report.name,
        "bounds": {b.name: b.epsilon if math.isfinite(b.epsilon) else None for b in report.bounds},
        "plan": {
            "regularization": found.regularization,
            "step_size": found.step_size,
            "steps": plan.steps,
            "noise_multiplier": plan.noise_multiplier,
            "l2_clip_norm": found.l2_clip_norm,
            "max_batch_size": found.max_batch_size,
            "contraction": found.contraction,
        },
        "reasons": list(found.reasons),
        "ten_times_the_steps": {
            "epsilon": more.epsilon,
            "epsilon_composition": next(b.epsilon for b in more.bounds if b.name == "composition"),
        },
        "mechanism": mechanism.to_dict(),
    }

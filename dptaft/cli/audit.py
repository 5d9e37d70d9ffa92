"""`dptaft audit`: attack a run's own training with canaries and compare what leaks with what is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft.auditing.report import AuditReport


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data", help="The run's records; `synthetic` reads none.  [default: a named data set of the run]"
)
@click.option(
    "--observer",
    type=click.Choice(("all-iterates", "last-iterate", "black-box")),
    help="Who attacks.  [default: what the claim covers]",
)
@click.option(
    "--kind",
    type=click.Choice(("coordinate", "tangent", "mislabelled", "images")),
    help="What is inserted.  [default: coordinate; mislabelled for black-box]",
)
@click.option("--canaries", "count", type=click.IntRange(min=2), help="Number of canaries.")
@click.option("--canary-data", help="Labelled images to insert, for --kind images.")
@click.option("--repetitions", type=click.IntRange(min=1), help="Number of trainings.")
@click.option(
    "--significance",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Chance of calling a sound claim a violation.",
)
@click.option(
    "--membership", type=click.IntRange(min=4), help="Also attack the released model: shadow models."
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="With --membership: .png or .svg."
)
@click.option(
    "--attach", is_flag=True, help="Write audit.json into the run's folder; synthetic or public data."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def audit(run: Path, **options: Any) -> None:
    """Repeat the training of RUN with canaries and bound its privacy loss from below.

    Exit status 1 where the claim is violated.
    """
    from dptaft.auditing.report import AUDIT
    from dptaft.auditing.report import audit as audit_run
    from dptaft.cli.progress import Bars
    from dptaft.data import load_data

    plot, shadows = options["plot"], options["membership"]
    if plot is not None and shadows is None:
        raise click.UsageError("--plot shows the attack on the released model; add --membership")
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise click.UsageError(f"--plot writes .png or .svg, got {plot.name!r}")
    canary_data = options["canary_data"]
    with Bars() as progress:
        report = audit_run(
            run,
            data=options["data"],
            observer=options["observer"],
            canaries=options["kind"] or ("images" if canary_data else None),
            count=options["count"],
            canary_images=None if canary_data is None else load_data(canary_data, hold_out=False),
            repetitions=options["repetitions"],
            significance=options["significance"],
            attach=options["attach"],
            progress=progress,
        )
        document = report.to_dict()
        if shadows is not None:
            document["membership"] = _membership(run, options, progress)
    if options["attach"]:
        document["attached"] = str(Path(report.run) / AUDIT)
    echo(json.dumps(document, indent=2, allow_nan=False) if options["as_json"] else table(report, document))
    if report.verdict == "violation":
        raise SystemExit(1)


def _membership(run: Path, options: dict[str, Any], progress: Any) -> dict[str, Any]:
    from dptaft.auditing.membership import membership_attack

    found = membership_attack(run, data=options["data"], shadows=options["membership"], progress=progress)
    if options["plot"] is not None:
        found.plot(options["plot"])
    return found.to_dict()


def table(report: AuditReport, document: dict[str, Any]) -> str:
    """The report as aligned lines."""
    evidence, check = report.evidence, report.sensitivity
    rows = [
        ("verdict", report.verdict),
        (
            "lower bound",
            f"{_down(evidence.epsilon)} at delta {report.delta:g}, confidence {_confidence(report)}",
        ),
        ("claimed", f"{up(evidence.claimed, 6)} ({report.observer})"),
        ("attainable", f"{_down(evidence.attainable)} had every guess been right"),
        ("test", f"{evidence.method}; family: {evidence.family}"),
        ("any mechanism", f"{_down(report.any_mechanism.epsilon)} (one run, no family)"),
        (
            "canaries",
            f"{evidence.canaries} {report.canaries}, {evidence.correct} of {evidence.guesses} right",
        ),
        ("exercised", report.exercises),
        ("sensitivity", f"measured {check.measured:.6g}, declared {check.declared:.6g} ({check.worst})"),
        (
            "noise",
            report.noise.problem
            or f"{report.noise.ratio:.4f} times the declared {report.noise.declared:.4g}",
        ),
        ("batches", report.sampling.problem or f"as claimed ({report.sampling.claimed})"),
        ("data", f"{report.data}, {report.repetitions} repetition{'s' * (report.repetitions > 1)}"),
        ("spends", report.spends),
        *(("note", note) for note in report.notes),
    ]
    if "membership" in document:
        rows += [("membership", line) for line in document["membership"]["summary"]]
    if "attached" in document:
        rows.append(("attached", document["attached"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _confidence(report: AuditReport) -> str:
    return f"{100 * (1 - report.evidence.significance):g} %"


def _down(value: float) -> str:
    """Four digits, rounded down: a lower bound never exaggerates."""
    from decimal import ROUND_FLOOR, Context, Decimal

    return f"{float(Context(prec=4, rounding=ROUND_FLOOR).create_decimal(Decimal(value))):.4g}"

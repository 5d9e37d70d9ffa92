"""`dptaft train`: one private training run, from images to a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.backend import backend_options, chosen_backend
from dptaft.cli.echo import echo
from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft.runs import Run

_OPTIMIZER_FIELDS = ("kind", "learning_rate", "momentum", "l2_regularization", "averaging")
_SCHEDULES = ("learning_rate_schedule", "noise_schedule")


class Steps(click.ParamType):
    """A whole number, or `auto` for the public default."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number; None for `auto`."""
        return None if value == "auto" else int(click.INT.convert(value, param, ctx))


STEPS = Steps()


@click.command()
@click.option(
    "--epsilon", type=float, help="Privacy budget to spend at most; inf for a baseline without privacy."
)
@click.option("--delta", type=float, help="Failure probability.  [default: min(1e-5, 1/(10 n))]")
@click.option(
    "--data",
    default="digits",
    show_default=True,
    help="digits, fashion-mnist, a folder of class folders, a .csv of labels, a .npz, or hf:NAME.",
)
@click.option("--classes", help="Comma-separated class names; declared, so not taken from private data.")
@click.option("--public-data", is_flag=True, help="Declare the images a public benchmark.")
@click.option("--skip-corrupt", is_flag=True, help="Count an image that cannot be read as an empty record.")
@click.option(
    "--model", default="starter", show_default=True, help="starter, starter-scattering, or a timm name."
)
@click.option(
    "--weights", default="pretrained", show_default=True, help="pretrained, random, or a checkpoint file."
)
@click.option("--scope", default="last:1", show_default=True, help="head, last:K, attention:K or all.")
@click.option(
    "--method",
    type=click.Choice(["tangent", "non-linear", "objective-perturbation", "output-perturbation"]),
    default="tangent",
    show_default=True,
    help="Linearised model, ordinary fine-tuning of the same weights, or a linearised model solved once: no "
    "steps, no clipping, nothing to choose.",
)
@click.option(
    "--loss",
    type=click.Choice(["cross-entropy", "rescaled-square", "huber-square"]),
    default="cross-entropy",
    show_default=True,
)
@click.option("--steps", type=STEPS, help="Gradient steps, or auto.  [default: auto, by size and budget]")
@click.option(
    "--certified",
    is_flag=True,
    help="Convex training within a certificate, to convergence; claims the final weights alone.",
)
@click.option(
    "--clip-norm", "l2_clip_norm", type=float, help="Bound on one record's gradient.  [default: relative]"
)
@click.option("--learning-rate", type=float, help="Step size on the mean gradient.  [default: relative]")
@click.option(
    "--optimizer", "kind", type=click.Choice(["sgd", "momentum", "adam"]), help="[default: momentum]"
)
@click.option("--momentum", type=float, help="Decay of the velocity.  [default: 0.9]")
@click.option(
    "--l2", "l2_regularization", type=float, help="L2 regularisation, outside clipping.  [default: 0]"
)
@click.option(
    "--learning-rate-schedule", help="constant, linear:FINAL or cosine:FINAL, a factor on the step size."
)
@click.option("--noise-schedule", help="The same for the noise of a full batch; every step is accounted.")
@click.option("--averaging", type=click.Choice(["last", "tail", "ema"]), help="Which iterate to release.")
@click.option(
    "--sampling",
    type=click.Choice(["auto", "full-batch", "poisson", "cyclic-partition"]),
    default="auto",
    show_default=True,
    help="How batches are drawn; auto takes the full batch while that is quick.",
)
@click.option(
    "--batch-size", "expected_batch_size", type=int, help="Expected batch size of poisson or cyclic sampling."
)
@click.option(
    "--adjacency",
    type=click.Choice(["zero-out", "add-remove", "replace-one"]),
    default="zero-out",
    show_default=True,
    help="What neighbouring data sets are.",
)
@click.option("--public-size", type=int, help="Public number of records to divide by (for add-remove).")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Public seed of the random head; never of noise."
)
@click.option(
    "--insecure-seed", type=int, help="Seed noise and samples for debugging: voids the privacy claim."
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--engine",
    type=click.Choice(["auto", "fused", "hooks", "ghost"]),
    default="auto",
    show_default=True,
    help="How clipped sums are computed; all give the same numbers.",
)
@click.option("--physical-batch-size", type=int, help="Records in memory at once; changes nothing else.")
@click.option(
    "--feature-cache", type=click.Path(file_okay=False), help="Folder for cached features (private)."
)
@click.option(
    "--feature-precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
)
@click.option("--head", default="random", show_default=True, help="random, or a safetensors file of a head.")
@click.option("--centered/--uncentered", default=True, show_default=True, help="Drop or keep f(x; w0).")
@click.option(
    "--fresh-class-token", is_flag=True, help="New trainable class token at the first linearised block."
)
@click.option(
    "--reinitialised-blocks", type=int, default=0, show_default=True, help="Last blocks that start afresh."
)
@click.option(
    "--shards",
    help="Disjoint shards, one run each below --output: a number of random ones, or a column.",
)
@click.option(
    "--shards-of", type=click.Path(path_type=Path), help="Add a shard with this data to a folder of shards."
)
@click.option("--public-shards", type=int, help="Draw random shards from this public number, not secretly.")
@backend_options
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run.  [default: runs/<id>]")
@click.option(
    "--ledger",
    type=click.Path(path_type=Path),
    help="Budget ledger.  [default: ledger.sqlite beside the run]",
)
@click.option("--no-ledger", is_flag=True, help="Charge no ledger; the statement says so.")
@click.option("--resume", is_flag=True, help="Continue the interrupted run of the same --output and options.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def train(classes: str | None, as_json: bool, **options: Any) -> None:
    """Train privately on labelled images and write runs/<id>/.

    With no option but --epsilon it trains on scikit-learn's handwritten digits with the bundled backbone.
    Several processes share the records: `torchrun --nproc-per-node N -m dptaft train ...`.
    """
    shards = {name: options.pop(name) for name in ("shards", "shards_of", "public_shards")}
    backend = chosen_backend({name: options.pop(name) for name in ("backend", "jobs", "backend_option")})
    if not backend.in_this_process and shards["shards"] is None and shards["shards_of"] is None:
        raise click.UsageError("--backend and --jobs are for the trainings of --shards; leave them out")
    if options["epsilon"] is None and shards["shards_of"] is None:
        raise click.UsageError("give --epsilon, for example --epsilon 3 (or inf for no privacy)")
    if options.pop("no_ledger"):
        if options["ledger"] is not None:
            raise click.UsageError("--ledger and --no-ledger exclude each other; give one of them")
        options["ledger"] = None
    elif options["ledger"] is None:
        options["ledger"] = "auto"
    if options["resume"] and options["output"] is None:
        raise click.UsageError("--resume needs the --output of the interrupted run")
    import dptaft
    from dptaft.cli.progress import Bars
    from dptaft.distributed.ranks import RankLostError
    from dptaft.training.steps import TrainingInterruptedError

    given = {name: options.pop(name) for name in _OPTIMIZER_FIELDS}
    optimizer = {name: value for name, value in given.items() if value is not None}
    optimizer |= _schedules({name: options.pop(name) for name in _SCHEDULES})
    names = None if classes is None else [name.strip() for name in classes.split(",")]
    try:
        with Bars() as bars:
            common = {"classes": names, "progress": bars}
            if any(value is not None for value in shards.values()):
                from dptaft.cli.shards import train_parts
                from dptaft.distributed import require_one_process

                require_one_process("training of shards")
                options |= {"backend": backend, "as_json": as_json}
                echo(train_parts(shards, optimizer, **common, **options))
                return
            run = dptaft.train(optimizer=optimizer, **common, **options)
    except TrainingInterruptedError as stop:
        echo(str(stop), err=True)
        raise SystemExit(130) from None
    except RankLostError as lost:
        echo(str(lost), err=True)
        raise SystemExit(1) from None
    _show(run, as_json)


def _show(run: Run, as_json: bool) -> None:
    """Print the facts of a run; where that fails the run is there all the same."""
    try:
        echo(json.dumps(summary(run), indent=2) if as_json else table(run))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(
            f"the run is complete in {run.path}, its table was not printed ({error.strerror})"
        ) from None


def _schedules(texts: dict[str, str | None]) -> dict[str, Any]:
    given = {name: text for name, text in texts.items() if text is not None}
    if not given:
        return {}
    from dptaft.training.optimizers import Schedule

    return {name: Schedule.parse(text) for name, text in given.items()}


def summary(run: Run) -> dict[str, Any]:
    """The public facts of a run that the table shows."""
    facts: dict[str, Any] = {"run": str(run.path), "evaluation_accuracy": run.accuracy}
    if run.statement is None:
        return facts | {"no_privacy_claim": run.no_claim}
    statement = run.statement
    record, details = statement.mechanism["record"], statement.mechanism
    mu = statement.accounting.get("mu")
    return facts | {
        "epsilon": statement.claim["epsilon"],
        "delta": statement.claim["delta"],
        "mu": None if mu is None else mu["mu"],
        "bound": statement.accounting["bound"],
        "bounds": {bound["name"]: bound["epsilon"] for bound in statement.accounting["bounds"]},
        "released": statement.claim["released"],
        **_mechanism_facts(record, details),
        "sampling": details["sampler"],
        "adjacency": statement.claim["adjacency"],
        "unit": statement.claim["unit"],
        "random_source": statement.implementation["noise_source"],
        "ledger": {
            name: statement.composition.get(name) for name in ("ledger", "data_set", "total", "remaining")
        },
        "caveats": statement.admin.get("caveats", []),
    }


def _mechanism_facts(record: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, Any]:
    """Noise and steps, or what a run without steps has in their place."""
    if "noise_multiplier" not in record:
        names = ("method", "regularization", "objective_noise_std", "output_noise_std", "gradient_tolerance")
        return {"steps": None} | {name: details[name] for name in names}
    return {
        "noise_multiplier": record["noise_multiplier"],
        "noise_std": details["noise_std"],
        "l2_clip_norm": details["l2_clip_norm"],
        "steps": details["steps_executed"],
    }


def table(run: Run) -> str:
    """The summary as aligned lines."""
    facts = summary(run)
    accuracy = facts["evaluation_accuracy"]
    rows = [
        (
            "accuracy",
            "none: no evaluation images"
            if accuracy is None
            else f"{accuracy:.2%} on held-out evaluation images",
        )
    ]
    if run.statement is None:
        rows.append(("privacy", f"NO CLAIM: {run.no_claim}"))
    else:
        rows += _privacy_rows(facts)
    rows.append(("run", facts["run"]))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _privacy_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    mu = facts["mu"]
    return [
        ("epsilon", f"{up(facts['epsilon'], 6)} at delta {up(facts['delta'], 3)} ({facts['bound']})"),
        *(
            ("beside it", f"epsilon {up(value, 6)} ({name})")
            for name, value in facts["bounds"].items()
            if name != facts["bound"] and value is not None
        ),
        ("mu", f"{up(mu, 6)} (Gaussian differential privacy)" if mu is not None else "not exactly Gaussian"),
        *_mechanism_rows(facts),
        ("adjacency", f"{facts['adjacency']}, unit: {facts['unit']}"),
        ("random source", facts["random_source"]),
        *_budget_rows(facts["ledger"], Path(facts["run"]).parent),
        *(("note", line) for line in facts["caveats"]),
    ]


def _mechanism_rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    if facts["steps"] is None:
        inside, outside = facts["objective_noise_std"], facts["output_noise_std"]
        return [
            ("method", f"{facts['method']}: no steps, solved to gradient {facts['gradient_tolerance']:.3g}"),
            ("noise", f"{inside:.5g} on the objective, {outside:.5g} on the weights (standard deviations)"),
            ("regularization", f"{facts['regularization']:.5g} beside the sum of the losses"),
        ]
    noise = facts["noise_multiplier"]
    shown = f"{noise:.5g}" if isinstance(noise, float) else f"{min(noise):.5g} to {max(noise):.5g} (schedule)"
    return [
        ("noise multiplier", f"{shown} (standard deviation {facts['noise_std']:.5g} on the clipped sum)"),
        ("steps", f"{facts['steps']} ({facts['sampling']})"),
    ]


def _budget_rows(ledger: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Where the run was charged, what is spent there, and what is left of a declared budget, rounded down."""
    left, total = ledger["remaining"], ledger["total"]
    if total is None:
        return []
    beside = folder / "ledger.sqlite"
    place = beside if _is_ledger(beside, ledger["ledger"]) else ledger["ledger"]
    spent = (
        f"epsilon {up(total['epsilon'], 6)} at delta {up(total['delta'], 3)} spent on {ledger['data_set']}"
    )
    if left is None:
        rest = "no budget is declared (`dptaft ledger init` sets one)"
    elif left["epsilon"] > 0:
        rest = f"one more run at delta {left['delta']:g} may have epsilon {left['epsilon']:g}"
    else:
        rest = "nothing is left"
    return [("budget", f"{spent} (ledger {place}); {rest}")]


def _is_ledger(path: Path, name: str) -> bool:
    from dptaft_accounting.ledger import Ledger, LedgerError

    try:
        return Ledger(path).id == name
    except LedgerError:
        return False

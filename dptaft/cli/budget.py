"""`dptaft budget`: what a training plan would cost, or what noise a budget needs, without training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up

if TYPE_CHECKING:
    from dptaft.training.plan import Sampling
    from dptaft_accounting import BoundReport, ConvexityCertificate, Mechanism

SAMPLINGS = ("full-batch", "poisson", "cyclic-partition")
_TABLE_EPSILONS = (1.0, 2.0, 3.0, 8.0)


_OLD_LOSSES = {"multinomial-logistic": "cross-entropy"}
_IN_CERTIFICATES = {new: old for old, new in _OLD_LOSSES.items()}


def loss_name(given: str | None) -> str:
    """The one name of a loss: that of training, where training has it.

    >>> loss_name(None), loss_name("multinomial-logistic"), loss_name("huber")
    ('cross-entropy', 'cross-entropy', 'huber')
    """
    return _OLD_LOSSES.get(given or "cross-entropy", given or "cross-entropy")


@dataclass(frozen=True)
class Plan:
    """A training plan; the noise multiplier stays open until it is given or calibrated.

    Sampling, whole epochs, divisor and record are those of training (`dptaft.training.plan`).
    """

    kind: str
    records: int
    batch_size: int
    asked: int
    delta: float
    adjacency: str
    clip_norm: float
    convex: Mapping[str, Any] | None

    @cached_property
    def sampling(self) -> Sampling:
        """As training resolves it."""
        from dptaft.training.plan import PrivacyConfig, resolve_sampling

        size = None if self.kind == "full-batch" else self.batch_size
        return resolve_sampling(
            PrivacyConfig(epsilon=1.0, sampling=self.kind, expected_batch_size=size), self.records
        )

    @cached_property
    def steps(self) -> int:
        """Steps, rounded up to whole epochs for a cyclic partition."""
        from dptaft.training.plan import whole_epochs

        return whole_epochs(self.asked, self.sampling)

    @cached_property
    def normaliser(self) -> float:
        """The public divisor of the noised sum."""
        from dptaft.training.plan import normaliser_of

        return normaliser_of(self.sampling, self.records)

    def mechanism(self, noise_multiplier: float) -> Mechanism:
        """The mechanism of this plan at one noise multiplier."""
        from dptaft.training.plan import constant_record

        released = "all-iterates" if self.convex is None else "last-iterate"
        return constant_record(self.sampling, noise_multiplier, self.steps, self.adjacency, released)

    def certificate(self) -> ConvexityCertificate | None:
        """The convexity certificate of a convex plan."""
        from dptaft.training.plan import largest_batch
        from dptaft_accounting import ConvexityCertificate

        if self.convex is None:
            return None
        kind, extra = self.sampling.kind.removesuffix("-partition"), {}
        if kind == "poisson":
            extra = {"sampling_rate": self.sampling.rate}
        elif kind == "cyclic" and self.sampling.parts > 1:
            extra = {"batches_per_epoch": self.sampling.parts}
        else:
            kind = "full-batch"
        largest = largest_batch(
            self.records, self.sampling, delta=self.delta, adjacency=self.adjacency, most_steps=self.steps
        )
        return ConvexityCertificate.issue(
            l2_clip_norm=self.clip_norm,
            normaliser=self.normaliser,
            sampling=kind,
            steps=self.steps,
            records=self.records,
            max_batch_size=largest,
            adjacency=self.adjacency,
            **extra,
            **self.convex,
        )

    def report(self, noise_multiplier: float) -> BoundReport:
        """All bounds of this plan at one noise multiplier."""
        from dptaft_accounting import best_bound

        return best_bound(self.mechanism(noise_multiplier), self.certificate(), delta=self.delta)

    def calibrate(self, epsilon: float) -> float:
        """The noise multiplier that reaches `epsilon`."""
        from dptaft_accounting import Target, calibrate_noise_multiplier

        target = Target(epsilon=epsilon, delta=self.delta)
        return calibrate_noise_multiplier(self.mechanism, target, certificate=self.certificate())


def _summary(plan: Plan, noise_multiplier: float) -> dict[str, Any]:
    from dptaft_accounting.tradeoff import risk

    report = plan.report(noise_multiplier)
    danger = risk(report.profile)
    return {
        "epsilon": report.epsilon if math.isfinite(report.epsilon) else None,
        "delta": plan.delta,
        "adjacency": plan.adjacency,
        "released": "all iterates" if plan.convex is None else "last iterate",
        "bound": report.name,
        "bounds": {b.name: b.epsilon if math.isfinite(b.epsilon) else None for b in report.bounds},
        "noise_multiplier": noise_multiplier,
        "noise_std_on_average_gradient": noise_multiplier * plan.clip_norm / plan.normaliser,
        "mu": report.best.mu,
        "advantage": danger.advantage,
        "bayes_error": danger.bayes_error,
        "tpr_at_fpr": {f"{fpr:g}": tpr for fpr, tpr in danger.tpr_at_fpr.items()},
        "mechanism": plan.mechanism(noise_multiplier).to_dict(),
    }


def _what_if(plan: Plan, epsilons: tuple[float, ...]) -> list[dict[str, Any]]:
    """Noise that each combination of epsilon, steps and batch size needs."""
    rows = []
    sizes = [plan.batch_size]
    if plan.kind != "full-batch":
        sizes = sorted(
            {max(1, plan.batch_size // 2), plan.batch_size, min(plan.records, 2 * plan.batch_size)}
        )
    for size in sizes:
        for steps in sorted({max(1, plan.asked // 2), plan.asked, 2 * plan.asked}):
            other = replace(plan, batch_size=size, asked=steps)
            for epsilon in epsilons:
                noise = other.calibrate(epsilon)
                rows.append(
                    {
                        "epsilon": epsilon,
                        "steps": other.steps,
                        "batch_size": size,
                        "noise_multiplier": noise,
                        "noise_std_on_average_gradient": noise * plan.clip_norm / other.normaliser,
                    }
                )
    return rows


def _plot(plan: Plan, noise_multiplier: float, path: Path) -> None:
    """Draws epsilon against steps: composition, and the best bound of the last iterate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = 8 if plan.kind == "poisson" and plan.convex else 16
    ratio = plan.steps ** (1 / (count - 1)) if plan.steps > 1 else 1.0
    steps = sorted({max(1, round(ratio**k)) for k in range(count)} | {plan.steps})
    composition, last = [], []
    for number in steps:
        report = replace(plan, asked=number).report(noise_multiplier)
        composition.append(next(b.epsilon for b in report.bounds if b.name == "composition"))
        last.append(report.epsilon)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, composition, marker="o", label="composition (all iterates released)")
    if plan.convex is not None:
        axes.plot(steps, last, marker="s", label="last iterate, convex loss")
    axes.set(xscale="log", xlabel="steps", ylabel=f"epsilon at delta {plan.delta:g}", ylim=(0, None))
    axes.set_title(f"{plan.kind}, noise multiplier {noise_multiplier:.4g}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _print_summary(summary: Mapping[str, Any]) -> None:
    echo(f"epsilon            {up(summary['epsilon'], 6)} at delta {summary['delta']:g}")
    echo(f"adjacency          {summary['adjacency']}, released: {summary['released']}")
    echo(f"bound              {summary['bound']}")
    for name, value in summary["bounds"].items():
        if name != summary["bound"]:
            echo(f"  beside it        {name}: {up(value, 6)}")
    echo(f"noise multiplier   {up(summary['noise_multiplier'], 6)}")
    echo(f"noise std          {up(summary['noise_std_on_average_gradient'], 4)} on the average gradient")
    if summary["mu"] is not None:
        echo(f"mu                 {up(summary['mu'], 4)}")
    rates = ", ".join(f"{up(tpr, 2)} at FPR {fpr}" for fpr, tpr in summary["tpr_at_fpr"].items())
    echo(f"best attack        advantage {up(summary['advantage'], 3)}; TPR {rates}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    echo()
    echo(f"{'epsilon':>8} {'steps':>8} {'batch':>8} {'noise multiplier':>17} {'noise std (average)':>20}")
    for row in rows:
        echo(
            f"{row['epsilon']:>8g} {row['steps']:>8} {row['batch_size']:>8} "
            f"{up(row['noise_multiplier'], 5):>17} {up(row['noise_std_on_average_gradient'], 4):>20}"
        )


@click.command()
@click.option("--records", type=click.IntRange(min=1), required=True, help="Number n of training records.")
@click.option("--steps", type=click.IntRange(min=1), help="Number of training steps; planned by --certified.")
@click.option("--certified", is_flag=True, help="Plan a run of `dptaft train --certified`, with reasons.")
@click.option(
    "--classes",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="With --convex or --certified: number of classes.",
)
@click.option("--sampling", type=click.Choice(SAMPLINGS), default="full-batch", show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="(Expected) batch size; all records by default."
)
@click.option("--epsilon", type=float, help="Budget; the noise it needs is searched.")
@click.option("--noise-multiplier", type=float, help="Noise; what it costs is computed.")
@click.option("--delta", type=float, help="Failure probability; min(1e-5, 1/(10 n)) by default.")
@click.option(
    "--adjacency",
    type=click.Choice(("zero-out", "add-remove", "replace-one")),
    default="zero-out",
    show_default=True,
)
@click.option("--clip-norm", type=float, default=1.0, show_default=True, help="Clip norm C.")
@click.option("--convex", is_flag=True, help="Certify a convex loss and release the last iterate only.")
@click.option(
    "--loss", help="With --convex or --certified: the loss, as in training.  [default: cross-entropy]"
)
@click.option(
    "--feature-bound", type=float, default=0.7, show_default=True, help="With --convex: Jacobian norm."
)
@click.option("--regularization", type=float, help="With --convex: lambda of the quadratic regulariser.")
@click.option("--step-size", type=float, help="With --convex: step size.")
@click.option("--diameter", type=float, help="With --convex: diameter of the set iterates are projected on.")
@click.option("--table", is_flag=True, help="What-if table over epsilon, steps and batch size.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Plot epsilon over steps: .png, .svg."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def budget(**options: Any) -> None:
    """Say what a plan would cost, or what noise a budget needs, without training."""
    if options["certified"]:
        from dptaft.cli.certified_budget import certified_budget

        certified_budget(options)
        return
    if options["steps"] is None:
        raise click.UsageError("give --steps (only --certified plans them)")
    epsilon, noise = options["epsilon"], options["noise_multiplier"]
    if (epsilon is None) == (noise is None):
        raise click.UsageError("give exactly one of --epsilon and --noise-multiplier")
    plot = options["plot"]
    _check(options)
    plan = _plan(options)
    if noise is None:
        noise = plan.calibrate(epsilon)
    result = _summary(plan, noise)
    if options["table"]:
        result["what_if"] = _what_if(plan, _TABLE_EPSILONS if epsilon is None else (epsilon,))
    if plot is not None:
        _plot(plan, noise, plot)
        result["plot"] = str(plot)
    if options["as_json"]:
        echo(json.dumps(result, indent=2, allow_nan=False))
        return
    _print_summary(result)
    if options["table"]:
        _print_table(result["what_if"])
    if plot is not None:
        echo(f"plot               {plot}")


def _check(options: Mapping[str, Any]) -> None:
    plot = options["plot"]
    if plot is not None and plot.suffix.lower() not in (".png", ".svg"):
        raise click.UsageError(f"--plot writes .png or .svg, got {plot.name!r}")
    if plot is not None and not plot.parent.is_dir():
        raise click.UsageError(f"no folder {str(plot.parent)!r} to write --plot to; make it first")
    if not 0 < options["clip_norm"] < math.inf:
        raise click.UsageError(f"--clip-norm must be finite and positive, got {options['clip_norm']}")


def _loss(options: Mapping[str, Any]) -> dict[str, Any]:
    """Name and constants of the loss of a convex plan, as certificates hold them."""
    from dptaft_accounting.convexity import LOSSES

    name = loss_name(options["loss"])
    held = _IN_CERTIFICATES.get(name, name)
    if held in LOSSES:
        return {"loss": held}
    from dptaft.training import losses
    from dptaft.training.certified import loss_constants

    if name not in losses.LOSSES:
        own = sorted(loss_name(known) for known in LOSSES)
        known = ", ".join(dict.fromkeys([*losses.LOSSES, *own]))
        raise click.UsageError(f"unknown loss {name!r}; use {known}")
    return {"loss": name, "constants": loss_constants(losses.LOSSES[name](), options["classes"])}


def _plan(options: Mapping[str, Any]) -> Plan:
    from dptaft.training.plan import default_delta

    records, size = options["records"], options["batch_size"]
    if options["sampling"] == "full-batch":
        if size not in (None, records):
            raise click.UsageError(f"--batch-size {size} needs --sampling poisson or cyclic-partition")
        size = records
    if size is None:
        raise click.UsageError(f"--sampling {options['sampling']} needs --batch-size")
    if size > records:
        raise click.UsageError(f"--batch-size {size} exceeds the {records} records")
    convex = None
    if options["convex"]:
        for name in ("regularization", "step_size"):
            if options[name] is None:
                raise click.UsageError(f"--convex needs --{name.replace('_', '-')}")
        names = ("loss", "feature_bound", "regularization", "step_size", "diameter")
        convex = {name: options[name] for name in names} | _loss(options)
    elif options["regularization"] is not None or options["step_size"] is not None:
        raise click.UsageError("--regularization and --step-size describe a convex plan; add --convex")
    return Plan(
        kind=options["sampling"],
        records=records,
        batch_size=size,
        asked=options["steps"],
        delta=default_delta(records) if options["delta"] is None else options["delta"],
        adjacency=options["adjacency"],
        clip_norm=options["clip_norm"],
        convex=convex,
    )

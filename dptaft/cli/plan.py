"""`dptaft plan`: time, disk, memory, cost and noise of a training, before anything starts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import click

from dptaft.cli.echo import echo
from dptaft.cli.format import up
from dptaft.cli.train import train

if TYPE_CHECKING:
    from dptaft.estimate import Estimate

_PRIVACY = (
    "delta",
    "adjacency",
    "steps",
    "l2_clip_norm",
    "sampling",
    "expected_batch_size",
    "public_size",
    "certified",
)
_MODEL = ("scope", "loss", "seed", "feature_precision", "head", "centered", "fresh_class_token")
_PERFORMANCE = ("device", "engine", "physical_batch_size", "feature_cache")
_DATA = ("classes", "public_data", "skip_corrupt")
_STAGES = {
    "start": "start",
    "identify": "identifying the data",
    "features": "features",
    "cache": "writing and checking the cache",
    "training": "steps",
    "bookkeeping": "ledger, checkpoints, accounting",
    "evaluation": "evaluation",
}


def _as_in_train(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options of `dptaft train` of these names, in its words."""
    options = {option.name: option for option in train.params}

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        kept = function.__dict__.setdefault("__click_params__", [])
        kept.extend(options[name] for name in reversed(names))
        return function

    return add


@click.command()
@click.option("--records", type=click.IntRange(min=1), help="Number of training records, in place of --data.")
@click.option(
    "--num-classes", type=click.IntRange(min=2), default=10, show_default=True, help="With --records."
)
@click.option("--data", help="Data as for `dptaft train`; its files are counted, not read.")
@click.option("--epsilon", type=float, default=3.0, show_default=True, help="Privacy budget; inf for none.")
@click.option(
    "--model", default="starter", show_default=True, help="starter, starter-scattering, or a timm name."
)
@click.option("--method", type=click.Choice(["tangent", "non-linear"]), default="tangent", show_default=True)
@_as_in_train(*_DATA, *_PRIVACY, "kind", *_MODEL, *_PERFORMANCE)
@click.option(
    "--processes", type=click.IntRange(min=1), default=1, show_default=True, help="As with torchrun."
)
@click.option("--price-per-hour", type=click.FloatRange(min=0), help="Of the machine, in any currency.")
@click.option(
    "--image-size",
    "image_side",
    type=click.IntRange(min=8),
    help="Side in pixels of your image files.  [default: what the model reads]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(as_json: bool, **options: Any) -> None:
    """Say what a training would take on this machine: time, disk, memory, cost and noise.

    Measures each part for a few seconds on synthetic images. Nothing is downloaded, charged or kept, and no
    private image is read.
    """
    if (options["records"] is None) == (options["data"] is None):
        raise click.UsageError("give one of --records and --data, for example --records 1000000")
    found = _estimate(options)
    echo(json.dumps(found.plain(), indent=2, allow_nan=False) if as_json else table(found))


def _estimate(options: dict[str, Any]) -> Estimate:
    from dptaft.data import load_data
    from dptaft.estimate import blank_data, estimate_training
    from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request

    if options["data"] is None:
        data = blank_data(options["records"], options["num_classes"])
    else:
        names = options["classes"]
        data = load_data(
            options["data"],
            classes=None if names is None else [name.strip() for name in names.split(",")],
            public=options["public_data"],
            skip_corrupt=options["skip_corrupt"],
        )
    request = Request(
        privacy=PrivacyConfig(options["epsilon"], **{name: options[name] for name in _PRIVACY}),
        model=ModelConfig(
            name=options["model"],
            method=options["method"],
            unit_jacobian=options["certified"],
            **{name: options[name] for name in _MODEL},
        ),
        optimizer={} if options["kind"] is None else {"kind": options["kind"]},
        performance=PerformanceConfig(**{name: options[name] for name in _PERFORMANCE}),
        data=data.name,
    )
    extra = ("processes", "price_per_hour", "image_side")
    return estimate_training(
        data, request, start_seconds=_process_age(), **{name: options[name] for name in extra}
    )


def _process_age() -> float:
    """Seconds since this process began: a training starts as slowly."""
    try:
        with open("/proc/self/stat") as file:
            ticks = int(file.read().rsplit(")", 1)[1].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.process_time()


def table(found: Estimate) -> str:
    """The estimate as aligned lines."""
    s, p, memory, disk = found.setting, found.privacy, found.memory, found.disk
    batch = (
        "all records" if p["sampling"] == "full-batch" else f"about {p['expected_batch_size']:.6g} records"
    )
    rows = [
        (
            "training",
            f"{s['records']} records, {s['model']}, scope {s['scope']} ({s['operator']}), {s['device']}",
        ),
        ("weights", f"{s['trained_weights']} trained ({s['method']}, engine {s['engine']})"),
        ("privacy", _privacy_row(p)),
        ("steps", f"{p['steps']} of {batch} ({p['sampling']}, rate {p['sampling_rate']:.4g})"),
        ("time", f"{duration(found.seconds['total'])} with {s['processes']} process(es)"),
    ]
    rows += [("", f"{duration(found.seconds[key]):>10}  {name}") for key, name in _STAGES.items()]
    rows.append(("memory", f"{size(memory['peak'])} at the peak, {size(memory['available'])} available now"))
    if "device_peak" in memory:
        rows.append(("on the device", f"{size(memory['device_peak'])} at the peak, for each process"))
    kept = f"{size(disk['cache'])} of features" if disk["cache"] else "no features (no --feature-cache)"
    rows.append(("disk", f"{kept}, {size(disk['weights'])} of weights; {size(disk['free'])} free"))
    if found.communication:
        rows.append(("network", f"{size(found.communication)} per step and process"))
    if found.cost is not None:
        rows.append(("cost", f"{found.cost:.2f}"))
    rows += [("warning", line) for line in found.warnings]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _privacy_row(p: Mapping[str, Any]) -> str:
    if p["epsilon"] is None:
        return "NO CLAIM: no noise is added"
    return (
        f"epsilon {up(p['epsilon'], 6)} at delta {up(p['delta'], 3)} ({p['adjacency']}); noise multiplier "
        f"{up(p['noise_multiplier'], 5)}, {up(p['noise_std_on_mean'], 3)} clip norms on the mean gradient"
    )


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days.

    >>> duration(3.21), duration(200), duration(9000), duration(9e5)
    ('3.2 s', '3.3 min', '2.5 h', '10.4 days')
    """
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / 86_400:.1f} days" if math.isfinite(seconds) else "for ever"


def size(count: float) -> str:
    """Bytes with a decimal unit.

    >>> size(950), size(1.5e9), size(6.05e14)
    ('950 B', '1.5 GB', '605 TB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

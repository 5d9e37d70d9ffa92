"""`dptaft models`: which models are supported in a scope, and what they cost."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from dptaft.cli.echo import echo


@click.command()
@click.argument("pattern", required=False)
@click.option("--scope", default="last:1", show_default=True, help="head, last:K, attention:K or all.")
@click.option("--num-classes", type=click.IntRange(min=2), default=10, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def models(pattern: str | None, scope: str, num_classes: int, as_json: bool) -> None:
    """List models with their support in a scope, trained weights, and cached bytes and time per image.

    PATTERN is a timm name or shell pattern such as 'vit_small*'; without it some common models are shown.
    Any timm model with transformer blocks works; nothing is downloaded here.
    """
    from dptaft.backbones import BackboneError
    from dptaft.cli.progress import Bars
    from dptaft.costs import COMMON_MODELS, find_models, model_cost
    from dptaft.tangent.scope import Scope

    Scope.parse(scope)
    names = list(COMMON_MODELS) if pattern is None else find_models(pattern)
    costs, skipped = [], {}
    with Bars() as bars:
        for done, name in enumerate(names, start=1):
            try:
                costs.append(model_cost(name, scope, num_classes))
            except Exception as error:  # whatever one model does must not end the list
                skipped[name] = _reason(name, error)
            bars("measuring models", done, len(names))
    if not costs:
        raise BackboneError(next(iter(skipped.values())))
    for reason in skipped.values():
        echo(f"skipped {reason}", err=True)
    if as_json:
        echo(json.dumps([asdict(cost) for cost in costs], indent=2))
        return
    echo(
        f"{'model':<34} {'pixels':>6} {'weights':>9} {'trained':>9} {'cache/image':>12} {'ms/image':>9}  path"
    )
    for c in costs:
        echo(
            f"{c.name:<34} {c.image_size:>6} {c.parameters / 1e6:>8.1f}M {c.trained / 1e6:>8.2f}M "
            f"{c.feature_bytes / 1024:>8.0f} KiB {1e3 * c.feature_seconds:>9.1f}  {c.path}"
        )


def _reason(name: str, error: Exception) -> str:
    text = " ".join(str(error).split()) if isinstance(error, ValueError) else type(error).__name__
    return text if text.startswith(name) else f"{name}: {text}"

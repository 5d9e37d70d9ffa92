"""Accuracy over epsilon, one line per method with error bars; runs without privacy as dashed lines."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from dptaft.sweep.page import by_data
from dptaft.sweep.results import Row

# Okabe and Ito's palette, which most colour-blind people can tell apart, without yellow
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_COLUMNS = 3
_LEAST_RANGE = 4.0
"""Points of accuracy that the vertical axis spans at least, so that small differences look small."""
_DODGE = 1.02
"""Factor between the places of two methods at one epsilon: their error bars stand side by side."""


def draw(rows: Sequence[Row], title: str) -> str | None:
    """The picture as SVG text; None where no row has a budget and an accuracy.

    Fonts become paths and the metadata hold no date, so that the same rows give the same file.
    """
    panels = {name: part for name, part in by_data(rows).items() if any(_drawn(row) for row in part)}
    if not panels:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    settings = {
        "svg.hashsalt": "dptaft",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(
            figsize=(6.4 if columns == 1 else 4.2 * columns, 4.2 * lines + 0.4), layout="constrained"
        )
        axes = figure.subplots(lines, columns, squeeze=False).flatten()
        labels = list(dict.fromkeys(row.label for row in rows))
        for axis, (name, part) in zip(axes, panels.items(), strict=False):
            _panel(axis, part, labels)
            axis.set_title(name if len(panels) > 1 else title, loc="left", fontsize=11)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if len(panels) > 1:
            figure.suptitle(title, x=0.01, ha="left")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _drawn(row: Row) -> bool:
    return row.mean is not None and math.isfinite(row.epsilon)


def _panel(axis: Any, rows: Sequence[Row], labels: Sequence[str]) -> None:
    ticks: set[float] = set()
    for number, label in enumerate(labels):
        own = [row for row in rows if row.label == label]
        colour = _COLOURS[number % len(_COLOURS)]
        points = sorted(
            (row.epsilon, 100 * row.mean, 100 * (row.spread or 0.0)) for row in own if _drawn(row)
        )  # type: ignore[operator]
        if points:
            epsilon, mean, spread = (list(values) for values in zip(*points, strict=True))
            ticks |= set(epsilon)
            shift = _DODGE ** (number - (len(labels) - 1) / 2)
            epsilon = [value * shift for value in epsilon]
            marker = _MARKERS[number % len(_MARKERS)]
            axis.errorbar(
                epsilon, mean, yerr=spread, color=colour, marker=marker, ms=5, lw=1.6, capsize=3, label=label
            )
        reference = next((row.mean for row in own if math.isinf(row.epsilon)), None)
        if reference is not None:
            axis.axhline(100 * reference, color=colour, ls="--", lw=1, alpha=0.7)
    axis.set_xscale("log")
    axis.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
    axis.minorticks_off()
    axis.set_xlabel("epsilon (dashed: without privacy)")
    axis.set_ylabel("accuracy on evaluation images, %")
    axis.grid(axis="y", lw=0.4, alpha=0.6)
    low, high = axis.get_ylim()
    missing = max(0.0, _LEAST_RANGE - (high - low))
    axis.set_ylim(low - missing, high)
    axis.legend(frameon=False, loc="best")

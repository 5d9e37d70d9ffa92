"""Panels for `convex.py`: accuracy over epsilon, sensitivity to settings, epsilon over epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

COLOURS = {
    "standard": "#0072b2",
    "certified": "#d55e00",
    "objective perturbation": "#009e73",
    "output perturbation": "#cc79a7",
}
MARKERS = {"standard": "o", "certified": "s", "objective perturbation": "^", "output perturbation": "v"}
LINES = {"steps": "-", "learning rate": "--"}


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write the figure; every data set and scope with results gets a row of panels."""
    rows = result["rows"]
    found = list(dict.fromkeys((row["data"], row["scope"]) for row in rows))
    figure, axes = plt.subplots(
        len(found), 3, figsize=(12, 3.4 * len(found)), squeeze=False, layout="constrained"
    )
    for line, (data, scope) in zip(axes, found, strict=True):
        mine = [row for row in rows if (row["data"], row["scope"]) == (data, scope)]
        parts = {
            part: [row for row in mine if row["part"] == part]
            for part in ("accuracy", "sensitivity", "epochs")
        }
        _accuracy(line[0], parts["accuracy"], f"{data}, {scope}")
        _sensitivity(line[1], parts["sensitivity"])
        _epochs(line[2], parts["epochs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _accuracy(axis: Axes, rows: list[dict[str, Any]], title: str) -> None:
    for index, (method, colour) in enumerate(COLOURS.items()):
        points = [row for row in rows if row["method"] == method and "accuracy_mean" in row]
        x = [row["epsilon"] * 1.04 ** (index - 1.5) for row in points]
        means, spreads = ([100 * row[name] for row in points] for name in ("accuracy_mean", "accuracy_sd"))
        axis.errorbar(
            x, means, spreads, label=method, color=colour, marker=MARKERS[method], capsize=2, markersize=5
        )
    axis.set(title=title, xlabel="epsilon", ylabel="accuracy, %", xscale="log")
    axis.set_xticks([1, 3, 8], ["1", "3", "8"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _sensitivity(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for method in ("standard", "certified"):
        for varied, style in LINES.items():
            points = [row for row in rows if row["method"] == method and row["varied"] == varied]
            points = sorted((row for row in points if "accuracy_mean" in row), key=lambda row: row["factor"])
            axis.plot(
                [row["factor"] for row in points],
                [100 * row["accuracy_mean"] for row in points],
                style,
                color=COLOURS[method],
                marker=MARKERS[method],
                markersize=5,
                label=f"{method}: {varied}",
            )
    axis.set(title="epsilon 3", xlabel="factor on the default", ylabel="accuracy, %", xscale="log")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=8)


def _epochs(axis: Axes, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        points = row["points"]
        x = [point["epochs"] for point in points]
        axis.plot(x, [p["composition"] for p in points], color=COLOURS["standard"], label="composition")
        axis.plot(x, [p["last_iterate"] for p in points], color=COLOURS["certified"], label="last iterate")
        axis.axvline(row["planned_epochs"], color="grey", linestyle=":", label="planned")
    axis.set(title="same noise, more epochs", xlabel="epochs", ylabel="epsilon", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    if rows:
        axis.legend(fontsize=8)

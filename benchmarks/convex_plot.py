"""Panels for `convex.py`: accuracy over epsilon, sensitivity to settings, epsilon over epochs."""

from __future__ import annotations

import math
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
    """Write the figure: a panel for every part of the study that was run on a data set and scope."""
    panels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        panels.setdefault((row["part"], row["data"], row["scope"]), []).append(row)
    lines = math.ceil(len(panels) / 3)
    figure, axes = plt.subplots(lines, 3, figsize=(12, 3.4 * lines), squeeze=False, layout="constrained")
    painters = {"accuracy": _accuracy, "sensitivity": _sensitivity, "epochs": _epochs}
    order = sorted(panels, key=lambda key: list(painters).index(key[0]))
    for axis, key in zip(axes.flat, order, strict=False):
        part, data, scope = key
        painters[part](axis, panels[key], f"{data}, {scope}")
    for axis in axes.flat[len(order) :]:
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
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


def _sensitivity(axis: Axes, rows: list[dict[str, Any]], title: str) -> None:
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
    axis.set(title=f"{title}, epsilon 3", xlabel="factor on the default", ylabel="accuracy, %", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _epochs(axis: Axes, rows: list[dict[str, Any]], title: str) -> None:
    for row in rows:
        points = row["points"]
        x = [point["epochs"] for point in points]
        axis.plot(x, [p["composition"] for p in points], color=COLOURS["standard"], label="composition")
        axis.plot(x, [p["last_iterate"] for p in points], color=COLOURS["certified"], label="last iterate")
        axis.axvline(row["planned_epochs"], color="grey", linestyle=":", label="planned")
    axis.set(title=f"{title}, same noise", xlabel="epochs", ylabel="epsilon", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)

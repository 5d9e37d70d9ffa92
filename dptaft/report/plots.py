"""The plots of a report as SVG that takes its colours and fonts from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from dptaft.report.curves import Curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# written by matplotlib as plain colours, then replaced by variables of the page's style sheet
_INK, _MUTED, _FIRST, _SECOND, _FILL = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
_VARIABLES = {
    _INK: "var(--ink)",
    _MUTED: "var(--line)",
    _FIRST: "var(--first)",
    _SECOND: "var(--second)",
    _FILL: "var(--wash)",
}
_SIZE = (4.1, 2.75)


def plots(curves: Curves) -> list[tuple[str, str, str]]:
    """Title, caption and SVG of every plot that the curves allow."""
    found = [
        (
            "What an attacker can achieve",
            "Every attack that asks whether a record was used lies above the curve. The straight line is "
            "guessing; the area between is all that the model gives away.",
            _svg("tradeoff", lambda axes: _tradeoff(axes, curves)),
        ),
        (
            "Epsilon for every delta",
            "One guarantee, read at other failure probabilities.",
            _svg("delta", lambda axes: _delta(axes, curves)),
        ),
    ]
    if curves.steps:
        two = len(curves.steps) > 1
        found.append(
            (
                "Epsilon over training steps",
                "With this noise, if training were planned for fewer steps."
                + (" The lower curve holds because only the last weights are released." if two else ""),
                _svg("steps", lambda axes: _steps(axes, curves)),
            )
        )
    return found


def _tradeoff(axes: Axes, curves: Curves) -> None:
    alphas, betas = zip(*curves.tradeoff, strict=True)
    alphas, betas = (0.0, *alphas, 1.0), (1.0, *betas, 0.0)
    axes.fill_between(alphas, betas, [1 - a for a in alphas], color=_FILL, linewidth=0)
    axes.plot([0, 1], [1, 0], color=_INK, linewidth=0.9, dashes=(3, 3))
    axes.plot(alphas, betas, color=_FIRST, linewidth=2.2)
    axes.annotate("guessing", (0.74, 0.29), color=_INK, fontsize=9)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of false alarms", ylabel="share of misses")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])


def _delta(axes: Axes, curves: Curves) -> None:
    for (name, points), color in zip(curves.delta.items(), (_FIRST, _SECOND), strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), color=color, linewidth=2.2, label=name)
    axes.set_xscale("log")
    axes.set_xticks([1e-10, 1e-8, 1e-6, 1e-4, 1e-2], ["1e-10", "1e-8", "1e-6", "1e-4", "1e-2"])
    axes.minorticks_off()
    axes.set(xlim=(1e-10, 1e-2), xlabel="delta", ylabel="epsilon")
    _finish(axes, len(curves.delta) > 1)


def _steps(axes: Axes, curves: Curves) -> None:
    order = sorted(curves.steps, key=lambda name: name == "composition")
    for name, color in zip(order, (_FIRST, _SECOND), strict=False):
        points = curves.steps[name]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=2.2, label=name)
    last = max(points[-1][0] for points in curves.steps.values())
    axes.set(xlim=(0, last), xlabel="steps", ylabel="epsilon")
    axes.locator_params(axis="x", nbins=5, integer=True)
    _finish(axes, len(order) > 1)


def _finish(axes: Axes, legend: bool) -> None:
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="y", nbins=5)
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK, handlelength=1.4)


def _svg(name: str, draw: Callable[[Axes], None]) -> str:
    """Draw into a figure of its own (no global state) and adapt the SVG to the page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_MUTED)
        axes.tick_params(colors=_INK, color=_MUTED, labelsize=9, length=3)
        axes.grid(axis="y", color=_MUTED, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= )id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ', r"<svg \1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)

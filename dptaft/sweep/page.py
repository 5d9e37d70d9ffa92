"""Results of a sweep for people: Markdown, and one HTML page with the picture in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dptaft.report.text import escaped, printable
from dptaft.report.text import markdown as quoted
from dptaft.sweep.results import Row

_HEAD = ("method", "epsilon", "accuracy", "without privacy", "lost")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
th { border-bottom: 2px solid #888 }
.note { background: #f4f4f0; border-left: 4px solid #888; padding: .6rem 1rem }
.failed { border-left-color: #b00 }
svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd } .note { background: #262626 } th, td { border-color: #444 }
  svg { background: #fff }
}
"""


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table as text; accuracies in percent, with their standard deviation over seeds."""
    epsilon = "none (reference)" if math.isinf(row.epsilon) else f"{row.epsilon:g}"
    return (
        row.label,
        epsilon,
        _accuracy(row) + (f" ({row.failed} failed)" if row.failed else ""),
        "" if row.reference is None else f"{row.reference:.2%}",
        _lost(row),
    )


def _accuracy(row: Row) -> str:
    if row.mean is None:
        return "none"
    return f"{row.mean:.2%}" if row.spread is None else f"{row.mean:.2%} ± {row.spread:.2%}"


def _lost(row: Row) -> str:
    if row.reference is None or row.mean is None or math.isinf(row.epsilon):
        return ""
    return f"{100 * (row.reference - row.mean):.2f} points"


def by_data(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each data set."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.data, []).append(row)
    return found


def markdown(content: Mapping[str, Any], rows: Sequence[Row], picture: str | None) -> str:
    """The summary as Markdown."""
    lines = [f"# {quoted(content['title'])}", ""]
    lines += [content["shows"], ""] if content["shows"] else []
    lines += [f"![accuracy over epsilon]({picture})", ""] if picture else []
    lines += [content["privacy"], ""]
    for name, part in by_data(rows).items():
        lines += [
            f"## {quoted(name)}",
            "",
            f"| {' | '.join(_HEAD)} |",
            "|:--" + "|--:" * (len(_HEAD) - 1) + "|",
        ]
        lines += [f"| {' | '.join(map(quoted, cells(row)))} |" for row in part] + [""]
    if content["failed"]:
        lines += ["## Points without a result", ""]
        lines += [f"- {quoted(point)}: {quoted(error)}" for point, error in content["failed"].items()] + [""]
    return printable("\n".join([*lines, _foot(content)]) + "\n")


def page(content: Mapping[str, Any], rows: Sequence[Row], svg: str | None) -> str:
    """The summary as one self-contained HTML page."""
    title = escaped(content["title"])
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{title}</h1>",
        f"<p>{escaped(content['shows'])}</p>" if content["shows"] else "",
        svg[svg.index("<svg") :] if svg else "",
        f'<p class="note">{escaped(content["privacy"])}</p>',
    ]
    for name, part in by_data(rows).items():
        head = "".join(f"<th>{text}</th>" for text in _HEAD)
        body = "".join(
            "<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells(row)) + "</tr>" for row in part
        )
        parts.append(
            f"<h2>{escaped(name)}</h2><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    for point, error in content["failed"].items():
        parts.append(f'<p class="note failed">{escaped(point)}: {escaped(error)}</p>')
    return (
        "\n".join([*(part for part in parts if part), f"<p>{escaped(_foot(content))}</p></body></html>"])
        + "\n"
    )


def _foot(content: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    seeds = len(content["seeds"])
    return (
        f"Accuracy on evaluation images, mean and standard deviation over {seeds} "
        f"seed{'s' * (seeds != 1)} of the model. Recipe `{content['recipe']}`; {versions}."
    )

"""The files of a finished sweep: summary as JSON, CSV, Markdown and HTML, and the picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dptaft.sweep.page import markdown, page
from dptaft.sweep.plot import draw
from dptaft.sweep.points import expand
from dptaft.sweep.recipe import Recipe
from dptaft.sweep.results import Row, as_csv, as_json, collect, document
from dptaft.sweep.runner import RUNS, SweepResult

PICTURE = "accuracy.svg"


def write_results(recipe: Recipe, result: SweepResult) -> dict[str, Any]:
    """Write ``summary.{json,csv,md,html}`` and ``accuracy.svg`` beside the runs; returns the document."""
    rows = collect(expand(recipe), result.outcomes, result.folder / RUNS)
    content = document(recipe, rows, result.failed, result.wholes)
    write_files(result.folder, content, rows)
    return content


def write_files(folder: Path, content: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Write the files of a document and its rows."""
    svg = draw(rows, content["title"])
    files = {
        "summary.json": as_json(content),
        "summary.csv": as_csv(rows),
        "summary.md": markdown(content, rows, PICTURE if svg else None),
        "summary.html": page(content, rows, svg),
    }
    for name, text in (files | ({PICTURE: svg} if svg else {})).items():
        (folder / name).write_text(text, encoding="utf-8")

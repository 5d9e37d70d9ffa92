"""RESULTS.md from committed results: `python benchmarks/results_tables.py` (`--check` compares only).

Numbers come from `recipes/results/*/summary.json` and `benchmarks/results/*.json`; prose, and the places of
the tables, from `benchmarks/results_template.md`. Our accuracies are rounded down, those of the baseline up,
spreads, times and memory up. A result that is not there is named as missing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEMPLATE, TARGET = ROOT / "benchmarks" / "results_template.md", ROOT / "RESULTS.md"
SWEEPS, BENCHMARKS = ROOT / "recipes" / "results", ROOT / "benchmarks" / "results"
EPSILONS = (1.0, 3.0, 8.0)
PUBLISHED = {
    "digits": {},
    "fashion": {
        "published: ScatterNet + linear (Tramer and Boneh, ICLR 2021)": 89.7,
        "published: CNN from scratch (the same paper)": 86.0,
    },
}
"""Percent at epsilon 3, delta 1e-5."""
GOALS = (("digits", 1.0, 94.0), ("digits", 3.0, 96.0), ("fashion", 1.0, 87.5), ("fashion", 3.0, 89.7))
MISSING = "not run"


@dataclass(frozen=True)
class Result:
    """Accuracies (fractions) of the runs of one method at one budget."""

    data: str
    method: str
    epsilon: float
    accuracies: tuple[float, ...]
    command: str
    ours: bool = True

    @property
    def mean(self) -> float:
        """Mean accuracy."""
        return statistics.fmean(self.accuracies)

    @property
    def text(self) -> str:
        """Percent, mean and standard deviation."""
        mean = rounded(100 * self.mean, up=not self.ours)
        if len(self.accuracies) < 2:
            return mean
        return f"{mean} ± {rounded(100 * statistics.stdev(self.accuracies), up=True)}"


def rounded(value: float, *, up: bool, digits: int = 1) -> str:
    """Rounded down, or up; floating-point dust does not count.

    >>> rounded(97.79, up=False), rounded(97.7, up=True), rounded(97.71, up=True)
    ('97.7', '97.7', '97.8')
    """
    scaled = round(value * 10**digits, 6)
    return f"{(math.ceil(scaled) if up else math.floor(scaled)) / 10**digits:.{digits}f}"


def read(path: Path) -> dict[str, Any] | None:
    """A result file; None where it is not there."""
    return json.loads(path.read_text()) if path.exists() else None


def sweep(name: str, data: str, suffix: str = "") -> list[Result]:
    """Rows of a committed sweep."""
    found = read(SWEEPS / name / "summary.json")
    return sweep_rows([] if found is None else found["rows"], data, suffix, f"dptaft sweep {name}")


def sweep_rows(rows: Sequence[Mapping[str, Any]], data: str, suffix: str, command: str) -> list[Result]:
    """Rows of a sweep's summary that have a result."""
    return [
        Result(data, row["method"] + suffix, float(row["epsilon"]), tuple(row["accuracies"]), command)
        for row in rows
        if row["accuracies"]
    ]


def folds() -> list[Result]:
    """Certified and one-shot training and ordinary fine-tuning on five folds of the digits."""
    convex, digits = read(BENCHMARKS / "convex.json"), read(BENCHMARKS / "digits.json")
    found = [
        Result(
            "digits",
            f"{row['scope']}, {row['method']}",
            row["epsilon"],
            tuple(row["accuracies"]),
            "python benchmarks/convex.py",
        )
        for row in ([] if convex is None else convex["rows"])
        if (row["part"], row["data"]) == ("accuracy", "digits")
        and row["method"] in ("certified", "objective perturbation")
        and "accuracies" in row
    ]
    return found + [
        Result(
            "digits",
            "non-linear last:1 (Opacus)",
            row["epsilon"],
            tuple(row["accuracies"]),
            "python benchmarks/digits.py",
        )
        for row in ([] if digits is None else digits["rows"])
        if row["method"].startswith("non-linear") and row["epsilon"] in EPSILONS
    ]


def baseline() -> list[Result]:
    """ScatterNet and a linear classifier through our engine."""
    found = read(BENCHMARKS / "scatternet.json") or {"data": {}}
    return [
        Result(
            {"digits": "digits", "fashion-mnist": "fashion"}[name],
            "ScatterNet + linear, our engine",
            row["epsilon"],
            tuple(row["accuracies"]),
            "python benchmarks/scatternet.py",
            ours=False,
        )
        for name, part in found["data"].items()
        for row in part["rows"]
    ]


def results() -> list[Result]:
    """Everything that was run, in the order of the tables."""
    return [
        *sweep("results_digits", "digits"),
        *sweep("results_digits_slow", "digits"),
        *folds(),
        *sweep("results_fashion", "fashion", ", scattering starter"),
        *sweep("results_fashion_slow", "fashion", ", scattering starter"),
        *sweep("results_fashion_convex", "fashion", ", scattering starter"),
        *sweep("results_fashion_non_linear", "fashion", ", scattering starter"),
        *sweep("results_fashion_characters", "fashion"),
        *baseline(),
    ]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right of the first column."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def accuracy_table(found: Sequence[Result], data: str) -> str:
    """Methods against budgets, with the number of runs and the command."""
    mine = [result for result in found if result.data == data]
    rows = []
    for method in dict.fromkeys(result.method for result in mine):
        own = {result.epsilon: result for result in mine if result.method == method}
        cells = [own[epsilon].text if epsilon in own else MISSING for epsilon in EPSILONS]
        runs = "/".join(str(n) for n in sorted({len(result.accuracies) for result in own.values()}))
        rows.append([method, *cells, runs, f"`{next(iter(own.values())).command}`"])
    for label, accuracy in PUBLISHED[data].items():
        rows.append([label, "", f"{accuracy:.1f}", "", "", ""])
    return table(["accuracy, %", "epsilon 1", "epsilon 3", "epsilon 8", "runs", "command"], rows)


def goal_table(found: Sequence[Result]) -> str:
    """The goals against the best of our own methods."""
    rows = []
    for data, epsilon, goal in GOALS:
        own = [r for r in found if r.ours and (r.data, r.epsilon) == (data, epsilon)]
        best = max(own, key=lambda r: r.mean, default=None)
        name = f"{data}, epsilon {epsilon:g}: at least {goal:g} %"
        if best is None:
            rows.append([name, MISSING, "", ""])
        else:
            reached = (
                "yes" if 100 * best.mean >= goal else f"no, {rounded(goal - 100 * best.mean, up=True)} short"
            )
            rows.append([name, best.text, best.method, reached])
    return table(["goal", "best of ours, %", "method", "reached"], rows)


def small_scopes() -> list[Result]:
    """Last block and head on 10,000 images of Fashion-MNIST, which no other table shows."""
    found = read(BENCHMARKS / "scopes_small.json")
    names = {"last:1": "tangent last:1, scattering starter", "head": "head, scattering starter"}
    rows = [] if found is None else found["result"]["rows"]
    return sweep_rows(
        [dict(row, method=names[row["method"]]) for row in rows],
        "fashion, 10,000 images",
        "",
        "python benchmarks/scopes_small.py",
    )


def order_table(found: Sequence[Result]) -> str:
    """Tangent of the last block against the head of the same starter and recipe family."""
    rows = []
    pairs = (
        ("digits", "tangent last:1", "head"),
        ("digits", "tangent last:1, scattering starter", "head, scattering starter"),
        ("fashion, 10,000 images", "tangent last:1, scattering starter", "head, scattering starter"),
        ("fashion", "tangent last:1, scattering starter", "head, scattering starter"),
    )
    by_key = {(r.data, r.method, r.epsilon): r for r in (*found, *small_scopes())}
    for data, tangent, head in pairs:
        starter = "scattering" if "scattering" in tangent else "characters"
        for epsilon in EPSILONS:
            first, second = by_key.get((data, tangent, epsilon)), by_key.get((data, head, epsilon))
            if first is not None and second is not None:
                gap = 100 * (first.mean - second.mean)
                rows.append([f"{data}, {starter}", f"{epsilon:g}", first.text, second.text, f"{gap:+.1f}"])
    return table(["data, starter", "epsilon", "tangent last:1", "head", "difference"], rows)


def run_cost_table() -> str:
    """Time and memory of one run in a process of its own."""
    found, scatter = read(BENCHMARKS / "results_cost.json"), read(BENCHMARKS / "scatternet.json")
    rows = [
        [
            f"{row['data']}: {row['name']}",
            rounded(row["seconds"], up=True, digits=0),
            rounded(row["processor_seconds"], up=True, digits=0),
            rounded(row["peak_gb"], up=True),
        ]
        for row in (found or {"rows": []})["rows"]
    ]
    for name, part in (scatter or {"data": {}})["data"].items():
        spent = part["cost"]
        rows.append(
            [
                f"{name}: ScatterNet + linear, features given",
                rounded(spent["seconds"], up=True, digits=0),
                rounded(spent["processor_seconds"], up=True, digits=0),
                rounded(spent["process_peak_gb"], up=True),
            ]
        )
    return table(["one run at epsilon 3", "seconds", "processor seconds", "peak memory, GB"], rows)


def vit_table() -> str:
    """What large backbones cost."""
    found = read(BENCHMARKS / "cost_vit.json")
    rows = [
        [
            f"{row['model']}, {row['scope']}",
            f"{row['trained_weights'] / 1e6:.1f} M",
            f"{row['bytes_per_image'] / 1e3:.0f} kB",
            rounded(row["features_seconds_per_image"], up=True, digits=2),
            rounded(1e3 * row["clipped_sum_seconds_per_record"], up=True),
            rounded(row["noise_and_step_seconds"], up=True, digits=2),
            rounded(row["training_seconds"] / 60, up=True, digits=0),
            rounded(row["peak_bytes"] / 1e9, up=True),
        ]
        for row in (found or {"rows": []})["rows"]
    ]
    header = [
        "model",
        "trained",
        "cache per image",
        "boundary and constants, s per image",
        "clipped sum, ms per record",
        "noise and step, s",
        "all steps, min",
        "peak memory, GB",
    ]
    return table(header, rows)


def chosen_table() -> str:
    """Hyperparameters that the baseline was given, and whether the grid ended there."""
    found = read(BENCHMARKS / "scatternet.json") or {"data": {}}
    rows = []
    for name, part in found["data"].items():
        for row in part["rows"]:
            tried = {key: sorted({other[key] for other in part["tried"]}) for key in ("steps", "rate")}
            ends = [
                label
                for label, values, value in (
                    ("steps", tried["steps"], row["steps"]),
                    ("learning rate", tried["rate"], row["learning_rate"]),
                )
                if value == values[-1]
            ]
            cells = [f"{row['epsilon']:g}", f"{row['steps']}", f"{row['learning_rate']:g}"]
            rows.append([name, *cells, " and ".join(ends) or "none"])
    return table(["data", "epsilon", "steps", "learning rate", "largest that was tried"], rows)


def missing() -> str:
    """Results that the tables name and that are not there."""
    files = [SWEEPS / name / "summary.json" for name in (
        "results_digits",
        "results_digits_slow",
        "results_fashion",
        "results_fashion_slow",
        "results_fashion_convex",
        "results_fashion_non_linear",
        "results_fashion_characters",
    )] + [BENCHMARKS / f"{name}.json" for name in ("scatternet", "results_cost", "cost_vit")]  # fmt: skip
    names = [str(path.relative_to(ROOT)) for path in files if not path.exists()]
    return "Not there yet: " + ", ".join(f"`{name}`" for name in names) + "." if names else ""


def render() -> str:
    """The whole text of RESULTS.md."""
    found = results()
    parts = {
        "digits": accuracy_table(found, "digits"),
        "fashion": accuracy_table(found, "fashion"),
        "goals": goal_table(found),
        "order": order_table(found),
        "chosen": chosen_table(),
        "cost": run_cost_table(),
        "vit": vit_table(),
        "missing": missing(),
    }
    text = TEMPLATE.read_text()
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text.rstrip() + "\n"


def main() -> None:
    """Write RESULTS.md, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="Exit with 1 where RESULTS.md is not up to date."
    )
    args = parser.parse_args()
    text = render()
    if args.check:
        sys.exit(0 if TARGET.exists() and TARGET.read_text() == text else 1)
    TARGET.write_text(text)


if __name__ == "__main__":
    main()

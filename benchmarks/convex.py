"""Standard, certified and one-shot training at equal epsilon: accuracy, sensitivity, epsilon over epochs.

python benchmarks/convex.py --output benchmarks/results/convex.json --plot docs/figures/convex.svg

Parts: `accuracy` (every method at epsilon 1, 3, 8), `sensitivity` (epsilon 3; steps and learning rate from a
tenth to ten times the default, the noise calibrated anew each time) and `epochs` (noise of the epsilon 3
plan, 10 to 1000 epochs: what composition and the last iterate cost). Digits: five folds; Fashion-MNIST: the
first 10,000 training images, evaluated on the 10,000 test images. The output file is written after every
row, and rows that it holds already are not computed again. All runs go through `dptaft.train` with default
options.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from digits import fold

import dptaft
from dptaft_accounting import ConvexityCertificate, PrivacyStatement, best_bound, mechanism_from_dict

METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "certified": {"certified": True},
    "objective perturbation": {"method": "objective-perturbation"},
    "output perturbation": {"method": "output-perturbation"},
}
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
EPOCHS = (10, 30, 100, 300, 1000)
PARTS = ("accuracy", "sensitivity", "epochs")
FASHION_RECORDS = 10_000


def fashion(number: int) -> dptaft.ImageData:
    """The first 10,000 training images of Fashion-MNIST; the number only tells runs apart."""
    data = dptaft.load_data("fashion-mnist")
    return replace(data, train=data.train.take(range(FASHION_RECORDS)))


DATA: dict[str, tuple[Callable[[int], dptaft.ImageData], int]] = {
    "digits": (fold, 5),
    "fashion-mnist": (fashion, 3),
}


class Study:
    """Rows by their key, in a file that is written after every one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def row(self, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row of this key, computed if it is missing."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        started = time.perf_counter()
        row = key | compute()
        row["seconds"] = round(time.perf_counter() - started, 1)
        self.rows.append(row)
        self._write()
        print(json.dumps(row), flush=True)
        return row

    def _write(self) -> None:
        result = {
            "data": {
                "digits": "five folds of 1,437 training and 360 evaluation images",
                "fashion-mnist": f"first {FASHION_RECORDS:,} training images, 10,000 test images, three runs",
            },
            "rows": self.rows,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, CPU",
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("dptaft", "torch", "timm")},
            "command": "python benchmarks/convex.py",
        }
        draft = self.path.with_suffix(".part")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(draft, self.path)


class Trainer:
    """Runs of the product with a shared cache of features."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def run(self, data: dptaft.ImageData, epsilon: float, scope: str, options: dict[str, Any]) -> dptaft.Run:
        """One run in a folder of its own, without a ledger: the data are public."""
        self._count += 1
        return dptaft.train(
            data,
            epsilon=epsilon,
            scope=scope,
            output=self._folder / str(self._count),
            feature_cache=str(self._folder / "features"),
            ledger=None,
            **options,
        )

    def accuracies(self, data: str, epsilon: float, scope: str, options: dict[str, Any]) -> dict[str, Any]:
        """Mean and spread over the runs of a data set, or why the product refuses to train like this."""
        make, count = DATA[data]
        found = []
        for number in range(count):
            try:
                found.append(self.run(make(number), epsilon, scope, options).accuracy or 0.0)
            except ValueError as error:
                return {"refused": str(error)}
        return {
            "accuracy_mean": round(statistics.mean(found), 5),
            "accuracy_sd": round(statistics.stdev(found), 5),
            "accuracies": [round(value, 5) for value in found],
        }


def accuracy(study: Study, trainer: Trainer, data: str, scope: str) -> None:
    """Every method at every epsilon."""
    for epsilon in (1.0, 3.0, 8.0):
        for name, options in METHODS.items():
            key = {"part": "accuracy", "data": data, "scope": scope, "method": name, "epsilon": epsilon}
            study.row(key, lambda e=epsilon, o=options: trainer.accuracies(data, e, scope, o))  # type: ignore[misc]


def defaults(trainer: Trainer, data: str, scope: str, options: dict[str, Any]) -> tuple[int, float]:
    """Steps and learning rate that the product chooses at epsilon 3."""
    run = trainer.run(DATA[data][0](0), 3.0, scope, options)
    return claimed(run).mechanism["steps_planned"], run.config["optimizer"]["learning_rate"]


def claimed(run: dptaft.Run) -> PrivacyStatement:
    """The statement of a private run."""
    if run.statement is None:
        raise RuntimeError(f"{run.path} claims nothing: {run.no_claim}")
    return run.statement


def settings(steps: int, rate: float) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """What is varied, by which factor, and the options for it."""
    for factor in FACTORS:
        yield "steps", factor, {"steps": max(1, round(steps * factor))}
        yield "learning rate", factor, {"optimizer": {"learning_rate": rate * factor}}


def sensitivity(study: Study, trainer: Trainer, data: str, scope: str) -> None:
    """Accuracy at epsilon 3 when steps or learning rate are not the default."""
    for name in ("standard", "certified"):
        base = {"part": "sensitivity", "data": data, "scope": scope, "method": name}
        chosen: dict[str, Any] = study.row(
            base | {"varied": "nothing"},
            lambda o=METHODS[name]: dict(  # type: ignore[misc]
                zip(("steps", "learning_rate"), defaults(trainer, data, scope, o), strict=True)
            ),
        )
        for varied, factor, extra in settings(chosen["steps"], chosen["learning_rate"]):
            options = METHODS[name] | extra
            key = base | {"varied": varied, "factor": factor}
            study.row(key, lambda o=options: trainer.accuracies(data, 3.0, scope, o))  # type: ignore[misc]


def epochs(study: Study, trainer: Trainer, data: str, scope: str) -> None:
    """Epsilon of both bounds at the noise of the certified plan, over the number of full-batch epochs."""

    def curve() -> dict[str, Any]:
        run = trainer.run(DATA[data][0](0), 3.0, scope, METHODS["certified"])
        statement = claimed(run)
        mechanism = mechanism_from_dict(statement.mechanism["record"])
        certificate = ConvexityCertificate.from_dict(statement.accounting["certificate"])
        planned = statement.mechanism["steps_planned"]
        points = []
        for count in sorted({*EPOCHS, planned, 10 * planned}):
            report = best_bound(
                replace(mechanism, steps=count),  # type: ignore[call-arg]
                replace(certificate, steps=count),
                delta=statement.claim["delta"],
            )
            found = {bound.name: bound.epsilon for bound in report.bounds}
            last = min(value for name, value in found.items() if name != "composition")
            points.append({"epochs": count, "composition": found["composition"], "last_iterate": last})
        return {"planned_epochs": planned, "points": points}

    study.row({"part": "epochs", "data": data, "scope": scope}, curve)


def main() -> None:
    """Run the parts that are asked for, then draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--scopes", nargs="+", default=["head", "last:1"])
    parser.add_argument("--cache", type=Path, help="Folder for features and runs; temporary by default.")
    args = parser.parse_args()
    study = Study(args.output)
    work = {"accuracy": accuracy, "sensitivity": sensitivity, "epochs": epochs}
    with tempfile.TemporaryDirectory(dir=args.cache) as folder:
        trainer = Trainer(Path(folder))
        for data in args.data:
            for scope in args.scopes:
                for part in args.parts:
                    work[part](study, trainer, data, scope)
    if args.plot is not None:
        from convex_plot import draw

        draw(json.loads(args.output.read_text()), args.plot)


if __name__ == "__main__":
    main()

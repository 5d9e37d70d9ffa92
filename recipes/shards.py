"""Accuracy over the number of shards, after removing shards, and the time that removal takes.

python recipes/shards.py measure digits
python recipes/shards.py measure fashion-mnist --train 3000 --evaluation 1000
python recipes/shards.py plot

`measure` trains the data set in 1 to 50 random shards, with and without privacy, default options throughout,
and compares one model on all data (one shard), the average of the shards' weights, the ensemble of their
logits (the same function, at the cost of all models) and the ensemble of their probabilities. From the
composition of the most shards it removes more and more of them, and times the removal of one shard against
training all data again on features that are read already. Results are written after every setting; `plot`
draws them and writes a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import dptaft
from dptaft.shards import compose, remove_shard, train_shards

RESULTS = Path(__file__).parent / "results" / "shards"
SHARDS = (50, 20, 10, 5, 2, 1)
"""One shard comes last: by then the features are in the cache, so that its time is training alone."""
EPSILONS = (3.0, math.inf)
KEPT = (49, 40, 25, 10, 5, 1)


def load(name: str, train: int | None, evaluation: int | None) -> dptaft.ImageData:
    """The data set, or its first `train` training and `evaluation` evaluation images."""
    data = dptaft.load_data(name)
    if train is not None:
        data = dataclasses.replace(data, train=data.train.take(range(train)))
    if evaluation is not None:
        data = dataclasses.replace(data, evaluation=data.evaluation.take(range(evaluation)))
    return data


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest score is that of their class."""
    return float((scores.argmax(1) == labels).double().mean())


def ensembles(data: dptaft.ImageData, runs: list[dptaft.Run], composed: dptaft.Run) -> dict[str, float]:
    """Accuracy of the ensembles, and how far the logits of the average are from the ensemble's."""
    learner = composed.predictor.learner
    features = learner.features(data.evaluation).features
    outputs = [learner.logits(features, run.predictor.weights).double() for run in runs]
    mean = sum(outputs) / len(outputs)
    probabilities = sum(output.softmax(1) for output in outputs) / len(outputs)
    single = [accuracy(output, data.evaluation.labels) for output in outputs]
    own = learner.logits(features, composed.predictor.weights).double()
    return {
        "ensemble_of_logits": accuracy(mean, data.evaluation.labels),
        "ensemble_of_probabilities": accuracy(probabilities, data.evaluation.labels),
        "single_shard": statistics.mean(single),
        "largest_difference": float((own - mean).abs().max()),
    }


def measure_shards(
    data: dptaft.ImageData, shards: int, epsilon: float, folder: Path, cache: Path
) -> dict[str, Any]:
    """Train, compose and evaluate one number of shards."""
    started, used = time.perf_counter(), time.process_time()
    parent = train_shards(
        data, shards, epsilon=epsilon, output=folder / "p", ledger=None, feature_cache=str(cache)
    )
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    runs = [dptaft.load_run(path) for path in parent.runs()]
    average = compose(runs, folder / "average", evaluate_on=data)
    return {
        "shards": shards,
        "epsilon": "inf" if math.isinf(epsilon) else epsilon,
        "average": average.accuracy,
        "claimed_epsilon": None if average.statement is None else average.statement.claim["epsilon"],
        "training_seconds": round(seconds, 2),
        "training_cpu_seconds": round(busy, 2),
        **ensembles(data, runs, average),
    }


def measure_removal(data: dptaft.ImageData, folder: Path) -> list[dict[str, Any]]:
    """Remove shards one after the other; accuracy and seconds of the removals that leave `KEPT` shards."""
    current, rows = folder / "average", []
    count = len(dptaft.load_run(current).config["composition"]["parts"])
    while count > 1:
        name = dptaft.load_run(current).config["composition"]["parts"][0]["shard"]
        started, used = time.perf_counter(), time.process_time()
        made = remove_shard(current, name, folder / f"less{count}")
        seconds, busy = time.perf_counter() - started, time.process_time() - used
        count, current = count - 1, made.path
        if count in KEPT:
            evaluated = compose([made], folder / f"evaluated{count}", evaluate_on=data)
            rows.append(
                {
                    "kept": count,
                    "accuracy": evaluated.accuracy,
                    "seconds": round(seconds, 3),
                    "cpu_seconds": round(busy, 3),
                }
            )
    return rows


def measure(data: dptaft.ImageData, repeats: int, most_rows: int | None) -> None:
    """All settings of one data set that are not in its results yet, written as they come."""
    target = RESULTS / f"{data.name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    content = _begun(target, data)
    done = {(row["repeat"], row["epsilon"], row["shards"]) for row in content["shards"]}
    wanted = [
        (repeat, epsilon, shards) for repeat in range(repeats) for epsilon in EPSILONS for shards in SHARDS
    ]
    left = [(r, e, s) for r, e, s in wanted if (r, "inf" if math.isinf(e) else e, s) not in done]
    with tempfile.TemporaryDirectory() as cache:
        for repeat, epsilon, shards in left[:most_rows]:
            with tempfile.TemporaryDirectory() as folder:
                row = measure_shards(data, shards, epsilon, Path(folder), Path(cache))
                content["shards"].append({"repeat": repeat} | row)
                print(json.dumps(row), flush=True)
                if shards == max(SHARDS):
                    content["removal"] += [
                        {"repeat": repeat, "epsilon": row["epsilon"]} | removed
                        for removed in measure_removal(data, Path(folder))
                    ]
            target.write_text(json.dumps(content, indent=1) + "\n")


def _begun(target: Path, data: dptaft.ImageData) -> dict[str, Any]:
    """Results so far, of the same data."""
    facts = {"data": data.name, "records": len(data.train), "evaluation": len(data.evaluation)}
    if target.exists():
        content: dict[str, Any] = json.loads(target.read_text())
        if all(content[key] == value for key, value in facts.items()):
            return content
    return facts | {"version": version("dptaft"), "shards": [], "removal": []}


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(row[key] for row in rows)


def _select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def plot() -> None:
    """Draw all measured data sets and write the table."""
    contents = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    (RESULTS / "README.md").write_text(table(contents))
    draw(contents, RESULTS / "shards.svg")


def draw(contents: list[dict[str, Any]], path: Path) -> None:
    """Two panels per data set: accuracy over shards, accuracy after removals."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "shards", "font.size": 9, "axes.spines.top": False})
    mpl.rcParams["axes.spines.right"] = False
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(contents), 2, figsize=(9, 3.2 * len(contents)), squeeze=False, layout="constrained"
    )
    colours = {"inf": "#444444", 3.0: "#1f6fb4"}
    for (left, right), content in zip(axes, contents, strict=True):
        for epsilon, colour in colours.items():
            label = "no privacy" if epsilon == "inf" else f"epsilon {epsilon:g}"
            rows = _select(content["shards"], epsilon=epsilon)
            counts = sorted({row["shards"] for row in rows})
            for key, style, name in (
                ("average", "-o", "average = ensemble of logits"),
                ("ensemble_of_probabilities", ":", "ensemble of probabilities"),
                ("single_shard", "--", "one shard alone"),
            ):
                values = [_mean(_select(rows, shards=s), key) for s in counts]
                left.plot(counts, values, style, color=colour, markersize=3, lw=1.3, label=f"{name}, {label}")
            removed = _select(content["removal"], epsilon=epsilon)
            kept = sorted({row["kept"] for row in removed})
            values = [_mean(_select(removed, kept=k), "accuracy") for k in kept]
            full = _mean(_select(rows, shards=max(counts)), "average")
            right.plot([*kept, max(counts)], [*values, full], "-o", color=colour, markersize=3, label=label)
        left.set(
            xscale="log",
            xlabel="shards (1: one model on all data)",
            ylabel="accuracy",
            title=f"{content['data']}: shards",
        )
        left.set_xticks(counts, [str(s) for s in counts])
        left.minorticks_off()
        right.set(
            xlabel=f"shards left of {max(counts)}", ylabel="accuracy", title=f"{content['data']}: removal"
        )
    axes[0][0].legend(fontsize=6.5, frameon=False)
    axes[0][1].legend(fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(contents: list[dict[str, Any]]) -> str:
    """The numbers as Markdown."""
    lines = [
        "# Shards: accuracy, removal, time",
        "",
        "`python recipes/shards.py measure NAME`, then `plot`. Default options; means over repeats. All "
        "shards together claim the epsilon of one, because they share no record.",
    ]
    for content in contents:
        lines += _tables_of(content)
    return "\n".join(lines) + "\n"


def _tables_of(content: dict[str, Any]) -> list[str]:
    rows = content["shards"]
    repeats = len({row["repeat"] for row in rows})
    worst = max(row["largest_difference"] for row in rows)
    times = [row["cpu_seconds"] for row in content["removal"] if row["kept"] == KEPT[0]]
    again = [row["training_cpu_seconds"] for row in rows if row["shards"] == 1]
    lines = [
        "",
        f"## {content['data']}: {content['records']} records, {content['evaluation']} evaluation images, "
        f"repeats: {repeats}",
        "",
        "| epsilon | shards | average | ensemble of probabilities | one shard alone |",
        "|---|---|---|---|---|",
    ]
    for epsilon in sorted({row["epsilon"] for row in rows}, key=str):
        for shards in sorted({row["shards"] for row in rows}):
            chosen = _select(rows, epsilon=epsilon, shards=shards)
            if chosen:
                numbers = (
                    f"{100 * _mean(chosen, key):.1f} %"
                    for key in ("average", "ensemble_of_probabilities", "single_shard")
                )
                lines.append(f"| {epsilon} | {shards} | {' | '.join(numbers)} |")
    lines += ["", "| epsilon | shards left | accuracy |", "|---|---|---|"]
    for epsilon in sorted({row["epsilon"] for row in content["removal"]}, key=str):
        for kept in KEPT:
            chosen = _select(content["removal"], epsilon=epsilon, kept=kept)
            if chosen:
                lines.append(f"| {epsilon} | {kept} | {100 * _mean(chosen, 'accuracy'):.1f} % |")
    lines += ["", f"Logits of the average and of the ensemble differ by at most {worst:.1e}."]
    if times and again:
        lines.append(
            f"Removing one of {max(SHARDS)} shards takes {statistics.median(times):.2f} s of one core "
            "(largest "
            f"{max(times):.2f}); training all data again takes {statistics.median(again):.1f} s, on features "
            "that are read already."
        )
    return lines


def main() -> None:
    """Command line."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["measure", "plot"])
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--train", type=int, help="first training images only")
    parser.add_argument("--evaluation", type=int, help="first evaluation images only")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--rows", type=int, help="stop after so many new settings")
    args = parser.parse_args()
    if args.action == "plot":
        plot()
    else:
        measure(load(args.data, args.train, args.evaluation), args.repeats, args.rows)


if __name__ == "__main__":
    main()

"""Audits of sound runs: how near the lower bounds come, how often a sound claim is called a violation.

python benchmarks/audit.py [--quick] [--only SECTION ...]; results go to benchmarks/results/audit.json,
section by section, so that an interrupted run keeps what it has measured.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dptaft
from dptaft.auditing.recipe import load_recipe
from dptaft.auditing.repeat import Repeater
from dptaft.auditing.report import judge
from dptaft.data import ArrayPixels, ImageData, Split
from dptaft_accounting import mu_to_epsilon
from dptaft_accounting.audit import Choice, audit_one_run
from dptaft_accounting.audit_bounds import clopper_pearson, f_one_run_mu, one_run_epsilon

RESULTS = Path(__file__).parent / "results" / "audit.json"
EPSILONS = (0.5, 1.0, 3.0, 8.0)
VECTORS = ((1000, 100, 75, 1e-4), (100_000, 1510, 1439, 1e-5), (1000, 500, 500, 1e-5))


def oracle_vectors(quick: bool) -> list[dict[str, Any]]:
    """The published examples of both one-run tests."""
    rows = []
    for m, r, v, delta in VECTORS:
        counts = {"canaries": m, "guesses": r, "correct": v}
        rows.append(
            counts
            | {
                "delta": delta,
                "epsilon": round(one_run_epsilon(delta, **counts), 5),
                "epsilon_gaussian_family": round(mu_to_epsilon(f_one_run_mu(**counts), delta), 5),
            }
        )
    return rows


def operating_points(quick: bool) -> dict[str, Any]:
    """Mechanisms that release noise alone, tested for epsilon 0 at 5 %: share of false violations."""
    rng, count, trials = np.random.default_rng(0), 300, 100 if quick else 300
    numbers = tuple(range(10, count, 10))
    alarms = {"best, uncorrected": 0, "bonferroni": 0, "split": 0}
    for _ in range(trials):
        coins, scores = rng.random(count) < 0.5, rng.normal(size=count)
        options = {"epsilon": 0.0, "delta": 0.0}
        best = [audit_one_run(scores, coins, **options, choice=Choice((r,))).rejected for r in numbers]
        alarms["best, uncorrected"] += any(best)
        for correction in ("bonferroni", "split"):
            halves = numbers if correction == "bonferroni" else tuple(r // 2 for r in numbers)
            choice = Choice(halves, correction)
            alarms[correction] += audit_one_run(scores, coins, **options, choice=choice, rng=rng).rejected
    return {"candidates": len(numbers), "mechanisms": trials} | {k: v / trials for k, v in alarms.items()}


def small_data(count: int = 48, classes: int = 3) -> ImageData:
    """Bands of light, a class each: cheap enough for hundreds of audits."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    images = rng.uniform(0, 0.3, (count, 28, 28)).astype(np.float32)
    for i, label in enumerate(labels):
        images[i, label * 9 : label * 9 + 9] += 0.6
    return ImageData(
        "bands",
        tuple("abc"[:classes]),
        Split(ArrayPixels(images), torch.from_numpy(labels)),
        None,
        True,
        True,
    )


def digits(quick: bool) -> list[dict[str, Any]]:
    """The default run on digits, worst-case canaries, both observers; seconds of the whole audit."""
    return _observers((1.0, 3.0, 8.0))


def certified(quick: bool) -> list[dict[str, Any]]:
    """Certified digits runs: the claim for all iterates and the smaller one for the last iterate alone."""
    return _observers((1.0, 3.0, 8.0), certified=True)


def _observers(epsilons: tuple[float, ...], **options: Any) -> list[dict[str, Any]]:
    rows = []
    for epsilon in epsilons:
        with tempfile.TemporaryDirectory() as folder:
            run = dptaft.train("digits", epsilon=epsilon, output=f"{folder}/run", **options)
            for observer in ("all-iterates", "last-iterate"):
                start, used = time.perf_counter(), time.process_time()
                report = dptaft.audit(run, observer=observer)
                rows.append(
                    {
                        "epsilon": epsilon,
                        "observer": observer,
                        "claimed": report.evidence.claimed,
                        "lower_bound": report.evidence.epsilon,
                        "share": report.evidence.epsilon / report.evidence.claimed,
                        "attainable": report.evidence.attainable,
                        "any_mechanism": report.any_mechanism.epsilon,
                        "test": report.evidence.method,
                        "canaries": report.evidence.canaries,
                        "verdict": report.verdict,
                        "measured_sensitivity": report.sensitivity.measured / report.sensitivity.declared,
                        "seconds": time.perf_counter() - start,
                        "cpu_seconds": time.process_time() - used,
                    }
                )
    return rows


def records(quick: bool) -> list[dict[str, Any]]:
    """Canaries that go through the model: weaker attacks, honest bounds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = dptaft.train("digits", epsilon=8.0, scope="head", output=f"{folder}/run")
        for observer, kind in (
            ("all-iterates", "tangent"),
            ("all-iterates", "mislabelled"),
            ("last-iterate", "mislabelled"),
            ("black-box", "mislabelled"),
        ):
            report = dptaft.audit(run, observer=observer, canaries=kind, repetitions=2 if quick else 10)
            rows.append(
                {
                    "observer": observer,
                    "canaries": kind,
                    "claimed": report.evidence.claimed,
                    "lower_bound": report.evidence.epsilon,
                    "verdict": report.verdict,
                }
            )
    return rows


def clean(quick: bool) -> dict[str, Any]:
    """500 audits of sound runs that use their budget to the last digit; false violations at 5 %."""
    data, per = small_data(), 5 if quick else 125
    rows, alarms, total = [], 0, 0
    for epsilon in EPSILONS:
        with tempfile.TemporaryDirectory() as folder:
            run = dptaft.train(data, epsilon=epsilon, scope="head", steps=5, output=f"{folder}/run")
            repeater = Repeater(load_recipe(run, data))
            found = {"all-iterates": 0, "last-iterate": 0}
            shares: list[float] = []
            for number in range(per):
                observer = ("all-iterates", "last-iterate")[number % 2]
                canaries = repeater.canaries("coordinate", None)
                observed = repeater.observe(canaries, observer)
                evidence = judge(repeater.recipe, observer, canaries, observed, 0.05)
                found[observer] += evidence.rejected
                shares.append(evidence.epsilon / evidence.claimed)
            rows.append(
                {"epsilon": epsilon, "violations": found, "audits": per, "largest_share": max(shares)}
            )
            alarms, total = alarms + sum(found.values()), total + per
    return {
        "significance": 0.05,
        "audits": total,
        "false_violations": alarms,
        "rate": alarms / total,
        "rate_95_upper": clopper_pearson(alarms, total, 0.025),
        "rate_95_lower": 1 - clopper_pearson(total - alarms, total, 0.025),
        "by_epsilon": rows,
    }


SECTIONS: dict[str, Callable[[bool], Any]] = {
    "oracle_vectors": oracle_vectors,
    "operating_points": operating_points,
    "digits": digits,
    "certified": certified,
    "records": records,
    "clean": clean,
}


def main() -> None:
    """Run the sections that were asked for and merge their results into the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; prints, writes nothing")
    parser.add_argument("--only", nargs="*", choices=sorted(SECTIONS), default=sorted(SECTIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        start = time.perf_counter()
        result = SECTIONS[name](options.quick)
        print(name, f"({time.perf_counter() - start:.0f} s)", json.dumps(result, indent=1), flush=True)
        if options.quick:
            continue
        document = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        document[name] = _plain(result)
        document["machine"] = (
            f"{platform.machine()}, one thread, Python {platform.python_version()}, torch {torch.__version__}"
        )
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()

"""Time and tightness of calibration and evaluation beside dp-accounting, Opacus, prv-accountant.

    python benchmarks/accounting.py --quick --json

Every accountant calibrates (or evaluates) the same mechanism in a process of its own, timed after its
imports. `--quick` leaves out calibration by prv-accountant, which takes more than a minute; one evaluation
is timed either way.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

EPSILON, DELTA, RATE, STEPS = 3.0, 1e-5, 0.01, 10_000
RESULT = Path(__file__).parent / "results" / "accounting.json"

_HEAD = (
    "import json, time, warnings, logging\n"
    "warnings.simplefilter('ignore'); logging.disable(30)\n"
    f"E, D, P, T = {EPSILON}, {DELTA}, {RATE}, {STEPS}\n"
)

OURS_COLD = (
    "import dptaft_accounting as a\nt = time.perf_counter()\n"
    "z = a.calibrate_noise_multiplier(lambda z: a.PoissonGaussian(z, P, T), a.Target(epsilon=E, delta=D))\n"
    "print(json.dumps([time.perf_counter() - t, z]))\n"
)
OURS = (
    "import dptaft_accounting as a\n"
    "run = lambda: a.calibrate_noise_multiplier(lambda z: a.PoissonGaussian(z, P, T), "
    "a.Target(epsilon=E, delta=D))\n"
    "a.best_bound(a.PoissonGaussian(1.0, 0.5, 2), delta=D)\n"
    "t = time.perf_counter(); z = run()\n"
    "print(json.dumps([time.perf_counter() - t, z]))\n"
)
OURS_ONE = (
    "import dptaft_accounting as a\n"
    "a.best_bound(a.PoissonGaussian(1.0, 0.5, 2), delta=D)\nt = time.perf_counter()\n"
    "e = a.best_bound(a.PoissonGaussian(1.565, P, T), delta=D).epsilon\n"
    "print(json.dumps([time.perf_counter() - t, e]))\n"
)
PEERS = {
    "dp-accounting": (
        "import dp_accounting as d\nfrom dp_accounting.pld import PLDAccountant\n"
        "event = lambda z: d.SelfComposedDpEvent(d.PoissonSampledDpEvent(P, d.GaussianDpEvent(z)), T)\n"
        "t = time.perf_counter()\n"
        "z = d.calibrate_dp_mechanism(PLDAccountant, event, E, D)\n"
        "print(json.dumps([time.perf_counter() - t, z]))\n"
    ),
    "opacus-prv": (
        "from opacus.accountants.utils import get_noise_multiplier\nt = time.perf_counter()\n"
        "z = get_noise_multiplier(target_epsilon=E, target_delta=D, sample_rate=P, steps=T, "
        "accountant='prv')\n"
        "print(json.dumps([time.perf_counter() - t, z]))\n"
    ),
    "opacus-rdp": (
        "from opacus.accountants.utils import get_noise_multiplier\nt = time.perf_counter()\n"
        "z = get_noise_multiplier(target_epsilon=E, target_delta=D, sample_rate=P, steps=T, "
        "accountant='rdp')\n"
        "print(json.dumps([time.perf_counter() - t, z]))\n"
    ),
}
PRV = (
    "from prv_accountant.dpsgd import find_noise_multiplier\nt = time.perf_counter()\n"
    "z = find_noise_multiplier(P, T, E, D, eps_error=0.01)\n"
    "print(json.dumps([time.perf_counter() - t, z]))\n"
)
EVALUATIONS = {
    "dp-accounting": (
        "from dp_accounting.pld import privacy_loss_distribution as l\nt = time.perf_counter()\n"
        "e = l.from_gaussian_mechanism(1.565, sampling_prob=P).self_compose(T).get_epsilon_for_delta(D)\n"
        "print(json.dumps([time.perf_counter() - t, float(e)]))\n"
    ),
    "prv-accountant": (
        "from prv_accountant import PRVAccountant, PoissonSubsampledGaussianMechanism as M\n"
        "t = time.perf_counter()\n"
        "a = PRVAccountant(M(noise_multiplier=1.565, sampling_probability=P), eps_error=0.01, "
        "delta_error=D/1e3,\n"
        "                  max_self_compositions=T)\n"
        "e = a.compute_epsilon(D, T)[2]\n"
        "print(json.dumps([time.perf_counter() - t, float(e)]))\n"
    ),
}


def measure(code: str, repeats: int = 1, limit: float = 300.0) -> tuple[float, float] | None:
    """Runs the code in fresh processes; returns the shortest time and the value, or None where it failed."""
    best: tuple[float, float] | None = None
    for _ in range(repeats):
        command = [sys.executable, "-c", _HEAD + code]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            return None
        seconds, value = json.loads(done.stdout.strip().splitlines()[-1])
        best = (seconds, value) if best is None or seconds < best[0] else best
    return best


def import_seconds(repeats: int = 3) -> float:
    """Shortest time of `import dptaft_accounting` in a fresh process, interpreter start not counted."""
    code = "import dptaft_accounting\nprint(json.dumps([time.perf_counter() - START, 0]))\n"
    results = [measure("START = time.perf_counter()\n" + code) for _ in range(repeats)]
    return min(result[0] for result in results if result is not None)


def run(quick: bool) -> dict[str, Any]:
    """Measures everything once and returns one JSON-able object."""
    started = time.perf_counter()
    cold, warm = measure(OURS_COLD, 3), measure(OURS, 3)
    if cold is None or warm is None:
        raise SystemExit("calibration failed")
    evaluation = measure(OURS_ONE, 3)
    calibrations = {name: measure(code, limit=30 if quick else 300) for name, code in PEERS.items()}
    if not quick:
        calibrations["prv-accountant"] = measure(PRV)
    evaluations = {name: measure(code, limit=30 if quick else 300) for name, code in EVALUATIONS.items()}
    return {
        "task": {"epsilon": EPSILON, "delta": DELTA, "sampling_rate": RATE, "steps": STEPS},
        "calibration_seconds": warm[0],
        "calibration_seconds_first_call": cold[0],
        "noise_multiplier": warm[1],
        "import_seconds": import_seconds(),
        "peer_seconds": {name: result and result[0] for name, result in calibrations.items()},
        "peer_noise_multiplier": {name: result and result[1] for name, result in calibrations.items()},
        "evaluation_seconds": evaluation and evaluation[0],
        "evaluation_epsilon_at_1.565": evaluation and evaluation[1],
        "peer_evaluation_seconds": {name: result and result[0] for name, result in evaluations.items()},
        "peer_evaluation_epsilon": {name: result and result[1] for name, result in evaluations.items()},
        "machine": f"{platform.machine()}, {platform.system()}, one thread where the library allows",
        "versions": {
            name: version(name)
            for name in ("dptaft", "numpy", "scipy", "dp-accounting", "opacus", "prv-accountant")
        }
        | {"python": platform.python_version()},
        "quick": quick,
        "total_seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave out what takes minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="record the result beside the script")
    options = parser.parse_args()
    result = run(options.quick)
    if options.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(result, indent=2))
        return
    print(f"dptaft_accounting: {result['calibration_seconds']:.3f} s, noise {result['noise_multiplier']:.5f}")
    for name, seconds in result["peer_seconds"].items():
        noise = result["peer_noise_multiplier"][name]
        print(f"{name}: {'failed' if seconds is None else f'{seconds:.3f} s, noise {noise:.5f}'}")


if __name__ == "__main__":
    main()

"""Release the best of a secret random number of candidates, and account for the choice.

Papernot, Steinke 2022, "Hyperparameter tuning with Renyi differential privacy": the number K of candidates is
drawn from a truncated negative binomial distribution and never disclosed, every candidate is drawn
independently and uniformly from the public list (so the same one may be drawn again and is then trained
again), each costs the same base mechanism, and only the best is released. Everything else is deleted.

The score is the accuracy on the evaluation images, which are outside every claim of dptaft and must not be
training records; given them, the choice is post-processing of the candidates' outputs. The accuracy of the
winner is that of a maximum over candidates, and so looks better than a new set of images would find it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dptaft.learner import Progress
from dptaft.prepaid import Payment, charge
from dptaft.runs import METRICS, WEIGHTS, Run, hash_files, load_run, new_run, write_config, write_statement
from dptaft.sweep.points import SweepPoint, expand, group
from dptaft.sweep.recipe import Candidates, Recipe, RecipeError
from dptaft.sweep.results import Row, document
from dptaft.sweep.runner import RUNS, SweepResult, sweep_folder
from dptaft.sweep.treatment import Whole
from dptaft.sweep.work import Outcome, Worker
from dptaft.sweep.write import write_files
from dptaft.training.checkpoint import write_atomically
from dptaft.training.noise import NoiseSource
from dptaft.training.plan import default_delta
from dptaft.training.preparation import Prepared, PreparedOneShot
from dptaft_accounting import (
    FullBatchGaussian,
    Mechanism,
    PrivacyStatement,
    RepeatAndSelect,
    Target,
    best_bound,
    calibrate_noise_multiplier,
)
from dptaft_accounting._search import bisect
from dptaft_accounting.accountants.selection import negative_binomial_mean

WINNER = "best"
_PRIVATE, _DRAWN = "candidates", "candidates.json"
_DERIVED = ("notion", "epsilon", "delta", "adjacency", "unit", "records_per_unit", "released")
_NEGLIGIBLE = 1e-18
"""Where the probabilities are so small the sum has reached 1 up to rounding."""


def draw_count(candidates: Candidates, source: NoiseSource) -> int:
    """K from the truncated negative binomial distribution with the given mean and shape.

    ``P[K = k]`` is proportional to ``(1 - gamma)^k (k + shape - 1 choose k)`` for k >= 1, for shape 0 to
    ``(1 - gamma)^k / k`` (Papernot, Steinke 2022, Definition 1), inverted at a uniform number of 63 bits. Its
    mean is at most the stated one.
    """
    shape, gamma = candidates.shape, distribution_gamma(candidates)
    uniform = (int(source.integers(1)) + 0.5) * 2.0**-63
    if shape == 0:
        probability = (1 - gamma) / -math.log(gamma)
    else:
        probability = shape * (1 - gamma) * gamma**shape / -math.expm1(shape * math.log(gamma))
    below, count = probability, 1
    while below < uniform and probability > _NEGLIGIBLE:
        probability *= (1 - gamma) * (count + shape) / (count + 1)
        below += probability
        count += 1
    return count


def distribution_gamma(candidates: Candidates) -> float:
    """Gamma of the distribution: its mean is just below the stated one, for which the accountant charges."""
    wanted = candidates.mean
    return bisect(lambda g: negative_binomial_mean(candidates.shape, g) > wanted, 1e-300, 1 - 1e-12)[1]


@dataclass(frozen=True)
class Choice:
    """What is released and what it costs.

    Attributes:
        base: what one candidate may spend at most: mu-GDP as one Gaussian step.
        mechanism: the choice among candidates.
        delta: of the claim.
        epsilon: of the choice.
        base_epsilon: of one candidate at the same delta.
    """

    base: FullBatchGaussian
    mechanism: RepeatAndSelect
    delta: float
    epsilon: float
    base_epsilon: float


def plan_choice(recipe: Recipe, delta: float, adjacency: str) -> Choice:
    """Calibrate the candidates so that the choice among them costs at most the budget of the recipe.

    Raises:
        CalibrationError: no noise reaches the budget.
    """
    count = recipe.budget.candidates

    def selected(noise: float) -> RepeatAndSelect:
        base = FullBatchGaussian(noise, steps=1, adjacency=adjacency)
        return RepeatAndSelect(base, count.mean, "truncated-negative-binomial", count.shape)

    target = Target(epsilon=recipe.budget.epsilons[0], delta=delta)
    mechanism = selected(calibrate_noise_multiplier(selected, target))
    base = mechanism.base
    if not isinstance(base, FullBatchGaussian):
        raise RecipeError("the base of a choice must be a full-batch Gaussian")
    total = best_bound(mechanism, delta=delta).epsilon
    return Choice(base, mechanism, delta, total, best_bound(base, delta=delta).epsilon)


def run_selection(recipe: Recipe, folder: Path, *, progress: Progress | None = None) -> SweepResult:
    """Draw the candidates, train them, release the winner with its statement, delete everything else.

    Args:
        recipe: with the treatment ``select-best``.
        folder: of the sweep; an interrupted selection is continued with the same candidates.
        progress: called with (stage, done, total); what it shows depends on the secret number of candidates.

    Returns:
        One outcome, the winner's; none where every candidate failed.

    Raises:
        RecipeError: no evaluation images, or candidates that do not cost the same.
        LedgerError: the budget does not permit the choice.

    Formal guarantees:
        The folder ``runs/best`` is what `RepeatAndSelect` describes and the only trace of the candidates
        that is left. Whoever watches the process (its duration, its output) may learn their number, and must
        not publish it.
    """
    points = expand(recipe)
    with sweep_folder(folder, recipe):
        private, winner = folder / _PRIVATE, folder / RUNS / WINNER
        worker = Worker(private / RUNS, public=False)
        data = worker.images(points[0])
        if data.evaluation is None or not len(data.evaluation):
            raise RecipeError("select-best scores candidates on evaluation images; give some")
        adjacency = str(points[0].options.get("adjacency", "zero-out"))
        delta = recipe.budget.delta or default_delta(points[0].options.get("public_size") or len(data.train))
        choice = plan_choice(recipe, delta, adjacency)
        listed = [_with_budget(point, choice) for point in points]
        plans = _plans(listed, choice, worker)
        whole = Whole(choice.mechanism, delta, choice.epsilon, 1)
        ledger = Path(recipe.budget.ledger) if recipe.budget.ledger else folder.parent / "ledger.sqlite"
        charged = charge(whole.bill(data, f"sweep {folder.name}"), ledger, folder / "ledger.json")
        if not winner.is_dir() and not (folder / "summary.json").exists():
            _prepare_private(private)
            drawn = _drawn(private / _DRAWN, listed, recipe.budget.candidates)
            allowed = {point.id: plans[name].spending() for name, point in drawn}
            outcomes = _train([point for _, point in drawn], worker, Payment({}, allowed), progress)
            _release(outcomes, [point for _, point in drawn], worker, winner, choice, recipe, charged)
        shutil.rmtree(private, ignore_errors=True)
        return _result(recipe, folder, winner, choice, whole, charged)


def _with_budget(point: SweepPoint, choice: Choice) -> SweepPoint:
    """The point with the budget of one candidate, a little below its bound."""
    epsilon = choice.base_epsilon * (1 - 1e-6)
    return replace(point, epsilon=epsilon, options=dict(point.options) | {"delta": choice.delta})


def _plans(
    points: Sequence[SweepPoint], choice: Choice, worker: Worker
) -> dict[str, Prepared | PreparedOneShot]:
    """Plans of all candidates, each of which costs at most the base.

    Raises:
        RecipeError: one of another kind, whose curve the base does not bound.
    """
    found: dict[str, Prepared | PreparedOneShot] = {}
    for task in group(points):
        found |= worker.plans(task)
    for name, prepared in found.items():
        if not _bounded(prepared.spending().mechanism, choice.base):
            raise RecipeError(
                f"the candidate {name} is no full-batch Gaussian mechanism within the budget of one; "
                'use full batches (sampling = "full-batch")'
            )
    return found


def _bounded(mechanism: Mechanism | None, base: FullBatchGaussian) -> bool:
    """Whether mu^2 = sum (sensitivity/noise)^2 of a full-batch Gaussian is at most that of the base."""
    if not isinstance(mechanism, FullBatchGaussian) or mechanism.adjacency != base.adjacency:
        return False
    return sum(z**-2 for z in mechanism.noise_schedule) <= sum(z**-2 for z in base.noise_schedule)


def _prepare_private(private: Path) -> None:
    private.mkdir(mode=0o700, exist_ok=True)
    private.chmod(0o700)
    (private / RUNS).mkdir(mode=0o700, exist_ok=True)


def _drawn(path: Path, points: Sequence[SweepPoint], candidates: Candidates) -> list[tuple[str, SweepPoint]]:
    """(id in the list, point with an id of its own) of all candidates: drawn once, kept in a private file."""
    if path.exists():
        numbers = [int(number) for number in json.loads(path.read_text())]
    else:
        source = NoiseSource()
        count = draw_count(candidates, source)
        numbers = [int(value) % len(points) for value in source.integers(count)]
        write_atomically(path, json.dumps(numbers).encode())
    return [(points[n].id, replace(points[n], id=f"{i:06}-{points[n].id}")) for i, n in enumerate(numbers)]


def _train(
    points: Sequence[SweepPoint], worker: Worker, payment: Payment, progress: Progress | None
) -> list[Outcome]:
    found: dict[str, Outcome] = {}
    missing = []
    for point in points:
        if worker.output(point).is_dir():
            found[point.id] = Outcome(point.id, load_run(worker.output(point)).accuracy)
        else:
            missing.append(point)
    for task in group(missing):
        found |= {outcome.point: outcome for outcome in worker.run(task, payment, progress)}
    return [found[point.id] for point in points]


def _release(
    outcomes: Sequence[Outcome],
    points: Sequence[SweepPoint],
    worker: Worker,
    winner: Path,
    choice: Choice,
    recipe: Recipe,
    charged: Mapping[str, Any],
) -> None:
    """Write the winner's run with the statement about the choice; nothing where every candidate failed."""
    scored = [(o.accuracy, p) for o, p in zip(outcomes, points, strict=True) if o.accuracy is not None]
    if not scored:
        return
    best = max(scored, key=lambda pair: pair[0])[1]
    run = load_run(worker.output(best))
    winner.parent.mkdir(exist_ok=True)
    with new_run(winner) as draft:
        for name in (WEIGHTS, METRICS):
            shutil.copyfile(run.path / name, draft / name)
        write_config(draft, _config(run, choice, recipe))
        write_statement(draft, _statement(run, draft, choice, recipe, charged))


def _config(run: Run, choice: Choice, recipe: Recipe) -> dict[str, Any]:
    """The candidate's configuration under the name and budget of the choice.

    A candidate's own name tells its number, and so something about how many there were.
    """
    asked = dict(run.config["privacy"]) | {"epsilon": recipe.budget.epsilons[0]}
    count = recipe.budget.candidates
    selection = {
        "candidate_epsilon": choice.base_epsilon,
        "mean_candidates": count.mean,
        "shape": count.shape,
    }
    named = dict(run.config["run"]) | {"id": WINNER}
    return dict(run.config) | {"run": named, "privacy": asked, "selection": selection}


def _statement(
    run: Run, draft: Path, choice: Choice, recipe: Recipe, charged: Mapping[str, Any]
) -> PrivacyStatement:
    """The statement of the winner: what its candidate says, with the choice as the mechanism."""
    if run.statement is None:
        raise RecipeError("a candidate without a privacy claim cannot be released")
    old = run.statement.to_dict()
    accesses = dict(old["claim"].get("data_accesses", {}))
    for name in ("hyperparameters", "clipping_choice"):
        if accesses.get(name) == "not covered":
            accesses[name] = "covered"
    claim = {key: value for key, value in old["claim"].items() if key not in _DERIVED}
    caveats = [
        "the released run is the best of a secret number of candidates by accuracy on the evaluation images: "
        "that accuracy is too good for new images",
        "the list of candidates is assumed to have been written down without looking at the records",
    ]
    kept = [
        line for line in old["admin"].get("caveats", []) if not line.startswith(("given by", "no budget"))
    ]
    return PrivacyStatement.build(
        choice.mechanism,
        choice.delta,
        unit=old["claim"]["unit"],
        cross_check=False,
        claim=claim | {"data_accesses": accesses},
        details={"candidate": {key: value for key, value in old["mechanism"].items() if key != "record"}},
        composition=dict(charged) | _cost_of_choice(choice, recipe),
        implementation=old.get("implementation", {}),
        utility=old.get("utility", {}),
        admin={
            "run": WINNER,
            "time": old["admin"]["time"],
            "files": hash_files(draft),
            "caveats": kept + caveats,
        },
    )


def _cost_of_choice(choice: Choice, recipe: Recipe) -> dict[str, Any]:
    count, listed = recipe.budget.candidates, len(expand(recipe))
    return {
        "hyperparameter_choice": (
            f"best of a secret random number of candidates (mean {count.mean:g}, truncated negative binomial "
            f"of shape {count.shape:g}), each drawn from a public list of {listed}"
        ),
        "hyperparameter_cost": (
            f"accounted: one candidate costs epsilon {choice.base_epsilon}, the choice among them epsilon "
            f"{choice.epsilon}, at delta {choice.delta}"
        ),
    }


def _result(
    recipe: Recipe, folder: Path, winner: Path, choice: Choice, whole: Whole, charged: Mapping[str, Any]
) -> SweepResult:
    chosen, rows, outcomes = None, [], ()
    if winner.is_dir():
        run = load_run(winner)
        cost = _cost_of_choice(choice, recipe)
        chosen = {
            "run": f"{RUNS}/{WINNER}",
            "accuracy": run.accuracy,
            "settings": {key: run.config[key] for key in ("model", "optimizer", "privacy")},
            "epsilon": choice.epsilon,
            "delta": choice.delta,
            "candidate_epsilon": choice.base_epsilon,
            "ledger_entry": charged["ledger_entry"],
            "privacy": f"Released: the {cost['hyperparameter_choice']}. "
            f"{cost['hyperparameter_cost'].capitalize()}.",
        }
        rows, outcomes = [_row(recipe, run, choice)], (Outcome(WINNER, run.accuracy),)
    content = document(recipe, rows, (), {recipe.data[0].name: whole}, chosen)
    write_files(folder, content, rows)
    return SweepResult(folder, outcomes, (), {recipe.data[0].name: whole})


def _row(recipe: Recipe, run: Run, choice: Choice) -> Row:
    accuracy = float(run.accuracy or 0.0)
    setting = f"scope {run.config['model']['scope']}, method {run.config['model']['method']}"
    return Row(
        recipe.data[0].name,
        "best candidate",
        setting,
        recipe.budget.epsilons[0],
        choice.epsilon,
        choice.delta,
        (accuracy,),
        accuracy,
        None,
        None,
        0,
    )

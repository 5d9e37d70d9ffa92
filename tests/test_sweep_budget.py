"""What a sweep as a whole costs: compositions, the ledger, the choice of the best, kills."""

import collections
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import tomli_w
from builders import small_images
from sweeping import HEAD, recipe

from dptaft.identity import identify
from dptaft.prepaid import PaymentError, PrepaidAccount, charge
from dptaft.runs import load_run
from dptaft.sweep import select
from dptaft.sweep.points import expand
from dptaft.sweep.recipe import Candidates, RecipeError
from dptaft.sweep.runner import RUNS, run_sweep
from dptaft.sweep.select import WINNER, distribution_gamma, draw_count, plan_choice, run_selection
from dptaft.sweep.treatment import compose
from dptaft.sweep.write import write_results
from dptaft.training.account import Spending
from dptaft.training.noise import NoiseSource
from dptaft.verification import verify
from dptaft_accounting import FullBatchGaussian, PrivacyStatement, SequenceComposition, best_bound
from dptaft_accounting.accountants.selection import negative_binomial_mean
from dptaft_accounting.errors import AccountingError
from dptaft_accounting.ledger import Budget, Ledger


def entries(folder):
    ledger = Ledger(folder / "ledger.sqlite")
    return ledger, [entry for name in ledger.datasets() for entry in ledger.account(name).entries]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    made = recipe("publish-all", seeds=(0, 1))
    result = run_sweep(made, root / "all")
    return made, root, result, write_results(made, result)


def test_publishing_all_costs_the_composition_of_all(published):
    made, root, result, content = published
    whole = result.wholes["digits"]
    records = [load_run(root / "all" / RUNS / p.id).statement.mechanism["record"] for p in expand(made)]
    mu = math.sqrt(sum(r["steps"] / r["noise_multiplier"] ** 2 for r in records))
    from dptaft_accounting import mu_to_epsilon

    assert whole.epsilon == pytest.approx(mu_to_epsilon(mu, 1e-5), rel=1e-5)
    assert whole.epsilon > max(made.budget.epsilons)
    assert f"cost epsilon {whole.epsilon}" in content["privacy"]
    statement = PrivacyStatement.from_json((root / "all" / "privacy-digits.json").read_text())
    assert statement.recompute().holds
    assert statement.claim["epsilon"] == whole.epsilon
    ledger, (entry,) = entries(root)
    assert entry.state == "committed"
    assert float(entry.authorised.epsilon) >= whole.epsilon
    assert ledger.verify() == []


def test_points_of_a_published_sweep_name_the_whole(published):
    made, root, result, _ = published
    _, (entry,) = entries(root)
    for point in expand(made):
        composition = load_run(root / "all" / RUNS / point.id).statement.composition
        assert composition["sweep"]["ledger_entry"] == entry.id
        assert composition["sweep"]["epsilon"] == result.wholes["digits"].epsilon


def test_a_sweep_that_goes_on_is_not_charged_again(published):
    made, root, *_ = published
    point = expand(made)[0]
    (root / "all" / RUNS / point.id).rename(root / "taken-away")
    again = run_sweep(made, root / "all")
    assert len(again.kept) == 3
    (failed,) = again.failed  # the run that was taken away may be published: a second one is not paid for
    assert "a second result costs again" in failed.error
    (root / "taken-away").rename(root / "all" / RUNS / point.id)
    assert run_sweep(made, root / "all").failed == ()
    assert len(entries(root)[1]) == 1
    with pytest.raises(RecipeError, match="another recipe, whose cost is settled"):
        run_sweep(recipe("publish-all", seeds=(0, 1), epsilons=[1.0]), root / "all")


def test_a_budget_that_is_too_small_stops_the_sweep_before_it_trains(tmp_path, published):
    _, root, *_ = published
    source = Ledger(root / "ledger.sqlite")
    own = recipe("publish-all", seeds=(0, 1), ledger=str(tmp_path / "ledger.sqlite"))
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    from dptaft.data import load_data
    from dptaft.identity import content_digest

    name = ledger.register(content_digest(load_data("digits").train), "digits")
    ledger.declare(name, Budget.from_epsilon(4.0, 1e-5))
    with pytest.raises(ValueError, match=r"budget|exceed"):
        run_sweep(own, tmp_path / "all")
    assert not list((tmp_path / "all" / RUNS).iterdir())
    with pytest.raises(
        RecipeError, match=r"publishing all 4 points costs epsilon .* more than most_epsilon 5"
    ):
        run_sweep(recipe("publish-all", seeds=(0, 1), most_epsilon=5.0), tmp_path / "cap")
    assert len(source.account(source.datasets()[0]).entries) == 1


@pytest.mark.parametrize("moment", ["reserve", "pointer", "authorise", "commit"])
def test_a_crash_at_any_moment_of_the_charge_leads_to_one_charge(tmp_path, monkeypatch, moment):
    """Dying before or after each durable step, then starting again: charged once, never twice."""
    from dptaft import prepaid
    from dptaft.data import load_data

    data, whole = load_data("digits"), compose([Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)] * 3)
    given = (whole.bill(data, "sweep"), tmp_path / "ledger.sqlite", tmp_path / "pointer.json")

    class CrashError(Exception):
        pass

    def crash_after(owner, name):
        original = getattr(owner, name)

        def dying(*args, **kwargs):
            original(*args, **kwargs)
            raise CrashError

        monkeypatch.setattr(owner, name, dying)

    crash_after(*((prepaid, "write_atomically") if moment == "pointer" else (Ledger, moment)))
    with pytest.raises(CrashError):
        charge(*given)
    monkeypatch.undo()
    # the process that held the entry is this one; a sweep that starts again is another
    monkeypatch.setattr("dptaft.budgeting.is_gone", lambda owner: True)
    monkeypatch.setattr("dptaft_accounting.ledger.is_gone", lambda owner: True)
    fields = charge(*given)
    assert charge(*given)["ledger_entry"] == fields["ledger_entry"]
    _, found = entries(tmp_path)
    spent = [entry for entry in found if float(entry.authorised.epsilon) > 0]
    assert [entry.id for entry in spent] == [fields["ledger_entry"]]
    assert float(spent[0].authorised.epsilon) >= whole.epsilon


def test_a_sweep_whose_data_changed_is_refused(tmp_path):
    from builders import small_data

    whole = compose([Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)])
    places = (tmp_path / "ledger.sqlite", tmp_path / "pointer.json")
    data = small_data()
    charge(whole.bill(data, "sweep"), *places)
    fewer = replace(data, train=data.train.take(range(59)))
    with pytest.raises(PaymentError, match="holds other records now; restore them"):
        charge(whole.bill(fewer, "sweep"), *places)
    known, book = identify(fewer), Ledger(places[0])
    assert book.register(known.content, "small", records=known.records) == book.datasets()[0]
    with pytest.raises(PaymentError, match="holds other records now; restore them"):  # one more version
        charge(whole.bill(fewer, "sweep"), *places)
    charge(whole.bill(data, "sweep"), *places)


def test_a_finished_point_continues_from_its_partial_folder_alone(tmp_path):
    spending = Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)
    partial = tmp_path / "runs" / "point.partial"
    partial.mkdir(parents=True)
    (partial / "result.safetensors").touch()
    account = PrepaidAccount({}, spending, tmp_path / "finished" / "point", partial)
    for _ in range(2):  # stopped between its commit and its run folder
        account.reserve(spending)
        account.commit(spending)
    (partial / "result.safetensors").unlink()  # an empty folder is no state either
    with pytest.raises(PaymentError, match="bring the folder back, or start anew"):
        account.reserve(spending)


def test_composition_is_that_of_the_parts_and_points_without_noise_are_refused():
    spending = Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)
    whole = compose([spending, spending])
    assert isinstance(whole.mechanism, SequenceComposition)
    assert whole.epsilon == best_bound(FullBatchGaussian(5.0, steps=8), delta=1e-5).epsilon
    with pytest.raises(RecipeError, match="without noise"):
        compose([spending, Spending(None, None, 1e-5)])


def test_a_point_cannot_spend_more_than_was_paid():
    account = PrepaidAccount({"a": 1}, Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5))
    account.authorise(Spending(FullBatchGaussian(5.0, steps=3), None, 1e-5))
    assert account.commit(Spending(FullBatchGaussian(5.0, steps=4), None, 1e-5)) == {"a": 1}
    for more in (FullBatchGaussian(5.0, steps=5), FullBatchGaussian(4.9, steps=4)):
        with pytest.raises(PaymentError, match="more than was charged"):
            account.authorise(Spending(more, None, 1e-5))


# ---------------------------------------------------------------- select-best

GRID = HEAD | {"grid": {"l2_clip_norm": [0.01, 0.3], "optimizer.learning_rate": [1e-3, 30.0]}}


def selecting(**budget):
    return recipe("select-best", methods=(GRID,), **({"epsilon": 3.0, "candidates": {"mean": 3.0}} | budget))


def test_the_choice_costs_at_most_the_budget_and_its_candidates_less():
    choice = plan_choice(selecting(), 1e-5, "zero-out")
    assert 2.99 < choice.epsilon <= 3.0
    assert choice.base_epsilon < 2.0
    assert choice.epsilon == best_bound(choice.mechanism, delta=1e-5).epsilon
    more = plan_choice(selecting(candidates={"mean": 30.0}), 1e-5, "zero-out")
    assert more.base_epsilon < choice.base_epsilon


@pytest.mark.parametrize("candidates", [Candidates(3.0, 0.0), Candidates(10.0, 1.0), Candidates(2.0, 0.5)])
def test_the_secret_number_has_its_distribution(candidates):
    """Against the probabilities of Papernot and Steinke's Definition 1, by a chi-square test."""
    shape, gamma = candidates.shape, distribution_gamma(candidates)
    mean = negative_binomial_mean(shape, gamma)
    assert mean <= candidates.mean < mean * (1 + 1e-6)

    def weight(k):
        falling = math.prod((i + shape) / (i + 1) for i in range(1, k)) * (shape or 1.0)
        return (1 - gamma) ** k * falling

    weights = [weight(k) for k in range(1, 4000)]
    total, source, draws = sum(weights), NoiseSource(), 6_000
    assert sum(k * w for k, w in enumerate(weights, 1)) / total == pytest.approx(mean, rel=1e-6)
    counts = collections.Counter(draw_count(candidates, source) for _ in range(draws))
    assert min(counts) == 1
    bins = [weights[k - 1] / total * draws for k in range(1, 9)]
    seen = [counts[k] for k in range(1, 9)]
    bins.append(draws - sum(bins))
    seen.append(draws - sum(seen))
    statistic = sum((s - e) ** 2 / e for s, e in zip(seen, bins, strict=True))
    assert statistic < 35  # chi-square with 8 degrees of freedom: p below 3e-5


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    root = tmp_path_factory.mktemp("selected")
    seen = {}
    original = select._release

    def spy(outcomes, points, worker, *rest):
        seen["outcomes"], seen["points"] = list(outcomes), list(points)
        folder = worker.output(points[0]).parent.parent
        seen["mode"] = (
            stat.S_IMODE(folder.stat().st_mode),
            stat.S_IMODE((folder / "candidates.json").stat().st_mode),
        )
        return original(outcomes, points, worker, *rest)

    select._release = spy
    try:
        result = run_selection(selecting(), root / "pick")
    finally:
        select._release = original
    return root, result, seen


def test_only_the_winner_is_left_with_a_statement_about_the_choice(selected):
    root, _, seen = selected
    folder = root / "pick"
    best = max(outcome.accuracy for outcome in seen["outcomes"] if outcome.accuracy is not None)
    run = load_run(folder / RUNS / WINNER)
    assert run.accuracy == best
    assert [path.name for path in (folder / RUNS).iterdir()] == [WINNER]
    assert not (folder / "candidates").exists()
    assert seen["mode"] == (0o700, 0o600)
    statement = run.statement
    assert statement.mechanism["record"]["kind"] == "repeat-and-select"
    assert statement.recompute().holds
    assert 2.99 < statement.claim["epsilon"] <= 3.0
    assert verify(folder / RUNS / WINNER, ledger=root / "ledger.sqlite").passed
    assert run.predict([dptaft_image()])[0].label in "0123456789"


def dptaft_image():
    from dptaft.data import load_data

    return load_data("digits").evaluation.pixels[0]


def test_nothing_that_is_left_tells_the_number_of_candidates(selected):
    """Neither draw numbers in names nor counts of points in the results."""
    root, _, seen = selected
    folder = root / "pick"
    for path in folder.rglob("*"):
        assert "0000" not in path.name
        if path.suffix in (".json", ".toml", ".md", ".html", ".csv", ".jsonl"):
            text = path.read_text()
            for point in seen["points"]:
                assert point.id not in text
                assert point.id[:7] not in text
    assert json.loads((folder / "summary.json").read_text())["chosen"]["candidate_epsilon"] < 2.0
    assert "one candidate costs epsilon" in (folder / "summary.md").read_text()


def test_a_finished_choice_is_not_made_again(selected):
    root, result, _ = selected
    before = (root / "pick" / RUNS / WINNER / "privacy.json").read_bytes()
    assert run_selection(selecting(), root / "pick").outcomes == result.outcomes
    assert (root / "pick" / RUNS / WINNER / "privacy.json").read_bytes() == before
    assert len(entries(root)[1]) == 1


def test_an_interrupted_choice_goes_on_with_the_same_candidates(tmp_path, monkeypatch):
    monkeypatch.setattr(select, "draw_count", lambda candidates, source: 3)
    original = select.Worker.run

    def stop(self, task, payment, progress=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(select.Worker, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        run_selection(selecting(), tmp_path / "pick")
    drawn = json.loads((tmp_path / "pick" / "candidates" / "candidates.json").read_text())
    seen = []

    def resumed(self, task, payment, progress=None):
        seen.extend(point.id for point in task.points)
        return original(self, task, payment, progress)

    monkeypatch.setattr(select.Worker, "run", resumed)
    monkeypatch.setattr(select, "draw_count", lambda candidates, source: 99)
    run_selection(selecting(), tmp_path / "pick")
    ids = [point.id for point in expand(selecting())]
    assert seen == [f"{i:06}-{ids[n]}" for i, n in enumerate(drawn)]
    assert len(entries(tmp_path)[1]) == 1


def test_candidates_of_another_curve_are_refused(tmp_path):
    sampled = GRID | {"sampling": "poisson", "expected_batch_size": 100}
    made = recipe("select-best", methods=(sampled,), epsilon=3.0)
    with pytest.raises((RecipeError, AccountingError), match="no full-batch Gaussian"):
        run_selection(made, tmp_path / "pick")
    assert not (tmp_path / "ledger.sqlite").exists()


# ---------------------------------------------------------------- kills


@pytest.mark.slow
def test_a_killed_sweep_of_100_points_repeats_and_charges_nothing_twice(tmp_path):
    """SIGKILL half-way; then again to the end."""
    budgets = [0.5 + 0.25 * i for i in range(10)]
    images, labels = small_images(12)
    np.savez(tmp_path / "few.npz", images=images.clip(0, 1), labels=labels)
    data = [{"name": "few", "source": str(tmp_path / "few.npz"), "classes": ["a", "b", "c"]}]
    made = recipe("publish-all", name="hundred", seeds=tuple(range(10)), epsilons=budgets, steps=2, data=data)
    path, folder = tmp_path / "hundred.toml", tmp_path / "sweep"
    path.write_text(tomli_w.dumps(dict(made.content)))
    command = [sys.executable, "-m", "dptaft", "sweep", str(path), "--output", str(folder)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)

    def finished():
        return sorted((folder / RUNS).glob("few-*/privacy.json")) if folder.exists() else []

    while len(finished()) < 50 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in finished()}
    assert 50 <= len(before) < 100
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, **quiet)
    assert len(finished()) == 100
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in before} == before
    assert {path.name for path in (folder / RUNS).iterdir()} == {point.id for point in expand(made)}
    ledger, (entry,) = entries(tmp_path)
    statements = [load_run(file.parent).statement for file in finished()]
    total = compose([spending(statement) for statement in statements])
    assert float(entry.authorised.epsilon) == pytest.approx(total.epsilon, rel=1e-5)
    assert {s.mechanism["steps_executed"] for s in statements} == {2}
    assert ledger.verify() == []


def spending(statement):
    from dptaft_accounting import mechanism_from_dict

    return Spending(mechanism_from_dict(statement.mechanism["record"]), None, statement.claim["delta"])

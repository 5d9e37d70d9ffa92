"""Sweeps: batched and single points, failures, resumption, results."""

import csv
import json
import math
import xml.etree.ElementTree as ET

import pytest
from click.testing import CliRunner
from sweeping import HEAD, recipe

import dptaft
from dptaft.backends import BackendConfig
from dptaft.cli import main
from dptaft.runs import load_run
from dptaft.sweep.points import expand
from dptaft.sweep.recipe import RecipeError
from dptaft.sweep.results import Row
from dptaft.sweep.runner import RUNS, run_sweep
from dptaft.sweep.write import write_results

METHODS = (
    HEAD,
    {"name": "plain", "scope": "head", "method": "non-linear"},
    {"name": "deep", "scope": "last:99"},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three methods (batched, one by one, impossible), two budgets, two seeds, and the reference."""
    folder = tmp_path_factory.mktemp("sweeps") / "tiny"
    made = recipe(methods=METHODS, seeds=(0, 1), reference=True)
    seen = []
    result = run_sweep(made, folder, report=lambda done, total, outcomes: seen.append((done, total)))
    return made, folder, result, seen, write_results(made, result)


def test_every_point_is_a_run_with_its_own_true_statement(finished):
    made, folder, result, seen, _ = finished
    points = expand(made)
    assert len(result.outcomes) == len(points) == 18
    assert seen[-1] == (18, 18)
    for point, outcome in zip(points, result.outcomes, strict=True):
        if point.method == "deep":
            assert "deeper than the model" in outcome.error
            continue
        run = load_run(folder / RUNS / point.id)
        assert run.accuracy == outcome.accuracy
        assert run.config["model"]["seed"] == point.seed
        assert run.config["model"]["method"] == ("non-linear" if point.method == "plain" else "tangent")
        if math.isinf(point.epsilon):
            assert run.statement is None
            continue
        assert run.statement.claim["epsilon"] <= point.epsilon
        assert run.statement.recompute().holds
        assert "no claim is made for the sweep" in run.statement.composition["hyperparameter_cost"]
    assert not (folder / "features").exists()
    assert not list(folder.glob("**/*.partial"))


def test_batched_points_are_those_of_single_training(finished):
    """Without noise, a point of a batch equals the same run alone."""
    made, folder, *_ = finished
    point = next(p for p in expand(made) if p.method == "head" and math.isinf(p.epsilon) and p.seed == 1)
    mine = load_run(folder / RUNS / point.id).predictor.weights
    alone = dptaft.train("digits", **point.train_options(), output=folder.parent / "alone", ledger=None)
    for name, value in alone.predictor.weights.items():
        assert (mine[name] - value).norm() <= 1e-4 * value.norm() + 1e-7


def test_finished_points_are_kept_and_failures_tried_again(finished):
    made, folder, first, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / RUNS).glob("*/privacy.json")}
    again = run_sweep(made, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / RUNS).glob("*/privacy.json")} == before
    assert len(again.kept) == 12
    assert again.outcomes == first.outcomes
    assert len(json.loads((folder / "failures.json").read_text())) == 6


def test_results_hold_mean_spread_and_reference(finished):
    _, folder, _, _, content = finished
    rows = {(row["method"], row["epsilon"]): row for row in content["rows"]}
    assert len(rows) == 9
    one, reference = rows["head", 1.0], rows["head", "inf"]
    a, b = one["accuracies"]
    assert one["mean"] == pytest.approx((a + b) / 2)
    assert one["spread"] == pytest.approx(abs(a - b) / math.sqrt(2))
    assert one["reference"] == reference["mean"] == pytest.approx(sum(reference["accuracies"]) / 2)
    assert 0.99 < one["claimed_epsilon"] <= 1.0
    assert (rows["deep", 1.0]["mean"], rows["deep", 1.0]["failed"]) == (None, 2)
    assert json.loads((folder / "summary.json").read_text())["rows"] == content["rows"]
    lines = list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))
    assert [line["epsilon"] for line in lines[:3]] == ["1.0", "8.0", "inf"]
    assert float(lines[0]["mean"]) == one["mean"]
    text = (folder / "summary.md").read_text()
    assert "| head | 1 |" in text
    assert "No claim is made for the sweep as a whole" in text
    assert "deeper than the model" in text


def test_picture_has_a_line_with_error_bars_per_method_and_is_reproducible(finished):
    made, folder, result, _, _ = finished
    svg = (folder / "accuracy.svg").read_text()
    ET.fromstring(svg)
    assert svg.count('id="LineCollection') == 2 * 2  # error bars in the plot and in the legend
    page = (folder / "summary.html").read_text()
    assert page.count("<svg") == 1
    assert "<script" not in page
    write_results(made, result)
    assert (folder / "accuracy.svg").read_text() == svg


def test_names_of_users_cannot_break_out_of_the_page(finished):
    from dptaft.sweep.page import page

    _, _, _, _, content = finished
    row = Row("<b>", "<script>x</script>", "", 1.0, 1.0, 1e-5, (0.5,), 0.5, None, None, 0)
    text = page(content | {"title": "<i>", "failed": {"<u>": "<s>"}}, [row], None)
    for tag in ("<b>", "<script>", "<i>", "<u>", "<s>"):
        assert tag not in text


@pytest.mark.slow
def test_two_processes_give_the_same_points(tmp_path):
    made = recipe(methods=(HEAD,), seeds=(0, 1), steps=2)
    result = run_sweep(made, tmp_path / "two", backend=BackendConfig(jobs=2))
    assert [outcome.error for outcome in result.outcomes] == [None] * 4
    assert {path.name for path in (tmp_path / "two" / RUNS).iterdir()} == {point.id for point in expand(made)}


def test_foreign_folders_and_busy_folders_are_refused(tmp_path):
    made = recipe()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(RecipeError, match="holds other files"):
        run_sweep(made, tmp_path / "mine")
    from dptaft.sweep.runner import sweep_folder

    with sweep_folder(tmp_path / "busy", made), pytest.raises(RecipeError, match="another process works on"):
        run_sweep(made, tmp_path / "busy")


def test_command_prints_table_plan_and_json(tmp_path):
    path = tmp_path / "mine.toml"
    import tomli_w

    path.write_text(tomli_w.dumps(dict(recipe(methods=METHODS[::2]).content)))
    run = CliRunner()
    planned = run.invoke(main, ["sweep", str(path), "--dry-run", "--json", "--set", "data.0.source=nowhere"])
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.stdout)
    assert plan["data"]["digits"].startswith("NOT FOUND")
    assert plan["batches"] == [2, 2]
    out = run.invoke(main, ["sweep", str(path), "--output", str(tmp_path / "out"), "--set", "seeds=[1]"])
    assert out.exit_code == 1, out.output  # one method fails
    assert "head" in out.stdout
    assert "failed: digits-deep" in out.stdout
    again = run.invoke(
        main, ["sweep", str(path), "--output", str(tmp_path / "out"), "--set", "seeds=[1]", "--json"]
    )
    assert json.loads(again.stdout)["rows"][0]["method"] == "head"
    wrong = run.invoke(main, ["sweep", str(path), "--set", "budget.treatment=free"])
    assert wrong.exit_code == 2
    assert "needs a treatment" in wrong.output


@pytest.mark.slow
def test_the_recipe_of_the_paper_runs_on_a_stand_in(tmp_path):
    """All seven data sets, every method: small images and the starter in place of ViT-L/16."""
    from builders import write_folder

    for part, count in (("train", 8), ("test", 4)):
        write_folder(tmp_path / "images" / part, count=count)
    changes = [f"data.{i}.source={tmp_path / 'images'}" for i in range(7)]
    changes += ["options.model=starter", f"options.feature_cache={tmp_path / 'features'}", "options.steps=1"]
    changes += ["budget.epsilons=[8.0]", "budget.reference=false", "methods.1.scope=last:2"]
    given = [text for change in changes for text in ("--set", change)]
    out = CliRunner().invoke(
        main, ["sweep", "paper_privacy", *given, "--output", str(tmp_path / "out"), "--json"]
    )
    assert out.exit_code == 0, out.output
    content = json.loads(out.stdout)
    assert len(content["rows"]) == 28
    assert all(row["mean"] is not None for row in content["rows"])
    assert not content["failed"]


def test_what_a_kill_left_beside_a_finished_run_is_removed(finished):
    made, folder, *_ = finished
    point = expand(made)[0]
    left = [folder / RUNS / f"{point.id}.partial", folder / RUNS / f".{point.id}-x1y2"]
    for path in left:
        path.mkdir()
        (path / "checkpoint.safetensors").write_bytes(b"private")
    run_sweep(made, folder)
    assert not any(path.exists() for path in left)

"""Recipes: what is accepted, what is refused by name, which points follow."""

import math

import pytest
from click.testing import CliRunner
from sweeping import HEAD, recipe

import dptaft
from dptaft.cli import main
from dptaft.sweep.points import expand, group
from dptaft.sweep.recipe import (
    RecipeError,
    find_recipe,
    load_recipe,
    override,
    parse_recipe,
    shipped_recipes,
    train_options,
)


def content(**changes):
    return dict(recipe().content) | changes


def test_points_are_every_combination_with_readable_and_different_names():
    grid = {
        "name": "grid",
        "scope": "head",
        "grid": {"l2_clip_norm": [0.5, 1.0], "optimizer.learning_rate": [2.0]},
    }
    points = expand(recipe(methods=(HEAD, grid), seeds=(0, 7), reference=True))
    assert len(points) == 2 * 3 + 2 * 2 * 3
    assert len({point.id for point in points}) == len(points)
    assert points[0].id.startswith("digits-head-eps1-seed0-")
    last = points[-1]
    assert (last.method, last.epsilon, last.seed) == ("grid", math.inf, 7)
    assert last.options == {
        "steps": 3,
        "scope": "head",
        "l2_clip_norm": 1.0,
        "optimizer": {"learning_rate": 2.0},
    }
    assert expand(recipe())[0].id == expand(recipe(reference=True))[0].id


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "last:1", "loss": "huber-square", "l2_clip_norm": 0.5, "sampling": "poisson"}
        | {"expected_batch_size": 32, "device": "cpu"}
        | {"optimizer": {"kind": "adam", "learning_rate_schedule": "linear:0.5"}},
        {"certified": True},
        {"scope": "head", "method": "objective-perturbation"},
    ],
)
def test_options_of_the_recipe_reach_the_request_as_train_would_make_it(monkeypatch, options):
    """The request of a point is the one that `dptaft.train` makes of the same options."""
    (point,) = expand(
        recipe(methods=({"name": "m"} | options,), epsilons=[2.0], seeds=(3,), delta=1e-6, steps=None)
    )
    seen = []

    def capture(data, request, output, **given):
        seen.append(request)
        raise RuntimeError("captured")

    monkeypatch.setattr("dptaft.training.trainer.run_training", capture)
    with pytest.raises(RuntimeError, match="captured"):
        dptaft.train("digits", **point.train_options(), ledger=None)
    assert point.request() == seen[0]


def test_groups_share_everything_but_noise_step_size_clip_norm_and_regularisation():
    grid = {
        "name": "grid",
        "scope": "head",
        "grid": {"l2_clip_norm": [0.5, 1.0], "optimizer.momentum": [0.5, 0.9]},
    }
    plain = {"name": "plain", "scope": "head", "method": "non-linear"}
    tasks = group(expand(recipe(methods=(HEAD, grid, plain), seeds=(0, 1))))
    assert [(len(task.points), task.shared) for task in tasks] == [
        (10, True),
        (2, False),
        (10, True),
        (2, False),
    ] or [(len(task.points), task.shared) for task in tasks] == [
        (10, True),
        (10, True),
        (2, False),
        (2, False),
    ]
    for task in tasks:
        assert len({point.seed for point in task.points}) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown entry 'colour' in the recipe"),
        ({"budget": {"epsilons": [1.0]}}, "needs a treatment of public-benchmark, publish-all, select-best"),
        ({"budget": {"treatment": "public-benchmark", "epsilons": [0.0]}}, "must be positive"),
        ({"budget": {"treatment": "public-benchmark", "epsilons": []}}, "epsilons are empty"),
        ({"budget": {"treatment": "public-benchmark", "epsilon": 1.0}}, "takes epsilons"),
        ({"budget": {"treatment": "select-best", "epsilons": [1.0]}}, "takes epsilon in"),
        (
            {"budget": {"treatment": "publish-all", "epsilons": [1.0], "reference": True}},
            "cannot allow on private",
        ),
        ({"budget": {"treatment": "select-best", "epsilon": 1.0, "candidates": {"mean": 1.0}}}, "above 1"),
        (
            {"budget": {"treatment": "public-benchmark", "epsilons": [1.0], "most_epsilon": 2.0}},
            "publish-all",
        ),
        ({"data": {"name": "digits"}}, r"no \[\[data\]\]"),
        ({"data": [{"name": "digits"}]}, "has no source"),
        ({"methods": [HEAD, HEAD]}, "same name"),
        ({"methods": [{"scope": "head"}]}, "has no name"),
        ({"methods": [HEAD | {"epsilon": 1.0}]}, "list budgets in"),
        ({"methods": [HEAD | {"scoop": "head"}]}, "unknown option 'scoop'"),
        ({"methods": [HEAD | {"steps": "many"}]}, "steps in method 'head' is 'many'; it must be of type int"),
        ({"methods": [HEAD | {"steps": True}]}, "it must be of type int"),
        ({"methods": [HEAD | {"grid": {"steps": 3}}]}, "needs a list for steps"),
        ({"methods": [HEAD | {"grid": {"steps": [3, "x"]}}]}, "must be of type int"),
        ({"options": {"classes": ["a"]}}, r"declare it in \[\[data\]\]"),
        ({"options": {"insecure_seed": 1}}, "never run with seeded noise"),
        ({"seeds": [0, 0]}, "repeated"),
        ({"seeds": ["x"]}, "whole numbers"),
    ],
)
def test_wrong_entries_are_refused_by_name(changes, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(content(**changes), "tiny")


def test_select_best_takes_one_data_set():
    two = [{"name": "a", "source": "digits"}, {"name": "b", "source": "digits"}]
    with pytest.raises(RecipeError, match="one recipe per data set"):
        recipe("select-best", epsilon=1.0, data=two)


def test_values_that_no_run_can_have_are_refused_before_anything_runs():
    with pytest.raises(ValueError, match="unknown sampling 'dice'"):
        expand(recipe(methods=(HEAD | {"sampling": "dice"},)))


def test_overrides_change_entries_and_name_what_is_missing():
    changed = content()
    for text in (
        "seeds=[4]",
        "budget.epsilons=[2.5]",
        "options.steps=9",
        "data.0.name=mine",
        "methods.0.scope=last:1",
    ):
        override(changed, text)
    made = parse_recipe(changed, "tiny")
    assert (made.seeds, made.budget.epsilons, made.options["steps"]) == ((4,), (2.5,), 9)
    assert (made.data[0].name, made.methods[0].options["scope"]) == ("mine", "last:1")
    for text, message in (
        ("seeds", "write key=value"),
        ("data.3.name=x", "no entry 3"),
        ("title.x=1", "is a value"),
    ):
        with pytest.raises(RecipeError, match=message):
            override(changed, text)


def test_recipes_are_found_by_name_and_by_path(tmp_path):
    assert find_recipe("digits").name == "digits.toml"
    path = tmp_path / "mine.toml"
    path.write_text("title = [")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(str(path))
    with pytest.raises(RecipeError, match=r"shipped one: .*digits"):
        find_recipe("nothing")


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name):
    result = CliRunner().invoke(main, ["sweep", name, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "points; batches of" in result.output


def test_options_come_from_the_signature_of_train():
    options = train_options()
    assert {"scope", "method", "loss", "steps", "optimizer", "feature_cache"} <= set(options)
    assert not {"data", "epsilon", "seed", "output", "resume", "ledger", "insecure_seed"} & set(options)

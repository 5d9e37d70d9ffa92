"""`dptaft budget`: plans without training."""

import json
import math

import pytest
from click.testing import CliRunner

from dptaft.cli.budget import budget

POISSON = ["--records", "60000", "--steps", "10000", "--sampling", "poisson", "--batch-size", "600"]
FULL = ["--records", "1000", "--steps", "100"]


def run(*arguments):
    return CliRunner().invoke(budget, [str(a) for a in arguments])


def test_noise_for_a_budget_and_cost_of_a_noise_agree():
    found = json.loads(run(*POISSON, "--epsilon", 3, "--delta", 1e-5, "--json").output)
    assert found["noise_multiplier"] == pytest.approx(1.565, rel=1e-3)
    assert found["epsilon"] <= 3
    again = json.loads(
        run(*POISSON, "--noise-multiplier", found["noise_multiplier"], "--delta", 1e-5, "--json").output
    )
    assert again["epsilon"] == found["epsilon"]
    assert again["noise_std_on_average_gradient"] == pytest.approx(found["noise_multiplier"] / 600)


def test_text_rounds_against_the_plan():
    found = json.loads(run(*FULL, "--epsilon", 3, "--json").output)
    text = run(*FULL, "--epsilon", 3).output
    shown = next(line.split()[-1] for line in text.splitlines() if line.startswith("noise multiplier"))
    assert found["noise_multiplier"] <= float(shown) <= found["noise_multiplier"] * 1.0001
    assert "epsilon            2.9999" in text
    assert found["delta"] == 1e-5


def test_default_delta_shrinks_with_the_data():
    assert json.loads(run(*POISSON, "--noise-multiplier", 2, "--json").output)["delta"] == pytest.approx(
        1 / 600000
    )


def test_convex_plans_show_both_bounds():
    plan = ["--records", 1500, "--steps", 200, "--sampling", "cyclic-partition", "--batch-size", 100]
    found = json.loads(
        run(
            *plan, "--noise-multiplier", 2, "--convex", "--regularization", 0.05, "--step-size", 1, "--json"
        ).output
    )
    assert found["bound"] == "last-iterate secret partition"
    assert found["bounds"]["composition"] > 2 * found["epsilon"]
    assert found["mechanism"]["epochs"] == 14


def test_what_if_table():
    found = json.loads(run(*FULL, "--noise-multiplier", 20, "--table", "--json").output)["what_if"]
    assert len(found) == 12
    assert {row["steps"] for row in found} == {50, 100, 200}
    noise = {(row["epsilon"], row["steps"]): row["noise_multiplier"] for row in found}
    assert noise[3.0, 200] == pytest.approx(math.sqrt(2) * noise[3.0, 100], rel=1e-4)
    assert noise[8.0, 100] < noise[1.0, 100]
    assert "noise std" in run(*FULL, "--noise-multiplier", 20, "--table").output


@pytest.mark.parametrize(("name", "start"), [("cost.png", b"\x89PNG"), ("cost.svg", b"<?xml")])
def test_plot(tmp_path, name, start):
    path = tmp_path / name
    plan = [*FULL, "--epsilon", 3, "--convex", "--regularization", 0.05, "--step-size", 1]
    result = run(*plan, "--plot", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*FULL], "exactly one of"),
        ([*FULL, "--epsilon", 3, "--noise-multiplier", 2], "exactly one of"),
        ([*FULL, "--epsilon", 3, "--batch-size", 10], "needs --sampling"),
        (["--records", 10, "--steps", 1, "--sampling", "poisson", "--epsilon", 1], "needs --batch-size"),
        (
            ["--records", 10, "--steps", 1, "--sampling", "poisson", "--batch-size", 11, "--epsilon", 1],
            "exceeds",
        ),
        ([*FULL, "--epsilon", 3, "--convex"], "needs --regularization"),
        ([*FULL, "--epsilon", 3, "--step-size", 1], "add --convex"),
        ([*FULL, "--epsilon", 3, "--plot", "cost.pdf"], ".png or .svg"),
        (["--records", 10, "--steps", 0, "--epsilon", 1], "0 is not in the range"),
    ],
)
def test_usage_errors(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*FULL, "--epsilon", "-1"], "epsilon must be greater than 0"),
        ([*FULL, "--epsilon", "nan"], "epsilon must be finite"),
        ([*FULL, "--noise-multiplier", 0], "noise_multiplier must be greater than 0"),
        ([*FULL, "--epsilon", 1, "--delta", 1], "delta must lie strictly"),
        ([*POISSON, "--epsilon", 1, "--adjacency", "replace-one"], "not sound"),
        (
            [*FULL, "--epsilon", 1, "--convex", "--regularization", 0.1, "--step-size", 100],
            "expands distances",
        ),
    ],
)
def test_bad_values_are_value_errors(arguments, words):
    result = run(*arguments)
    assert isinstance(result.exception, ValueError)
    assert words in str(result.exception)

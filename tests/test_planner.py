"""The planner promises what training does: one rule for rate, batches, epochs, divisor and noise."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dptaft.cli import main
from dptaft.estimate import blank_data
from dptaft.training.plan import (
    ModelConfig,
    PerformanceConfig,
    PlanError,
    PrivacyConfig,
    Request,
    Sampling,
    constant_record,
    largest_batch,
    make_plan,
    resolve_sampling,
    whole_epochs,
)
from dptaft.training.preparation import build_learner, prepare
from dptaft_accounting.accountants.last_iterate import batch_overflow


def budget(*words):
    result = CliRunner().invoke(main, ["budget", *map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.fixture(scope="module")
def learner():
    return build_learner(blank_data(10), request(PrivacyConfig(3.0)))


def request(privacy):
    return Request(privacy, ModelConfig(scope="head"), {}, PerformanceConfig(), "records")


@pytest.mark.parametrize("size", [1000, 959, 900, 600, 575, 500, 1437])
def test_budget_and_training_agree_on_cyclic_batches(learner, size):
    words = ("--records", 1437, "--steps", 30, "--sampling", "cyclic-partition", "--batch-size", size)
    planned = budget(*words, "--epsilon", 3)
    privacy = PrivacyConfig(3.0, steps=30, sampling="cyclic-partition", expected_batch_size=size)
    trained = prepare(blank_data(1437), request(privacy), learner).plan
    assert planned["noise_multiplier"] == trained.noise_multiplier
    assert planned["mechanism"] == trained.mechanism().to_dict()
    assert planned["noise_std_on_average_gradient"] == trained.noise_multiplier / trained.normaliser
    if size == 600:
        assert planned["noise_multiplier"] == pytest.approx(5.386, abs=5e-4)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    records=st.integers(2, 5000),
    share=st.floats(0, 1),
    steps=st.integers(1, 60),
    case=st.sampled_from(
        [
            ("full-batch", "zero-out"),
            ("full-batch", "add-remove"),
            ("full-batch", "replace-one"),
            ("poisson", "zero-out"),
            ("poisson", "add-remove"),
            ("cyclic-partition", "zero-out"),
            ("cyclic-partition", "replace-one"),
        ]
    ),
)
def test_budget_and_training_agree_on_everything(records, share, steps, case):
    kind, adjacency = case
    size = None if kind == "full-batch" else max(1, round(share * records))
    words = ["--records", records, "--steps", steps, "--sampling", kind, "--adjacency", adjacency]
    planned = budget(*words, *([] if size is None else ["--batch-size", size]), "--epsilon", 3)
    public = records if adjacency == "add-remove" else None
    privacy = PrivacyConfig(3.0, None, adjacency, steps, None, kind, size, public)
    sampling = resolve_sampling(privacy, records)  # as `prepare` does
    plan = make_plan(privacy, num_records=records, steps=whole_epochs(steps, sampling), sampling=sampling)
    assert planned["noise_multiplier"] == plan.noise_multiplier
    assert planned["mechanism"] == plan.mechanism().to_dict()
    assert planned["noise_std_on_average_gradient"] == plan.noise_multiplier / plan.normaliser


def test_an_unknown_sampler_has_no_record():
    with pytest.raises(PlanError, match="unknown sampling 'shuffled'"):
        constant_record(Sampling("shuffled", 0.1), 1.0, 10)


def test_the_largest_poisson_batch_is_paid_for():
    found = largest_batch(
        10_000, Sampling("poisson", 0.01), delta=1e-5, adjacency="zero-out", most_steps=1000
    )
    assert batch_overflow(10_000, 0.01, found, 1000) <= 1e-8
    assert 150 < found < 250


def test_one_vocabulary_of_losses():
    plan = ("--records", 1000, "--epsilon", 3)
    convex = (*plan, "--steps", 50, "--convex", "--regularization", 0.1, "--step-size", 1, "--clip-norm", 3)
    certified = (*plan, "--certified")
    for words in (convex, certified):
        default = budget(*words)
        for name in ("cross-entropy", "multinomial-logistic"):
            assert budget(*words, "--loss", name) == default
        assert budget(*words, "--loss", "huber-square")["epsilon"] <= 3
        for name in ("hinge", "rescaled-square"):
            result = CliRunner().invoke(main, ["budget", *map(str, words), "--loss", name])
            assert result.exit_code == 2
            assert "cross-entropy" in result.output
    assert budget(*convex, "--loss", "huber")["epsilon"] <= 3


def test_planning_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; from dptaft.cli import main; main(['budget', '--records', "
        "'1437', '--steps', '30', '--sampling', 'cyclic-partition', '--batch-size', '600', '--epsilon', '3'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "noise multiplier   5.38" in done.stdout

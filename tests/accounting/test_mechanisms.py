"""Records: exact round trips, and one clear error for everything unsound or malformed."""

import json
import math

import pytest

from dptaft_accounting.errors import AccountingError, MechanismError
from dptaft_accounting.mechanisms import (
    CyclicGaussian,
    FullBatchGaussian,
    ObjectivePerturbation,
    OutputPerturbation,
    ParallelComposition,
    PoissonGaussian,
    RepeatAndSelect,
    SequenceComposition,
    mechanism_from_dict,
)

FULL = FullBatchGaussian(3.0, 7)
RECORDS = [
    FULL,
    FullBatchGaussian((1.0, 2.5, 0.1), 3, adjacency="replace-one", released="last-iterate"),
    PoissonGaussian(1.1, 0.013, 5, adjacency="add-remove"),
    CyclicGaussian(0.7, 10, 4, partition="secret-random"),
    ObjectivePerturbation(1.0, 0.25, 2.0, 3.0, gradient_tolerance=1e-3, output_noise_std=0.1, problems=10),
    OutputPerturbation(1.0, 0.1, 1000, 0.3, adjacency="replace-one"),
    SequenceComposition((FULL, PoissonGaussian(1.0, 0.1, 3))),
    ParallelComposition((FULL, SequenceComposition((FULL, FULL)))),
    RepeatAndSelect(FULL, 10.0, shape=1.0),
    RepeatAndSelect(FULL, 10.0, candidate_count="poisson"),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.kind)
def test_round_trip_through_json_is_exact(record):
    again = mechanism_from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record
    assert hash(again) == hash(record)


@pytest.mark.parametrize("noise", [0, -1.0, math.nan, math.inf, "2", None, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda z: FullBatchGaussian(z, 3),
        lambda z: FullBatchGaussian((1.0, 1.0, z), 3),
        lambda z: PoissonGaussian(z, 0.1, 3),
        lambda z: CyclicGaussian(z, 2, 3),
    ],
)
def test_noise_must_be_a_positive_number(build, noise):
    with pytest.raises(MechanismError, match="noise_multiplier"):
        build(noise)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0001, math.nan, "0.1"])
def test_sampling_rate_must_be_a_probability(rate):
    with pytest.raises(MechanismError, match="sampling_rate"):
        PoissonGaussian(1.0, rate, 3)


@pytest.mark.parametrize("steps", [0, -1, 1.5, 2.0, "3", math.nan, True])
def test_steps_must_be_whole(steps):
    with pytest.raises(MechanismError, match="steps"):
        FullBatchGaussian(1.0, steps)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: PoissonGaussian(1.0, 0.1, 3, adjacency="replace-one"), "replace-one.*not sound"),
        (lambda: CyclicGaussian(1.0, 2, 3, adjacency="add-remove"), "add-remove.*not sound"),
        (lambda: OutputPerturbation(1.0, 0.1, 10, 1.0, adjacency="add-remove"), "add-remove.*not sound"),
        (lambda: ObjectivePerturbation(1.0, 0.25, 2.0, 1.0, adjacency="replace-one"), "not sound"),
        (lambda: ParallelComposition((FullBatchGaussian(1.0, 1, "replace-one"),)), "two shards"),
        (lambda: FullBatchGaussian(1.0, 1, adjacency="swap"), "adjacency must be one of"),
        (lambda: FullBatchGaussian(1.0, 1, released="best"), "released must be one of"),
        (lambda: FullBatchGaussian((1.0, 2.0), 3), "2 values for 3 steps"),
        (lambda: ObjectivePerturbation(1.0, 0.25, 0.25, 1.0), "must exceed hessian_bound"),
        (lambda: ObjectivePerturbation(1.0, 0.25, 2.0, 1.0, gradient_tolerance=0.1), "output_noise_std"),
        (lambda: SequenceComposition(()), "non-empty"),
        (lambda: SequenceComposition((FULL, "noise")), "unknown mechanism"),
        (
            lambda: SequenceComposition((FULL, FullBatchGaussian(1.0, 1, "replace-one"))),
            "different adjacencies",
        ),
        (lambda: RepeatAndSelect(FULL, 1.0), "mean_candidates"),
        (lambda: RepeatAndSelect(FULL, 3.0, shape=-0.5), "shape"),
        (lambda: RepeatAndSelect(FULL, 3.0, candidate_count="fixed"), "candidate_count"),
        (lambda: mechanism_from_dict({"kind": "shuffled-gaussian"}), "unknown mechanism 'shuffled-gaussian'"),
        (lambda: mechanism_from_dict({**FULL.to_dict(), "seed": 1}), "no field 'seed'"),
        (lambda: mechanism_from_dict({"kind": "full-batch-gaussian", "steps": 3}), "incomplete"),
    ],
)
def test_unsound_records_are_refused_by_name(build, words):
    with pytest.raises(MechanismError, match=words) as caught:
        build()
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


def test_a_subclass_is_not_accounted_by_analogy():
    class Shuffled(PoissonGaussian):
        kind = "shuffled"

    with pytest.raises(AccountingError, match="unknown mechanism"):
        SequenceComposition((Shuffled(1.0, 0.1, 3),))

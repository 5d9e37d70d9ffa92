"""Records: exact round trips, and one clear error for everything unsound or malformed."""

import contextlib
import json
import math
import tracemalloc

import pytest

from dptaft_accounting.bounds import best_bound
from dptaft_accounting.canonical import canonical
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
    SoftmaxObjectivePerturbation,
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


def test_candidates_below_one_are_refused_for_every_count():
    for mean in (0.5, 1 - 1e-9):
        with pytest.raises(MechanismError, match="mean_candidates must be at least 1"):
            RepeatAndSelect(FULL, mean, candidate_count="poisson")
    with pytest.raises(MechanismError, match="mean_candidates must exceed 1"):
        RepeatAndSelect(FULL, 1.0)
    with pytest.raises(MechanismError, match="at most"):
        RepeatAndSelect(FULL, 1e300)


def test_deep_nesting_is_refused_in_one_line():
    record, mechanism = FULL.to_dict(), FULL
    for _ in range(400):
        record = {"kind": "sequence", "parts": [record]}
    for _ in range(50):
        mechanism = SequenceComposition((mechanism,))
    assert best_bound(mechanism, delta=1e-5).epsilon > 0
    with pytest.raises(MechanismError, match="nested deeper than 50 levels"):
        mechanism_from_dict(record)
    with pytest.raises(MechanismError, match="nested deeper than 50 levels"):
        SequenceComposition((mechanism,))
    with pytest.raises(AccountingError, match="nested deeper than 150 levels"):
        canonical({"record": record})


@pytest.mark.parametrize("steps", [10**400, 2**70])
def test_numbers_beyond_floats_are_refused(steps):
    with pytest.raises(MechanismError, match="steps must be at most"):
        FullBatchGaussian(1.0, steps)
    with pytest.raises(MechanismError, match="noise_multiplier"):
        FullBatchGaussian(10**400, 1)


@pytest.mark.parametrize(
    "mechanism",
    [
        PoissonGaussian(1e308, 0.5, 10),
        PoissonGaussian(5e-324, 0.5, 10),
        PoissonGaussian(1.0, 5e-324, 2**53),
        PoissonGaussian(1e-3, 0.9, 2**53),
        FullBatchGaussian(1.0, 2**60),
        FullBatchGaussian((1e-308, 1e308), 2),
        OutputPerturbation(1.0, 1e-200, 10, 1e-200),
        ObjectivePerturbation(1.0, 0.25, 10.0, 1e-308),
        ObjectivePerturbation(1.0, 0.25, 10.0, 30.0, 1e-100, 1e5),
        SequenceComposition((PoissonGaussian(1e-6, 0.5, 10), PoissonGaussian(1.0, 0.5, 10))),
        SequenceComposition(tuple(PoissonGaussian(1 + k / 1000, 0.01 + k / 1e5, 5) for k in range(400))),
        SoftmaxObjectivePerturbation(1e300, 3, 1.0, 1.0),
        RepeatAndSelect(FULL, 1e5, shape=5e-324),
        SoftmaxObjectivePerturbation(1.0, 3, 1e-100, 1e-200),
    ],
    ids=lambda m: m.kind,
)
@pytest.mark.parametrize("size", [1, 10**6])
def test_extreme_records_are_accounted_or_refused(mechanism, size):
    """No traceback, no lack of memory, never NaN."""
    with contextlib.suppress(AccountingError):
        assert best_bound(mechanism, delta=1e-6, records_per_unit=size).epsilon >= 0


def test_many_different_parts_cost_little_tightness():
    parts = tuple(PoissonGaussian(1.0 + k / 2000, 0.01, 5) for k in range(100))
    many = best_bound(SequenceComposition(parts), delta=1e-5).epsilon
    worst = best_bound(PoissonGaussian(1.0, 0.01, 500), delta=1e-5).epsilon
    least = best_bound(PoissonGaussian(1.05, 0.01, 500), delta=1e-5).epsilon
    assert least < many < worst


def test_a_constant_schedule_takes_no_room():
    tracemalloc.start()
    best_bound(FullBatchGaussian(100.0, 2**24), delta=1e-5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000

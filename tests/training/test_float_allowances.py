"""What float32 may do to a sum of many records stays within the allowances that the noise is scaled for."""

import pytest
import torch
from builders import small_data
from torch import nn

from dptaft.backbones import load_backbone
from dptaft.data import Split
from dptaft.learner import Learner
from dptaft.tangent.bounded import SCALE, BoundedOperator, unit_scales
from dptaft.tangent.diameter import inverse_diameters
from dptaft.tangent.head_operator import HeadOperator
from dptaft.training.certified import CLIP_MARGIN, design
from dptaft.training.clipping import FLOAT_SLACK, LARGEST_PIECE, PhysicalBatches, clipped_cotangents
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.opacus_engine import OpacusEngine
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Sampling
from dptaft_accounting.errors import CertificateError

RECORDS, FEATURES, CLASSES, CLIP = 40_000, 48, 10, 1.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, CLASSES)


@pytest.fixture(scope="module")
def problem():
    """Records whose gradients point the same way, so that their sum is as long as it can be."""
    generator = torch.Generator().manual_seed(0)
    images = 0.3 * torch.randn(RECORDS, FEATURES, generator=generator)
    images += torch.randn(FEATURES, generator=generator)
    labels = torch.full((RECORDS,), 3)
    features = BoundedOperator(HeadOperator(Model())).extract(images)
    operator = BoundedOperator(HeadOperator(Model().double()))  # as for every certified run
    engine = FusedEngine(operator, features, labels, loss=CrossEntropy(), l2_clip_norm=CLIP)
    theta = {
        name: torch.randn(shape, generator=generator) for name, shape in operator.parameter_shapes.items()
    }
    return engine, features, labels, theta


def exact(features, labels, theta):
    """The sum of all gradients in float64, for the same constants."""
    wide, scale = HeadOperator(Model().double()), features[SCALE].double()[:, None]
    theta = {name: value.double() for name, value in theta.items()}
    cotangents = CrossEntropy().cotangent(wide.jvp(features, theta) * scale, labels)
    return wide.vjp(features, cotangents * scale)


def length(values):
    return float(torch.cat([value.reshape(-1).double() for value in values]).norm())


def test_two_chains_drift_less_than_the_clip_margin(problem):
    """Rounding may move either of two coupled chains; the margin covers both, in every step."""
    engine, features, labels, theta = problem
    found = engine.clipped_sum(theta, torch.arange(RECORDS)).value
    wanted = exact(features, labels, theta)
    error = length(found[name].double() - wanted[name] for name in wanted)
    assert length(wanted.values()) > 0.5 * RECORDS  # long enough to hurt
    assert 2 * error < 2**0.5 * CLIP_MARGIN / 4


@pytest.mark.parametrize("period", [1, 512, 37])
@pytest.mark.parametrize("records", [100_000, 204_800])
def test_two_chains_do_not_drift_however_many_records_are_alike(problem, period, records):
    """Rounding of equal records has one sign: in float32 it would grow with their number."""
    _, features, labels, theta = problem
    chosen = torch.arange(records) % period
    few, labels = features.index(chosen), labels[chosen]
    engine = FusedEngine(
        BoundedOperator(HeadOperator(Model().double())), few, labels, loss=CrossEntropy(), l2_clip_norm=CLIP
    )
    found = engine.clipped_sum(theta, torch.arange(records)).value
    counts = torch.bincount(chosen, minlength=period)
    wanted = {name: torch.zeros_like(value) for name, value in found.items()}
    for kind in range(period):
        one = exact(features.index(slice(kind, kind + 1)), labels[kind : kind + 1], theta)
        for name, value in one.items():
            wanted[name] += int(counts[kind]) * value
    error = length(found[name] - wanted[name] for name in wanted)
    assert length(wanted.values()) > 0.3 * records
    assert error < CLIP * 2.0**-15


@pytest.mark.parametrize("period", [1, 512, 37])
def test_removing_any_record_moves_the_sum_by_no_more_than_declared(problem, period):
    """All later records change their places and pieces; 204,800 copies of a few records suffer most."""
    _, features, labels, theta = problem
    records = 204_800
    chosen = torch.arange(records) % period
    whole = None
    for left_out in (None, 0, 1, 511, records - 1):
        kept = chosen if left_out is None else torch.cat([chosen[:left_out], chosen[left_out + 1 :]])
        engine = FusedEngine(
            HeadOperator(Model().double()),
            features.index(kept),
            labels[kept],
            loss=CrossEntropy(),
            l2_clip_norm=0.1,
            adjacency="add-remove",
        )
        found = engine.clipped_sum(theta, torch.arange(len(kept)))
        whole = found.value if whole is None else whole
        moved = length(whole[name] - found.value[name] for name in whole)
        assert moved <= found.sensitivity
        assert left_out is None or moved > 0.0999  # every record is clipped


@pytest.mark.parametrize(
    ("kind", "adjacency", "certified"),
    [
        ("fused", "add-remove", False),
        ("hooks", "add-remove", False),
        ("ghost", "add-remove", False),
        ("fused", "zero-out", True),
    ],
)
def test_a_learner_takes_such_sums_in_float64(kind, adjacency, certified):
    model = ModelConfig(scope="last:1", unit_jacobian=certified)
    data = small_data(20)
    backbone = load_backbone(model.name, num_classes=len(data.classes), seed=0, weights="random")
    learner = Learner(backbone, model, PerformanceConfig(device="cpu", engine=kind))
    cached = learner.features(data.train)
    engine = learner.engine(
        cached.features, data.train.labels, loss=CrossEntropy(), l2_clip_norm=0.5, adjacency=adjacency
    )
    if kind == "fused":
        assert engine.operator.dtype == torch.float64
    else:
        assert {p.dtype for p in engine.parameters.values()} == {torch.float64}
    narrow = learner.engine(
        cached.features, data.train.labels, loss=CrossEntropy(), l2_clip_norm=0.5, adjacency="zero-out"
    )
    wide = engine.clipped_sum(learner.parameters, torch.arange(20)).value
    other = narrow.clipped_sum(learner.parameters, torch.arange(20)).value
    assert all(
        p.dtype == (torch.float64 if certified else torch.float32) for p in learner.parameters.values()
    )
    error = length(wide[name] - other[name] for name in wide)
    assert error <= 1e-5 * length(wide.values())


def test_replacing_a_record_by_an_empty_one_leaves_all_others_as_they_were():
    """Zero-out keeps places: features and contributions of the others are the same to the last bit."""
    data = small_data(140)
    model = ModelConfig(scope="last:1")
    backbone = load_backbone(model.name, num_classes=len(data.classes), seed=0, weights="random")
    learner = Learner(backbone, model, PerformanceConfig(device="cpu"))

    class Without:
        def __len__(self):
            return 140

        def __getitem__(self, index):
            return torch.full((1, 8, 8), float("nan")) if index == 0 else data.train.pixels[index]

    whole = learner.features(data.train).features
    less = learner.features(Split(Without(), data.train.labels)).features
    assert less["finite"].tolist() == [False] + [True] * 139
    for name, values in whole.tensors.items():
        assert torch.equal(values[1:], less[name][1:]), name


def test_factors_too_small_for_float32_clip_as_others_do():
    """Gradients of length 1e33 and a clip norm of 1e-6: the factor has few bits in float32."""
    norms = torch.tensor([3e33, 2.9e36, 1e38])
    cotangents = torch.tensor([[3e27, 4e27], [1e30, -2e30], [2e31, 5e30]])
    found = clipped_cotangents(norms, cotangents, 1e-6).double()
    expected = 1e-6 / norms.double()[:, None] * cotangents.double()
    assert ((found - expected).abs() / expected.abs()).max() < 2.0**-23


def test_one_record_moves_the_computed_sum_by_no_more_than_its_allowance(problem):
    engine, features, labels, theta = problem
    whole = engine.clipped_sum(theta, torch.arange(RECORDS)).value
    less = engine.clipped_sum(theta, torch.arange(RECORDS - 1)).value
    alone = exact(features.index(slice(RECORDS - 1, None)), labels[-1:], theta)
    error = length(whole[name].double() - less[name].double() - alone[name] for name in alone)
    assert error < CLIP * FLOAT_SLACK


@pytest.mark.parametrize("share", [1.0 + 2.0**-12, 1.0 + CLIP_MARGIN / 2])
def test_a_clip_norm_without_the_margin_is_refused(share):
    plan = PrivacyConfig(epsilon=3.0, l2_clip_norm=2**0.5 * share)
    with pytest.raises(CertificateError, match="leaves no room for float32 rounding"):
        design(plan, CrossEntropy(), 10, num_records=100, delta=1e-5, sampling=Sampling("full-batch"))


def test_diameters_are_not_too_small_where_a_common_part_cancels():
    """Rows that are almost equal: the Gram holds their distances in its last bits, or not at all."""
    generator = torch.Generator().manual_seed(0)
    for size in (1e4, 1e6, 1e7, 1e8, 1e9):
        common = torch.randn(50, 1, 20, generator=generator, dtype=torch.float64) * size
        rows = common + torch.randn(50, 5, 20, generator=generator, dtype=torch.float64)
        diameters = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").amax((1, 2))
        assert float((inverse_diameters(rows @ rows.mT) * diameters).max()) < 1 + 2**-30


def cancelling(size):
    """A module below whose head the cotangents cancel: its rows are almost equal."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    with torch.no_grad():
        module[2].weight += size * torch.randn(1, 16)
    module[2].requires_grad_(False)
    return module


@pytest.mark.parametrize(("size", "refused"), [(0.0, False), (1e6, True)])
def test_ghost_clipping_refuses_heads_under_which_its_norms_are_not_those_of_the_sum(size, refused):
    inputs, labels = torch.randn(4, 6), torch.arange(4) % 3
    engine = OpacusEngine(
        cancelling(size),
        inputs,
        labels,
        num_classes=3,
        loss=CrossEntropy(),
        l2_clip_norm=1e-3,
        method="ghost",
    )
    if refused:
        with pytest.raises(ValueError, match="disagree with the gradients; use engine hooks"):
            engine.clipped_sum(engine.initial_theta(), torch.arange(4))
    else:
        engine.clipped_sum(engine.initial_theta(), torch.arange(4))


def test_jacobians_in_the_subnormal_range_count_nothing():
    """Float32 holds products with them to a few bits only, so that their norm would not be bounded."""
    assert unit_scales(torch.eye(2, dtype=torch.float64)[None] * 1e-76).tolist() == [0.0]


def test_no_piece_is_so_long_that_float32_sums_outgrow_their_allowance():
    lengths = []
    PhysicalBatches(10**6).run(5000, lambda start, stop: stop - start, lengths.append)
    assert sum(lengths) == 5000
    assert max(lengths) <= LARGEST_PIECE

"""What float32 may do to a sum of many records stays within the allowances that the noise is scaled for."""

import pytest
import torch
from torch import nn

from dptaft.tangent.bounded import SCALE, BoundedOperator, unit_scales
from dptaft.tangent.diameter import inverse_diameters
from dptaft.tangent.head_operator import HeadOperator
from dptaft.training.certified import CLIP_MARGIN, design
from dptaft.training.clipping import FLOAT_SLACK, LARGEST_PIECE, PhysicalBatches
from dptaft.training.fused import FusedEngine
from dptaft.training.losses import CrossEntropy
from dptaft.training.plan import PrivacyConfig, Sampling
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
    operator = BoundedOperator(HeadOperator(Model()))
    features = operator.extract(images)
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


def test_jacobians_in_the_subnormal_range_count_nothing():
    """Float32 holds products with them to a few bits only, so that their norm would not be bounded."""
    assert unit_scales(torch.eye(2, dtype=torch.float64)[None] * 1e-76).tolist() == [0.0]


def test_no_piece_is_so_long_that_float32_sums_outgrow_their_allowance():
    lengths = []
    PhysicalBatches(10**6).run(5000, lambda start, stop: stop - start, lengths.append)
    assert sum(lengths) == 5000
    assert max(lengths) <= LARGEST_PIECE

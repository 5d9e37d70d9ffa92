"""Smoke laws of the first interfaces; the laws proper live in the modules named after the code."""

from dptaft_accounting.bounds import best_bound
from dptaft_accounting.calibration import Target, calibrate_noise_multiplier
from dptaft_accounting.mechanisms import FullBatchGaussian
from dptaft_accounting.statement import PrivacyStatement


def test_calibrate_account_state_recompute():
    z = calibrate_noise_multiplier(lambda z: FullBatchGaussian(z, steps=100), Target(epsilon=3.0, delta=1e-5))
    mechanism = FullBatchGaussian(z, steps=100)
    assert 3.0 * (1 - 1e-3) < best_bound(mechanism, delta=1e-5).epsilon <= 3.0
    statement = PrivacyStatement.build(mechanism, delta=1e-5, details={"l2_clip_norm": 1.0})
    assert PrivacyStatement.from_json(statement.to_json()) == statement
    assert statement.recompute().holds

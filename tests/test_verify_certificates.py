"""Verification of certificates: also those inside compositions, and against what the run was configured with."""

import copy
import dataclasses
import json

import pytest
import run_folders
from run_folders import CONVEX, make_run, proof

from dptaft.verification import verify
from dptaft_accounting import (
    CertifiedLastIterate,
    FullBatchGaussian,
    ParallelComposition,
    SequenceComposition,
)

OTHER = FullBatchGaussian(20.0, 60, released="last-iterate")


def composed(compose, certificate):
    return compose(
        (CertifiedLastIterate(OTHER, proof(60), 1e-5), CertifiedLastIterate(CONVEX, certificate, 1e-5))
    )


def failures(folder):
    return {check.name: check.message for check in verify(folder).failures}


@pytest.mark.parametrize("compose", [ParallelComposition, SequenceComposition])
def test_certificates_inside_compositions_are_issued_again(tmp_path, monkeypatch, compose):
    monkeypatch.setattr(run_folders, "details", lambda _: {"how": "average"})
    sound = make_run(tmp_path / "sound", composed(compose, proof())).path
    assert "certificate" in {check.name for check in verify(sound).checks if check.status == "passed"}
    forged = dataclasses.replace(proof(), smoothness=0.001)
    folder = make_run(tmp_path / "forged", composed(compose, forged)).path
    assert "smoothness does not follow" in failures(folder)["certificate"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"learning_rate": 0.5}, "step_size"),
        ({"l2_regularization": 0.01}, "strong_convexity"),
        ({"unit_jacobian": True}, "feature_bound"),
    ],
)
def test_certificates_agree_with_the_configuration(tmp_path, monkeypatch, changes, message):
    """A stronger regulariser than the one that was trained with would contract more than the steps did."""
    plain = run_folders.config("one")
    plain["optimizer"] |= {"learning_rate": 1.0, "l2_regularization": 0.1}
    for name, value in changes.items():
        plain["model" if name == "unit_jacobian" else "optimizer"][name] = value
    monkeypatch.setattr(run_folders, "config", lambda *_, **__: copy.deepcopy(plain))
    folder = make_run(tmp_path / "one", CONVEX, certificate=proof()).path
    assert json.loads((folder / "privacy.json").read_text())["accounting"]["certificate"]
    found = failures(folder)
    assert set(found) == (set() if message is None else {"certificate"})
    assert message is None or message in found["certificate"]


def test_the_feature_bound_of_verification_is_that_of_training():
    from dptaft import verification
    from dptaft.tangent.bounded import ROUNDING

    assert verification._UNIT_JACOBIAN == 1.0 + ROUNDING

"""Verification of certificates, also of those inside compositions."""

import dataclasses

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


@pytest.fixture(autouse=True)
def composed_settings(monkeypatch):
    """`run.toml` of a sum of runs where the record is one."""
    plain = run_folders.config

    def config(name="one", **privacy):
        parts = [{"id": part, "partition": "p", "shard": part} for part in ("one", "two")]
        settings = {key: value for key, value in plain(name, **privacy).items() if key != "optimizer"}
        del settings["privacy"]["epsilon"]
        return settings | {
            "composition": {"how": "average", "disjoint": False, "parts": parts, "removed": []}
        }

    monkeypatch.setattr(run_folders, "config", config)
    monkeypatch.setattr(run_folders, "details", lambda *_: {"how": "average"})


@pytest.mark.parametrize("compose", [ParallelComposition, SequenceComposition])
def test_certificates_inside_compositions_are_issued_again(tmp_path, compose):
    sound = make_run(tmp_path / "sound", composed(compose, proof())).path
    assert "certificate" in {check.name for check in verify(sound).checks if check.status == "passed"}
    forged = dataclasses.replace(proof(), smoothness=0.001)
    folder = make_run(tmp_path / "forged", composed(compose, forged)).path
    assert "smoothness does not follow" in failures(folder)["certificate"]


def test_the_feature_bound_of_verification_is_that_of_training():
    from dptaft.assumptions import UNIT_JACOBIAN
    from dptaft.tangent.bounded import ROUNDING

    assert UNIT_JACOBIAN == 1.0 + ROUNDING

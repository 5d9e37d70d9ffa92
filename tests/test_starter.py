import dataclasses
from importlib.resources import files

import pytest
import torch
from builders import small_data
from safetensors.torch import load_file

from dptaft import load_data, train
from dptaft.backbones import load_backbone
from dptaft.bundled import STARTERS
from dptaft.tangent.model import TangentModel
from dptaft.verification import verify
from dptaft_accounting.policy import Policy

FOLDER = files("dptaft") / "starter"


def test_starter_is_small_and_documented():
    assert (FOLDER / "starter.safetensors").stat().st_size <= 4 * 2**20
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert "linear probe" in card
    assert "@@" not in card
    assert all(t.dtype == torch.float16 for t in load_file(FOLDER / "starter.safetensors").values())


def test_starter_features_separate_digits():
    """A least-squares classifier on frozen features, far below what any change of preprocessing would leave."""
    data, backbone = load_data("digits"), load_backbone("starter", num_classes=10)
    model = TangentModel(backbone.model, "head")

    def features(split):
        u = torch.cat([model.boundary(x) for x in split.batches(256, backbone.preprocessing)]).double()
        return torch.cat([u, torch.ones(len(u), 1, dtype=u.dtype)], 1)

    u, y = features(data.train), torch.nn.functional.one_hot(data.train.labels).double()
    weights = torch.linalg.solve(u.T @ u + 10 * torch.eye(u.shape[1], dtype=u.dtype), u.T @ y)
    right = (features(data.evaluation) @ weights).argmax(1) == data.evaluation.labels
    assert right.double().mean() > 0.98


@pytest.mark.parametrize("name", STARTERS)
def test_every_bundled_backbone_is_public_without_anybodys_word(tmp_path, name):
    data = dataclasses.replace(small_data(), is_public=True)
    run = train(data, epsilon=8, steps=1, model=name, scope="head", output=tmp_path / "run")
    assert run.statement.claim["data_accesses"]["backbone"] == "public"
    assert verify(run.path, policy=Policy(allowed_declared=())).passed
    given = train(
        data,
        epsilon=8,
        steps=1,
        model=name,
        scope="head",
        weights=str(FOLDER / f"{STARTERS[name][0]}.safetensors"),
        output=tmp_path / "given",
    )
    assert given.statement.claim["data_accesses"]["backbone"] == "public, declared by the user"
    assert not verify(given.path, policy=Policy(allowed_declared=())).passed

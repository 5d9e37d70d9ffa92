from pathlib import Path

import rank_tasks
import torch
from ranks import free_port, succeeded, together
from safetensors.torch import load_file

import dptaft
from dptaft import feature_cache
from dptaft.feature_cache import read_features, write_features
from dptaft.tangent.operator import Features


def entries(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_every_process_keeps_its_own_features_and_nothing_changes(tmp_path):
    options = {"epsilon": float("inf"), "device": "cpu", "scope": "head", "steps": 3, "ledger": None}
    alone = dptaft.train(rank_tasks.data(), **options, output=tmp_path / "alone")
    options["feature_cache"] = str(tmp_path / "cache")
    first, second = succeeded(together(2, rank_tasks.train_twice, tmp_path, options, free_port()))
    assert first[0][0] == second[0][0]
    assert len(entries(tmp_path / "cache")) == 3  # two parts of the records; 75 evaluation images are one
    expected = load_file(alone.path / "model.safetensors")
    for path, _ in first:
        for name, value in load_file(Path(path) / "model.safetensors").items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)


def test_processes_may_start_a_cache_at_the_same_moment(tmp_path, monkeypatch):
    """One of them sees no tag, and then the tag that another one has just written."""
    key, parts = "0" * 64, [Features({"u": torch.ones(2, 1)})]
    write_features(tmp_path / "cache", "1" * 64, parts, 2)
    real, asked = Path.exists, []

    def exists(path):
        if path.name == feature_cache._TAG:
            asked.append(path)
            return len(asked) > 1
        return real(path)

    monkeypatch.setattr(Path, "exists", exists)
    write_features(tmp_path / "cache", key, parts, 2)
    assert len(read_features(tmp_path / "cache", key)) == 2

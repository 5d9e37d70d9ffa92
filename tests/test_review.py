"""Bad input of every kind ends in one clear error, and the hold-out rule keeps its side of the claim."""

import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import small_data, small_images, write_folder
from click.testing import CliRunner
from PIL import Image

import dptaft
from dptaft.backbones import BackboneError, Preprocessing, load_backbone
from dptaft.cli import main
from dptaft.costs import model_cost
from dptaft.data import DataError, load_data, read_image
from dptaft.learner import Learner, resolve_device
from dptaft.runs import RunError, check_output, load_run
from dptaft.training.checkpoint import Checkpointer
from dptaft.training.plan import ModelConfig, PerformanceConfig, PlanError, PrivacyConfig


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((6, 0, 8), np.uint8)}, "no pixel"),
        ({"images": np.full((6, 8, 8), np.nan)}, "not finite"),
        ({"classes": np.array(["x", "x", "y"])}, "must differ"),
        ({"classes": np.array("x")}, "1 class;"),
        ({"labels": np.arange(6) + 10**6}, "go up to 1000005; number the classes 0, 1, 2"),
        ({"labels": np.zeros((6, 2), int)}, "expected whole numbers"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, change, message):
    arrays = {"images": np.zeros((6, 8, 8), np.uint8), "labels": np.arange(6) % 3} | change
    with pytest.raises(DataError, match=message):
        load_data(npz(tmp_path / "x.npz", **arrays))


def test_damaged_archives_are_refused(tmp_path):
    whole = tmp_path / "whole.npz"
    npz(whole, images=np.zeros((6, 8, 8), np.uint8), labels=np.arange(6) % 3)
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole.read_bytes()[:400])
    lone = tmp_path / "lone.npz"
    with lone.open("wb") as file:
        np.save(file, np.zeros(3))
    text = tmp_path / "text.npz"
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("images", "hello")
        archive.writestr("labels", "hello")
    for path in (cut, lone, text):
        with pytest.raises(DataError):
            load_data(str(path))


def test_float_images_and_hidden_files(tmp_path):
    root = write_folder(tmp_path / "pets")
    (root / "cat" / "._000.png").write_bytes(b"resource fork")
    (root / "cat" / "folder.png").mkdir()
    assert len(load_data(str(root)).train) == 8
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="holds floats"):
        read_image(tmp_path / "x.tif")


def test_digits_take_no_other_classes():
    with pytest.raises(DataError, match="leave them out"):
        load_data("digits", classes=["a", "b"])


def held_out(root):
    split = load_data(str(root)).evaluation.pixels
    return [Path(split._pixels.name(i)) for i in split._indices]


def test_hold_out_by_position_is_refused_where_it_would_break_the_claim(tmp_path):
    """Without the first file of a class the rule trains on files that it held out before."""
    root = write_folder(tmp_path / "pets", count=24)
    held = {p.name for p in held_out(root)}
    (root / "cat" / "000.png").rename(tmp_path / "000.png")
    assert len(held - {p.name for p in held_out(root)} - {"000.png"}) > 1
    for adjacency in ("add-remove", "replace-one"):
        size = 20 if adjacency == "add-remove" else None
        with pytest.raises(DataError, match="move others between training and evaluation"):
            dptaft.train(str(root), epsilon=1, adjacency=adjacency, public_size=size, output=tmp_path / "run")
    load_data(str(root)).check_adjacency("zero-out")
    load_data("digits").check_adjacency("add-remove")
    images, labels = small_images(20)
    array = load_data(npz(tmp_path / "a.npz", images=images.clip(0, 1), labels=labels))
    array.check_adjacency("replace-one")
    with pytest.raises(DataError, match="add-remove"):
        array.check_adjacency("add-remove")


def test_long_images_take_little_memory():
    prepare = Preprocessing(28, (0.5,), (0.5,))
    assert prepare(torch.rand(1, 1, 200_000)).shape == (1, 28, 28)
    long = torch.rand(1, 10, 100)
    square = Preprocessing(10, (0.0,), (1.0,))
    assert torch.equal(square(long), long[:, :, 45:55])


def test_models_and_devices_that_cannot_be_used():
    with pytest.raises(BackboneError, match="no single classification head"):
        load_backbone("deit_tiny_distilled_patch16_224", num_classes=2, weights="random")
    assert "BatchNorm" in model_cost("resnet18", "head").path
    with pytest.raises(PlanError, match="'meta' cannot be used"):
        resolve_device("meta")
    with pytest.raises(PlanError, match="seed must be"):
        ModelConfig(seed=-1)
    with pytest.raises(PlanError, match="clip norm"):
        PrivacyConfig(1.0, l2_clip_norm=1e-40)


def test_damaged_runs_are_refused_by_file(tmp_path):
    run = dptaft.train(small_data(12), epsilon=8, steps=1, output=tmp_path / "run")
    text = (run.path / "run.toml").read_text()
    damage = {
        "privacy.json": ("[]", "{"),
        "metrics.jsonl": ("{",),
        "run.toml": ("x", "[run]\nformat = 2\n", text.replace("[model]", "[other]")),
    }
    for name, contents in damage.items():
        for content in contents:
            broken = tmp_path / "broken"
            shutil.copytree(run.path, broken)
            (broken / name).write_text(content)
            with pytest.raises(RunError, match=name):
                load_run(broken)
            shutil.rmtree(broken)


def test_output_name_too_long_is_refused(tmp_path):
    with pytest.raises(RunError, match="too long"):
        check_output(tmp_path / ("a" * 300))


def test_feature_cache_does_not_change_the_identity_of_the_data(tmp_path):
    data = small_data(12)
    digests = set()
    for cache in (None, str(tmp_path / "cache")):
        backbone = load_backbone("starter", num_classes=3)
        learner = Learner(backbone, ModelConfig(), PerformanceConfig(feature_cache=cache))
        digests.add(learner.features(data.train).digest)
    assert len(digests) == 1


def test_checkpoint_folder_is_durable_and_a_full_disk_is_named(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    checkpointer = Checkpointer(tmp_path / "run.partial", {})
    assert str(tmp_path) in synced

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"make room, then continue .*run\.partial"):
        checkpointer.authorise(0, 1)
    checkpointer.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--clip-norm", "0"), "clip-norm must be finite and positive"),
        (("--clip-norm", "nan"), "clip-norm must be finite and positive"),
        (("--plot", "/no/such/place/x.png"), "no folder"),
    ],
)
def test_budget_refuses(options, message):
    result = CliRunner().invoke(
        main, ["budget", "--records", "10", "--steps", "2", "--epsilon", "3", *options]
    )
    assert result.exit_code == 2
    assert message in result.output

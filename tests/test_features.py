"""Feature building and the private cache: equal to uncached, private, crash-safe, never used damaged."""

import json
import os
import stat
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dptaft import feature_cache
from dptaft.feature_cache import read_features, write_features
from dptaft.features import FeatureCacheError, build_features, feature_key, remove_cache, tensors_digest
from dptaft.tangent.bounded import BoundedOperator
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.diameter import DiameterOperator
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features

N = 5
KEY = "0123456789abcdef"


def base(**options):
    torch.manual_seed(0)
    shape = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3}
    return VisionTransformer(**(shape | options))


def setup(scope="last:1", **options):
    model = TangentModel(base(**options), scope)
    return model, tangent_operator(model)


def images():
    return torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def same(a, b):
    assert set(a.tensors) == set(b.tensors)
    return all(torch.equal(a[k], b[k]) for k in a.tensors)


def example_features(n=N):
    g = torch.Generator().manual_seed(2)
    return Features(
        {
            "a": torch.randn(n, 3, 2, generator=g),
            "b": torch.randn(n, generator=g).bfloat16(),
            "c": torch.arange(n) % 2 == 0,
        }
    )


def parts(n=N):
    return iter(example_features(n).index(slice(i, i + 2)) for i in range(0, n, 2))


def leftovers(root):
    return sorted(p.name for p in root.iterdir() if p.suffix != ".lock" and p.name != "CACHEDIR.TAG")


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2", "all"])
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
def test_batched_features_give_the_model_of_the_images(scope, on_disk, tmp_path):
    model, operator = setup(scope)
    where = {"cache": tmp_path / "cache", "key": KEY} if on_disk else {}
    seen = []
    features = build_features(
        images().split(2), N, model, operator, progress=lambda *done: seen.append(done), **where
    )
    assert seen == [(2, N), (4, N), (5, N)]
    g = torch.Generator().manual_seed(3)
    theta = {k: torch.randn(s, generator=g) for k, s in operator.parameter_shapes.items()}
    model.load_theta(theta)
    torch.testing.assert_close(operator.jvp(features, theta), model(images()).detach(), rtol=1e-4, atol=1e-4)


def test_a_complete_entry_is_used_without_reading_images(tmp_path):
    model, operator = setup()
    first = build_features(images().split(2), N, model, operator, cache=tmp_path, key=KEY)

    def no_images():
        pytest.fail("the images were read again")
        yield

    again = build_features(no_images(), N, model, operator, cache=tmp_path, key=KEY)
    assert same(first, again)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_changes_training_and_prediction_alike(precision, tmp_path):
    model, operator = setup()
    exact = build_features([images()], N, model, operator)
    memory = build_features([images()], N, model, operator, precision=precision)
    disk = build_features(images().split(2), N, model, operator, precision=precision, cache=tmp_path, key=KEY)
    theta = {k: torch.ones(s) for k, s in operator.parameter_shapes.items()}
    assert memory.nbytes < exact.nbytes
    assert not torch.equal(operator.jvp(memory, theta), operator.jvp(exact, theta))
    torch.testing.assert_close(operator.jvp(memory, theta), operator.jvp(disk, theta), rtol=1e-5, atol=1e-5)


def test_float16_saturates_instead_of_overflowing():
    model, operator = setup()
    model.boundary = lambda x: torch.full((len(x), 5, 8), 1e6) * torch.linspace(-1, 1, 8)
    features = build_features([images()], N, model, operator, precision="float16")
    assert features["finite"].all()


def test_folders_and_files_are_private(tmp_path):
    root = tmp_path / "cache"
    previous = os.umask(0)
    try:
        write_features(root, KEY, parts(), N)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert stat.S_IMODE((root / KEY).stat().st_mode) == 0o700
    files = list((root / KEY).iterdir())
    assert len(files) == 4
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}


def test_types_shapes_and_values_survive_the_disk(tmp_path):
    write_features(tmp_path, KEY, parts(), N)
    back = read_features(tmp_path, KEY)
    expected = example_features()
    assert {k: t.dtype for k, t in back.tensors.items()} == {k: t.dtype for k, t in expected.tensors.items()}
    assert same(back, expected)
    chosen = torch.tensor([4, 1])
    assert same(back.index(chosen), expected.index(chosen))


def test_writing_holds_one_part_at_a_time(tmp_path):
    alive = []

    def watched():
        for part in parts(20):
            assert sum(ref() is not None for ref in alive) <= 1
            alive.append(weakref.ref(part))
            yield part

    write_features(tmp_path, KEY, watched(), 20)
    assert len(alive) == 10


def test_a_second_writer_waits_and_keeps_the_first_result(tmp_path):
    started, finish = threading.Event(), threading.Event()
    second_ran = []

    def slow():
        started.set()
        assert finish.wait(1200)
        yield example_features()

    def unused():
        second_ran.append(True)
        yield example_features()

    first = threading.Thread(target=write_features, args=(tmp_path, KEY, slow(), N))
    second = threading.Thread(target=write_features, args=(tmp_path, KEY, unused(), N))
    first.start()
    assert started.wait(1200)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    finish.set()
    first.join(10)
    second.join(10)
    assert second_ran == []
    assert same(read_features(tmp_path, KEY), example_features())


def damage_truncate(entry):
    data = (entry / "a.bin").read_bytes()
    (entry / "a.bin").write_bytes(data[:-1])


def damage_flip(entry):
    data = bytearray((entry / "a.bin").read_bytes())
    data[17] ^= 1
    (entry / "a.bin").write_bytes(data)


def damage_lose_file(entry):
    (entry / "b.bin").unlink()


def damage_manifest_text(entry):
    (entry / "manifest.json").write_text("{")


def damage_manifest_type(entry):
    text = (entry / "manifest.json").read_text()
    (entry / "manifest.json").write_text(text.replace("bfloat16", "float16"))


DAMAGES = [damage_truncate, damage_flip, damage_lose_file, damage_manifest_text, damage_manifest_type]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_refused(damage, tmp_path):
    write_features(tmp_path, KEY, parts(), N)
    damage(tmp_path / KEY)
    with pytest.raises(FeatureCacheError, match="truncated or damaged"):
        read_features(tmp_path, KEY)


def test_a_damaged_entry_is_rebuilt_with_a_warning_in_the_log(tmp_path, caplog):
    model, operator = setup()
    first = build_features([images()], N, model, operator, cache=tmp_path, key=KEY)
    expected = {k: t.clone() for k, t in first.tensors.items()}
    path = tmp_path / KEY / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])
    again = build_features([images()], N, model, operator, cache=tmp_path, key=KEY)
    assert "rebuilding" in caplog.text
    assert all(torch.equal(again[k], t) for k, t in expected.items())


def test_an_entry_under_another_key_is_refused(tmp_path):
    write_features(tmp_path, KEY, parts(), N)
    other = KEY[::-1]
    (tmp_path / KEY).rename(tmp_path / other)
    with pytest.raises(FeatureCacheError, match="truncated or damaged"):
        read_features(tmp_path, other)


def test_a_failure_half_way_leaves_nothing(tmp_path):
    def broken():
        yield example_features(2)
        raise RuntimeError("camera on fire")

    with pytest.raises(RuntimeError, match="camera on fire"):
        write_features(tmp_path, KEY, broken(), N)
    assert leftovers(tmp_path) == []
    with pytest.raises(FeatureCacheError, match="no features at"):
        read_features(tmp_path, KEY)


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    script = f"""
import os, pathlib, torch
from dptaft.feature_cache import write_features
from dptaft.tangent.operator import Features
def killed():
    yield Features({{"a": torch.zeros(2, 3)}})
    os.kill(os.getpid(), 9)
write_features(pathlib.Path({str(tmp_path)!r}), {KEY!r}, killed(), {N})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert leftovers(tmp_path) == [f".building-{KEY}"]
    write_features(tmp_path, KEY, parts(), N)
    assert leftovers(tmp_path) == [KEY]
    assert same(read_features(tmp_path, KEY), example_features())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_gives_one_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_create", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(FeatureCacheError, match=r"no space left.*half precision"):
        write_features(tmp_path, KEY, parts(), N)
    assert leftovers(tmp_path) == []


def test_too_little_space_is_refused_before_writing(tmp_path, monkeypatch):
    usage = feature_cache.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(FeatureCacheError, match=r"need .* GB but .* has 1e-08 GB free"):
        write_features(tmp_path, KEY, parts(), N)
    assert leftovers(tmp_path) == []


def test_a_wrong_count_is_refused(tmp_path):
    model, operator = setup()
    for count in (N - 1, N + 1):
        with pytest.raises(FeatureCacheError, match="announced"):
            build_features(images().split(2), count, model, operator)
        with pytest.raises(FeatureCacheError, match="announced"):
            write_features(tmp_path, KEY, parts(), count)
    assert leftovers(tmp_path) == []


def test_parts_that_differ_are_refused(tmp_path):
    different = [Features({"a": torch.zeros(2, 3)}), Features({"a": torch.zeros(3, 4)})]
    with pytest.raises(FeatureCacheError, match="differ in type or shape"):
        write_features(tmp_path, KEY, different, N)


def test_one_command_removes_the_cache_and_nothing_else(tmp_path):
    root = tmp_path / "cache"
    write_features(root, KEY, parts(), N)
    (root / ".building-feedfeedfeedfeed").mkdir()
    size = sum(f.stat().st_size for f in (root / KEY).iterdir())
    assert remove_cache(root) == size
    assert not root.exists()
    write_features(root, KEY, parts(), N)
    (root / "notes.txt").write_text("mine")
    remove_cache(root)
    assert [p.name for p in root.iterdir()] == ["notes.txt"]
    with pytest.raises(FeatureCacheError, match="not a feature cache"):
        remove_cache(root)
    with pytest.raises(FeatureCacheError, match="holds other files"):
        write_features(root, KEY, parts(), N)


def test_an_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FeatureCacheError, match="cannot write the feature cache"):
        write_features(tmp_path / "file" / "cache", KEY, parts(), N)


def test_the_key_depends_on_everything_that_features_depend_on():
    def key(scope="last:1", data="d", precision="float32", preprocessing=None, change=None, **options):
        model = TangentModel(base(**options), scope)
        if change is not None:
            model.base.get_parameter(change).data[0] += 1e-3
        return feature_key(
            model,
            tangent_operator(model),
            preprocessing=preprocessing or {"mean": [0.5]},
            data=data,
            precision=precision,
        )

    keys = [
        key(),
        key(scope="last:2"),
        key(scope="attention:2"),  # the cut of last:2; Grams and scales of bounded operators differ
        key(scope="head"),
        key(data="e"),
        key(precision="float16"),
        key(preprocessing={"mean": [0.4]}),
        key(change="blocks.0.attn.qkv.weight"),
        key(change="head.weight"),
        key(num_heads=4),
        key(act_layer="gelu_tanh"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_bad_arguments_are_named(tmp_path):
    model, operator = setup()
    with pytest.raises(ValueError, match="unknown feature precision 'int8'; use float32, float16, bfloat16"):
        build_features([images()], N, model, operator, precision="int8")
    with pytest.raises(FeatureCacheError, match="both a folder and a key"):
        build_features([images()], N, model, operator, cache=tmp_path)
    with pytest.raises(FeatureCacheError, match="not a hexadecimal digest"):
        write_features(tmp_path, "../../etc", parts(), N)


def test_a_digest_covers_names_types_shapes_and_values():
    tensors = [
        {"x": torch.zeros(4)},
        {"y": torch.zeros(4)},
        {"x": torch.zeros(2, 2)},
        {"x": torch.zeros(4, dtype=torch.int32)},
        {"x": torch.tensor([0.0, 0.0, 0.0, 1e-30])},
    ]
    assert len({tensors_digest(t) for t in tensors}) == len(tensors)


def test_the_manifest_is_json_with_sizes_and_checksums(tmp_path):
    write_features(tmp_path, KEY, parts(), N)
    manifest = json.loads(Path(tmp_path / KEY / "manifest.json").read_text())
    assert manifest["count"] == N
    assert manifest["tensors"]["a"]["shape"] == [N, 3, 2]
    assert len(manifest["tensors"]["a"]["sha256"]) == 64


@pytest.mark.parametrize("bound", [BoundedOperator, DiameterOperator])
def test_scales_cached_for_another_scope_are_never_used(bound, tmp_path):
    """``attention:2`` and ``last:2`` have one cut; the scales of one leave Jacobians of the other too large."""
    for scope in ("attention:2", "last:2"):
        model = TangentModel(base(), scope)
        operator = bound(DualOperator(model))
        key = feature_key(model, operator, preprocessing={}, data="d")
        found = build_features([images()], N, model, operator, cache=tmp_path, key=key)
    expected = operator.extract(model.boundary(images()))
    assert torch.equal(found.index(slice(0, N))["unit_scale"], expected["unit_scale"])


def test_an_existing_folder_is_taken_from_everybody_else(tmp_path, monkeypatch):
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o755)
    write_features(root, KEY, iter([example_features()]), N)
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o750)

    def refused(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refused)
    with pytest.raises(FeatureCacheError, match=r"others can list .*mode 750.*choose a folder of your own"):
        write_features(root, "1" * 64, iter([example_features()]), N)

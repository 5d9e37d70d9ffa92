"""Data larger than memory: bounded reads, forward samples, the same numbers as in memory."""

import os
import tracemalloc

import pytest
import torch
from builders import small_data
from timm.models.vision_transformer import VisionTransformer

import dptaft
from dptaft import estimate_room, stored_features
from dptaft.estimate_room import available_memory
from dptaft.feature_cache import read_features, write_features
from dptaft.features import build_features, keeps_grams
from dptaft.tangent.choose import tangent_operator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import Features
from dptaft.training import fused
from dptaft.training.fused import FusedEngine, check_unique
from dptaft.training.losses import CrossEntropy
from dptaft.training.noise import InsecureSeededNoise
from dptaft.training.plan import PlanError
from dptaft.training.sampling import Poisson

LARGE = 2_000_000
KEY = "0123456789abcdef"
N = 40


def test_poisson_samples_are_the_draws_below_the_rate_at_bounded_memory():
    tracemalloc.start()
    batch = Poisson(LARGE, 1e-4, InsecureSeededNoise(3)).next_batch()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    draws = InsecureSeededNoise(3).integers(LARGE)
    assert torch.equal(batch, torch.nonzero(draws < int(1e-4 * 2**63)).squeeze(1))
    assert peak < 8 * LARGE / 2


# ---------------------------------------------------------------------- reading


@pytest.fixture
def pair(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = Features(
        {
            "a": torch.randn(N, 3, 5, generator=generator),
            "b": torch.randn(N, generator=generator).bfloat16(),
            "c": torch.arange(N) % 3 == 0,
            "nothing": torch.zeros(N, 0),
        },
        grams=torch.randn(N, 2, 2, generator=generator, dtype=torch.float64),
    )
    write_features(tmp_path, KEY, (features.index(slice(i, i + 7)) for i in range(0, N, 7)), N)
    return features, read_features(tmp_path, KEY)


@pytest.mark.parametrize(
    "selection",
    [
        slice(0, N),
        slice(3, 9),
        slice(-4, None),
        slice(5, 5),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([7]),
        torch.tensor([1, 2, 3, 9, 10, 39]),
        torch.tensor([39, 0, 4, 3, 3]),
        torch.arange(N),
    ],
    ids=str,
)
@pytest.mark.parametrize("large", [0, 1 << 15], ids=["read", "copied"])
def test_a_part_of_stored_features_is_that_part(pair, selection, large, monkeypatch):
    monkeypatch.setattr(stored_features, "_LARGE", large)
    monkeypatch.setattr(stored_features, "_MAPPED", 3)
    memory, stored = pair
    expected, found = memory.index(selection), stored.index(selection)
    assert set(found.tensors) == set(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert torch.equal(found.grams, expected.grams)
    assert len(found) == len(expected)


def test_stored_features_look_like_features(pair):
    memory, stored = pair
    assert (len(stored), stored.nbytes) == (len(memory), memory.nbytes)
    assert torch.equal(stored["a"], memory["a"])
    assert torch.equal(stored.grams, memory.grams)
    assert torch.equal(stored.to(dtype=torch.float64)["a"], memory["a"].double())
    assert stored.to("cpu").index(slice(0, 2))["a"].device.type == "cpu"


@pytest.mark.parametrize("number", [-1, N])
def test_numbers_outside_the_data_are_refused(pair, number):
    with pytest.raises(IndexError, match="from 0 to 39"):
        pair[1].index(torch.tensor([0, number]))


def test_a_mask_is_refused_and_an_empty_slice_is_empty(pair):
    """Read as numbers, a mask would give the first two examples over and over."""
    with pytest.raises(IndexError, match="no mask"):
        pair[1].index(torch.arange(N) > 20)
    assert len(pair[1].index(slice(20, 10))) == 0


def test_writing_to_a_part_changes_no_file(pair):
    memory, stored = pair
    stored.index(slice(0, N))["a"].zero_()
    assert torch.equal(stored["a"], memory["a"])


def test_a_deleted_cache_can_still_be_read(pair, tmp_path):
    memory, stored = pair
    for file in (tmp_path / KEY).iterdir():
        file.unlink()
    for selection in (torch.tensor([5]), slice(5, 6)):
        assert torch.equal(stored.index(selection)["a"], memory["a"][5:6])


def test_a_file_that_became_short_is_an_error_and_no_crash(pair, tmp_path, monkeypatch):
    os.truncate(tmp_path / KEY / "a.bin", 100)
    with pytest.raises(ValueError, match="greater than file size"):
        pair[1].index(torch.tensor([N - 1]))
    monkeypatch.setattr(stored_features, "_LARGE", 0)
    with pytest.raises(OSError, match="shorter"):
        pair[1].index(torch.tensor([N - 1]))
    with pytest.raises(ValueError, match="greater than file size"):
        pair[1].index(slice(0, N))


def resident_file_bytes():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_a_pass_over_the_file_keeps_one_piece_resident(tmp_path):
    rows, width = 3000, 8192
    part = Features({"u": torch.ones(500, width)})
    write_features(tmp_path, KEY, (part for _ in range(0, rows, 500)), rows)
    stored, before, peak = read_features(tmp_path, KEY), resident_file_bytes(), 0
    for start in range(0, rows, 100):
        piece = stored.index(slice(start, start + 100))
        assert float(piece["u"].sum()) == 100 * width
        peak = max(peak, resident_file_bytes())
    assert peak - before < stored.nbytes / 8
    whole = stored["u"]
    whole.sum()
    assert resident_file_bytes() - before > stored.nbytes / 2  # what the pass would have kept


# ---------------------------------------------------------------------- engine


def model_and_images(scope):
    torch.manual_seed(0)
    base = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=3
    ).eval()
    model = TangentModel(base, scope)
    return model, tangent_operator(model), torch.randn(N, 3, 8, 8)


@pytest.mark.parametrize("scope", ["head", "last:1", "last:2"])
def test_clipped_sums_from_disk_are_those_from_memory(scope, tmp_path):
    model, operator, images = model_and_images(scope)
    memory = build_features([images], N, model, operator)
    grams = keeps_grams(memory.nbytes // N, 3)
    assert grams == (scope != "head")
    disk = build_features(images.split(7), N, model, operator, cache=tmp_path, key=KEY, grams=grams)
    labels = torch.arange(N) % 3
    options = {"loss": CrossEntropy(), "l2_clip_norm": 0.1, "physical_batch_size": 16}
    ours = FusedEngine(operator, disk, labels, **options)
    theirs = FusedEngine(operator, memory, labels, **options)
    assert ours._grams is None
    assert theirs._grams is not None
    generator = torch.Generator().manual_seed(1)
    theta = {k: 0.1 * torch.randn(s, generator=generator) for k, s in operator.parameter_shapes.items()}
    for batch in (torch.arange(N), torch.tensor([1, 2, 3, 20, 39]), torch.tensor([], dtype=torch.int64)):
        found, expected = ours.clipped_sum(theta, batch).value, theirs.clipped_sum(theta, batch).value
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_kept_grams_are_used_and_checked(tmp_path):
    model, operator, images = model_and_images("last:1")
    features = build_features([images], N, model, operator)
    grams = operator.gram(features)
    labels, options = torch.arange(N) % 3, {"loss": CrossEntropy(), "l2_clip_norm": 0.1}
    engine = FusedEngine(operator, Features(features.tensors, grams), labels, **options)
    assert engine._grams is None
    with pytest.raises(ValueError, match="disagree with explicit gradients"):
        FusedEngine(operator, Features(features.tensors, 0.25 * grams), labels, **options)
    without = FusedEngine(
        operator, Features(features.tensors, 0.25 * grams), labels, norms="factors", **options
    )
    theta = without.initial_theta()
    one, two = (e.clipped_sum(theta, torch.arange(N)).value for e in (engine, without))
    torch.testing.assert_close(one["head.weight"], two["head.weight"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("compared", [2, 3, 1 << 20])
def test_repeated_numbers_are_refused_in_any_order(compared, monkeypatch):
    monkeypatch.setattr(fused, "_COMPARED", compared)
    for good in ([], [5], [0, 1, 2, 3, 4], [4, 3, 0]):
        check_unique(torch.tensor(good, dtype=torch.int64))
    for bad in ([1, 1], [0, 1, 1, 2], [0, 1, 2, 2], [3, 0, 3], [0, 1, 2, 0]):
        with pytest.raises(ValueError, match="more than once"):
            check_unique(torch.tensor(bad))


# ---------------------------------------------------------------------- memory


def machine(root, available, **groups):
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable: {available // 1024} kB\n"} | groups
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_available_memory_without_groups(tmp_path):
    assert available_memory(machine(tmp_path, 8 << 20)) == 8 << 20


def test_the_tightest_group_counts_and_dropped_pages_do_not(tmp_path):
    top = "sys/fs/cgroup"
    groups = {
        "proc/self/cgroup": "0::/job/step\n",
        f"{top}/job/step/memory.max": "max\n",
        f"{top}/job/step/memory.current": "1000000\n",
        f"{top}/job/memory.max": "5000000\n",
        f"{top}/job/memory.current": "3000000\n",
        f"{top}/job/memory.stat": "anon 1\ninactive_file 500000\n",
    }
    assert available_memory(machine(tmp_path, 8 << 20, **groups)) == 2_500_000


def test_groups_of_the_first_version(tmp_path):
    group = "sys/fs/cgroup/memory/job"
    groups = {
        "proc/self/cgroup": "4:cpu:/job\n9:memory:/job\n",
        f"{group}/memory.limit_in_bytes": "4000000\n",
        f"{group}/memory.usage_in_bytes": "5000000\n",
        f"{group}/memory.stat": "total_inactive_file 0\n",
    }
    assert available_memory(machine(tmp_path, 8 << 20, **groups)) == 0


@pytest.mark.parametrize("method", ["tangent", "objective-perturbation"])
def test_features_that_do_not_fit_are_refused_before_anything_is_charged(method, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_room, "available_memory", lambda: 10_000)
    with pytest.raises(PlanError, match=r"75 records need .* GB of memory.*--feature-cache DIR"):
        dptaft.train(small_data(), epsilon=3, method=method, scope="head", output=tmp_path / "run")
    assert not list(tmp_path.iterdir())  # no run, no partial run, no ledger


def test_a_feature_cache_lifts_the_refusal(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate_room, "available_memory", lambda: 10_000)
    with pytest.raises(PlanError, match="need"):
        dptaft.train(small_data(), epsilon=3, scope="head", steps=1, output=tmp_path / "a", ledger=None)
    cache = str(tmp_path / "cache")
    run = dptaft.train(
        small_data(),
        epsilon=3,
        scope="head",
        steps=1,
        output=tmp_path / "b",
        ledger=None,
        feature_cache=cache,
    )
    assert run.accuracy is not None

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from builders import evaluation_images, small_images
from click.testing import CliRunner
from PIL import Image
from safetensors.numpy import load_file

import dptaft
from dptaft.cli import main
from dptaft.data import ArrayPixels, ImageData, Split
from dptaft.shards import (
    ShardError,
    add_shard,
    compose,
    load_collection,
    remove_record,
    remove_shard,
    train_shards,
)
from dptaft.shards.parts import ComposeError
from dptaft.shards.records import load_records, read_trail
from dptaft_accounting import best_bound, mechanism_from_dict
from dptaft_accounting.accountants.gaussian import gaussian_mu
from dptaft_accounting.ledger import Ledger
from dptaft_accounting.tradeoff import GaussianProfile

FAST = {"epsilon": 3, "steps": 3, "ledger": None, "delta": 1e-5}


def data_of(count=60, seed=0, name="small"):
    images, labels = small_images(count, 3, seed)
    split = Split(ArrayPixels(images), torch.from_numpy(labels))
    return ImageData(name, ("a", "b", "c"), split, evaluation_images(count), True)


def without(data, *numbers):
    kept = [i for i in range(len(data.train)) if i not in numbers]
    return dataclasses.replace(data, train=data.train.take(kept))


def tensors(run):
    return load_file(run.path / "model.safetensors")


def bytes_of(run):
    return (run.path / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    shards = train_shards(data_of(), 4, output=root / "p", public_seed=1, **FAST)
    compose(shards.runs(), root / "average")
    return root


@pytest.fixture
def place(original, tmp_path):
    """A copy to change: the parent folder p, and the composed run average."""
    shutil.copytree(original, tmp_path / "x")
    return tmp_path / "x"


def holder(place, number):
    shards = load_records(place / "p").shards.items()
    return next(name for name, held in shards if any(record.number == number for record in held))


def test_removal_is_never_having_trained_the_shard(place):
    made = remove_shard(place / "average", "2", place / "rest")
    others = compose([place / "p" / name for name in "134"], place / "others")
    assert bytes_of(made) == bytes_of(others)
    whole, part = (
        tensors(dptaft.load_run(place / "average")),
        load_file(place / "p" / "2" / "model.safetensors"),
    )
    for name, value in tensors(made).items():
        if name.startswith("trained/"):
            assert np.abs((4 * whole[name].astype(float) - part[name]) / 3 - value).max() < 1e-6
    assert np.abs(tensors(made)["trained/head.weight"] - whole["trained/head.weight"]).max() > 1e-4
    assert made.statement.recompute().holds
    assert made.statement.claim["epsilon"] <= 3
    assert dptaft.load_run(made.path).predict([data_of().train.pixels[0]])[0].label in "abc"


def test_the_removed_shard_need_not_be_there_any_more(place):
    shutil.rmtree(place / "p" / "2")
    made = remove_shard(place / "average", "2", place / "rest")
    assert bytes_of(made) == bytes_of(compose([place / "p" / name for name in "134"], place / "others"))
    assert "without a bound" in made.config["composition"]["removed"][0]["reveals"]
    assert "with_removed" not in made.statement.composition


def test_the_statement_says_what_earlier_releases_reveal(place):
    part = dptaft.load_run(place / "p" / "2")
    average = dptaft.load_run(place / "average")
    made = remove_shard(average, "2", place / "rest")
    (item,) = made.statement.composition["removed"]
    assert item["statement"] == part.id
    assert item["epsilon"] == part.statement.claim["epsilon"]
    assert item["releases"] == [average.id]
    assert made.statement.composition["with_removed"]["epsilon"] == part.statement.claim["epsilon"]
    assert [line for line in made.statement.admin["caveats"] if "still reveals its records" in line]
    again = remove_shard(made, "3", place / "less")
    assert [item["shard"] for item in again.statement.composition["removed"]] == ["2", "3"]
    assert again.statement.composition["removed"][1]["releases"] == [average.id, made.id]
    assert load_collection(place / "p").shards == tuple(
        shard for shard in load_collection(place / "p").shards if shard.name in "14"
    )
    assert [line["action"] for line in read_trail(place / "p")] == [
        *["train"] * 4,
        "compose",
        "compose",
        "remove",
        "compose",
        "remove",
    ]


def test_factors_after_removal(place):
    runs = [place / "p" / name for name in "1234"]
    added = remove_shard(compose(runs, place / "s", how="add"), "2", place / "s2")
    assert [p["factor"] for p in added.config["composition"]["parts"]] == [1, 1, 1]
    shutil.copytree(place / "p", place / "q")
    weighted = compose(runs, place / "w", how="weighted", weights=[0.1, 0.2, 0.3, 0.4])
    less = remove_shard(weighted, "4", place / "w4")
    assert [p["factor"] for p in less.config["composition"]["parts"]] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    balanced = compose(runs, place / "b", how="weighted", weights=[1, -1, 2, -2])
    with pytest.raises(ComposeError, match="add up to zero"):
        remove_shard(remove_shard(balanced, "3", place / "b3"), "4", place / "b4")


def test_nonsense_is_refused(place):
    with pytest.raises(ShardError, match="has no shard '7'; it has 1, 2, 3, 4"):
        remove_shard(place / "average", "7", place / "x")
    with pytest.raises(ShardError, match="was trained as a whole"):
        remove_shard(place / "p" / "1", "1", place / "x")
    pair = compose([place / "p" / "1", place / "p" / "2"], place / "pair")
    one = remove_shard(pair, "1", place / "one")
    assert bytes_of(one) != bytes_of(pair)
    with pytest.raises(ShardError, match="shard 2 is the last one"):
        remove_shard(one, "2", place / "x")
    with pytest.raises(ShardError, match="holds record 77"):
        remove_record(place / "average", 77, place / "x")
    with pytest.raises(ValueError, match="exists"):
        remove_shard(place / "average", "3", place / "one")
    assert not (place / "x").exists()


def test_a_missing_remaining_part_is_named_and_nothing_changes(place):
    shutil.rmtree(place / "p" / "3")
    with pytest.raises(ComposeError, match="put it back"):
        remove_shard(place / "average", "2", place / "x")
    assert not (place / "x").exists()
    assert len(load_collection(place / "p").shards) == 4


def test_a_record_leaves_with_its_shard(place):
    name = holder(place, 17)
    made = remove_record(place / "average", 17, place / "rest")
    left = [other for other in "1234" if other != name]
    assert [p["shard"] for p in made.config["composition"]["parts"]] == left
    last = read_trail(place / "p")[-1]
    assert last["record"] == load_records(place / "p").digest(data_of().train.pixels[17])
    assert (
        last["record"] not in (made.path / "run.toml").read_text() + (made.path / "privacy.json").read_text()
    )
    with pytest.raises(ShardError, match=f"it is in {name}"):
        remove_record(made, 17, place / "y")
    with pytest.raises(ShardError, match="also in other shards"):
        add_shard(place / "p", dataclasses.replace(data_of(), train=data_of().train.take([17])), ledger=None)


def test_retraining_forgets_the_record_and_keeps_the_others(tmp_path):
    """Without noise: the retrained composition equals one that never had the record."""
    options = FAST | {"epsilon": math.inf}
    shards = train_shards(data_of(), 3, output=tmp_path / "p", public_seed=1, **options)
    average = compose(shards.runs(), tmp_path / "average")
    name = holder(tmp_path, 17)
    made = remove_record(average, 17, tmp_path / "rest", retrain=True, data=data_of())
    numbers = [r.number for r in load_records(shards.path).shards[name]]
    assert 17 not in numbers
    assert len(numbers) == 19
    part = dataclasses.replace(data_of(), train=data_of().train.take(numbers))
    alone = dptaft.train(part, output=tmp_path / "alone", **options)
    new = load_collection(shards.path).shard(name)
    assert new.folder == f"{name}-again1"
    assert new.records == 19
    one, two = load_file(shards.path / new.folder / "model.safetensors"), tensors(alone)
    assert max(float(np.abs(one[k] - two[k]).max()) for k in one) < 1e-6
    folders = [shards.path / (new.folder if other == name else other) for other in "123"]
    assert bytes_of(made) == bytes_of(compose(folders, tmp_path / "direct"))
    assert made.statement is None
    assert "claims no privacy" in made.config["composition"]["removed"][0]["reveals"]


def test_retraining_is_charged_and_total_is_stated(tmp_path):
    ledger = tmp_path / "ledger.sqlite"
    shards = train_shards(data_of(), 3, output=tmp_path / "p", **FAST | {"ledger": "auto"})
    average = compose(shards.runs(), tmp_path / "average")
    before = Ledger(ledger).account("small").spent.epsilon_at(1e-5)
    gone = without(data_of(), 17)  # the owner deleted the record already: all numbers behind it moved
    made = remove_record(average, 17, tmp_path / "rest", retrain=True, data=gone)
    after = Ledger(ledger).account("small")
    assert len(after.entries) == 4
    mu = gaussian_mu(mechanism_from_dict(dptaft.load_run(shards.path / "1").statement.mechanism["record"]))
    both = GaussianProfile(math.sqrt(2) * mu).epsilon(1e-5)
    assert before < 3 < both * (1 - 1e-6) <= after.spent.epsilon_at(1e-5) <= both * 1.001
    assert made.statement.claim["epsilon"] <= 3
    assert made.statement.composition["with_removed"]["epsilon"] == pytest.approx(both, rel=1e-6)
    assert made.statement.composition["with_removed"]["epsilon"] >= both * (1 - 1e-9)
    second = remove_record(made, 18, tmp_path / "rest2", retrain=True, data=without(data_of(), 17, 18))
    assert second.statement.composition["with_removed"]["epsilon"] >= both * (1 - 1e-9)
    assert second.statement.claim["epsilon"] <= 3
    record = mechanism_from_dict(second.statement.mechanism["record"])
    assert best_bound(record, delta=1e-5).epsilon <= 3


def test_identical_images_leave_together(tmp_path):
    images, labels = small_images(60)
    images[31] = images[4]
    data = dataclasses.replace(data_of(), train=Split(ArrayPixels(images), torch.from_numpy(labels)))
    seed = next(s for s in range(100) if _apart(s, 4, 31))
    with pytest.warns(UserWarning, match="1 training images of small have the pixels of another"):
        shards = train_shards(data, 4, output=tmp_path / "p", public_seed=seed, **FAST)
    made = remove_record(compose(shards.runs(), tmp_path / "average"), 4, tmp_path / "rest")
    assert len(made.config["composition"]["parts"]) == 2
    assert len(made.config["composition"]["removed"]) == 2


def _apart(seed, one, two):
    from dptaft.shards.assignment import random_assignment

    names = random_assignment(60, 4, seed).names
    return names[one] != names[two]


def test_a_record_may_be_named_by_its_file(tmp_path):
    images, labels = small_images(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "data" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)).save(folder / f"{i:02}.png")
    shards = train_shards(str(tmp_path / "data"), 2, output=tmp_path / "p", classes=["a", "b", "c"], **FAST)
    compose(shards.runs(), tmp_path / "average")
    file = tmp_path / "data" / "b" / "04.png"
    made = remove_record(tmp_path / "average", file, tmp_path / "rest")
    assert len(made.config["composition"]["parts"]) == 1
    cli = CliRunner()
    done = cli.invoke(
        main,
        ["remove", str(tmp_path / "average"), "--record", str(file), "-o", str(tmp_path / "again")],
    )
    assert done.exit_code == 0, done.output
    assert "still reveals its records" in done.stdout


def test_retraining_loads_the_data_again(tmp_path):
    options = FAST | {"steps": 2}
    shards = train_shards("digits", 40, output=tmp_path / "p", scope="head", **options)
    compose(shards.runs(), tmp_path / "average")
    made = remove_record(tmp_path / "average", 100, tmp_path / "rest", retrain=True, ledger=None)
    assert len(made.config["composition"]["parts"]) == 40
    with pytest.raises(ShardError, match="was trained on images in memory"):
        _again_in_memory(tmp_path)


def _again_in_memory(tmp_path):
    shards = train_shards(data_of(12), 2, output=tmp_path / "m", **FAST)
    average = compose(shards.runs(), tmp_path / "m-average")
    remove_record(average, 3, tmp_path / "y", retrain=True, ledger=None)


def test_a_shard_of_one_record_cannot_be_retrained_without_it(tmp_path):
    shards = train_shards(data_of(3), 3, output=tmp_path / "p", **FAST)
    average = compose(shards.runs(), tmp_path / "average")
    with pytest.raises(ShardError, match="holds nothing else"):
        remove_record(average, 1, tmp_path / "x", retrain=True, data=data_of(3), ledger=None)
    assert not (tmp_path / "x").exists()


def test_command_line(place):
    cli = CliRunner()
    base = ["remove", str(place / "average")]
    done = cli.invoke(main, [*base, "--shard", "1", "-o", str(place / "a"), "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["parts"] == ["2", "3", "4"]
    assert "still reveals" in shown["removed"][0]
    for bad in (
        [*base, "-o", str(place / "x")],
        [*base, "--shard", "1", "--record", "2", "-o", str(place / "x")],
        [*base, "--shard", "9", "-o", str(place / "x")],
        [*base, "--shard", "1", "--retrain", "-o", str(place / "x")],
        [*base, "--record", "nothing.png", "-o", str(place / "x")],
        [*base, "--record", "777", "-o", str(place / "x")],
        [*base, "--shard", "2", "-o", str(place / "a")],
        ["remove", str(place / "p"), "--shard", "2", "-o", str(place / "x")],
    ):
        refused = cli.invoke(main, bad)
        assert refused.exit_code == 2, refused.output
        assert "Traceback" not in refused.output
    assert not (place / "x").exists()


def test_removal_builds_no_model(place):
    code = (
        "import sys; from dptaft.shards import remove_shard; "
        f"remove_shard({str(place / 'average')!r}, '2', {str(place / 'rest')!r}); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""Splits, classes and folders that are none of the data, told apart by name or refused by name."""

import warnings

import numpy as np
import pytest
from builders import small_images, write_folder

from dptaft.data import DataError, load_data


def loaded(path, **options):
    """The data, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_data(str(path), **options)
    return data, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("train", "val"),
        ("Train", "Test"),
        ("TRAIN", "VAL"),
        ("Training", "Testing"),
        ("training", "validation"),
        ("train", "valid"),
        ("train", "dev"),
        ("train", "eval"),
        ("train", "evaluation"),
        ("train", "holdout"),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path, names):
    for name, count in zip(names, (8, 4), strict=True):
        write_folder(tmp_path / name, count=count)
    data, said = loaded(tmp_path)
    assert (data.classes, len(data.train), len(data.evaluation), said) == (("cat", "dog"), 8, 4, [])


def test_train_alone_is_read_and_a_fifth_of_it_held_out(tmp_path):
    write_folder(tmp_path / "train", count=10)
    data, said = loaded(tmp_path)
    assert (data.classes, len(data.train), len(data.evaluation), said) == (("cat", "dog"), 8, 2, [])
    flat = tmp_path / "test"
    flat.mkdir()
    (tmp_path / "train/cat/000.png").rename(flat / "a.png")
    data, said = loaded(tmp_path)
    assert (len(data.train), len(data.evaluation)) == (7, 2)
    assert said == [f"test in {tmp_path}: left out (no class folders with images)"]


@pytest.mark.parametrize("third", ["val", "validation", "Dev"])
def test_of_three_splits_test_is_the_evaluation_and_the_other_is_named(tmp_path, third):
    for name, count in (("train", 8), ("test", 4), (third, 6)):
        write_folder(tmp_path / name, count=count)
    data, said = loaded(tmp_path, classes=["dog", "cat"])
    assert (data.classes, len(data.train), len(data.evaluation)) == (("dog", "cat"), 8, 4)
    assert said == [f"{third} in {tmp_path}: left out (train is read for training, test for evaluation)"]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("fold_0/cat", "fold_0/dog", "fold_1/cat", "fold_1/dog"),
            "fold_0, fold_1 .* hold the same folders cat, dog",
        ),
        (("a/cat", "a/dog", "a/fox", "b/cat", "b/dog"), "a, b .* hold the same folders cat, dog, fox"),
        (("seg_train/seg_train", "seg_test/seg_test"), "seg_train and seg_test, which look like splits"),
        (("train2017", "val2017"), "train2017 and val2017, which look like splits"),
        (("trainA", "trainB", "testA", "testB"), "trainA and testA, which look like splits"),
        (("train", "test"), "train, test: splits without class folders"),
        (("train", "bus"), "train: splits without class folders"),
        (
            ("train/cat", "train/dog", "Train/cat", "Train/dog"),
            "Train, train: which may each be the training split",
        ),
        (
            ("test/cat", "test/dog", "val/cat", "val/dog"),
            "test, val: evaluation splits without one for training",
        ),
        (("cat", "dog", "test"), "test: evaluation splits without one for training"),
        (
            ("train/cat", "train/dog", "extra/cat", "extra/dog"),
            "the split train beside extra, splits or classes",
        ),
        (
            ("train/cat", "train/dog", "val/cat", "val/dog", "dev/cat", "dev/dog"),
            "dev and val, either of which",
        ),
        (
            ("cat/train", "cat/test", "dog/train", "dog/test"),
            "cat holds train and test, splits below a class",
        ),
    ],
)
def test_other_structures_are_refused_by_name(tmp_path, folders, message):
    images = write_images(tmp_path, folders)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))
    assert images == sorted(tmp_path.glob("**/*.png"))


def write_images(root, folders, count=3):
    for seed, name in enumerate(folders):
        place = root / name
        write_folder(place.parent, count, classes=(place.name,))
        rewrite(place, seed)
    return sorted(root.glob("**/*.png"))


def rewrite(folder, seed):
    from PIL import Image

    images, _ = small_images(len(list(folder.iterdir())), 2, seed=seed + 5)
    for path, image in zip(sorted(folder.iterdir()), images, strict=True):
        Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        (("bus", "train"), ["bus", "train"]),
        (("train2017", "val2017"), ["train2017", "val2017"]),
        (("cat/a", "cat/b", "dog/a", "dog/b"), ["cat", "dog"]),
    ],
)
def test_declared_classes_settle_what_the_folders_are(tmp_path, folders, classes):
    write_images(tmp_path, folders)
    data, said = loaded(tmp_path, classes=classes, hold_out=False)
    assert (data.classes, len(data.train), said) == (tuple(classes), 3 * len(folders), [])


@pytest.mark.parametrize(
    "folders",
    [
        ("cat", "dog"),
        ("cat/images", "dog/images"),
        ("cat/p1", "cat/p2", "dog/p3", "dog/p4"),
        ("cat/a", "dog"),
    ],
)
def test_folders_below_a_class_are_part_of_it(tmp_path, folders):
    write_images(tmp_path, folders)
    data, said = loaded(tmp_path, hold_out=False)
    assert (data.classes, len(data.train), said) == (("cat", "dog"), 3 * len(folders), [])


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbs/deep", "sub/.cache", "__MACOSX"])
def test_hidden_folders_below_a_class_are_not_read(tmp_path, hidden):
    write_folder(tmp_path, count=12)
    write_images(tmp_path / "cat", [hidden])
    data, said = loaded(tmp_path, hold_out=False)
    assert len(data.train) == 12
    name = hidden.removesuffix("/deep")
    assert said == [f"cat/{name} in {tmp_path}: left out (hidden, or not of the data)"]


@pytest.mark.parametrize("mark", ["run.toml", "recipe.toml", "CACHEDIR.TAG"])
def test_a_run_inside_a_class_takes_no_record_away_and_adds_none(tmp_path, mark):
    write_folder(tmp_path, count=12)
    write_images(tmp_path / "cat", ["first/plots"])
    (tmp_path / "cat/first" / mark).write_text("")
    data, said = loaded(tmp_path, hold_out=False)
    assert (data.classes, len(data.train)) == (("cat", "dog"), 12)
    assert said == [f"cat/first in {tmp_path}: left out (hidden, or not of the data)"]


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize(
    ("name", "file", "why"),
    [
        ("__MACOSX", "cat/._000.png", "remains of an archive"),
        (".git", "x.png", "hidden"),
        ("runs", "ledger.sqlite", "runs of dptaft"),
        ("runs", "first/run.toml", "runs of dptaft"),
        ("runs", "first.partial/progress.json", "runs of dptaft"),
        ("first", "run.toml", "runs of dptaft"),
        ("swept", "recipe.toml", "runs of dptaft"),
        ("features", "CACHEDIR.TAG", "a cache"),
    ],
)
def test_folders_that_are_none_of_the_data_are_left_out_and_named(tmp_path, split, name, file, why):
    root = tmp_path / split
    write_folder(root, count=12)
    if split:
        write_folder(tmp_path / "test", count=4)
    place = root / name / file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    for options in ({}, {"classes": ["cat", "dog"]}):
        data, said = loaded(tmp_path, hold_out=False, **options)
        assert (data.classes, len(data.train)) == (("cat", "dog"), 12)
        assert said == [f"{name} in {root}: left out ({why})"]


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize(
    ("files", "held"),
    [(("1.dcm", "2.dcm"), r"2 \.dcm"), (("1.txt", "2.json", "3.txt"), r"2 \.txt, 1 \.json"), ((), "no file")],
)
def test_an_undeclared_class_without_an_image_is_refused_by_name(tmp_path, split, files, held):
    root = tmp_path / split
    write_folder(root, count=12)
    if split:
        write_folder(tmp_path / "test", count=4)
    (root / "labels").mkdir()
    for file in files:
        (root / "labels" / file).write_bytes(b"x")
    with pytest.raises(DataError, match=rf"labels holds no image .* but {held}; move it away, convert"):
        load_data(str(tmp_path))
    declared, _ = loaded(tmp_path, classes=["cat", "dog", "labels"], hold_out=False)
    assert len(declared.train) == 12


def test_a_folder_that_cannot_be_listed_is_no_smaller_class(tmp_path, monkeypatch):
    import os

    write_folder(tmp_path, count=12)
    real = os.scandir

    def closed(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="dog"):
        load_data(str(tmp_path))

"""One image is one record: files under several names are refused, copies of pixels are told to the owner."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from builders import small_data, small_images, write_folder
from PIL import Image

import dptaft
from dptaft.data import ArrayPixels, DataError, ImageData, Split, load_data
from dptaft.data.identity import copies_between, copies_within, pixel_digest


@pytest.fixture
def pets(tmp_path):
    return write_folder(tmp_path / "pets", count=20)


def table(root, rows, header="file,label"):
    path = root / "table.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "again", ["pets/../pets/cat/000.png", "./pets/cat/000.png", "{}/cat/000.png", "twin.png"]
)
def test_a_table_names_a_file_once_under_whatever_name(tmp_path, pets, again):
    os.link(pets / "cat/000.png", tmp_path / "twin.png")
    rows = [f"pets/{c}/{n:03}.png,{c}" for n, c in enumerate(("cat", "dog"))]
    assert len(load_data(table(tmp_path, rows), hold_out=False).train) == 2
    rows.append(f"{again.format(pets.resolve())},cat")
    with pytest.raises(DataError, match=r"row 4 .* again(, the file .*cat/000\.png of row 2)?; one row"):
        load_data(table(tmp_path, rows))


def test_a_table_names_no_file_in_training_and_evaluation(tmp_path, pets):
    rows = ["pets/cat/000.png,cat,train", "pets/dog/001.png,dog,train", "pets/./cat/000.png,cat,test"]
    with pytest.raises(DataError, match=r"row 4 .* again"):
        load_data(table(tmp_path, rows, "file,label,split"))


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("label", ["cat", "dog"])
def test_a_linked_file_in_a_folder_is_refused(pets, link, label):
    link(pets / "cat/000.png", pets / label / "latest.png")
    with pytest.raises(
        DataError, match=r"a file would be read again .*(latest|000)\.png is the same file as"
    ):
        load_data(str(pets))


def test_a_linked_evaluation_folder_is_refused_and_all_files_are_counted(tmp_path):
    write_folder(tmp_path / "train", count=8)
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(DataError, match=r"8 files .*one in training, one in evaluation"):
        load_data(str(tmp_path))


def test_files_that_only_look_alike_are_different_records(pets):
    shutil.copy(pets / "cat/000.png", pets / "cat/000.PNG")
    assert len(load_data(str(pets), hold_out=False).train) == 21


def test_a_link_to_a_folder_of_one_class_is_read_as_before(tmp_path, pets):
    root = tmp_path / "linked"
    root.mkdir()
    for name in ("cat", "dog"):
        (root / name).symlink_to(pets / name)
    assert len(load_data(str(root), hold_out=False).train) == 20


def digests(*images):
    return np.stack([np.frombuffer(pixel_digest(torch.tensor(image)), dtype=np.uint8) for image in images])


def test_copies_are_counted_and_the_first_pair_is_named():
    a, b, c = ([[[value]]] for value in (0.1, 0.2, 0.3))
    found = copies_within(digests(b, a, c, a, b, a))
    assert (found.count, found.most, found.first) == (3, 3, (1, 3))
    assert copies_within(digests(a, b, c)) is None
    found = copies_between(digests(a, b, a), digests(c, b, a))
    assert (found.count, found.first) == (2, (1, 1))
    assert copies_between(digests(a), digests(b)) is None
    unread = np.zeros((2, 16), dtype=np.uint8)
    assert copies_within(unread) is None
    assert copies_between(unread, unread) is None


def quick(data, path, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = {"epsilon": 3.0, "steps": 2, "scope": "head", "output": path / "run", **options}
        run = dptaft.train(data, **given)
    return run, [str(w.message) for w in caught if "pixels of a" in str(w.message)]


@pytest.mark.parametrize("suffix", ["png", "bmp"])
@pytest.mark.parametrize("options", [{}, {"ledger": None}, {"method": "output-perturbation", "steps": None}])
def test_training_tells_the_owner_of_copies_and_publishes_nothing(tmp_path, pets, suffix, options):
    """Two copies of one image, one with another label, one colour: told, and in no file of the run."""
    Image.open(pets / "cat/002.png").save(pets / "cat" / f"003copy.{suffix}")
    Image.open(pets / "cat/002.png").convert("RGB").save(pets / "dog" / f"004other.{suffix}")
    run, told = quick(str(pets), tmp_path, classes=["cat", "dog"], **options)
    assert len(told) == 1
    assert told[0].startswith("2 training images of pets have the pixels of another (first ")
    assert "002.png and " in told[0]
    assert "is there 3 times" in told[0]
    for file in run.path.iterdir():
        text = file.read_bytes()
        assert b"copy" not in text
        assert b"pixels of" not in text


def test_training_tells_the_owner_of_evaluation_images_that_were_trained_on(tmp_path, pets):
    shutil.copy(pets / "cat/000.png", pets / "cat/001.png")  # 000 is held out, 001 is a record
    data = load_data(str(pets), classes=["cat", "dog"])
    assert (len(data.train), len(data.evaluation)) == (16, 5)
    _, told = quick(data, tmp_path)
    assert len(told) == 1
    assert told[0].startswith("1 evaluation images of pets have the pixels of a training image (first ")
    assert "cat/001.png and " in told[0]


def test_copies_in_arrays_are_told_and_distinct_images_are_not(tmp_path):
    assert quick(small_data(), tmp_path / "a")[1] == []
    images, labels = small_images(20, 2)
    images[[3, 7]] = images[1]
    split = Split(ArrayPixels(images), torch.from_numpy(labels))
    data = ImageData("arrays", ("a", "b"), split, split.take([7, 8]), True)
    _, told = quick(data, tmp_path / "b")
    assert "2 training images of arrays" in told[0]
    assert "(first image 1 and image 3; " in told[0]
    assert "2 evaluation images" in told[1]
    assert "(first image 1 and image 7)" in told[1]


def test_empty_records_are_no_copies_of_each_other(tmp_path, pets):
    for name in ("cat/002.png", "dog/003.png"):
        (pets / name).write_bytes(b"no image")
    _, told = quick(str(pets), tmp_path, classes=["cat", "dog"], skip_corrupt=True)
    assert told == []


def test_the_hold_out_does_not_look_at_the_images(tmp_path):
    """Copies stay where their numbers put them: zeroing one record moves no other one."""
    images, labels = small_images(20, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    copied = images.copy()
    copied[[1, 6, 11]] = copied[0]
    np.savez(tmp_path / "b.npz", images=copied, labels=labels)
    first, second = (load_data(str(tmp_path / f"{name}.npz")) for name in "ab")
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.equal(second.evaluation.pixels[0], second.train.pixels[0])
    assert [len(second.train), len(second.evaluation)] == [16, 4]

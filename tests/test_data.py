import gzip
import struct

import numpy as np
import pytest
import torch
from builders import small_images, write_folder
from PIL import Image

from dptaft.data import ArrayPixels, DataError, ImageData, Split, load_data, read_idx, read_image


def test_digits_are_split_by_a_public_rule():
    data = load_data("digits")
    again = load_data("digits")
    assert (len(data.train), len(data.evaluation)) == (1437, 360)
    assert torch.equal(data.train.labels, again.train.labels)
    assert data.is_public
    assert data.classes_are_public
    first = data.evaluation.pixels[0]
    assert first.shape == (1, 8, 8)
    assert 0 <= first.min() <= first.max() <= 1


def test_folder_of_class_folders_holds_out_every_fifth_of_each_class(tmp_path):
    data = load_data(str(write_folder(tmp_path / "pets", count=24)))
    assert data.classes == ("cat", "dog")
    assert not data.classes_are_public
    assert torch.bincount(data.evaluation.labels).tolist() == [3, 3]
    assert len(data.train) + len(data.evaluation) == 24


def test_train_and_test_folders_are_kept_apart(tmp_path):
    write_folder(tmp_path / "train", count=8)
    write_folder(tmp_path / "test", count=4)
    data = load_data(str(tmp_path), classes=["cat", "dog"])
    assert (len(data.train), len(data.evaluation)) == (8, 4)
    assert data.classes_are_public


def test_declared_classes_may_be_empty_and_undeclared_folders_are_refused(tmp_path):
    write_folder(tmp_path, count=12)
    assert load_data(str(tmp_path), classes=["cat", "dog", "fox"]).classes == ("cat", "dog", "fox")
    with pytest.raises(DataError, match="dog is none of the classes"):
        load_data(str(tmp_path), classes=["cat", "fox"])


def test_npz_with_and_without_a_test_split(tmp_path):
    images, labels = small_images(20)
    whole = tmp_path / "whole.npz"
    np.savez(whole, images=(255 * images.clip(0, 1)).astype(np.uint8), labels=labels)
    assert (len(load_data(str(whole)).train), len(load_data(str(whole)).evaluation)) == (16, 4)
    both = tmp_path / "both.npz"
    np.savez(both, images=images, labels=labels, test_images=images[:3], test_labels=labels[:3])
    assert (len(load_data(str(both)).train), len(load_data(str(both)).evaluation)) == (20, 3)


def write_idx(path, array):
    raw = (
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def test_idx_folder(tmp_path):
    images, labels = small_images(10)
    pixels = (255 * images.clip(0, 1)).astype(np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels)
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels.astype(np.uint8))
    data = load_data(str(tmp_path))
    assert len(data.train) == 8
    assert torch.allclose(data.evaluation.pixels[0][0] * 255, torch.from_numpy(pixels[0]).float())
    raw = (tmp_path / "train-labels-idx1-ubyte").read_bytes()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(raw[:-1])
    with pytest.raises(DataError, match="no complete IDX file"):
        read_idx(tmp_path / "train-labels-idx1-ubyte")


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("I;16", 1)])
def test_image_modes(tmp_path, mode, channels):
    array = np.full((6, 5), 65535 if mode == "I;16" else 255, dtype=np.uint16 if mode == "I;16" else np.uint8)
    image = (
        Image.fromarray(array)
        if mode in ("L", "I;16")
        else Image.fromarray(array).convert("RGB").convert(mode)
    )
    image.save(tmp_path / "x.png")
    pixels = read_image(tmp_path / "x.png")
    assert pixels.shape == (channels, 6, 5)
    assert torch.allclose(pixels, torch.ones_like(pixels))


def test_bad_data_is_refused_by_name(tmp_path):
    images, labels = small_images(6)
    with pytest.raises(DataError, match="no data set or path 'nope'"):
        load_data("nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no folders"):
        load_data(str(tmp_path / "empty"))
    (tmp_path / "hollow" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images"):
        load_data(str(tmp_path / "hollow"))
    with pytest.raises(DataError, match="1 class;"):
        load_data(str(write_folder(tmp_path / "one", classes=("cat",))))
    (tmp_path / "one" / "cat" / "000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read the image .*000\.png"):
        read_image(tmp_path / "one" / "cat" / "000.png")
    np.savez(tmp_path / "odd.npz", pictures=images)
    with pytest.raises(DataError, match="no array 'images'"):
        load_data(str(tmp_path / "odd.npz"))
    with pytest.raises(DataError, match="outside"):
        ArrayPixels(images * 300)
    with pytest.raises(DataError, match="6 images but 5 labels"):
        Split(ArrayPixels(images), torch.from_numpy(labels[:5]))
    with pytest.raises(DataError, match="label 2 but 2 classes"):
        ImageData("x", ("a", "b"), Split(ArrayPixels(images), torch.from_numpy(labels)), None, True)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "evil.npz", images=np.array([{"a": 1}], dtype=object), labels=np.array([0]))
    with pytest.raises(DataError, match="cannot read"):
        load_data(str(tmp_path / "evil.npz"))

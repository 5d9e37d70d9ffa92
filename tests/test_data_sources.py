"""Data of real users: tables, archives, Hugging Face and PyTorch datasets; images that cannot be read."""

import csv
import warnings

import numpy as np
import pytest
import torch
from builders import small_data, small_images, write_folder
from PIL import Image
from test_data import write_idx

import dptaft
from dptaft.data import DataError, ImageData, Split, as_pixels, load_data
from dptaft.data.folders import Wanted
from dptaft.data.hub import from_tables, parse_options
from dptaft.data.pixels import CheckedPixels, FilePixels


def uint8(images):
    return (255 * images.clip(0, 1)).astype(np.uint8)


def write_table(root, rows, fields=("file", "label", "split")):
    with (root / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        writer.writerows(rows)
    return str(root / "labels.csv")


@pytest.fixture
def files(tmp_path):
    images, labels = small_images(12, 2)
    for i, image in enumerate(uint8(images)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    return [(f"{i}.png", ("cat", "dog")[label]) for i, label in enumerate(labels)]


def test_table_of_labels_with_and_without_a_split(tmp_path, files):
    whole = load_data(write_table(tmp_path, files, ("file", "label")), classes=["cat", "dog"])
    assert (len(whole.train), len(whole.evaluation)) == (9, 3)
    assert whole.classes_are_public
    assert whole.unstable_under == ("add-remove",)
    rows = [(*row, "test" if i < 4 else "train") for i, row in enumerate(files)]
    parted = load_data(write_table(tmp_path, rows))
    assert (len(parted.train), len(parted.evaluation)) == (8, 4)
    assert parted.train.labels.tolist() == [0, 1] * 4
    assert not parted.classes_are_public
    assert torch.equal(parted.evaluation.pixels[0], as_pixels(Image.open(tmp_path / "0.png")))


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([("0.png", "cat")], ("path", "label"), "no column 'file'"),
        ([("0.png", "cat"), ("0.png", "dog")], ("file", "label"), "row 3 .* again; one row is one record"),
        ([("0.png", "cat"), ("1.png", "")], ("file", "label"), "row 3 .* lacks a file or a label"),
        ([("0.png", "cow")], ("file", "label"), "row 2 .* 'cow', which is none of the classes cat, dog"),
        ([("0.png", "cat", "fold3")], ("file", "label", "split"), "split 'fold3'; use train or test"),
    ],
)
def test_bad_tables_are_refused_by_row(tmp_path, files, rows, fields, message):
    with pytest.raises(DataError, match=message):
        load_data(write_table(tmp_path, rows, fields), classes=["cat", "dog"])


def test_archives_with_train_and_test_arrays_and_column_labels(tmp_path):
    images, labels = small_images(20)
    path = tmp_path / "scans.npz"
    column = labels[:, None].astype(np.uint8)
    test = {"test_images": images[:3].clip(0, 1), "test_labels": column[:3]}
    np.savez(path, train_images=images.clip(0, 1), train_labels=column, **test)
    data = load_data(str(path))
    assert (len(data.train), len(data.evaluation)) == (20, 3)
    assert data.train.labels.tolist() == labels.tolist()


def test_idx_files_with_a_prefix_and_two_sets_in_one_folder(tmp_path):
    images, labels = small_images(10)
    for prefix in ("emnist-letters-", ""):
        write_idx(tmp_path / f"{prefix}train-images-idx3-ubyte", uint8(images))
        write_idx(tmp_path / f"{prefix}train-labels-idx1-ubyte.gz", labels.astype(np.uint8))
        if prefix:
            assert len(load_data(str(tmp_path), hold_out=False).train) == 10
    with pytest.raises(DataError, match="several IDX data sets"):
        load_data(str(tmp_path))


def test_public_data_has_public_classes(tmp_path):
    root = str(write_folder(tmp_path / "pets", count=24))
    assert load_data(root, public=True).classes_are_public
    assert load_data(root, public=True).is_public
    assert load_data(root, public=True).unstable_under == ()


class Items:
    """A map-style dataset."""

    def __init__(self, images, labels):
        self.images, self.labels_of = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.labels_of[index])


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: Image.fromarray(image),
        lambda image: image,
        lambda image: torch.from_numpy(image),
        lambda image: torch.from_numpy(image)[None].float() / 255,
    ],
)
def test_torch_datasets_of_every_image_type(convert):
    images, labels = small_images(8)
    items = Items([convert(image) for image in uint8(images)], labels)
    data = ImageData.from_torch(items, Items(items.images[:2], labels[:2]), classes="abc", name="mine")
    assert torch.allclose(data.train.pixels[3][0], torch.from_numpy(uint8(images)[3]).float() / 255)
    assert data.train.labels.tolist() == labels.tolist()
    assert (len(data.evaluation), data.name, data.classes_are_public) == (2, "mine", True)


def test_torch_labels_come_from_targets_and_images_must_not_change():
    images, labels = small_images(6)
    items = Items(images.clip(0, 1), labels)
    items.targets = torch.zeros(6, dtype=torch.int64)
    assert ImageData.from_torch(items, classes="abc").train.labels.tolist() == [0] * 6

    class Augmented(Items):
        def __getitem__(self, index):
            return torch.rand(1, 4, 4), 0

    with pytest.raises(DataError, match="differs from call to call; leave random augmentation out"):
        ImageData.from_torch(Augmented(images, labels), classes="ab")
    with pytest.raises(DataError, match="cannot read the labels of data"):
        ImageData.from_torch([(np.zeros((4, 4), np.uint8), "cat")] * 2, classes="ab")
    with pytest.raises(DataError, match=r"outside \[0, 1\]"):
        ImageData.from_torch(Items(images * 9, labels), classes="abc")


def damaged_folder(tmp_path, count=24):
    root = write_folder(tmp_path / "pets", count=count)
    for name in ("cat/002.png", "dog/007.png"):
        (root / name).write_bytes(b"no image")
    return root


def test_unreadable_images_are_all_named_and_counted_or_skipped(tmp_path):
    root = damaged_folder(tmp_path)
    pixels = load_data(str(root), hold_out=False).train.pixels
    with pytest.raises(DataError, match=r"2 of 24 images cannot be read: .*002\.png, .*007\.png"):
        [pixels[i] for i in range(24)]
    data = load_data(str(root), skip_corrupt=True, hold_out=False)
    with pytest.warns(UserWarning, match=r"002\.png.*counts as an empty record"):
        first = data.train.pixels[1]
    assert torch.isnan(first).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isnan(data.train.pixels[1]).all()  # named once
    assert list(data.train.unreadable) == [1]
    assert list(data.train.take([5, 1]).unreadable) == [1]


def skipped(pixels, index):
    """The same images, one of them unreadable."""

    class Broken:
        def __len__(self):
            return len(pixels)

        def __getitem__(self, i):
            if i == index:
                raise DataError("cannot read it")
            return pixels[i]

        def name(self, i):
            return f"image {i}"

    return CheckedPixels(Broken(), skip=True)


@pytest.mark.parametrize("options", [{}, {"scope": "head"}, {"method": "non-linear"}, {"engine": "hooks"}])
def test_a_skipped_image_contributes_nothing_and_n_stays(tmp_path, options):
    """With the same noise, a run with an unreadable record is one on the others alone, divided by n."""
    data = small_data(12)
    broken = Split(skipped(data.train.pixels, 5), data.train.labels)
    kept = data.train.take([i for i in range(12) if i != 5])
    common = {"epsilon": 8.0, "steps": 3, "insecure_seed": 1, **options}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        run = dptaft.train(
            ImageData("a", data.classes, broken, None, True, skips_corrupt=True),
            output=tmp_path / "a",
            **common,
        )
    without = dptaft.train(
        ImageData("b", data.classes, kept, None, True),
        output=tmp_path / "b",
        adjacency="add-remove",
        public_size=12,
        **common,
    )
    mine, other = run.predictor.weights, without.predictor.weights
    assert all(torch.allclose(mine[name], other[name], atol=1e-5) for name in mine)


def test_training_on_a_folder_with_unreadable_images(tmp_path):
    root = damaged_folder(tmp_path)
    common = {"classes": ["cat", "dog"], "epsilon": 8.0, "steps": 2}
    with pytest.raises(DataError, match="2 of 24 images cannot be read"):
        dptaft.train(str(root), output=tmp_path / "refused", **common)
    assert not (tmp_path / "refused").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = dptaft.train(str(root), output=tmp_path / "run", skip_corrupt=True, **common)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 3
    assert "cat/002.png" in messages[0]
    assert "2 of 18 training images and 0 evaluation images" in messages[2]
    text = (run.path / "privacy.json").read_text()
    assert "empty record" in text
    assert "002.png" not in text


class Column:
    def __init__(self, names=None):
        self.names = names


class Table:
    """What the loader needs of a Hugging Face table."""

    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(self.columns["label"])

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {k: v[key] for k, v in self.columns.items()}


def table(count, names=("x", "y", "z")):
    image, label = type("Image", (Column,), {}), type("ClassLabel", (Column,), {})
    images, labels = small_images(count)
    columns = {"image": [Image.fromarray(a) for a in uint8(images)], "label": labels.tolist()}
    return Table({"image": image(), "label": label(list(names))}, columns)


def test_tables_of_a_hub_dataset():
    data = from_tables("me/scans", {"train": table(9), "validation": table(3)}, {}, Wanted())
    assert (data.name, data.classes, len(data.train), len(data.evaluation)) == (
        "me-scans",
        ("x", "y", "z"),
        9,
        3,
    )
    assert not data.classes_are_public
    assert torch.equal(data.train.pixels[2], as_pixels(table(9)["image"][2]))
    with pytest.raises(DataError, match="no split 'dev'; it has train"):
        from_tables("scans", {"train": table(9)}, {"test": "dev"}, Wanted())
    with pytest.raises(DataError, match="no column 'fine'; it has image, label"):
        from_tables("scans", table(9), {"label": "fine"}, Wanted())
    both = table(9)
    both.features["mask"] = both.features["image"]
    with pytest.raises(
        DataError, match=r"2 columns of type Image among image, label, mask; name one with \?image"
    ):
        from_tables("scans", both, {}, Wanted())
    assert len(from_tables("scans", both, {"image": "image"}, Wanted()).train) == 9


def test_options_of_a_hub_dataset():
    for text in ("colour=red", "image=a&image=b", "image=", "test=&test="):
        with pytest.raises(DataError, match="option"):
            parse_options(text, "hf:x")
    assert parse_options("test=&label=l", "hf:x") == {"test": "", "label": "l"}


def test_saved_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    images, labels = small_images(10)
    features = datasets.Features(
        {
            "scan": datasets.Image(),
            "kind": datasets.ClassLabel(names=["x", "y", "z"]),
            "age": datasets.Value("int8"),
        }
    )
    rows = {"scan": [Image.fromarray(a) for a in uint8(images)], "kind": labels.tolist(), "age": [1] * 10}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "one"))
    data = load_data(str(tmp_path / "one"))
    assert (data.classes, len(data.train), len(data.evaluation)) == (("x", "y", "z"), 8, 2)
    assert torch.allclose(data.evaluation.pixels[1][0] * 255, torch.from_numpy(uint8(images)[5]).float())
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "two"))
    data = load_data(f"{tmp_path / 'two'}?image=scan&label=kind", classes=["z", "x", "y"])
    assert (data.classes, data.classes_are_public, len(data.evaluation)) == (("z", "x", "y"), True, 10)
    assert data.train.labels.tolist() == [(label + 1) % 3 for label in labels]
    with pytest.raises(DataError, match="has no config"):
        load_data(f"{tmp_path / 'two'}?config=x")


def test_named_files_and_missing_files(tmp_path):
    pixels = CheckedPixels(FilePixels([tmp_path / "gone.png"]))
    with pytest.raises(DataError, match=r"gone\.png.*repair or remove it, or skip"):
        pixels[0]
    with pytest.raises(DataError, match="hf:NAME"):
        load_data("labels.csv")


def test_fashion_mnist_is_found_by_name(monkeypatch, tmp_path):
    from dptaft.data import load

    if load._FASHION_FOLDER.is_dir():
        data = load_data("fashion-mnist")
        assert (len(data.train), len(data.evaluation), len(data.classes)) == (60_000, 10_000, 10)
        assert data.is_public
    monkeypatch.setattr(load, "_FASHION_FOLDER", tmp_path / "none")
    with pytest.raises(DataError, match="install the Debian package dataset-fashion-mnist"):
        load_data("fashion-mnist")

"""Labels and class names: matched by name where the source has names, refused by row where there is none."""

import os

import numpy as np
import pytest
import torch
from builders import small_images
from PIL import Image
from test_data import write_idx
from test_data_sources import Items, Table, uint8

from dptaft.data import DataError, ImageData, load_data
from dptaft.data.hub import from_tables
from dptaft.data.wanted import Wanted

LABELS = [0, 1, 2] * 4


def archive(path, classes=None, labels=LABELS, test=None):
    images, _ = small_images(len(labels))
    arrays = {"images": uint8(images), "labels": np.array(labels)}
    if classes is not None:
        arrays["classes"] = np.array(classes)
    if test is not None:
        arrays |= {"test_images": uint8(images)[: len(test)], "test_labels": np.array(test)}
    np.savez(path, **arrays)
    return str(path)


def kind(name, names=None):
    made = type(name, (), {})()
    if names is not None:
        made.names = list(names)
    return made


def hub(labels, names=None, label="ClassLabel"):
    images, _ = small_images(len(labels))
    features = {"image": kind("Image"), "label": kind(label, names)}
    return Table(features, {"image": [Image.fromarray(a) for a in uint8(images)], "label": list(labels)})


class Named(Items):
    def __init__(self, labels, names):
        super().__init__(uint8(small_images(len(labels))[0]), np.array(labels))
        self.classes = names


def from_npz(tmp_path, names, classes, test=None):
    return load_data(archive(tmp_path / "a.npz", names, test=test), classes=classes, hold_out=False)


def from_hub(tmp_path, names, classes, test=None):
    tables = {"train": hub(LABELS, names)} | ({} if test is None else {"test": hub(test, names)})
    return from_tables("a", tables, {}, Wanted(None if classes is None else tuple(classes)))


def from_items(tmp_path, names, classes, test=None):
    held = None if test is None else Named(test, names)
    return ImageData.from_torch(Named(LABELS, names), held, classes=classes or names)


SOURCES = pytest.mark.parametrize("source", [from_npz, from_hub, from_items])


@SOURCES
@pytest.mark.parametrize("classes", [["x", "y", "z"], ["z", "x", "y"], ["y", "x", "z"], ["z", "y", "x"]])
def test_declared_classes_are_matched_to_the_names_of_the_source(tmp_path, source, classes):
    data = source(tmp_path, ["x", "y", "z"], classes, test=[2, 0, 0, 1])
    assert data.classes == tuple(classes)
    assert [data.classes[n] for n in data.train.labels] == ["x", "y", "z"] * 4
    assert [data.classes[n] for n in data.evaluation.labels] == ["z", "x", "x", "y"]
    assert data.train.labels.dtype == torch.int64


@SOURCES
@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b", "c"], "names its classes x, y, z, and the declared classes lack x, y, z and add a, b, c"),
        (["x", "y"], "the declared classes lack z; declare the same names"),
        (["x", "y", "z", "w"], "the declared classes add w; declare the same names"),
    ],
)
def test_other_names_than_those_of_the_source_are_refused(tmp_path, source, classes, message):
    with pytest.raises(DataError, match=message):
        source(tmp_path, ["x", "y", "z"], classes)


def test_sources_without_names_are_named_in_the_order_of_the_numbers(tmp_path):
    data = load_data(archive(tmp_path / "a.npz"), classes=["z", "x", "y"])
    assert [data.classes[n] for n in data.train.labels[:3]] == ["x", "y", "z"]
    data = from_tables("a", hub(LABELS, label="Value"), {"label": "label"}, Wanted(("z", "x", "y")))
    assert data.train.labels.tolist() == LABELS
    images, labels = small_images(12)
    write_idx(tmp_path / "train-images-idx3-ubyte", uint8(images))
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels.astype(np.uint8))
    assert load_data(str(tmp_path), classes=["z", "x", "y"], hold_out=False).train.labels.tolist() == LABELS
    with pytest.raises(DataError, match="the labels of a have no names; declare the classes"):
        from_tables("a", hub(LABELS, label="Value"), {"label": "label"}, Wanted())


def test_class_names_that_no_file_can_hold_are_refused(tmp_path):
    for name in (b"caf\xe9", b"dog"):
        folder = os.path.join(os.fsencode(tmp_path), name)
        os.mkdir(folder)
        for number in range(3):
            Image.new("L", (8, 8), number + 10 * len(name)).save(folder + b"/%d.png" % number)
    with pytest.raises(DataError, match=r"the class name 'caf\\udce9' is no UTF-8 text; rename the class"):
        load_data(str(tmp_path))


def test_names_of_an_archive_may_be_bytes(tmp_path):
    assert load_data(archive(tmp_path / "a.npz", [b"x", b"y", b"z"])).classes == ("x", "y", "z")


@pytest.mark.parametrize(("names", "order"), [(["y", "z", "x"], [2, 0, 1]), (["z", "y"], [2, 1])])
def test_two_splits_with_names_in_another_order_are_not_mixed_up(names, order):
    tables = {"train": hub(LABELS, ["x", "y", "z"]), "test": hub(range(len(names)), names)}
    data = from_tables("a", tables, {}, Wanted())
    assert [data.classes[n] for n in data.evaluation.labels] == [*names]
    other = from_tables("a", tables, {}, Wanted(("z", "y", "x")))
    assert [other.classes[n] for n in other.evaluation.labels] == [*names]
    assert [other.classes[n] for n in other.train.labels] == ["x", "y", "z"] * 4
    tables["test"] = hub([0], ["w"])
    with pytest.raises(
        DataError, match="the split test of a has the class 'w', which is none of the classes x, y, z"
    ):
        from_tables("a", tables, {}, Wanted())


def test_text_labels_are_matched_to_the_classes():
    text = hub(["b", "a", "b", "c"], label="Value")
    tables, options = {"train": text, "test": hub(["c", "a"], label="Value")}, {"label": "label"}
    data = from_tables("a", tables, options, Wanted(("c", "b", "a")))
    assert (data.train.labels.tolist(), data.evaluation.labels.tolist()) == ([1, 2, 1, 0], [0, 2])
    data = from_tables("a", tables, options, Wanted())
    assert (data.classes, data.classes_are_public) == (("a", "b", "c"), False)
    assert data.train.labels.tolist() == [1, 0, 1, 2]
    with pytest.raises(
        DataError, match=r"row 3 of the split train of a has the label 'c', which is none of .* a, b"
    ):
        from_tables("a", text, options, Wanted(("a", "b")))
    with pytest.raises(DataError, match=r"row 1 of the split train of a has the label '2.5'"):
        from_tables("a", hub([1, "2.5"], label="Value"), options, Wanted(("a", "b")))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, None, 1], "row 2 of the split {} of a has no label; fill it in"),
        ([None, 1, None, 1], r"row 0 of the split {} of a has no label \(2 of 4 rows have none\)"),
        ([0, 1, 1, -1], "row 3 of the split {} of a has the label -1; expected 0 to 2"),
        ([-1] * 4, r"row 0 of the split {} of a has the label -1 \(4 of 4 rows have such labels\)"),
        ([0, 1, 3, 1], "row 2 of the split {} of a has the label 3; expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("names", ["xyz", None])
def test_a_row_without_a_usable_label_is_named(part, labels, message, names):
    tables = {"train": hub(LABELS, names), "test": hub(LABELS, names)} | {part: hub(labels, names)}
    wanted, options = Wanted(("x", "y", "z")), {"label": "label"}
    with pytest.raises(DataError, match=message.format(part)) as caught:
        from_tables("a", tables, options, wanted)
    assert ("?test= leaves that split out" in str(caught.value)) == (part == "test")
    if part == "test":
        assert from_tables("a", tables, options | {"test": ""}, wanted).evaluation is None


def test_one_split_is_not_trained_and_evaluated_on():
    tables = {"train": hub(LABELS, "xyz"), "test": hub([0, 1, 2], "xyz")}
    with pytest.raises(DataError, match="trained and evaluated on one split, 'train'"):
        from_tables("a", tables, {"test": "train"}, Wanted())
    data = from_tables("a", tables, {"train": "test"}, Wanted())
    assert (len(data.train), data.evaluation) == (3, None)


@pytest.mark.parametrize("labels", [[0, None, 1], ["a", "b", "a"], [0, [1, 2], 1]])
def test_labels_of_a_dataset_that_are_no_numbers_are_named(labels):
    items = Items(uint8(small_images(3)[0]), [0, 1, 0])
    items.targets = labels
    with pytest.raises(DataError, match=r"row \d of data has the label .*; expected whole numbers"):
        ImageData.from_torch(items, classes="ab")


def write_table(path, rows, separator=",", encoding="utf-8", header=("file", "label")):
    path.write_bytes("".join(separator.join(row) + "\n" for row in (header, *rows)).encode(encoding))
    return str(path)


ROWS = [("0.png", "cat"), ("1.png", "dog"), ("2.png", "cat")]


@pytest.mark.parametrize("name", ["labels.csv", "LABELS.CSV", "labels.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_tables_of_every_usual_form(tmp_path, name, separator, encoding):
    if encoding == "utf-16-le":
        path = tmp_path / name
        write_table(path, ROWS, separator, encoding)
        path.write_bytes(b"\xff\xfe" + path.read_bytes())
    else:
        path = write_table(tmp_path / name, ROWS, separator, encoding, (" file", "label "))
    data = load_data(str(path), hold_out=False)
    assert (data.classes, data.train.labels.tolist()) == (("cat", "dog"), [0, 1, 0])
    assert data.train.pixels.name(1) == str(tmp_path / "1.png")


def test_a_table_without_the_columns_shows_its_first_row(tmp_path):
    path = write_table(tmp_path / "hub.csv", ROWS, ";", header=("file_name", "label"))
    with pytest.raises(
        DataError, match=r"no column 'file'; .* is 'file_name;label' .columns separated by ';'"
    ):
        load_data(path)
    (tmp_path / "raw.csv").write_bytes(b"file,label\n\xff\xfe,x\n")
    with pytest.raises(DataError, match=r"cannot read the table .*raw\.csv.*; write it as UTF-8"):
        load_data(str(tmp_path / "raw.csv"))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("cat", "nan", "dog"), "row 3 .* 'nan', which stands for none"),
        (("cat", "dog", "N/A"), "row 4 .* 'N/A', which stands for none"),
        (("cat", "Cat", "dog"), "row 3 .* 'Cat' and row 2 'cat': two spellings of one class"),
        (("1", "2", "1.0"), "row 4 .* '1.0' and row 2 '1': two spellings"),
        (("t  1", "x", "t 1"), "row 4 .* 't 1' and row 2 't  1': two spellings"),
    ],
)
def test_undeclared_labels_that_mean_nothing_or_the_same_are_refused(tmp_path, labels, message):
    rows = [(f"{i}.png", label) for i, label in enumerate(labels)]
    path = write_table(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=message):
        load_data(path)
    declared = load_data(path, classes=sorted(set(labels)), hold_out=False)
    assert [declared.classes[n] for n in declared.train.labels] == [*labels]


def test_idx_files_may_have_dots_in_their_names(tmp_path):
    images, labels = small_images(10)
    write_idx(tmp_path / "train-images.idx3-ubyte", uint8(images))
    write_idx(tmp_path / "train-labels.idx1-ubyte", labels.astype(np.uint8))
    assert load_data(str(tmp_path), hold_out=False).train.labels.tolist() == labels.tolist()

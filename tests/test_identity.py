"""The same records under any other form meet the same budget; other records do not."""

import csv
import json
import struct

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from dptaft.budgeting import LedgerAccount, charged_elsewhere, open_account, open_ledger
from dptaft.cli import main
from dptaft.comparison import compare
from dptaft.data import ImageData, load_data
from dptaft.identity import identify, record_mark
from dptaft.runs import load_run
from dptaft.training.account import Spending
from dptaft.training.plan import ModelConfig, PerformanceConfig, PrivacyConfig, Request
from dptaft_accounting import FullBatchGaussian
from dptaft_accounting.ledger import Budget, BudgetExceededError, Ledger, LedgerError

COUNT = 30
NAMES = ("benign", "malignant")


def pictures(seed=0, count=COUNT):
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)


LABELS = np.arange(COUNT) % 2
NEW = pictures(seed=9, count=3)


def save(path, image, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).convert(mode).save(path)


def folder(root, images=None, labels=LABELS, names=NAMES, mode="L", suffix=".png", prefix=""):
    images = pictures() if images is None else images
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        save(root / names[label] / f"{prefix}{i:03}{suffix}", image, mode)
    return root


def table(root, order=None, split=lambda i: None):
    folder(root)
    order = range(COUNT) if order is None else order
    rows = [(f"{NAMES[LABELS[i]]}/{i:03}.png", NAMES[LABELS[i]], split(i)) for i in order]
    with (root / "copy.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        parts = rows[0][2] is not None
        writer.writerow(("file", "label", "split")[: 2 + parts])
        writer.writerows(row[: 2 + parts] for row in rows)
    return str(root / "copy.csv")


def archive(root, images, labels=LABELS, **more):
    root.mkdir()
    np.savez(root / "copy.npz", images=images, labels=labels, **more)
    return str(root / "copy.npz")


def idx(root):
    root.mkdir()
    images = pictures()
    header = struct.pack(">HBBIII", 0, 8, 3, *images.shape)
    (root / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    labels = struct.pack(">HBBI", 0, 8, 1, COUNT) + LABELS.astype(np.uint8).tobytes()
    (root / "train-labels-idx1-ubyte").write_bytes(labels)
    return str(root)


def sixteen_bits(root):
    for i, image in enumerate(pictures()):
        path = root / NAMES[LABELS[i]] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint16) * 257).save(path)
    return str(root)


def hugging_face(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(NAMES)))
    images = [Image.fromarray(image) for image in pictures()]
    made = datasets.Dataset.from_dict({"image": images, "label": LABELS.tolist()}, features=features)
    datasets.DatasetDict(train=made).save_to_disk(str(root))
    return str(root)


def api(root):
    items = [(image, int(label)) for image, label in zip(pictures(), LABELS, strict=True)]
    return ImageData.from_torch(items, classes=NAMES, name="items")


def parted(root):
    """Folders train and test, parted otherwise than by fifths."""
    for i, image in enumerate(pictures()):
        save(root / ("test" if i >= 20 else "train") / NAMES[LABELS[i]] / f"{i:03}.png", image)
    return str(root)


def held_out_only(root):
    """What the hold-out of the declared folder left aside, as training records."""
    data = load_data(str(folder(root / "whole")))
    images = (data.evaluation.pixels[i][0].numpy() * 255 for i in range(len(data.evaluation)))
    held = np.stack([image.round().astype(np.uint8) for image in images])
    return load_data(archive(root / "held", held, np.arange(len(held)) % 2), hold_out=False)


def with_a_bad_file(root):
    folder(root)
    (root / NAMES[0] / "bad.png").write_bytes(b"no image")
    return load_data(str(root), skip_corrupt=True)


def with_one_more(root, image):
    save(folder(root) / NAMES[0] / "zzz.png", image)
    return str(root)


def shuffled(seed=3):
    return np.random.default_rng(seed).permutation(COUNT)


ROUTES = {
    "another folder name": lambda r: str(folder(r)),
    "another order of classes": lambda r: load_data(str(folder(r)), classes=NAMES[::-1]),
    "renamed classes": lambda r: str(folder(r, names=("a", "b"))),
    "three classes": lambda r: str(
        folder(r, np.concatenate([pictures(), NEW]), [*LABELS, 2, 2, 2], ("a", "b", "c"))
    ),
    "one record relabelled": lambda r: str(folder(r, labels=[1 - LABELS[0], *LABELS[1:]])),
    "all labels swapped": lambda r: str(folder(r, labels=1 - LABELS)),
    "labels drawn anew": lambda r: str(folder(r, labels=LABELS[shuffled()])),
    "renamed files": lambda r: str(folder(r, prefix="scan-")),
    "files in another order": lambda r: str(folder(r, pictures()[shuffled()], LABELS[shuffled()])),
    "bmp": lambda r: str(folder(r, suffix=".bmp")),
    "tiff": lambda r: str(folder(r, suffix=".tiff")),
    "rgb of the same grey": lambda r: str(folder(r, mode="RGB")),
    "palette of the same grey": lambda r: str(folder(r, mode="P")),
    "sixteen bits of the same grey": sixteen_bits,
    "table": table,
    "table in another order": lambda r: table(r, order=shuffled().tolist()),
    "table with splits": lambda r: table(r, split=lambda i: "test" if i % 4 == 1 else "train"),
    "train and test folders": parted,
    "no hold-out": lambda r: load_data(str(folder(r)), hold_out=False),
    "bytes": lambda r: archive(r, pictures()),
    "three channels of bytes": lambda r: archive(r, np.repeat(pictures()[..., None], 3, axis=3)),
    "floats": lambda r: archive(r, pictures().astype(np.float32) / np.float32(255)),
    "doubles": lambda r: archive(r, pictures() / 255),
    "bytes with test arrays": lambda r: archive(
        r, pictures()[6:], LABELS[6:], test_images=pictures()[:6], test_labels=LABELS[:6]
    ),
    "idx": idx,
    "hugging face": hugging_face,
    "items": api,
    "one file copied": lambda r: with_one_more(r, pictures()[4]),
    "one new record": lambda r: with_one_more(r, NEW[0]),
    "one record dropped": lambda r: str(folder(r, pictures()[1:], LABELS[1:])),
    "a tenth of the records": lambda r: archive(r, pictures()[:3], [0, 1, 0]),
    "the held-out fifth": held_out_only,
    "an unreadable file more": with_a_bad_file,
}


def spending(epsilon_mu=0.718):
    return Spending(FullBatchGaussian(1 / epsilon_mu, steps=1), None, 1e-5)


def loaded(source):
    return source if isinstance(source, ImageData) else load_data(source)


@pytest.fixture(scope="module")
def spent(tmp_path_factory):
    """A folder with a budget of 3 of which nothing is left."""
    root = tmp_path_factory.mktemp("spent")
    data = load_data(str(folder(root / "scans")))
    ledger = open_ledger(root / "ledger.sqlite")
    known = identify(data)
    ledger.declare(
        ledger.register(known.content, "scans", records=known.records), Budget.from_epsilon(3, 1e-5)
    )
    account = LedgerAccount(root / "ledger.sqlite", data, root / "first")
    account.reserve(spending())
    account.authorise(spending())
    account.commit(spending())
    return root


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_route_that_changes_no_pixel_leads_around_a_budget(spent, tmp_path, route):
    data = loaded(ROUTES[route](tmp_path / "copy"))
    account = LedgerAccount(spent / "ledger.sqlite", data, tmp_path / "second")
    with pytest.raises(BudgetExceededError, match="the total of 'scans'"):
        account.reserve(spending(0.1))
    request = Request(PrivacyConfig(float("inf")), ModelConfig(), {}, PerformanceConfig(), "x")
    with pytest.raises(LedgerError, match="'scans' has a budget"):
        open_account(data, request, tmp_path / "third", ledger=spent / "ledger.sqlite")


def test_other_records_have_an_account_of_their_own_and_a_warning(spent, tmp_path):
    data = loaded(archive(tmp_path / "other", pictures(seed=1)))
    account = LedgerAccount(spent / "ledger.sqlite", data, tmp_path / "second")
    with pytest.warns(
        UserWarning, match="does not know this data: 'copy' is charged without a limit; it shares no"
    ):
        account.reserve(spending())
    account.close()


def test_a_subset_keeps_the_name_and_shared_records_are_charged_to_both(tmp_path):
    ledger, path = Ledger.create(tmp_path / "ledger.sqlite"), tmp_path / "ledger.sqlite"
    images = pictures(count=60)
    labels = np.arange(60) % 2
    first, second, both = (
        loaded(archive(tmp_path / name, images[part], labels[part]))
        for name, part in (("a", slice(0, 30)), ("b", slice(30, 60)), ("c", slice(20, 40)))
    )
    for name, data in (("first", first), ("second", second)):
        known = identify(data)
        ledger.register(known.content, name, records=known.records)
        ledger.declare(name, Budget.from_epsilon(3, 1e-5))
    account = LedgerAccount(path, both, tmp_path / "run")
    with pytest.warns(UserWarning, match="shares records with 'first', 'second': the run is charged to all"):
        account.reserve(spending(0.5))
    account.authorise(spending(0.5))
    fields = account.commit(spending(0.5))
    assert fields["data_set"] == "copy"
    assert fields["data_sets_with_shared_records"] == ["first", "second"]
    for name in ("first", "second", "copy"):
        assert float(ledger.account(name).spent.mu) == pytest.approx(0.5, rel=1e-6)
    late = LedgerAccount(path, first, tmp_path / "late")
    with pytest.raises(BudgetExceededError, match="the total of 'first'"):
        late.reserve(spending(0.6))
    later = LedgerAccount(path, second, tmp_path / "later")
    later.reserve(spending(0.4))
    assert float(ledger.account("copy").claimed.mu) == pytest.approx(0.41**0.5, rel=1e-6)
    later.close()
    assert ledger.verify() == []


def test_a_ledger_without_records_learns_them_at_the_next_use(tmp_path):
    """As older versions wrote it: the same content is known by its digest, its copies are known after that."""
    path = tmp_path / "ledger.sqlite"
    data = load_data(str(folder(tmp_path / "scans")))
    ledger = Ledger.create(path)
    ledger.declare(ledger.register(identify(data).content, "scans"), Budget.from_epsilon(3, 1e-5))
    assert ledger.unmarked() == ["scans"]
    copy = load_data(str(tmp_path / "scans"), classes=NAMES[::-1])
    account = LedgerAccount(path, loaded(archive(tmp_path / "o", pictures(1))), tmp_path / "other")
    with pytest.warns(UserWarning, match="records of 'scans' are not known yet"):
        account.reserve(spending(0.01))
    account.close()
    first = LedgerAccount(path, data, tmp_path / "first")
    first.reserve(spending())
    assert ledger.unmarked() == []
    with pytest.raises(BudgetExceededError, match="the total of 'scans'"):
        LedgerAccount(path, copy, tmp_path / "second").reserve(spending(0.1))
    first.close()
    assert Ledger(path).verify() == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spending_before_the_records_were_known_is_found(tmp_path):
    """Two forms of the same images, both charged by digest alone, are one account once records are known."""
    path = tmp_path / "ledger.sqlite"
    data = load_data(str(folder(tmp_path / "scans")))
    copy = load_data(str(tmp_path / "scans"), classes=NAMES[::-1])
    ledger = Ledger.create(path)
    for name, form in (("scans", data), ("copy", copy)):
        content, cost = identify(form).content, spending(0.5)
        ledger.register(content, name)
        account = LedgerAccount(path, form, tmp_path / name)
        account._given = content
        account.reserve(cost)
        account.authorise(cost)
        account.commit(cost)
    assert float(ledger.account("scans").spent.mu) == pytest.approx(0.5**0.5, rel=1e-6)


def test_the_marks_are_keyed_and_their_loss_is_found(spent, tmp_path):
    import shutil
    import sqlite3

    data = load_data(str(spent / "scans"))
    raw = b"".join(p.read_bytes() for p in spent.glob("ledger.sqlite*"))
    for mark in identify(data).records:
        assert mark[:8] not in raw
        assert mark.hex()[:16].encode() not in raw
    copy = tmp_path / "copy.sqlite"
    with sqlite3.connect(spent / "ledger.sqlite") as source, sqlite3.connect(copy) as target:
        source.backup(target)
        target.execute("DROP TRIGGER marks_stay")
        target.execute("UPDATE marks SET content = zeroblob(8)")
    assert "marks of a data set are missing or changed" in Ledger(copy).verify()[0]
    with pytest.raises(LedgerError, match="marks of a data set are missing or changed"):
        LedgerAccount(copy, loaded(archive(tmp_path / "n", NEW, [0, 1, 0])), tmp_path / "r").reserve(
            spending(0.1)
        )
    shutil.rmtree(tmp_path / "n")


def test_the_mark_of_an_image():
    grey = torch.arange(6.0).view(1, 2, 3) / 255
    assert record_mark(grey) == record_mark(grey.expand(3, 2, 3))
    assert record_mark(grey) != record_mark(grey.view(1, 3, 2))
    assert record_mark(grey) != record_mark(grey + 1 / 255)
    assert record_mark(torch.full((1, 2, 2), float("nan"))) is None


# what happens around a ledger


def cli(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def train(data, output, *options):
    return cli(
        "train",
        "--data",
        data,
        "--scope",
        "head",
        "--steps",
        2,
        "--epsilon",
        2.9,
        "--output",
        output,
        *options,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two runs on the same images in two forms, without a budget; the statements of both."""
    root = tmp_path_factory.mktemp("project")
    folder(root / "scans")
    table(root / "table")
    first = train(root / "scans", root / "runs" / "first")
    assert first.exit_code == 0, first.output
    second = train(root / "table" / "copy.csv", root / "runs" / "second", "--classes", "malignant,benign")
    assert second.exit_code == 0, second.output
    return root


def test_compare_adds_runs_on_the_same_images(project):
    runs = [load_run(project / "runs" / name) for name in ("first", "second")]
    totals = compare(runs).totals
    assert [total.runs for total in totals] == [2]
    assert 4.2 < totals[0].epsilon < 4.5
    text = (project / "runs" / "second" / "privacy.json").read_text()
    known = identify(load_data(str(project / "scans")))
    assert known.content not in text
    assert not any(mark.hex() in text for mark in known.records)


def test_a_run_names_its_data_without_the_path_and_the_rule_that_parts_it(project):
    first, second = (load_run(project / "runs" / name) for name in ("first", "second"))
    assert first.config["data"]["name"] == "scans"
    assert second.config["data"]["name"] == "copy.csv"
    assert not any(str(project) in path.read_text() for path in (project / "runs").glob("*/*.[tj]*"))
    assert first.statement.claim["data_accesses"]["hold_out"] == "not covered"
    assert any("number of images of each class" in line for line in first.statement.claim["not_protected"])
    assert "hold_out" not in second.statement.claim["data_accesses"]


def test_the_ledger_says_why_compare_may_show_less(project):
    shown = cli("ledger", "show", "--ledger", project / "runs" / "ledger.sqlite").output
    assert "`dptaft compare` composes whole runs" in shown


def test_the_chain_names_the_statement(project, tmp_path):
    """Other weights with hashes to match are another statement, which the ledger does not know."""
    import shutil

    from safetensors.torch import load, save

    path = project / "runs" / "ledger.sqlite"
    fine = cli("ledger", "verify", "--ledger", path)
    assert fine.exit_code == 0, fine.output
    assert "2 statements" in fine.output
    forged = tmp_path / "forged"
    shutil.copytree(project / "runs" / "first", forged)
    weights = load((forged / "model.safetensors").read_bytes())
    (forged / "model.safetensors").write_bytes(
        save({k: v + 1 if v.is_floating_point() else v for k, v in weights.items()})
    )
    from dptaft.runs import hash_files
    from dptaft_accounting.canonical import content_id, dumps

    document = json.loads((forged / "privacy.json").read_text())
    document["admin"]["files"] = hash_files(forged)
    document["admin"]["id"] = content_id(document)
    (forged / "privacy.json").write_text(dumps(document))
    load_run(forged)
    result = cli("ledger", "verify", "--ledger", path, forged)
    assert result.exit_code == 1
    assert "bound to another statement" in result.output


def test_a_lost_ledger_is_named_and_not_begun_again(project, tmp_path):
    import shutil

    runs = tmp_path / "runs"
    shutil.copytree(project / "runs" / "first", runs / "first")
    ledger = load_run(runs / "first").statement.composition["ledger"]
    assert charged_elsewhere(runs) == ("first", ledger)
    refused = train(project / "scans", runs / "third")
    assert refused.exit_code == 2
    assert refused.output.count("\n") == 1
    for words in (f"charged to the ledger {ledger}", "--ledger", "dptaft ledger init"):
        assert words in refused.output
    assert not (runs / "ledger.sqlite").exists()
    made = cli("ledger", "init", "--ledger", runs / "ledger.sqlite")
    assert made.exit_code == 0
    assert "starts at zero" in made.output
    assert train(project / "scans", runs / "third").exit_code == 0

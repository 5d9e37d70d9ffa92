import dataclasses
import json
import math
import stat
import tomllib

import numpy as np
import pytest
import torch
from builders import evaluation_images, small_data, small_images
from click.testing import CliRunner
from safetensors.numpy import load_file

import dptaft
from dptaft.cli import main
from dptaft.data import ArrayPixels, DataError, ImageData, Split
from dptaft.shards import ShardError, add_shard, compose, load_collection, train_shards
from dptaft.shards.assignment import named_assignment, random_assignment
from dptaft.shards.parts import ComposeError
from dptaft.shards.records import Records, load_records, locate, read_trail
from dptaft.shards.training import ShardTrainer
from dptaft.training.plan import PlanError
from dptaft.training.steps import TrainingInterruptedError
from dptaft_accounting import ParallelComposition, SequenceComposition, mechanism_from_dict
from dptaft_accounting.ledger import Ledger

FAST = {"epsilon": 3, "steps": 3, "ledger": None}


def data_of(count=60, seed=0, name="small", columns=None, classes=3, listed=None):
    images, labels = small_images(count, classes, seed)
    split = Split(ArrayPixels(images), torch.from_numpy(labels), columns or {})
    names = tuple("abcdefghij"[: listed or classes])
    return ImageData(name, names, split, evaluation_images(count, classes), True)


def record_of(run):
    return mechanism_from_dict(run.statement.mechanism["record"])


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    parent = tmp_path_factory.mktemp("shards") / "parent"
    return train_shards(data_of(), 4, output=parent, public_seed=1, **FAST)


def test_every_shard_is_a_run_of_its_own(collection):
    runs = [dptaft.load_run(path) for path in collection.runs()]
    assert [run.config["shard"]["name"] for run in runs] == ["1", "2", "3", "4"]
    assert {run.config["shard"]["partition"] for run in runs} == {collection.partition}
    assert all(run.statement.recompute().holds for run in runs)
    assert all(run.statement.mechanism["normaliser"] == 15 for run in runs)
    weights = [load_file(run.path / "model.safetensors")["trained/head.weight"] for run in runs]
    assert not any(np.array_equal(weights[0], other) for other in weights[1:])
    assert load_collection(collection.path) == collection


def test_disjoint_shards_cost_as_much_as_the_most_expensive(collection, tmp_path):
    runs = [dptaft.load_run(path) for path in collection.runs()]
    run = compose(runs, tmp_path / "run")
    assert run.statement.claim["epsilon"] == max(r.statement.claim["epsilon"] for r in runs) <= 3
    assert isinstance(record_of(run), ParallelComposition)
    assert set(record_of(run).parts) == {record_of(r) for r in runs}
    assert run.statement.composition["disjointness"] == "checked"
    vouched = {a["assumption"]: a["vouched_by"] for a in run.statement.claim["assumptions"]}
    assert vouched["no record is in two shards of one partition"] == "enforced by the code"
    assert vouched["the shard of a record does not depend on other records"] == "enforced by the code"
    assert run.statement.claim["data_accesses"]["sizes_of_shards"] == "public"


def test_two_runs_of_one_shard_compose_in_sequence(collection, tmp_path):
    """The same partition and shard, trained twice: its records pay twice, the others once."""
    request_of = collection.request
    parent = tmp_path / "twice"
    once = train_shards(data_of(), 4, output=parent, public_seed=1, **FAST)
    assert once.request == request_of
    records = load_records(parent)
    trainer = ShardTrainer(once, data_of(), stored(once), records, None, None)
    trainer.train(dataclasses.replace(once.shard("2"), folder="2-more"))
    run = compose([*once.runs(), parent / "2-more"], tmp_path / "run")
    record = record_of(run)
    assert isinstance(record, ParallelComposition)
    assert any(isinstance(part, SequenceComposition) for part in record.parts)
    single = dptaft.load_run(parent / "1").statement.claim["epsilon"]
    assert 1.3 * single < run.statement.claim["epsilon"] < 2 * single


def test_shards_of_two_partitions_share_records_and_compose_in_sequence(collection, tmp_path):
    other = train_shards(data_of(), 4, output=tmp_path / "other", public_seed=9, **FAST)
    run = compose([*collection.runs()[:2], *other.runs()[2:]], tmp_path / "run")
    assert isinstance(record_of(run), SequenceComposition)
    single = dptaft.load_run(other.runs()[0]).statement
    mu = single.accounting["mu"]["mu"]
    words = [a["assumption"] for a in run.statement.claim["assumptions"]]
    assert "no record is in two of the composed parts" not in words
    assert run.statement.accounting["mu"]["mu"] == pytest.approx(math.sqrt(2) * mu, rel=1e-6)
    with pytest.raises(ComposeError, match="both trained on data called 'small'"):
        compose([*collection.runs()[:2], *other.runs()[2:]], tmp_path / "x", disjoint=True)


def stored(collection):
    from dptaft.shards.requests import stored_request

    return stored_request(collection, "small")


def test_a_shard_is_what_training_on_its_records_alone_gives(tmp_path):
    """Shared features and a shared model change nothing: without noise both runs are the same."""
    data = data_of()
    options = {"epsilon": math.inf, "steps": 4, "ledger": None}
    shards = train_shards(data, 3, output=tmp_path / "s", public_seed=2, **options)
    numbers = [record.number for record in load_records(shards.path).shards["2"]]
    own = dataclasses.replace(data, train=data.train.take(numbers))
    alone = dptaft.train(own, output=tmp_path / "alone", delta=1e-5, **options)
    one, two = (load_file(path / "model.safetensors") for path in (shards.path / "2", alone.path))
    assert set(one) == set(two)
    assert max(float(np.abs(one[k] - two[k]).max()) for k in one) < 1e-6
    assert dptaft.load_run(shards.path / "2").statement is None
    assert compose(shards.runs(), tmp_path / "c").statement is None


def test_one_record_changes_its_own_shard_only(tmp_path):
    """What parallel composition rests on, checked on noiseless runs of neighbouring data."""
    data = data_of()
    changed = np.array(small_images(60)[0])
    changed[7] = 0.5
    neighbour = dataclasses.replace(data, train=Split(ArrayPixels(changed), data.train.labels))
    options = {"epsilon": math.inf, "steps": 2, "ledger": None, "public_seed": 3}
    runs = [
        train_shards(part, 5, output=tmp_path / name, **options)
        for part, name in ((data, "a"), (neighbour, "b"))
    ]
    own = [
        name for name, held in load_records(tmp_path / "a").shards.items() if any(r.number == 7 for r in held)
    ]
    moved = [
        shard.name
        for shard in runs[0].shards
        if (tmp_path / "a" / shard.folder / "model.safetensors").read_bytes()
        != (tmp_path / "b" / shard.folder / "model.safetensors").read_bytes()
    ]
    assert moved == own
    assert len(own) == 1


def test_random_shards_are_balanced_and_blind():
    for n, s in ((10, 3), (60, 7), (5, 5), (9, 1)):
        assignment = random_assignment(n, s)
        sizes = [assignment.names.count(name) for name in assignment.shards]
        assert len(sizes) == s
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1
    assert random_assignment(50, 5, 7) == random_assignment(50, 5, 7)
    assert random_assignment(50, 5).names != random_assignment(50, 5).names
    counts = np.zeros(6)
    for _ in range(3000):
        counts[int(random_assignment(12, 6).names[4]) - 1] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.04  # six standard errors


def test_what_is_private_stays_private(collection):
    parent = collection.path
    for name in ("records.json", "trail.jsonl"):
        assert stat.S_IMODE((parent / name).stat().st_mode) == 0o600
    records = load_records(parent)
    public = "".join(
        path.read_text()
        for path in parent.rglob("*")
        if path.suffix in (".toml", ".json") and path.name != "records.json"
    )
    assert records.key.hex() not in public
    assert not any(record.digest in public for held in records.shards.values() for record in held)
    assert sorted(r.number for held in records.shards.values() for r in held) == list(range(60))
    other = Records()
    assert other.digest(data_of().train.pixels[0]) != records.digest(data_of().train.pixels[0])


def test_secret_shards_differ_and_say_so(tmp_path):
    parts = [train_shards(data_of(12), 2, output=tmp_path / n, **FAST) for n in "ab"]
    held = [[r.number for r in load_records(p.path).shards["1"]] for p in parts]
    assert parts[0].assignment == "random and secret"
    assert len(held[0]) == len(held[1]) == 6
    assert parts[0].partition != parts[1].partition


def test_shards_of_a_column(tmp_path):
    sites = ("north", "south/2", "east") * 20
    data = data_of(columns={"site": sites})
    shards = train_shards(data, "site", output=tmp_path / "s", **FAST)
    assert [s.name for s in shards.shards] == ["east", "north", "south/2"]
    assert [s.folder for s in shards.shards] == ["east", "north", "south-2"]
    numbers = [r.number for r in load_records(shards.path).shards["north"]]
    assert all(sites[i] == "north" for i in numbers)
    run = compose(shards.runs(), tmp_path / "run")
    assert run.statement.claim["data_accesses"]["sizes_of_shards"] == "public, declared by the user"
    vouched = {a["assumption"]: a["vouched_by"] for a in run.statement.claim["assumptions"]}
    assert vouched["the shard of a record does not depend on other records"] == "declared by the user"
    named = train_shards(data, list(sites), output=tmp_path / "n", **FAST)
    assert [s.records for s in named.shards] == [20, 20, 20]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"shards": 0}, "at least one shard"),
        ({"shards": 61}, "at least as many records"),
        ({"shards": "site"}, "no column 'site'"),
        ({"shards": ["a", "b"]}, "2 names of shards for 60 records"),
        ({"shards": ["a"] * 59 + [""]}, "record 59 names no shard"),
        ({"shards": ["a/b", "a-b"] * 30}, "would share a folder"),
        ({"shards": ["a", "b"] * 30, "public_seed": 1}, "belongs to random shards"),
        ({"adjacency": "replace-one"}, "need the adjacency zero-out"),
        ({"adjacency": "add-remove", "public_size": 60}, "need the adjacency zero-out"),
        ({"insecure_seed": 1}, "same in every shard"),
        ({"method": "output-perturbation"}, "trained by gradient steps"),
        ({"scop": "head"}, "no option 'scop'"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(tmp_path, arguments, reason):
    given = {"shards": 3, **FAST, **arguments}
    with pytest.raises((ShardError, PlanError), match=reason):
        train_shards(data_of(), output=tmp_path / "s", **given)
    assert not (tmp_path / "s").exists()


def test_a_record_in_two_shards_is_refused(tmp_path):
    images, labels = small_images(60)
    images[31] = images[4]
    data = dataclasses.replace(data_of(), train=Split(ArrayPixels(images), torch.from_numpy(labels)))
    names = ["a"] * 30 + ["b"] * 30
    with pytest.raises(ShardError, match="1 of the images of shard b are also in other shards"):
        train_shards(data, names, output=tmp_path / "s", **FAST)
    same = ["b" if i == 4 else name for i, name in enumerate(names)]
    with pytest.warns(UserWarning, match="1 training images of small have the pixels of another"):
        assert len(train_shards(data, same, output=tmp_path / "s", **FAST).shards) == 2


def test_a_shard_is_added_later(collection, tmp_path):
    parent = train_shards(data_of(), 2, output=tmp_path / "p", **FAST).path
    more = data_of(30, seed=5, name="more")
    grown = add_shard(parent, more, ledger=None)
    assert [s.name for s in grown.shards] == ["1", "2", "3"]
    assert dptaft.load_run(parent / "3").config["shard"]["partition"] == grown.partition
    run = compose(load_collection(parent).runs(), tmp_path / "run")
    assert run.statement.composition["disjointness"] == "checked"
    assert run.statement.claim["epsilon"] <= 3
    assert [p["factor"] for p in run.config["composition"]["parts"]] == [1 / 3] * 3
    vouched = {a["assumption"]: a["vouched_by"] for a in run.statement.claim["assumptions"]}
    assert vouched["the shard of a record does not depend on other records"] == "declared by the user"
    assert grown.assignment == "random and secret, added later"
    overlap = dataclasses.replace(more, train=data_of().train.take(range(5, 9)))
    with pytest.raises(ShardError, match="4 of the images of shard 4 are also in other shards"):
        add_shard(parent, overlap, ledger=None)
    with pytest.raises(ShardError, match="has or had a shard '2'"):
        add_shard(parent, data_of(9, seed=6), name="2", ledger=None)
    with pytest.raises(ShardError, match=r"no shard of .* is unfinished"):
        add_shard(parent, more, ledger=None, resume=True)
    assert len(load_collection(parent).shards) == 3


def test_new_classes_leave_old_logits_alone(tmp_path):
    old = train_shards(data_of(), 2, output=tmp_path / "p", **FAST)
    before = compose(old.runs(), tmp_path / "before", how="add")
    new = data_of(50, seed=8, name="five", classes=5)
    grown = add_shard(old.path, new, ledger=None)
    assert grown.classes == tuple("abcde")
    after = compose(load_collection(old.path).runs(), tmp_path / "after", how="add")
    added = dptaft.load_run(old.path / "3")
    assert after.classes == tuple("abcde")

    def logits(run):
        split = data_of(12).train
        predictor = run.predictor
        return predictor.learner.logits(predictor.learner.features(split).features, predictor.weights)

    assert float((logits(after)[:, :3] - logits(before) - logits(added)[:, :3]).abs().max()) < 1e-5
    swapped = dataclasses.replace(new, classes=("b", "a", "c", "d", "e"))
    with pytest.raises(ShardError, match="do not continue"):
        add_shard(old.path, swapped, name="x", ledger=None)


def test_an_interrupted_training_goes_on(tmp_path, monkeypatch):
    data, parent = data_of(), tmp_path / "p"
    trained = ShardTrainer.train

    def stop_at_three(self, shard, numbers=None):
        if shard.name == "3":
            raise TrainingInterruptedError("stopped")
        return trained(self, shard, numbers)

    monkeypatch.setattr(ShardTrainer, "train", stop_at_three)
    with pytest.raises(TrainingInterruptedError):
        train_shards(data, 4, output=parent, **FAST)
    monkeypatch.undo()
    with pytest.raises(ShardError, match="not trained yet"):
        load_collection(parent).runs()
    kept = dptaft.load_run(parent / "2").id
    with pytest.raises(ValueError, match="exists"):
        train_shards(data, 4, output=parent, **FAST)
    with pytest.raises(ShardError, match="begun with other options"):
        train_shards(data, 4, output=parent, resume=True, **FAST | {"steps": 4})
    with pytest.raises(ShardError, match="is not what shard"):
        train_shards(data_of(seed=3), 4, output=parent, resume=True, **FAST)
    done = train_shards(data, 4, output=parent, resume=True, **FAST)
    assert len(done.runs()) == 4
    assert dptaft.load_run(parent / "2").id == kept


def test_a_killed_shard_goes_on_within_its_budget(tmp_path):
    data, ledger = data_of(), tmp_path / "ledger.sqlite"
    options = {"epsilon": 3, "steps": 60, "scope": "head", "ledger": ledger}

    def kill(stage, done, total):
        if stage == "shard 2: training" and done == 40:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train_shards(data, 2, output=tmp_path / "p", progress=kill, **options)
    assert (tmp_path / "p" / "2.partial").is_dir()
    with pytest.raises(ShardError, match="begun with 2 shards, not 3"):
        train_shards(data, 3, output=tmp_path / "p", resume=True, **options)
    shards = train_shards(data, 2, output=tmp_path / "p", resume=True, **options)
    statement = dptaft.load_run(shards.path / "2").statement
    assert statement.recompute().holds
    assert statement.claim["epsilon"] <= 3
    assert any("was interrupted" in line for line in statement.admin["caveats"])
    account = Ledger(ledger).account("small")
    assert float(account.spent.epsilon_at(1e-5)) <= 3 * (1 + 1e-6)
    assert not (tmp_path / "p" / "2.partial").exists()


def test_the_ledger_charges_shards_in_parallel(tmp_path):
    ledger = tmp_path / "budget.sqlite"
    shards = train_shards(data_of(), 3, output=tmp_path / "s", **FAST | {"ledger": ledger})
    account = Ledger(ledger).account("small")
    assert len(account.entries) == 3
    single = dptaft.load_run(shards.path / "1").statement
    assert account.spent.epsilon_at(1e-5) == pytest.approx(single.claim["epsilon"], rel=1e-6)
    assert single.composition["this_run"]["mu"] > 0
    again = train_shards(data_of(), 3, output=tmp_path / "t", **FAST | {"ledger": ledger})
    both = Ledger(ledger).account("small").spent.mu
    assert float(both) == pytest.approx(math.sqrt(2) * float(account.spent.mu))
    assert again.partition != shards.partition


def test_a_changed_or_missing_file_is_named(collection, tmp_path):
    with pytest.raises(ShardError, match="no folder of shards"):
        load_collection(tmp_path)
    with pytest.raises(ShardError, match=r"cannot read .*records.json"):
        load_records(tmp_path)
    assert read_trail(tmp_path) == []
    with pytest.raises(ShardError, match="has no shard '9'"):
        collection.shard("9")
    assert tomllib.loads((collection.path / "shards.toml").read_text())["shards"]["format"] == 1


def test_records_are_found_again_in_reordered_data():
    records, data = Records(), data_of(12).train
    digests = records.digests(data)
    named = [dptaft.shards.records.Record(i, digests[i]) for i in (2, 5, 7)]
    order = [11, 7, 2, 0, 5, 9]
    assert locate(named, [digests[i] for i in order]) == [1, 2, 4]
    assert locate(named, digests) == [2, 5, 7]
    with pytest.raises(ShardError, match="1 of the 3 images"):
        locate(named, [digests[i] for i in order if i != 5])
    doubled = [digests[2], digests[2], digests[5], digests[7]]
    assert len(locate([*named, named[0]], doubled)) == 4


def test_names_become_folders():
    assert named_assignment(["b", "a"], "x").shards == ("a", "b")
    with pytest.raises(ShardError, match="share a folder"):
        named_assignment(["A", "a"], "x")


def test_held_out_images_are_never_shards(tmp_path):
    whole = small_data(60)
    stacked = dataclasses.replace(whole, unstable_under=("zero-out",))
    with pytest.raises(DataError, match="under zero-out"):
        train_shards(stacked, 3, output=tmp_path / "s", **FAST)


def test_shards_may_be_certified_but_then_keep_their_classes(tmp_path):
    """Unit Jacobians divide by a norm over all classes, so that old weights would mean something else."""
    options = {"epsilon": 3, "ledger": None, "certified": True, "scope": "head"}
    shards = train_shards(data_of(), 2, output=tmp_path / "p", **options)
    runs = [dptaft.load_run(path) for path in shards.runs()]
    assert all(run.statement.accounting["bound"].startswith("last-iterate") for run in runs)
    run = compose(runs, tmp_path / "run")
    assert run.statement.claim["epsilon"] == max(r.statement.claim["epsilon"] for r in runs)
    assert run.statement.claim["epsilon"] < 0.9 * runs[0].statement.accounting["epsilon_composition"]
    assert run.statement.recompute().holds
    with pytest.raises(ShardError, match="norm over all classes"):
        add_shard(shards.path, data_of(50, seed=8, name="five", classes=5), ledger=None)
    five = dptaft.train(
        data_of(50, seed=8, name="five", classes=5), output=tmp_path / "five", delta=1e-5, **options
    )
    with pytest.raises(ComposeError, match="norms over all classes"):
        compose([runs[0], five], tmp_path / "x")


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, labels = small_images(40)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    more, others = small_images(20, seed=3)
    np.savez(tmp_path / "more.npz", images=more, labels=others)
    cli, base = CliRunner(), ["train", "--data", "d.npz", "--classes", "a,b,c"]
    done = cli.invoke(
        main, [*base, "--shards", "2", "--epsilon", "3", "--steps", "2", "--output", "p", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["records"] == [16, 16]
    assert json.loads(done.stdout)["epsilon"] <= 3
    grown = cli.invoke(main, ["train", "--data", "more.npz", "--classes", "a,b,c", "--shards-of", "p"])
    assert grown.exit_code == 0, grown.output
    assert "3 of 16 to 16 records" in grown.stdout
    composed = cli.invoke(main, ["compose", "p", "-o", "average"])
    assert composed.exit_code == 0, composed.output
    assert len(dptaft.load_run("average").config["composition"]["parts"]) == 3
    assert (tmp_path / "ledger.sqlite").exists()
    for bad in (
        [*base, "--shards", "2", "--epsilon", "3"],
        [*base, "--shards", "99", "--epsilon", "3", "--output", "q"],
        [*base, "--shards", "site", "--epsilon", "3", "--output", "q"],
        [*base, "--public-shards", "2", "--epsilon", "3", "--output", "q"],
        [*base, "--shards-of", "p"],
        [*base, "--shards-of", "p", "--epsilon", "3"],
        [*base, "--shards", "2", "--epsilon", "3", "--adjacency", "replace-one", "--output", "q"],
    ):
        refused = cli.invoke(main, bad)
        assert refused.exit_code == 2, refused.output
        assert "Traceback" not in refused.output
    assert not (tmp_path / "q").exists()


def test_a_csv_column_names_the_shards(tmp_path):
    from PIL import Image

    images, labels = small_images(20)
    rows = ["file,label,site"]
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray((255 * image.clip(0, 1)).astype(np.uint8)).save(tmp_path / f"{i:02}.png")
        rows.append(f"{i:02}.png,{'abc'[label]},{'left' if i < 12 else 'right'}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    shards = train_shards(
        str(tmp_path / "table.csv"), "site", output=tmp_path / "p", classes=["a", "b", "c"], **FAST
    )
    held = [i for i in range(20) if i % 5]  # every fifth is held out
    assert {s.name: s.records for s in shards.shards} == {
        "left": sum(i < 12 for i in held),
        "right": sum(i >= 12 for i in held),
    }
    with pytest.raises(ShardError, match="it has site"):
        train_shards(str(tmp_path / "table.csv"), "ward", output=tmp_path / "q", **FAST)

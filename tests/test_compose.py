import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from builders import small_data
from click.testing import CliRunner

import dptaft
from dptaft.cli import main
from dptaft.runs import RunError
from dptaft.shards import compose
from dptaft.shards.parts import ComposeError
from dptaft_accounting import (
    FullBatchGaussian,
    ParallelComposition,
    PoissonGaussian,
    SequenceComposition,
    best_bound,
    mechanism_from_dict,
)
from dptaft_accounting.accountants.gaussian import gaussian_mu
from dptaft_accounting.profiles import MaxProfile
from dptaft_accounting.tradeoff import GaussianProfile


def data_of(numbers, name="small"):
    whole = small_data(90)
    return dataclasses.replace(whole, name=name, train=whole.train.take(numbers))


def train_part(root, number, **options):
    data = data_of(range(30 * number, 30 * number + 30), options.pop("name", f"site{number}"))
    return dptaft.train(data, output=root / f"part{number}", **{"epsilon": 2 + number, "steps": 3} | options)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return [train_part(root, number) for number in range(3)]


@pytest.fixture
def images():
    return [small_data(90).train.pixels[i] for i in range(0, 90, 7)]


def logits(run, images):
    predictor = run.predictor
    split = small_data(90).train.take(range(0, 90, 7))
    return predictor.learner.logits(predictor.learner.features(split).features, predictor.weights).double()


def record_of(run):
    return mechanism_from_dict(run.statement.mechanism["record"])


def test_the_average_is_the_ensemble_and_a_whole_run(parts, images, tmp_path):
    run = compose([part.path for part in parts], tmp_path / "average")
    ensemble = sum(logits(part, images) for part in parts) / 3
    assert float((logits(run, images) - ensemble).abs().max()) < 1e-5
    assert float((logits(parts[0], images) - ensemble).abs().max()) > 1e-3
    again = dptaft.load_run(tmp_path / "average")
    assert again.statement.recompute().holds
    assert again.predict(images[:2])[0].label in again.classes
    listed = again.config["composition"]["parts"]
    assert [item["id"] for item in listed] == [part.id for part in parts]
    assert [item["weights_sha256"] for item in listed] == [
        part.statement.admin["files"]["model.safetensors"] for part in parts
    ]
    assert [item["factor"] for item in listed] == [1 / 3] * 3


def test_runs_that_nobody_calls_disjoint_compose_in_sequence(parts, tmp_path):
    run = compose(parts, tmp_path / "run")
    record = record_of(run)
    assert record == SequenceComposition(tuple(record_of(part) for part in parts))
    mu = math.sqrt(sum(gaussian_mu(record_of(part)) ** 2 for part in parts))
    assert run.statement.claim["epsilon"] >= GaussianProfile(mu).epsilon(1e-5) > 4.0
    assert run.statement.composition["disjointness"] == "not used"


def test_a_declaration_of_disjoint_runs_is_the_users_word(parts, tmp_path):
    run = compose(parts, tmp_path / "run", disjoint=True)
    largest = max(part.statement.claim["epsilon"] for part in parts)
    assert run.statement.claim["epsilon"] == pytest.approx(largest, rel=1e-6)
    assert run.statement.claim["epsilon"] >= largest
    assert run.statement.composition["disjointness"] == "declared by the user"
    words = [a for a in run.statement.claim["assumptions"] if "two of the composed parts" in a["assumption"]]
    assert [a["vouched_by"] for a in words] == ["declared by the user"]
    assert any("could not be checked" in line for line in run.statement.admin["caveats"])


def test_runs_on_one_data_set_cannot_be_declared_disjoint(parts, tmp_path):
    twin = train_part(tmp_path, 1, name="site0")
    with pytest.raises(ComposeError, match="both trained on data called 'site0'"):
        compose([parts[0], twin], tmp_path / "run", disjoint=True)
    assert not (tmp_path / "run").exists()


def test_one_run_given_twice_is_one_run(parts, tmp_path):
    twice = compose([parts[0], parts[0]], tmp_path / "twice")
    assert record_of(twice) == record_of(parts[0])
    assert twice.statement.claim["epsilon"] == parts[0].statement.claim["epsilon"]
    assert len(twice.config["composition"]["parts"]) == 1


def test_compositions_are_taken_apart_before_they_are_added(parts, images, tmp_path):
    two = compose(parts[:2], tmp_path / "two")
    three = compose([two, parts[2]], tmp_path / "three")
    direct = compose(parts, tmp_path / "direct")
    assert (three.path / "model.safetensors").read_bytes() == (direct.path / "model.safetensors").read_bytes()
    assert record_of(three) == record_of(direct)
    weighted = compose([two, parts[2]], tmp_path / "w", how="weighted", weights=[0.2, 0.8])
    expected = (
        0.1 * logits(parts[0], images) + 0.1 * logits(parts[1], images) + 0.8 * logits(parts[2], images)
    )
    assert float((logits(weighted, images) - expected).abs().max()) < 1e-5
    assert weighted.statement.claim["data_accesses"]["composition_weights"] == "not covered"
    with pytest.raises(ComposeError, match="is no average"):
        compose([weighted, parts[0]], tmp_path / "x")
    overlapping = compose([two, parts[0]], tmp_path / "o", how="weighted", weights=[0.5, 0.5])
    assert [p["factor"] for p in overlapping.config["composition"]["parts"]] == [0.75, 0.25]


def test_add_is_the_sum_of_centred_models(parts, images, tmp_path):
    run = compose(parts, tmp_path / "sum", how="add")
    assert float((logits(run, images) - sum(logits(part, images) for part in parts)).abs().max()) < 1e-5
    uncentred = train_part(tmp_path, 0, centered=False)
    with pytest.raises(ValueError, match="must add up to 1"):
        compose([uncentred, uncentred], tmp_path / "x", how="add")


def test_uncentred_models_average_with_their_offset(images, tmp_path):
    pair = [train_part(tmp_path, number, centered=False) for number in (0, 1)]
    run = compose(pair, tmp_path / "run")
    ensemble = sum(logits(part, images) for part in pair) / 2
    assert float((logits(run, images) - ensemble).abs().max()) < 1e-5


def test_parts_with_poisson_samples_compose_soundly(parts, tmp_path):
    poisson = train_part(tmp_path, 2, name="site9", sampling="poisson", expected_batch_size=10)
    sequence = compose([parts[0], poisson], tmp_path / "s")
    disjoint = compose([parts[0], poisson], tmp_path / "d", disjoint=True)
    largest = max(part.statement.claim["epsilon"] for part in (parts[0], poisson))
    assert disjoint.statement.claim["epsilon"] >= largest * (1 - 1e-9)
    assert disjoint.statement.claim["epsilon"] == pytest.approx(largest, rel=1e-6)
    total = sum(part.statement.claim["epsilon"] for part in (parts[0], poisson))
    assert largest * 1.05 < sequence.statement.claim["epsilon"] < total
    for run in (sequence, disjoint):
        assert run.statement.recompute().holds


def test_different_deltas_compose_at_the_smallest(parts, tmp_path):
    strict = train_part(tmp_path, 1, name="other", delta=1e-7)
    run = compose([parts[0], strict], tmp_path / "run", disjoint=True)
    assert run.statement.claim["delta"] == 1e-7
    at = best_bound(record_of(parts[0]), delta=1e-7).epsilon
    assert run.statement.claim["epsilon"] >= max(at, strict.statement.claim["epsilon"]) * (1 - 1e-9)
    assert run.statement.claim["epsilon"] > parts[0].statement.claim["epsilon"]


def test_every_use_of_data_is_that_of_the_worst_part(parts, tmp_path):
    data = dataclasses.replace(data_of(range(30), "private"), classes_are_public=False)
    other = dptaft.train(data, epsilon=3, steps=3, output=tmp_path / "other")
    run = compose([parts[0], other], tmp_path / "run")
    uses = [r.statement.claim["data_accesses"]["classes"] for r in (parts[0], other, run)]
    assert uses == ["public, declared by the user", "not covered", "not covered"]
    lost = "the list of classes: it was taken from the data"
    assert lost in run.statement.claim["not_protected"]


def test_a_part_without_a_claim_leaves_none(parts, tmp_path):
    free = train_part(tmp_path, 1, epsilon=math.inf)
    run = compose([parts[0], free], tmp_path / "run")
    assert run.statement is None
    assert "non-private" in run.no_claim
    both = compose([free], tmp_path / "only")
    assert both.statement is None
    seeded = train_part(tmp_path, 2, insecure_seed=3)
    assert compose([parts[0], seeded], tmp_path / "seeded").statement is None


def test_adjacencies_do_not_mix_and_replace_one_never_composes_in_parallel(parts, tmp_path):
    swaps = [train_part(tmp_path, n, name=f"r{n}", adjacency="replace-one") for n in (0, 1)]
    with pytest.raises(ComposeError, match="different adjacency"):
        compose([parts[0], swaps[1]], tmp_path / "x")
    run = compose(swaps, tmp_path / "run", disjoint=True)
    assert isinstance(record_of(run), SequenceComposition)
    assert run.statement.claim["epsilon"] > 1.05 * swaps[1].statement.claim["epsilon"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scope": "head"}, "differ in scope: last:1 against head"),
        ({"seed": 4}, "differ in seed"),
        ({"method": "non-linear"}, "not linear in its weights"),
        ({"centered": False}, "differ in centered"),
        ({"feature_precision": "float16"}, "differ in feature_precision"),
        ({"reinitialised_blocks": 1}, "differ in reinitialised_blocks"),
        ({"weights": "random"}, "differ in backbone"),
        ({"fresh_class_token": True}, "differ in fresh_class_token"),
    ],
)
def test_runs_of_another_base_are_refused(parts, tmp_path, options, reason):
    other = train_part(tmp_path, 1, **{"epsilon": math.inf} | options)
    with pytest.raises(ComposeError, match=reason):
        compose([parts[0], other], tmp_path / "run")


def test_other_losses_compose(parts, tmp_path):
    other = train_part(tmp_path, 1, loss="rescaled-square")
    assert compose([parts[0], other], tmp_path / "run").statement is not None


def test_other_classes_are_refused_and_longer_lists_are_not(parts, images, tmp_path):
    whole = small_data(90)
    more = dataclasses.replace(whole, name="more", classes=("a", "b", "c", "d"))
    new = dptaft.train(more, epsilon=3, steps=3, output=tmp_path / "new")
    run = compose([parts[0], new], tmp_path / "run", how="weighted", weights=[0.5, 0.5])
    assert run.classes == ("a", "b", "c", "d")
    old_and_new = (logits(parts[0], images), logits(new, images), logits(run, images))
    assert float((old_and_new[2][:, :3] - (old_and_new[0] + old_and_new[1][:, :3]) / 2).abs().max()) < 1e-5
    assert run.predict(images[:1])[0].scores.keys() == {"a", "b", "c", "d"}
    swapped = dataclasses.replace(whole, name="swapped", classes=("b", "a", "c"))
    other = dptaft.train(swapped, epsilon=3, steps=3, output=tmp_path / "other")
    with pytest.raises(ComposeError, match="do not begin the classes"):
        compose([parts[0], other], tmp_path / "x")


def test_changed_and_missing_parts_are_refused(parts, tmp_path):
    copies = []
    for part in parts[:2]:
        shutil.copytree(part.path, tmp_path / part.path.name)
        copies.append(tmp_path / part.path.name)
    run = compose(copies, tmp_path / "run")
    weights = copies[0] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match="not the file this run wrote"):
        compose(copies, tmp_path / "x")
    with pytest.raises(ComposeError, match="put it back"):
        compose([run, parts[2]], tmp_path / "x")
    shutil.rmtree(copies[0])
    shutil.copytree(parts[2].path, copies[0])
    with pytest.raises(ComposeError, match="is not the run that"):
        compose([run, parts[2]], tmp_path / "x")
    with pytest.raises(ComposeError, match="no run to compose"):
        compose([], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_accuracy_of_the_composed_run_is_measured_on_request(parts, tmp_path):
    data = small_data(90)
    run = compose(parts, tmp_path / "run", evaluate_on=data)
    split = data.evaluation
    labels = [p.label for p in run.predict([split.pixels[i] for i in range(len(split))])]
    right = np.mean(
        [label == data.classes[y] for label, y in zip(labels, split.labels.tolist(), strict=True)]
    )
    assert run.accuracy == pytest.approx(right)
    assert run.statement.utility["value"] == run.accuracy
    assert run.statement.claim["data_accesses"]["evaluation"] == "not covered"
    with pytest.raises(ValueError, match="same classes"):
        compose(parts, tmp_path / "x", evaluate_on=dataclasses.replace(data, classes=("a", "b", "x")))


def test_command_line(parts, tmp_path):
    paths = [str(part.path) for part in parts]
    cli = CliRunner()
    done = cli.invoke(main, ["compose", *paths, "-o", str(tmp_path / "a"), "--disjoint", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["disjointness"] == "declared by the user"
    assert shown["epsilon"] == dptaft.load_run(tmp_path / "a").statement.claim["epsilon"]
    text = cli.invoke(main, ["compose", *paths, "-o", str(tmp_path / "b"), "--weights", "1,1,-1"])
    assert text.exit_code == 0, text.output
    assert "3 (weighted)" in text.stdout
    for bad in (
        ["compose", *paths, "-o", str(tmp_path / "a")],
        ["compose", *paths, "-o", str(tmp_path / "c"), "--weights", "1,x"],
        ["compose", *paths, "-o", str(tmp_path / "c"), "--weights", "1,2"],
        ["compose", *paths, "-o", str(tmp_path / "c"), "--weights", "1,1,1", "--how", "add"],
        ["compose", paths[0], str(tmp_path), "-o", str(tmp_path / "c")],
        ["compose", "-o", str(tmp_path / "c")],
    ):
        refused = cli.invoke(main, bad)
        assert refused.exit_code == 2, refused.output
        assert "Traceback" not in refused.output
    assert not (tmp_path / "c").exists()


def test_the_largest_gaussian_of_disjoint_shards_is_exact():
    small, large = FullBatchGaussian(30.0, steps=10), FullBatchGaussian(9.0, steps=10)
    both = ParallelComposition((small, large))
    assert gaussian_mu(both) == gaussian_mu(large)
    curve = MaxProfile((GaussianProfile(gaussian_mu(small)), GaussianProfile(gaussian_mu(large))))
    assert best_bound(both, delta=1e-5).epsilon == pytest.approx(curve.epsilon(1e-5), rel=1e-6)
    assert gaussian_mu(ParallelComposition((small, PoissonGaussian(1.0, 0.1, 5)))) is None
    nested = SequenceComposition((both, small))
    assert gaussian_mu(nested) == pytest.approx(math.hypot(gaussian_mu(large), gaussian_mu(small)))


def test_torch_is_not_needed_to_compose(parts, tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from dptaft.shards import compose; "
        f"compose({[str(p.path) for p in parts]!r}, {str(tmp_path / 'run')!r}); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.is_tensor(dptaft.load_run(tmp_path / "run").predictor.weights["head.weight"])

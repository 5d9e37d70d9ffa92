"""A statement that assumes more than its run did is refused, assumption by assumption, on runs of every kind.

A forger with write access changes one thing, computes epsilon again from the changed record, and renews every hash and id.
"""

import contextlib
import json
import shutil

import pytest
from builders import small_data
from run_folders import leaves, other, replaced
from sweeping import HEAD, recipe

import dptaft
from dptaft.assumptions import ASSUMPTIONS
from dptaft.runs import (
    CONFIG,
    STATEMENT,
    RunError,
    hash_files,
    load_run,
    read_config,
    write_config,
    write_statement,
)
from dptaft.said import UNSAID, StatementSays
from dptaft.shards import compose, remove_shard, train_shards
from dptaft.sweep.select import run_selection
from dptaft.verification import verify
from dptaft_accounting import PrivacyStatement, mechanism_from_dict
from dptaft_accounting.convexity import ConvexityCertificate, LossConstants

_DERIVED = ("notion", "epsilon", "delta", "adjacency", "unit", "records_per_unit", "released")
_OPTIONS = {
    "full": {},
    "schedule": {"optimizer": {"noise_schedule": dptaft.training.optimizers.Schedule("linear", 0.5)}},
    "given": {"l2_clip_norm": 0.5, "adjacency": "replace-one", "delta": 1e-6},
    "poisson": {"sampling": "poisson", "expected_batch_size": 20},
    "cyclic": {"sampling": "cyclic-partition", "expected_batch_size": 20},
    "public size": {"adjacency": "add-remove", "public_size": 64},
    "certified": {"certified": True},
    "certified poisson": {"certified": True, "sampling": "poisson", "expected_batch_size": 20},
    "certified cyclic": {"certified": True, "sampling": "cyclic-partition", "expected_batch_size": 20},
    "objective": {"method": "objective-perturbation", "steps": None},
    "output": {"method": "output-perturbation", "steps": None},
    "non-linear": {"method": "non-linear", "engine": "hooks"},
}
KINDS = (*_OPTIONS, "composed", "removed", "one part", "selected")
_SLOW = [pytest.param(kind, marks=pytest.mark.slow) if kind == "selected" else kind for kind in KINDS]
GRID = HEAD | {"grid": {"l2_clip_norm": [0.01, 0.3]}}


class Runs:
    """Real runs by kind, trained when they are first asked for."""

    def __init__(self, root):
        self.root, self.made = root, {}

    def __getitem__(self, kind):
        if kind not in self.made:
            self.made[kind] = self._make(kind, self.root / kind.replace(" ", "-"))
        return self.made[kind]

    def _make(self, kind, folder):
        if kind in _OPTIONS:
            options = {"epsilon": 8.0, "steps": 3, "scope": "head", "ledger": None} | _OPTIONS[kind]
            return dptaft.train(small_data(), output=folder, **options).path
        if kind == "composed":
            shards = train_shards(
                small_data(), 3, epsilon=8.0, steps=2, scope="head", output=folder, ledger=None
            )
            return compose(shards.runs(), self.root / "sum").path
        if kind == "removed":
            return remove_shard(self["composed"], load_run(self["composed"]).config["composition"]["parts"][0]["shard"], folder).path  # fmt: skip
        if kind == "one part":
            return compose([self["full"], self["schedule"]], folder).path
        run_selection(recipe("select-best", methods=(GRID,), epsilon=3.0, candidates={"mean": 2.0}), folder)
        return folder / "runs" / "best"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("runs"))


def put(tree, path, value):
    *outer, last = path.split(".")
    for key in outer:
        tree = tree[int(key) if isinstance(tree, list) else key]
    key = int(last) if isinstance(tree, list) else last
    tree[key] = value(tree.get(key) if isinstance(tree, dict) else tree[key]) if callable(value) else value


def forge(run, folder, side, path, value):
    """A copy of a run in which one thing is changed and everything that follows from it is renewed."""
    shutil.copytree(run, folder)
    old = json.loads((folder / STATEMENT).read_text())
    if side == "run":
        config = read_config(folder)
        put(config, path, value)
        write_config(folder, config)
    elif side == "metrics":
        (folder / "metrics.jsonl").write_text(value)
    else:
        put(old, path, value)
    seal(folder, old)
    return folder


def seal(folder, old):
    claim = {key: item for key, item in old["claim"].items() if key not in _DERIVED}
    details = {key: item for key, item in old["mechanism"].items() if key != "record"}
    admin = {key: item for key, item in old["admin"].items() if key not in ("id", "schema_version")}
    proof = old["accounting"]["certificate"]
    built = PrivacyStatement.build(
        mechanism_from_dict(old["mechanism"]["record"]),
        old["claim"]["delta"],
        certificate=None if proof is None else ConvexityCertificate.from_dict(proof),
        unit=old["claim"]["unit"],
        cross_check=False,
        claim=claim,
        details=details,
        admin=admin | {"files": hash_files(folder)},
        **{key: old[key] for key in ("composition", "implementation", "utility") if key in old},
    )
    write_statement(folder, built)


@pytest.mark.parametrize("kind", _SLOW)
def test_an_honest_run_of_every_kind_verifies(runs, kind):
    found = verify(runs[kind])
    assert found.passed, found.failures
    assert not [c for c in found.checks if c.name == "agreement" and c.status == "note"]


@pytest.mark.parametrize("kind", _SLOW)
def test_sealing_alone_changes_nothing(runs, kind, tmp_path):
    """So that what a graft is refused for is the change, not the sealing."""
    folder = shutil.copytree(runs[kind], tmp_path / "copy")
    seal(folder, json.loads((folder / STATEMENT).read_text()))
    assert verify(folder).passed, verify(folder).failures


def more(value):
    return value * 1.5


def less(value):
    return value * 0.5


def fewer(value):
    return value - 1


# (stated, ran) of a row -> kind of run, changed side, place, value
S, R = "statement", "run"
GRAFTS = {
    ("admin.run", "run.id"): ("full", S, "admin.run", "another"),
    ("admin.time", "run.time"): ("full", S, "admin.time", "2020-01-01T00:00:00+00:00"),
    ("record.kind", "derived.kinds"): ("full", S, "mechanism.record", {"kind": "poisson-gaussian", "noise_multiplier": 9.0, "sampling_rate": 0.1, "steps": 3}),
    ("claim.adjacency", "privacy.adjacency"): ("given", S, "mechanism.record.adjacency", "zero-out"),
    ("claim.unit", "training.unit"): ("full", S, "claim.unit", "one person"),
    ("claim.epsilon", "privacy.epsilon"): ("full", R, "privacy.epsilon", 1.0),
    ("claim.delta", "training.delta"): ("full", S, "claim.delta", 1e-3),
    ("claim.delta", "privacy.delta"): ("given", S, "claim.delta", 1e-3),
    ("details.method", "model.method"): ("non-linear", S, "mechanism.method", "tangent"),
    ("details.loss", "model.loss"): ("full", S, "mechanism.loss", "huber-square"),
    ("details.scope", "model.scope"): ("full", S, "mechanism.scope", "last:1"),
    ("details.dtypes.features", "model.feature_precision"): ("full", S, "mechanism.dtypes.features", "float64"),
    ("implementation.noise_source", "training.noise_source"): ("full", R, "training.noise_source", "seeded"),
    ("implementation.processes", "processes.count"): ("full", S, "implementation.processes", 2),
    ("utility.value", "metrics.accuracy"): ("full", S, "utility.value", 1.5),
    ("utility.records", "metrics.images"): ("full", S, "utility.records", 10_000),
    ("claim.data_accesses.evaluation", "metrics.accuracy"): ("full", S, "claim.data_accesses.evaluation", "none"),
    ("claim.data_accesses.hyperparameters", "derived.given"): ("given", S, "claim.data_accesses.hyperparameters", "public"),
    ("claim.data_accesses.clipping_choice", "derived.given"): ("given", S, "claim.data_accesses.clipping_choice", "public"),
    ("claim.data_accesses.head", "model.head"): ("full", R, "model.head", "head.safetensors"),
    ("claim.data_accesses.number_of_records", "privacy.adjacency"): ("full", S, "claim.data_accesses.number_of_records", "none"),
    ("claim.data_accesses.classes", "training.classes_are_public"): ("full", R, "training.classes_are_public", False),
    ("claim.data_accesses.backbone", "derived.public_backbone"): ("full", R, "model.weights", "weights.pt"),
    ("details.optimizer", "optimizer.kind"): ("full", S, "mechanism.optimizer", "sgd"),
    ("details.averaging", "optimizer.averaging"): ("full", R, "optimizer.averaging", "ema"),
    ("claim.released", "privacy.certified"): ("full", S, "mechanism.record.released", "last-iterate"),
    ("details.sampler", "training.sampling"): ("full", R, "training.sampling", "cyclic-partition"),
    ("record.noise_multiplier", "training.noise_multiplier"): ("full", S, "mechanism.record.noise_multiplier", more),
    ("steps", "training.steps_executed"): ("cyclic", R, "training.steps_executed", 4),
    ("details.steps_executed", "training.steps_executed"): ("full", S, "mechanism.steps_executed", fewer),
    ("details.steps_planned", "training.steps_planned"): ("full", S, "mechanism.steps_planned", fewer),
    ("record.sampling_rate", "training.sampling_rate"): ("poisson", S, "mechanism.record.sampling_rate", less),
    ("record.batches_per_epoch", "training.batches_per_epoch"): ("cyclic", S, "mechanism.record.batches_per_epoch", 6),
    ("record.partition", "training.partition"): ("cyclic", R, "training.partition", "fixed"),
    ("details.l2_clip_norm", "training.l2_clip_norm"): ("full", S, "mechanism.l2_clip_norm", less),
    ("details.l2_clip_norm", "privacy.l2_clip_norm"): ("given", S, "mechanism.l2_clip_norm", less),
    ("details.clipping", "training.clipping"): ("full", S, "mechanism.clipping", "none acts"),
    ("details.noise_std", "training.noise_std"): ("full", S, "mechanism.noise_std", more),
    ("details.normaliser", "training.normaliser"): ("full", S, "mechanism.normaliser", more),
    ("details.expected_batch_size", "training.normaliser"): ("full", S, "mechanism.expected_batch_size", more),
    ("certificate", "privacy.certified"): ("certified", R, "privacy.certified", False),
    ("certificate", "optimizer.kind"): ("certified", R, "optimizer.kind", "momentum"),
    ("certificate", "optimizer.averaging"): ("certified", R, "optimizer.averaging", "tail"),
    ("certificate", "model.method"): ("certified", R, "model.method", "non-linear"),
    ("certificate", "model.unit_jacobian"): ("certified", R, "model.unit_jacobian", False),
    ("certificate", "optimizer.learning_rate_schedule"): ("certified", R, "optimizer.learning_rate_schedule.warmup_steps", 2),
    ("certificate.origin.loss", "model.loss"): ("certified", R, "model.loss", "huber-square"),
    ("certificate.origin.gradient_bound", "model.unit_jacobian"): ("certified", S, "accounting.certificate.origin.gradient_bound", "clipping of a scalar output"),
    ("certificate.origin.feature_bound", "training.feature_bound"): ("certified", S, "accounting.certificate.origin.feature_bound", "0.5"),
    ("certificate.step_size", "optimizer.learning_rate"): ("certified", S, "accounting.certificate.step_size", less),
    ("certificate.strong_convexity", "optimizer.l2_regularization"): ("certified", S, "accounting.certificate.strong_convexity", less),
    ("certificate.diameter", "training.projection_diameter"): ("certified", S, "accounting.certificate.diameter", 0.1),
    ("certificate.l2_clip_norm", "training.l2_clip_norm"): ("certified", S, "accounting.certificate.l2_clip_norm", more),
    ("certificate.normaliser", "training.normaliser"): ("certified", S, "accounting.certificate.normaliser", more),
    ("certificate.max_batch_size", "training.max_batch_size"): ("certified poisson", S, "accounting.certificate.max_batch_size", fewer),
    ("certificate.records", "training.records"): ("certified poisson", S, "accounting.certificate.records", fewer),
    ("record.diameter", "training.diameter"): ("objective", S, "mechanism.record.diameter", less),
    ("record.gradient_bound", "training.diameter"): ("output", S, "mechanism.record.gradient_bound", less),
    ("record.classes", "derived.classes"): ("objective", S, "mechanism.record.classes", fewer),
    ("regularization", "optimizer.l2_regularization"): ("output", S, "mechanism.record.regularization", more),
    ("objective_noise_std", "training.objective_noise_std"): ("objective", S, "mechanism.record.noise_std", more),
    ("output_noise_std", "training.output_noise_std"): ("output", S, "mechanism.record.noise_std", more),
    ("gradient_tolerance", "training.gradient_tolerance"): ("objective", S, "mechanism.record.gradient_tolerance", less),
    ("record.records", "training.records"): ("output", S, "mechanism.record.records", lambda n: 10 * n),
    ("record.mean_candidates", "selection.mean_candidates"): ("selected", S, "mechanism.record.mean_candidates", 1.1),
    ("record.shape", "selection.shape"): ("selected", S, "mechanism.record.shape", 1.0),
    ("record.candidate_count", "selection.candidate_count"): ("selected", S, "mechanism.record", lambda old: old | {"candidate_count": "poisson", "shape": 0.0}),
    ("candidate_epsilon", "selection.candidate_epsilon"): ("selected", S, "mechanism.record.base.noise_multiplier", more),
    ("candidate_mu", "derived.mu"): ("selected", R, "training.noise_multiplier", less),
    ("composition.how", "composition.how"): ("composed", S, "composition.how", "add"),
    ("details.composed_of", "derived.parts"): ("composed", S, "mechanism.composed_of", fewer),
    ("parts", "derived.entries"): ("composed", S, "composition.parts.0.epsilon", less),
    ("claim.delta", "derived.delta"): ("composed", S, "claim.delta", 1e-3),
    ("removed", "derived.removed"): ("removed", S, "composition.removed", []),
    ("composition.disjointness", "derived.disjointness"): ("one part", S, "composition.disjointness", "checked"),
    ("shape", "derived.shape"): ("one part", S, "mechanism.record.kind", "parallel"),
}  # fmt: skip


def test_every_assumption_has_a_graft():
    assert [(row.stated, row.ran) for row in ASSUMPTIONS] == list(dict.fromkeys(GRAFTS))
    assert len({(row.stated, row.ran) for row in ASSUMPTIONS}) == len(ASSUMPTIONS)


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (row.of == "selected")) for row in ASSUMPTIONS],
    ids=[f"{row.stated} against {row.ran}" for row in ASSUMPTIONS],
)
def test_a_statement_that_assumes_more_is_refused(runs, tmp_path, row):
    kind, side, path, value = GRAFTS[row.stated, row.ran]
    forged = forge(runs[kind], tmp_path / "forged", side, path, value)
    messages = [check.message for check in verify(forged).failures if check.name == "agreement"]
    assert len(messages) == 1
    assert "\n" not in messages[0]
    assert f"{row.name}: the statement has {row.stated} " in messages[0]
    assert f"{CONFIG} {row.ran} " in messages[0]


# words, and facts that neither the record nor run.toml decides; a larger sensitivity assumes less
_WORDS = (
    "claim.not_protected", "claim.public", "claim.assumptions", "claim.data_accesses.training",
    "claim.data_accesses.normalisation", "claim.data_accesses.early_stopping", "accounting.version",
    "accounting.cross_checks", "mechanism.sensitivity", "mechanism.stopping_rule", "mechanism.dtypes.sums",
    "mechanism.dtypes.noise", "composition", "implementation.versions", "implementation.source_revision",
    "implementation.sampling_source", "implementation.float_mitigation", "implementation.nan_policy",
    "utility.metric", "utility.split", "utility.private", "admin.caveats", "admin.id",
)  # fmt: skip


def test_only_words_of_a_renamed_statement_are_free(runs, tmp_path):
    """Every other scalar that is changed is found, though the statement has the id of its new content."""
    folder = shutil.copytree(runs["full"], tmp_path / "copy")
    document = json.loads((folder / STATEMENT).read_text())
    changed = 0
    for path, value in leaves(document):
        name = ".".join(map(str, path))
        if any(name == word or name.startswith(f"{word}.") for word in _WORDS):
            continue
        (folder / STATEMENT).write_text(replaced(document, path, other(value), seal=True))
        changed += 1
        with contextlib.suppress(RunError):
            assert not verify(folder).passed, name
    assert changed > 60


def certificate_of_a_dream(run):
    """A certificate for the numbers of an ordinary run, as if its steps had contracted."""
    mechanism = run.statement.mechanism
    return ConvexityCertificate.issue(
        loss="multinomial-logistic",
        feature_bound=mechanism["l2_clip_norm"] / 2**0.5 / 1.01,
        l2_clip_norm=mechanism["l2_clip_norm"],
        regularization=0.1,
        step_size=1.0,
        normaliser=mechanism["normaliser"],
        sampling="full-batch",
        steps=3,
        records=round(mechanism["normaliser"]),
    )


def test_a_certificate_for_a_run_with_momentum_is_refused(runs, tmp_path):
    """The last iterate of momentum has no bound of its own, however smooth the loss is said to be."""
    folder = shutil.copytree(runs["full"], tmp_path / "forged")
    old = json.loads((folder / STATEMENT).read_text())
    proof = certificate_of_a_dream(load_run(folder))
    old["mechanism"]["record"]["released"] = "last-iterate"
    old["accounting"]["certificate"] = proof.to_dict()
    seal(folder, old)
    claimed = load_run(folder).statement.claim["epsilon"]
    assert claimed <= old["claim"]["epsilon"]
    found = {check.name: check.message for check in verify(folder).failures}
    assert set(found) == {"agreement"}
    for words in ("released iterates", "certified training", "plain gradient steps", "unit Jacobians"):
        assert f"{words}: " in found["agreement"]


def test_an_old_run_without_the_new_table_verifies_and_gains_nothing(runs, tmp_path):
    """Missing `certified` means not certified, missing optimiser settings mean no plain gradient steps."""
    folder = shutil.copytree(runs["full"], tmp_path / "old")
    config = read_config(folder)
    del config["training"], config["privacy"]["certified"], config["model"]["unit_jacobian"]
    write_config(folder, config)
    old = json.loads((folder / STATEMENT).read_text())
    seal(folder, old)
    found = verify(folder)
    assert found.passed, found.failures
    assert [c.status for c in found.checks if c.name == "agreement"] == ["passed", "note"]
    config["optimizer"] = {}
    write_config(folder, config)
    old["mechanism"]["record"]["released"] = "last-iterate"
    old["accounting"]["certificate"] = certificate_of_a_dream(load_run(runs["full"])).to_dict()
    seal(folder, old)
    message = next(c.message for c in verify(folder).failures if c.name == "agreement")
    for words in ("certified training", "plain gradient steps", "the last iterate", "unit Jacobians"):
        assert f"{words}: " in message


@pytest.mark.parametrize("kind", ["full", "poisson", "cyclic", "certified poisson", "objective", "output"])
def test_a_run_that_keeps_one_fact_to_itself_is_refused(runs, tmp_path, kind):
    """Else a forger would remove the line of ``run.toml`` that gives a graft away."""
    said = StatementSays(json.loads((runs[kind] / STATEMENT).read_text()))
    of = {"every", "one-shot" if kind in ("objective", "output") else "steps"} | (
        {"certified"} if said.certified else set()
    )
    owed = {
        row.ran.removeprefix("training.")
        for row in ASSUMPTIONS
        if row.of in of and row.missing is UNSAID and said.value(row.stated) not in (UNSAID, None)
    }
    facts = read_config(runs[kind])["training"].keys() & {*owed, "given"}
    assert len(facts) >= 7
    for name in facts:
        folder = shutil.copytree(runs[kind], tmp_path / name)
        config = read_config(folder)
        del config["training"][name]
        write_config(folder, config)
        seal(folder, json.loads((folder / STATEMENT).read_text()))
        found = {check.name: check.message for check in verify(folder).failures}
        assert set(found) == {"agreement"}, name
        assert found["agreement"].endswith("nothing")


@pytest.mark.parametrize("kind", ["composed", "removed", "one part"])
def test_an_old_sum_of_runs_verifies_and_cannot_become_parallel(runs, tmp_path, kind):
    """Its configuration names no records and costs of its parts."""
    folder = shutil.copytree(runs[kind], tmp_path / "old")
    config = read_config(folder)
    for entry in config["composition"]["parts"]:
        del entry["record_sha256"], entry["epsilon"], entry["delta"]
    write_config(folder, config)
    old = json.loads((folder / STATEMENT).read_text())
    seal(folder, old)
    assert verify(folder).passed, verify(folder).failures
    if kind == "one part":
        old["mechanism"]["record"]["kind"] = "parallel"
        seal(folder, old)
        assert [c.name for c in verify(folder).failures] == ["agreement"]


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("full", "data", "x"),
        ("full", "model", 1),
        ("full", "training", []),
        ("full", "training.steps_executed", "many"),
        ("composed", "composition", {}),
        ("composed", "composition.parts", ["x"]),
    ],
)
def test_a_configuration_of_another_form_is_one_failed_check(runs, tmp_path, kind, path, value):
    folder = forge(runs[kind], tmp_path / "odd", "run", path, value)
    assert [check.name for check in verify(folder).failures] == ["agreement"]


@pytest.mark.parametrize("epsilon", [float("inf"), 8.0])
def test_a_claim_for_a_run_without_noise_is_refused(runs, tmp_path, epsilon):
    """A baseline, or a seeded run: their configuration gives no claim to graft on."""
    seeded = {} if epsilon == float("inf") else {"insecure_seed": 1}
    made = dptaft.train(
        small_data(), epsilon=epsilon, steps=3, scope="head", output=tmp_path / "none", ledger=None, **seeded
    )
    assert made.statement is None
    old = json.loads((runs["full"] / STATEMENT).read_text())
    old["admin"] |= {"run": "none", "time": made.config["run"]["time"]}
    old["utility"]["value"] = made.accuracy
    seal(made.path, old)
    message = next(c.message for c in verify(made.path).failures if c.name == "agreement")
    assert ("source of noise: " if seeded else "epsilon asked for: ") in message


def test_fields_left_out_of_a_record_are_compared_at_their_defaults(runs, tmp_path):
    """A record without a tolerance is one with an exact minimiser."""
    folder = shutil.copytree(runs["objective"], tmp_path / "forged")
    document = json.loads((folder / STATEMENT).read_text())
    del document["mechanism"]["record"]["gradient_tolerance"]
    seal(folder, document)
    assert "solver's tolerance: " in next(c.message for c in verify(folder).failures if c.name == "agreement")


def test_a_new_loss_needs_a_formula_and_its_constants(tmp_path, monkeypatch):
    """Registered in both lists it trains certified and verifies; with a formula alone nothing is trained."""
    from dptaft.training import losses
    from dptaft_accounting import convexity
    from dptaft_accounting.errors import CertificateError

    class Halved(losses.CrossEntropy):
        name = "halved"

        def value(self, logits, labels):
            return super().value(logits, labels) / 2

        def cotangent(self, logits, labels):
            return super().cotangent(logits, labels) / 2

        def cotangent_bound(self, num_classes):
            return 2**0.5 / 2

        def smoothness(self, num_classes):
            return 0.25

    def train(name):
        return dptaft.train(
            small_data(), epsilon=8.0, certified=True, steps=3, loss="halved", scope="head", output=tmp_path / name, ledger=None
        )  # fmt: skip

    monkeypatch.setitem(losses.LOSSES, "halved", Halved)
    with pytest.raises(CertificateError, match="the loss halved are unbounded, or no bound is known"):
        train("unknown")
    small = LossConstants(0.5, 0.25, scalar=False)
    monkeypatch.setitem(convexity.TRAINED_LOSSES, "halved", lambda classes: small)
    with pytest.raises(CertificateError, match="gradient of the loss halved may reach"):
        train("wrong")
    monkeypatch.setitem(
        convexity.TRAINED_LOSSES, "halved", lambda classes: LossConstants(2**-0.5, 0.25, scalar=False)
    )
    found = verify(train("right").path)
    assert found.passed, found.failures
    assert any(check.name == "certificate" and check.status == "passed" for check in found.checks)

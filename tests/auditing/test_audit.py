"""Sound runs: bounds below the claim and near it, exact bookkeeping of canaries, honest refusals."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import small_data
from scipy.stats import binom

import dptaft
from dptaft.auditing.canaries import CoordinateCanaries, LinearLoss, secret_coins
from dptaft.auditing.engine import AuditEngine
from dptaft.auditing.recipe import load_recipe, synthetic_data
from dptaft.auditing.repeat import Repeater
from dptaft.auditing.report import judge
from dptaft.training.clipping import ClippedSum
from dptaft_accounting.audit import Choice, audit_trials


def norm(values):
    return math.sqrt(sum(float(v.double().square().sum()) for v in values.values()))


@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
def test_a_coordinate_canary_moves_the_sum_by_exactly_the_clip_norm(adjacency):
    like = {"a": torch.zeros(4, 3), "b": torch.zeros(5)}
    canaries = CoordinateCanaries(like, 17, 0.25, adjacency)
    slots, coins = torch.arange(17), torch.zeros(17, dtype=torch.bool)
    base = canaries.clipped_sum(like, slots, coins).value
    for i in range(17):
        with_it = coins.clone()
        with_it[i] = True
        moved = canaries.clipped_sum(like, slots, with_it).value
        step = 0.5 if adjacency == "replace-one" else 0.25
        difference = {name: moved[name] - base[name] for name in like}
        assert norm(difference) == pytest.approx(step)
        score = canaries.project(moved) - canaries.project(base)
        assert score[i] == pytest.approx(1.0)
        assert score.abs().sum() == pytest.approx(1.0)
        assert canaries.along(difference)[i] == pytest.approx(0.25 * step)
    nobody = canaries.clipped_sum(like, torch.empty(0, dtype=torch.int64), ~coins)
    assert norm(nobody.value) == 0.0


@pytest.mark.parametrize("kind", ["tangent", "mislabelled"])
@pytest.mark.parametrize("adjacency", ["zero-out", "replace-one"])
def test_scores_of_record_canaries_are_projections_of_the_sum(trained, data, kind, adjacency):
    """Inner products through tangent products equal inner products of gradients one by one."""
    repeater = Repeater(load_recipe(trained(adjacency=adjacency), data))
    canaries = repeater.canaries(kind, 5)
    theta = {k: 0.1 * torch.randn_like(p) for k, p in repeater.learner.parameters.items()}
    canaries.prepare_step(theta)
    one, none = torch.ones(5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool)
    residual = {k: torch.randn_like(p) for k, p in theta.items()}
    sensitivity = repeater.recipe.prepared.l2_clip_norm * (2 if adjacency == "replace-one" else 1)
    for i in range(5):
        slot = torch.tensor([i])
        own, other = (canaries.clipped_sum(theta, slot, coins).value for coins in (one, none))
        d = {k: (own[k] - other[k]).double() for k in own}
        inner = sum(float((residual[k] * d[k]).sum()) for k in d)
        against = sum(float(((other[k] + d[k] / 2) * d[k]).sum()) for k in d)
        assert canaries.along(residual)[i] == pytest.approx(inner, rel=1e-4, abs=1e-6)
        expected = (inner - against) / sensitivity**2 + 0.5
        assert canaries.project(residual)[i] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        if kind == "tangent":
            assert norm(own) == pytest.approx(repeater.recipe.prepared.l2_clip_norm, rel=1e-4)


def test_linear_losses_have_constant_gradients():
    loss, labels = LinearLoss(2.0), torch.tensor([0, 2])
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss.value(z, labels).sum(), z)
    assert torch.allclose(gradient, loss.cotangent(z.detach(), labels))
    assert torch.equal(loss.cotangent(z.detach(), labels), loss.cotangent(5 * z.detach(), labels))
    assert loss.cotangent_bound(3) == pytest.approx(float(gradient[0].norm()))
    assert loss.smoothness(3) == 0


class FixedRecords:
    def clipped_sum(self, theta, indices):
        return ClippedSum({"w": torch.full((6,), float(len(indices)))}, 1.0)


def test_records_and_canary_slots_are_kept_apart():
    theta = {"w": torch.zeros(6)}
    coins = torch.tensor([True, False, True])
    canaries = CoordinateCanaries(theta, 3, 1.0, "zero-out")
    engine = AuditEngine(FixedRecords(), 4, canaries, coins)
    for batch, records, inserted in (([0, 3], 2, 0), ([1, 4, 5], 1, 1), ([4, 5, 6], 0, 2), ([], 0, 0)):
        value = engine.clipped_sum(theta, torch.tensor(batch, dtype=torch.int64)).value["w"]
        assert float(value.sum()) == pytest.approx(6 * records + inserted)


def test_coins_are_fair():
    heads = int(secret_coins(4000).sum())
    assert binom.ppf(1e-9, 4000, 0.5) < heads < binom.isf(1e-9, 4000, 0.5)


SOUND = [
    {},
    {"adjacency": "replace-one"},
    {"optimizer_kind": "adam"},
    {"sampling": "poisson", "expected_batch_size": 12, "steps": 10},
    {"sampling": "cyclic-partition", "expected_batch_size": 12, "steps": 12},
]


@pytest.mark.parametrize("options", SOUND, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_sound_runs_pass_every_check(trained, data, tmp_path, options):
    """Deterministic checks hold exactly; a false violation has probability 1e-6."""
    options = dict(options)
    kind = options.pop("optimizer_kind", None)
    if kind is None:
        run = trained(**options)
    else:
        settings = {"kind": kind, "learning_rate": 0.01}
        run = dptaft.train(
            data, epsilon=3.0, scope="head", steps=8, optimizer=settings, output=tmp_path / "run"
        )
    report = dptaft.audit(run, data=data, count=387, repetitions=8, significance=1e-6)
    assert report.verdict == "consistent"
    assert 0 < report.evidence.epsilon < report.evidence.claimed
    assert 0.99 < report.sensitivity.measured / report.sensitivity.declared <= 1.0
    assert report.noise.ratio == pytest.approx(1.0, abs=0.08)
    assert report.sampling.holds
    assert report.evidence.claimed == pytest.approx(run.statement.claim["epsilon"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0, 8.0])
def test_sound_runs_are_violations_at_most_at_the_significance(trained, data, epsilon):
    repeater = Repeater(load_recipe(trained(epsilon=epsilon), data))
    found = {"all-iterates": 0, "last-iterate": 0}
    for observer in found:
        for _ in range(40):
            canaries = repeater.canaries("coordinate", 387)
            observed = repeater.observe(canaries, observer)
            found[observer] += judge(repeater.recipe, observer, canaries, observed, 0.05).rejected
    assert max(found.values()) <= binom.isf(1e-4, 40, 0.05)


def test_worst_cases_reach_most_of_the_claim(trained, data):
    """Full batch, all iterates: the canary's trade-off curve is the claimed one, up to confidence."""
    run = trained(scope="last:1", steps=3)
    report = dptaft.audit(run, data=data, count=50_000, significance=0.01)
    assert 0.7 * report.evidence.claimed < report.evidence.epsilon < report.evidence.claimed * 1.02
    assert report.any_mechanism.epsilon < report.evidence.claimed


CERTIFIED = {"certified": True, "steps": 40}


def test_hidden_iterates_show_less_and_both_claims_hold(trained, data):
    run = trained(**CERTIFIED)
    last, everything = (
        dptaft.audit(run, data=data, observer=observer, count=387, repetitions=4, significance=1e-4)
        for observer in (None, "all-iterates")
    )
    assert last.observer == "last-iterate"
    assert last.evidence.claimed == pytest.approx(run.statement.claim["epsilon"], rel=1e-6)
    composition = run.statement.accounting["epsilon_composition"]
    assert everything.evidence.claimed == pytest.approx(composition, rel=1e-6)
    assert composition > 2 * last.evidence.claimed
    assert 0 < last.evidence.epsilon < last.evidence.claimed < everything.evidence.epsilon < composition
    assert last.verdict == everything.verdict == "consistent"


def test_all_iterates_refute_a_last_iterate_claim_made_for_them(trained, data):
    """Negative control: scores of all iterates judged by the last iterate's curve."""
    recipe = load_recipe(trained(**CERTIFIED), data)
    repeater = Repeater(recipe)
    observed = repeater.observe(repeater.canaries("coordinate", 387), "all-iterates", 4)
    family = recipe.family("last-iterate")
    evidence = audit_trials(observed.scores, observed.included.numpy(), family, choice=Choice((0.0,)))
    assert evidence.verdict == "violation"


def test_curved_canaries_stay_within_the_certificate(trained, data):
    """The certificate counts the records of a batch, so images take the places of records."""
    repeater = Repeater(load_recipe(trained(**CERTIFIED), data))
    images = repeater.canaries("mislabelled", 12)
    assert repeater.num_records(images) == len(data.train) - 12
    assert repeater.num_records(repeater.canaries("coordinate", 100)) == len(data.train)
    observed = repeater.observe(images, "last-iterate")
    assert set(observed.batch_sizes[0]) == {len(data.train)}
    with pytest.raises(ValueError, match="take the places of records"):
        repeater.canaries("mislabelled", len(data.train))


def test_weak_observers_and_user_images(trained, data):
    run = trained(epsilon=8.0)
    box = dptaft.audit(run, data=data, observer="black-box", repetitions=2)
    assert box.canaries == "mislabelled"
    assert box.verdict != "violation"
    mine = dptaft.audit(
        run, data=data, observer="last-iterate", canaries="images", canary_images=small_data(20), count=9
    )
    assert mine.evidence.canaries == 9
    assert mine.verdict == "inconclusive"


def test_synthetic_records_replace_private_ones(trained, data):
    run = trained()
    report = dptaft.audit(run, data="synthetic", count=300, repetitions=2, significance=1e-6)
    assert not report.private
    assert report.data == "synthetic"
    assert report.verdict != "violation"
    private = dptaft.audit(run, data=data, count=50, repetitions=1)
    assert private.private
    assert any("not covered by the claim" in note for note in private.notes)
    images = synthetic_data(7, ("a", "b", "c"))
    assert (len(images.train), images.train.labels.max().item()) == (7, 2)


def test_attaching_changes_no_file_of_the_run(trained, data):
    run = trained()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    with pytest.raises(ValueError, match="attach one of public data"):
        dptaft.audit(run.path, data=data, count=50, repetitions=1).attach()
    with pytest.raises(ValueError, match="attach one of public data"):
        dptaft.audit(run.path, data="synthetic", canaries="images", canary_images=data, attach=True)
    report = dptaft.audit(run.path, data="synthetic", count=50, repetitions=1)
    written = report.attach()
    assert written.name == "audit.json"
    document = json.loads(written.read_text())
    assert document["statement_id"] == run.id
    assert document["verdict"] == report.verdict
    assert {name: (run.path / name).read_bytes() for name in before} == before
    dptaft.load_run(run.path)
    written.unlink()


def test_audits_that_cannot_be_made_are_refused(trained, data, tmp_path):
    run = trained()
    with pytest.raises(ValueError, match="unknown observer"):
        dptaft.audit(run, data=data, observer="nobody")
    with pytest.raises(ValueError, match="cannot see coordinate"):
        dptaft.audit(run, data=data, observer="black-box", canaries="coordinate")
    with pytest.raises(ValueError, match="give its data"):
        dptaft.audit(run, data=small_data(20))
    with pytest.raises(ValueError, match="room for 1 to 387"):
        dptaft.audit(run, data=data, count=388)
    with pytest.raises(ValueError, match="--data synthetic"):
        dptaft.audit(run)
    with pytest.raises(ValueError, match="need images"):
        dptaft.audit(run, data=data, canaries="images")
    with pytest.raises(ValueError, match="repetitions must be"):
        dptaft.audit(run, data=data, repetitions=0)
    free = dptaft.train(data, epsilon=math.inf, scope="head", steps=1, output=tmp_path / "free")
    with pytest.raises(ValueError, match="nothing to audit"):
        dptaft.audit(free, data=data)


def test_mechanisms_without_steps_are_refused_by_name(trained, data):
    run = trained()
    mechanism = dict(run.statement.mechanism) | {"record": {"kind": "output-perturbation"}}
    other = replace(run, statement=SimpleNamespace(mechanism=mechanism, claim=run.statement.claim))
    with pytest.raises(ValueError, match="made by output-perturbation"):
        dptaft.audit(other, data=data)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "non-linear"}, {"engine": "ghost"}])
def test_engines_with_hooks_are_audited_and_left_clean(trained, data, options):
    run = trained(scope="last:1", steps=3, **options)
    report = dptaft.audit(run, data=data, count=1000, repetitions=3, significance=1e-6)
    assert report.verdict == "consistent"
    assert report.noise.ratio == pytest.approx(1.0, abs=0.01)
    with pytest.raises(ValueError, match="fused engine"):
        dptaft.audit(run, data=data, canaries="mislabelled")


def test_repetitions_use_new_coins_and_leave_the_learner_as_it_was(trained, data):
    repeater = Repeater(load_recipe(trained(), data))
    canaries = repeater.canaries("coordinate", 100)
    observed = repeater.observe(canaries, "all-iterates", 2)
    first, second = observed.included.split(100)
    assert not torch.equal(first, second)
    assert len(observed.scores) == 200
    assert np.isfinite(observed.scores.numpy()).all()
    assert not sys.modules["torch.optim.optimizer"]._global_optimizer_post_hooks

"""One-shot solvers: exact oracles, sensitivity on neighbours, noise of whole releases, refusals."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.operator import Features
from dptaft.training import one_shot
from dptaft.training.noise import InsecureSeededNoise, NoiseSource
from dptaft.training.one_shot import SoftmaxProblem, margin_cotangents, minimise, train_once
from dptaft.training.one_shot_plan import OneShotPlan, plan_one_shot, quantisation
from dptaft.training.plan import ONE_SHOT, PlanError, PrivacyConfig
from dptaft_accounting import best_bound
from dptaft_accounting.errors import AccountingError

CLASSES, WIDTH = 3, 5


class Head(nn.Module):
    """A model that is its classifier."""

    def __init__(self, classes=CLASSES, width=WIDTH):
        super().__init__()
        self.head = nn.Linear(width, classes).double()

    def get_classifier(self):
        return self.head


def operator(classes=CLASSES, width=WIDTH):
    return HeadOperator(Head(classes, width))


def records(count=40, seed=0, width=WIDTH, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    u = spread * torch.randn(count, width, generator=g, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (count,), generator=g)
    u[torch.arange(count), labels] += 1.0
    return Features({"u": u, "finite": torch.ones(count, dtype=torch.bool)}), labels


def explicit(features):
    """Jacobians (n, C, P) of the head on its parameters (weight, bias), divided by their diameter sqrt(2) |(u, 1)|."""
    u = torch.cat([features["u"], torch.ones(len(features), 1, dtype=torch.float64)], 1)
    u = u / (math.sqrt(2.0) * u.norm(dim=1, keepdim=True))
    eye = torch.eye(CLASSES, dtype=torch.float64)
    weight = torch.einsum("cd,ni->ncdi", eye, u[:, :-1]).flatten(2)
    bias = torch.einsum("cd,n->ncd", eye, u[:, -1])
    return torch.cat([weight, bias], 2)


def objective(theta, jacobians, labels, lam, b, margin):
    """The textbook formula, without softmax."""
    z = jacobians @ theta
    picked = z.gather(1, labels[:, None])
    others = torch.exp(margin + z - picked).scatter(1, labels[:, None], 0.0).sum(1)
    return torch.log1p(others).sum() + lam / 2 * theta @ theta + b @ theta


def newton(jacobians, labels, lam, b, margin=one_shot.MARGIN):
    """Damped Newton's method with dense float64 Hessians."""
    theta = torch.zeros(jacobians.shape[2], dtype=torch.float64)

    def value(t):
        return objective(t, jacobians, labels, lam, b, margin)

    for _ in range(200):
        gradient = torch.autograd.functional.jacobian(value, theta)
        if gradient.norm() < 1e-12:
            break
        step = torch.linalg.solve(torch.autograd.functional.hessian(value, theta), gradient)
        size = 1.0
        while value(theta - size * step) > value(theta) and size > 1e-8:
            size /= 2
        theta = theta - size * step
    return theta


def problem(features, labels, lam=0.7, b=None, **options):
    return SoftmaxProblem(operator(), features, labels, regularization=lam, linear=b, **options)


def plan(method="objective-perturbation", epsilon=2.0, count=40, **fields):
    found = plan_one_shot(
        method, PrivacyConfig(epsilon=epsilon), num_records=count, num_classes=CLASSES, dimension=18
    )
    return replace(found, **fields)


def test_cotangents_are_the_derivative_of_the_loss():
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    z.requires_grad_()
    picked = z.gather(1, labels[:, None])
    others = torch.exp(2.5 + z - picked).scatter(1, labels[:, None], 0.0).sum(1)
    torch.log1p(others).sum().backward()
    assert torch.allclose(margin_cotangents(z.detach(), labels, 2.5), z.grad, atol=1e-12)
    extreme = margin_cotangents(torch.tensor([[1e4, -1e4, 0.0, 0.0]]), torch.tensor([1]))
    assert extreme.tolist() == [[1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [7, 256])
def test_minimiser_equals_newtons_method_on_explicit_features(seed, size):
    features, labels = records(seed=seed)
    b = torch.randn(18, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    exact = newton(explicit(features), labels, 0.7, b)
    found = minimise(problem(features, labels, b=b, physical_batch_size=size), 1e-8)
    assert (found.weights - exact).norm() <= 1e-8 / 0.7 + 1e-9
    assert 0 < found.gradient_norm <= 1e-8
    # the bound of strong convexity is what the certificate promises at any tolerance
    rough = minimise(problem(features, labels, b=b), 0.05)
    assert 1e-4 < (rough.weights - exact).norm() <= rough.gradient_norm / 0.7


def test_offsets_shift_the_logits():
    features, labels = records()
    offsets = torch.randn(40, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = minimise(problem(features, labels, offsets=offsets), 1e-9)
    jacobians = explicit(features)
    theta = found.weights.clone().requires_grad_()
    z = jacobians @ theta + offsets
    picked = z.gather(1, labels[:, None])
    others = torch.exp(one_shot.MARGIN + z - picked).scatter(1, labels[:, None], 0.0).sum(1)
    (torch.log1p(others).sum() + 0.35 * theta @ theta).backward()
    assert theta.grad.norm() < 1e-8


def test_certified_norm_is_measured_at_the_returned_point(monkeypatch):
    """Errors that build up along the lines do not reach the certificate."""
    features, labels = records()
    found = minimise(problem(features, labels), 1e-6)
    jacobians = explicit(features)
    theta = found.weights.clone().requires_grad_()
    objective(theta, jacobians, labels, 0.7, torch.zeros(18, dtype=torch.float64), one_shot.MARGIN).backward()
    assert float(theta.grad.norm()) <= found.gradient_norm * (1 + 1e-6) + 1e-12
    monkeypatch.setattr(one_shot, "MAX_ITERATIONS", 3)
    with pytest.raises(PlanError, match="nothing is released"):
        minimise(problem(features, labels), 1e-9)


def test_a_wrong_gradient_on_the_way_cannot_fake_the_certificate():
    """A gradient from updated products is reported as nearly zero; the solver checks it and goes on."""
    features, labels = records()

    class Faked(SoftmaxProblem):
        fakes = 1

        def products(self, weights):
            self.fresh = super().products(weights)
            return self.fresh

        def gradient(self, weights, products):
            found = super().gradient(weights, products)
            if products is not self.fresh and self.fakes and 0.02 < found.norm() < 0.9:
                self.fakes -= 1
                return 1e-9 * found
            return found

    faked = Faked(operator(), features, labels, regularization=0.7)
    found = minimise(faked, 0.01)
    honest = problem(features, labels)
    true = honest.gradient(found.weights, honest.products(found.weights)).norm()
    assert faked.fakes == 0
    assert float(true) <= found.gradient_norm <= 0.01


def neighbours(features, labels):
    """Pairs of data sets that differ in one record: left out (its features become zero constants)."""
    for i in range(0, len(labels), 5):
        kept = torch.arange(len(labels)) != i
        yield features.index(kept), labels[kept]


def test_sensitivity_of_the_minimiser():
    """Leaving out a record moves it by at most D/lambda, and a hard record comes close."""
    features, labels = records(spread=3.0)
    lam = 2.0
    whole = minimise(problem(features, labels, lam=lam), 1e-9).weights
    moved = [
        (whole - minimise(problem(*few, lam=lam), 1e-9).weights).norm()
        for few in neighbours(features, labels)
    ]
    assert max(moved) <= 1 / lam
    assert max(moved) > 0.3 / lam
    lonely, label = features.index(slice(0, 1)), labels[:1]
    alone = minimise(problem(lonely, label, lam=lam), 1e-9).weights.norm()
    assert 0.75 / lam < alone <= 1 / lam
    # negative control: Jacobians that were not normalised move it further than the bound
    raw = problem(lonely, label, lam=20.0)
    raw._scales = torch.ones_like(raw._scales)
    assert minimise(raw, 1e-9).weights.norm() > 2 / 20.0


def test_replacing_a_record_moves_twice_as_far():
    features, labels = records(1)
    lam = 5.0
    swapped = minimise(problem(features, (labels + 1) % CLASSES, lam=lam), 1e-9).weights
    distance = (minimise(problem(features, labels, lam=lam), 1e-9).weights - swapped).norm()
    assert 1.2 / lam < distance <= 2 / lam


def test_records_that_are_not_finite_count_nothing():
    features, labels = records()
    broken = Features({"u": features["u"].clone(), "finite": features["finite"].clone()})
    broken["u"][7], broken["finite"][7] = 0.0, False
    kept = torch.arange(40) != 7
    left_out = minimise(problem(features.index(kept), labels[kept]), 1e-9).weights
    # its Jacobian is zero in every operator, but the bias would remain: the scale must remove it as well
    found = problem(broken, labels)
    assert found._scales[7] == 0
    assert torch.allclose(minimise(found, 1e-9).weights, left_out, atol=1e-8)


def test_memory_errors_halve_the_batch_and_change_nothing():
    features, labels = records()
    expected = minimise(problem(features, labels), 1e-9).weights
    small = operator()
    plain = small.jvp, small.vjp, small.gram
    for name, method in zip(("jvp", "vjp", "gram"), plain, strict=True):

        def guarded(few, *args, method=method):
            if len(few) > 6:
                raise MemoryError
            return method(few, *args)

        setattr(small, name, guarded)
    tight = SoftmaxProblem(small, features, labels, regularization=0.7, physical_batch_size=32)
    assert torch.allclose(minimise(tight, 1e-9).weights, expected, atol=1e-8)


def releases(found, count, seed=0, width=WIDTH):
    features, labels = records(width=width)
    source = InsecureSeededNoise(seed)
    made = operator(width=width)
    named = [train_once(made, features, labels, found, source) for _ in range(count)]
    return torch.stack([torch.cat([value.reshape(-1) for value in one.values()]) for one in named])


def within(values, std, slack=0.01):
    """Whether the root mean square of all values is `std` within 1 %, over three standard errors of 60,000 values."""
    measured = math.sqrt(float(values.square().mean()))
    return abs(measured / std - 1) < slack


def test_output_noise_of_whole_releases():
    found = plan("output-perturbation", gradient_tolerance=1e-4)
    features, labels = records(width=99)
    made = SoftmaxProblem(operator(width=99), features, labels, regularization=found.regularization)
    residual = releases(found, 200, width=99) - minimise(made, 1e-9).weights
    assert within(residual, found.output_noise_std)
    assert not within(0.98 * residual, found.output_noise_std)
    assert stats.kstest((residual / found.output_noise_std).flatten().numpy(), "norm").pvalue > 1e-3


def test_objective_noise_of_whole_releases():
    """The release determines b up to the output noise: b = -(gradient of the rest of the objective)."""
    found = plan("objective-perturbation")
    features, labels = records(width=99)
    rest = SoftmaxProblem(operator(width=99), features, labels, regularization=found.regularization)
    recovered = torch.stack([-rest.gradient(w, rest.products(w)) for w in releases(found, 200, width=99)])
    # the output noise moves the recovered b by its own size times the curvature
    assert found.output_noise_std * found.regularization < 0.011 * found.noise_std
    assert within(recovered, found.noise_std)
    assert not within(0.98 * recovered, found.noise_std)
    assert stats.kstest((recovered / found.noise_std).flatten().numpy(), "norm").pvalue > 1e-3


def test_releases_lie_on_the_public_grid_of_the_output_noise():
    found = plan("objective-perturbation", output_noise_std=0.5)
    cells = releases(found, 3)
    shift = cells - cells[:1]
    spacing = [float(v) for v in shift[1:].abs().flatten() if v > 0]
    unit = 0.5 * 2.0**-26
    offsets = [s / unit - round(s / unit) for s in spacing]
    assert statistics.median(abs(o) for o in offsets) < 0.26  # of a slightly larger spacing than the unit
    with pytest.raises(ValueError, match="classes"):
        train_once(operator(), *records(), replace(found, classes=4), NoiseSource())


def test_two_runs_draw_different_noise():
    features, labels = records()
    one, two = (train_once(operator(), features, labels, plan(), NoiseSource()) for _ in range(2))
    assert not torch.equal(one["head.weight"], two["head.weight"])


def test_without_privacy_the_minimiser_itself_is_returned():
    found = plan("objective-perturbation", epsilon=math.inf)
    assert (found.noise_std, found.output_noise_std, found.is_noisy) == (0.0, 0.0, False)
    features, labels = records()
    exact = newton(explicit(features), labels, found.regularization, torch.zeros(18, dtype=torch.float64))
    weights = releases(found, 1)[0]
    assert (weights - exact).norm() <= found.gradient_tolerance / found.regularization


@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize(("count", "classes"), [(100, 2), (1437, 10), (60_000, 10), (50_000, 1000)])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0])
def test_plans_meet_their_target_and_waste_nothing(method, count, classes, epsilon):
    found = plan_one_shot(
        method,
        PrivacyConfig(epsilon=epsilon),
        num_records=count,
        num_classes=classes,
        dimension=100_000,
    )
    spent = best_bound(found.mechanism(), delta=found.delta).epsilon
    assert 0.999 * epsilon < spent <= epsilon
    if method == "objective-perturbation":
        # the noise that hides the solver's error is far below the noise of the objective
        assert found.output_noise_std * found.regularization < 0.2 * found.noise_std
        assert quantisation(found.noise_std, 100_000) < 0.3 * found.gradient_tolerance


def test_plans_follow_budget_and_size():
    def chosen(epsilon, count):
        privacy = PrivacyConfig(epsilon=epsilon, delta=1e-6)
        return plan_one_shot(
            "objective-perturbation", privacy, num_records=count, num_classes=10, dimension=1290
        )

    strict, usual, large = chosen(1.0, 1437), chosen(3.0, 1437), chosen(3.0, 20_000)
    assert strict.noise_std > 2 * usual.noise_std
    assert strict.regularization > 2 * usual.regularization
    assert large.regularization < usual.regularization


def test_adjacencies():
    def made(method, adjacency, public_size=None):
        privacy = PrivacyConfig(epsilon=3.0, adjacency=adjacency, public_size=public_size)
        return plan_one_shot(method, privacy, num_records=1000, num_classes=10, dimension=1290)

    for method in ONE_SHOT:
        zero, swap = made(method, "zero-out"), made(method, "replace-one")
        noise = [p.noise_std or p.output_noise_std * p.regularization for p in (zero, swap)]
        assert 1.9 < noise[1] / noise[0] < 2.6
        assert best_bound(swap.mechanism(), delta=swap.delta).epsilon <= 3.0
        moved = [p.output_sensitivity * p.regularization - 2 * p.gradient_tolerance for p in (zero, swap)]
        own = 0.0 if method == "objective-perturbation" else 1.0
        assert moved == pytest.approx([own, 2 * own], abs=1e-12)
    size = made("objective-perturbation", "add-remove", 900)
    assert (size.records, size.delta) == (900, 1e-5)
    with pytest.raises(AccountingError, match="zero-out"):
        made("output-perturbation", "add-remove", 900)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10}, "steps 10 has no meaning"),
        ({"l2_clip_norm": 1.0}, "l2_clip_norm 1 has no meaning"),
        ({"expected_batch_size": 64}, "expected_batch_size 64 has no meaning"),
        ({"sampling": "poisson"}, "poisson sampling has no meaning"),
        ({"certified": True}, "certified"),
    ],
)
@pytest.mark.parametrize("method", ONE_SHOT)
def test_settings_of_stepwise_training_are_refused(method, options, message):
    with pytest.raises(PlanError, match=message):
        plan_one_shot(
            method, PrivacyConfig(epsilon=1.0, **options), num_records=99, num_classes=3, dimension=9
        )


def test_other_bad_input():
    with pytest.raises(PlanError, match="unknown one-shot method"):
        plan_one_shot("dual", PrivacyConfig(epsilon=1.0), num_records=99, num_classes=3, dimension=9)
    with pytest.raises(PlanError, match="at least 2 classes"):
        plan_one_shot(ONE_SHOT[0], PrivacyConfig(epsilon=1.0), num_records=99, num_classes=1, dimension=9)
    features, labels = records()
    with pytest.raises(ValueError, match="regularization must be finite and positive"):
        problem(features, labels, lam=0.0)
    with pytest.raises(ValueError, match="labels must be in"):
        problem(features, labels + 1)
    narrow = HeadOperator(Head().float())
    with pytest.raises(ValueError, match="float64"):
        SoftmaxProblem(narrow, features, labels, regularization=1.0)


def test_plan_states_a_mechanism_with_its_own_numbers():
    found = plan()
    record = found.mechanism()
    assert isinstance(found, OneShotPlan)
    assert (record.noise_std, record.regularization) == (found.noise_std, found.regularization)
    assert (record.gradient_tolerance, record.classes) == (found.gradient_tolerance, CLASSES)
    other = plan("output-perturbation").mechanism()
    assert other.regularization * other.records == pytest.approx(plan("output-perturbation").regularization)

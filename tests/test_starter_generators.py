"""The generators, objectives and judges of recipes/starter."""

import socket
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "recipes" / "starter"
NAMES = ("characters", "fractals", "atoms", "leaves", "silhouettes", "silhouettes+leaves+characters")


@pytest.fixture(autouse=True)
def starter(monkeypatch):
    """The recipe's modules import one another by name; nothing may be downloaded."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a generator used the network"))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def draw(sampler, count=24, seed=0):
    return sampler(count, torch.Generator().manual_seed(seed))


def small_model(size=28, stem="patches", channels=1):
    from stems import build_model

    torch.manual_seed(0)
    architecture = {
        "img_size": size,
        "patch_size": 4,
        "in_chans": channels,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
    }
    return build_model(architecture, stem)


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_draw_equal_images_of_the_promised_shape(name):
    from generators import make_sampler

    sampler = make_sampler(name)
    first, other = draw(sampler), draw(sampler, seed=1)
    again = draw(make_sampler(name))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.parameters.nan_to_num(9), again.parameters.nan_to_num(9))
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (24, 1, 28, 28)
    assert first.images.isfinite().all()
    assert first.images.min() >= 0
    assert first.images.max() <= 1
    assert first.images.std((1, 2, 3)).median() > 0.05
    assert first.labels.shape == (24,)
    assert 0 <= first.labels.min() <= first.labels.max() < sampler.num_classes
    assert first.parameters.shape == (24, sampler.num_parameters)
    assert len({image.numpy().tobytes() for image in first.images}) == 24


@pytest.mark.parametrize("name", ["fractals", "atoms", "leaves", "silhouettes"])
def test_colour_and_other_sizes(name):
    from generators import make_sampler

    images = draw(make_sampler(name, 48, 3), 8).images
    assert images.shape == (8, 3, 48, 48)
    assert 0 <= images.min() <= images.max() <= 1
    assert (images[:, 0] - images[:, 1]).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["fractals", "atoms", "leaves", "silhouettes"])
def test_parameters_vary_and_stay_in_their_unit(name):
    from generators import make_sampler

    parameters = draw(make_sampler(name), 300).parameters
    known = parameters.isfinite()
    assert known.any(0).all()
    middle = parameters.nanmean(0)
    spread = ((parameters - middle).nan_to_num(0).square().sum(0) / known.sum(0)).sqrt()
    assert spread.min() > 0.02
    assert parameters[known].abs().quantile(0.95) < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["characters", "fractals", "atoms", "leaves", "silhouettes"])
def test_classes_differ(name):
    """Variance between classes over that within, of power spectra, which forget place: 1 for random labels."""
    from generators import make_sampler

    drawing = draw(make_sampler(name), 3000)
    images = drawing.images - drawing.images.mean((1, 2, 3), keepdim=True)
    spectra = (torch.fft.rfft2(images).abs() + 0.1).log().flatten(1)

    def ratio(labels):
        groups = [spectra[labels == label] for label in labels.unique()]
        within = sum((g - g.mean(0)).square().sum() for g in groups) / (len(spectra) - len(groups))
        between = sum(len(g) * (g.mean(0) - spectra.mean(0)).square().sum() for g in groups) / (
            len(groups) - 1
        )
        return float(between / within)

    assert ratio(drawing.labels) > 1.2
    assert ratio(drawing.labels[torch.randperm(3000, generator=torch.Generator().manual_seed(0))]) < 1.1


def test_a_mixture_keeps_classes_and_parameters_of_its_parts_apart():
    from generators import make_sampler

    leaves, both = make_sampler("leaves"), make_sampler("leaves+atoms")
    drawing = draw(both, 11)
    assert both.num_classes == leaves.num_classes + make_sampler("atoms").num_classes
    assert torch.equal(drawing.images[:6], draw(leaves, 6).images)
    assert (drawing.labels[:6] < leaves.num_classes).all()
    assert (drawing.labels[6:] >= leaves.num_classes).all()
    assert drawing.parameters[:6, leaves.num_parameters :].isnan().all()
    assert drawing.parameters[6:, : leaves.num_parameters].isnan().all()
    assert drawing.parameters[6:, leaves.num_parameters :].isfinite().all()


def test_unknown_names_are_refused_by_value():
    from generators import make_sampler
    from stems import build_model

    with pytest.raises(ValueError, match="'clouds'"):
        make_sampler("leaves+clouds")
    with pytest.raises(ValueError, match="'dense'"):
        build_model({}, "dense")


def test_characters_have_no_parameters_to_regress():
    from generators import make_sampler
    from objectives import Parameters

    with pytest.raises(ValueError, match="no parameters"):
        Parameters(small_model(), make_sampler("characters"))


OBJECTIVES = ("classes", "parameters", "masked", "bottleneck", "contrastive")


@pytest.mark.parametrize(
    ("objective", "stem"),
    [(objective, "patches") for objective in OBJECTIVES]
    + [("masked", "convolutions"), ("parameters", "convolutions"), ("parameters", "scattering")],
)
def test_the_loss_falls_and_the_class_token_learns(objective, stem):
    from generators import make_sampler
    from objectives import OBJECTIVES

    sampler, model = make_sampler("silhouettes"), small_model(stem=stem)
    torch.manual_seed(0)
    module = OBJECTIVES[objective](model, sampler)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    drawing = draw(sampler, 32)
    for _ in range(40):
        loss = module(drawing, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    limit = 0.985 if objective == "contrastive" else 0.95  # new views at every step make the former slow
    assert sum(losses[-10:]) / 10 < limit * sum(losses[:2]) / 2
    assert model.cls_token.grad.abs().max() > 0


def test_hidden_parameters_do_not_count():
    from generators import make_sampler
    from objectives import Parameters

    sampler = make_sampler("silhouettes")
    module, drawing = Parameters(small_model(), sampler), draw(sampler, 8)
    torch.nn.init.zeros_(module.head[-1].weight)
    torch.nn.init.ones_(module.head[-1].bias)  # answers 1 to everything
    known = drawing.parameters[drawing.parameters.isfinite()].clamp(-2, 2)
    assert 0 < len(known) < drawing.parameters.numel()
    torch.testing.assert_close(module(drawing, torch.Generator()), (1 - known).square().mean())


def test_the_tangent_kernel_is_that_of_gradients_by_autograd():
    from judge import HEADS, constants_of, tangent_kernel
    from objectives import normalise

    from dptaft.tangent.initialise import initialise_head

    model, images = small_model().eval(), torch.rand(5, 1, 28, 28)
    kernel = tangent_kernel(*constants_of(model, images), 4)
    initialise_head(model, HEADS, seed=0)
    parts = [model.blocks[-1], model.norm, model.head]
    weights = [p for part in parts for p in part.parameters()]
    rows = []
    for image in images:
        logits = model(normalise(image[None]))[0]
        rows.append(
            torch.cat(
                [g.flatten() for c in logits for g in torch.autograd.grad(c, weights, retain_graph=True)]
            )
        )
    rows = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    torch.testing.assert_close(kernel, rows @ rows[:4].T, atol=1e-5, rtol=1e-5)


def test_judges_tell_a_task_that_can_be_learned_from_noise():
    from judge import Task, judge

    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(120, 1, 28, 28, generator=generator), torch.arange(120) % 2
    noise = judge(small_model().eval(), {"t": Task(images, labels, 80)})
    images[labels == 1, :, :14] *= 0.3
    found = judge(small_model().eval(), {"t": Task(images, labels, 80)})
    assert min(found.values()) > 0.95
    assert max(noise.values()) < 0.85


def test_pretraining_repeats_itself(monkeypatch, tmp_path):
    import pretrain
    from safetensors.torch import load_file

    def run(folder):
        options = [
            "--width",
            "32",
            "--depth",
            "1",
            "--steps",
            "3",
            "--batch-size",
            "8",
            "--output",
            str(folder),
        ]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", "--generator", "leaves", *options])
        pretrain.main()
        return load_file(folder / "starter.safetensors")

    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert not any(name.startswith("head.") for name in first)
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name])

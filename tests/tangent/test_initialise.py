import pytest
import torch
from torch import nn

from dptaft.tangent.initialise import fresh_class_token, initialise_head, reinitialise_blocks
from dptaft.tangent.model import TangentModel
from tests.tangent.families import DEPTH, FAMILIES, build, images


def new_head(classes, **options):
    model = build("class token")
    initialise_head(model, classes, **options)
    return model.head


def test_random_head_comes_from_its_seed_alone():
    torch.manual_seed(0)
    one = new_head(6, seed=3)
    torch.manual_seed(1)
    two, three = new_head(6, seed=3), new_head(6, seed=4)
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, three.weight)
    assert not one.bias.any()
    assert one.weight.dtype == torch.float64


def test_random_head_has_variance_one_over_width():
    head = new_head(2000, seed=0)
    assert abs(head.weight.var().item() * 24 - 1) < 0.03
    assert abs(head.weight.mean().item()) < 0.003


def test_the_new_head_is_part_of_the_model():
    model = build("class token")
    initialise_head(model, 6, seed=0)
    assert not model.head.training
    assert model(images()).shape == (3, 6)
    assert TangentModel(model, "head").theta()["head.weight"].shape == (6, 24)


def test_given_weights_are_copied():
    weight, bias = torch.randn(5, 24).double(), torch.randn(5).double()
    head = new_head(5, weight=weight, bias=bias)
    assert torch.equal(head.weight, weight)
    assert torch.equal(head.bias, bias)
    assert not new_head(5, weight=weight).bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either"),
        ({"seed": 0, "weight": torch.zeros(5, 24)}, "either"),
        ({"bias": torch.zeros(5), "seed": 0}, "either"),
        ({"weight": torch.zeros(4, 24)}, r"\(4, 24\), expected \(5, 24\)"),
        ({"weight": torch.zeros(5, 24), "bias": torch.zeros(4)}, r"\(4,\), expected \(5,\)"),
    ],
)
def test_unclear_heads_are_refused_before_anything_changes(options, message):
    model = build("class token")
    head = model.head
    with pytest.raises(ValueError, match=message):
        initialise_head(model, 5, **options)
    assert model.head is head


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="at least one class, got 0"):
        initialise_head(build("class token"), 0, seed=0)
    with pytest.raises(ValueError, match="no timm classifier"):
        initialise_head(nn.Linear(2, 2), 5, seed=0)


def test_both_heads_of_a_distilled_model_are_random_and_differ():
    model = build("distilled")
    initialise_head(model, 5, seed=0)
    assert model.head.weight.shape == model.head_dist.weight.shape == (5, 24)
    assert not torch.equal(model.head.weight, model.head_dist.weight)
    with pytest.raises(ValueError, match="two heads"):
        initialise_head(model, 5, weight=torch.zeros(5, 24))


def test_a_zero_head_hides_the_blocks_and_a_random_head_does_not():
    for options, moves in (({"weight": torch.zeros(5, 24)}, False), ({"seed": 0}, True)):
        model = build("class token")
        initialise_head(model, 5, **options)
        tangent = TangentModel(model, "last:1")
        tangent.load_theta({n: torch.ones_like(v) * (n[:4] != "head") for n, v in tangent.theta().items()})
        assert bool(tangent(images()).any()) == moves


@pytest.mark.parametrize(
    "family", ["registers, no embed class", "no biases, rms", "swiglu, inner norms", "beit"]
)
def test_reinitialised_blocks(family):
    models = [build(family, seed=0), build(family, seed=9)]
    before = {name: value.clone() for name, value in models[0].state_dict().items()}
    for model in models:
        reinitialise_blocks(model, 2, seed=5)
    one, two = (model.state_dict() for model in models)
    late = [name for name in one if name.startswith(("blocks.1.", "blocks.2."))]
    assert len(late) > 0
    assert all(torch.equal(one[name], two[name]) for name in late)
    assert all(torch.equal(one[name], before[name]) for name in one if name not in late)
    weight = models[0].blocks[1].mlp.fc2.weight
    assert abs(weight.std().item() / 0.02 - 1) < 0.15
    assert not torch.equal(weight, models[0].blocks[2].mlp.fc2.weight)
    assert (models[0].blocks[2].norm1.weight == 1).all()


def test_parameters_of_a_beit_block_are_known():
    model = build("beit")
    reinitialise_blocks(model, 1, seed=0)
    block = model.blocks[-1]
    assert (block.gamma_2 == 0.1).all()
    assert not block.attn.q_bias.any()
    assert not block.attn.relative_position_bias_table.any()


def test_layer_scale_returns_to_its_initial_value():
    model = build("registers, no embed class")
    reinitialise_blocks(model, 1, seed=0)
    assert (model.blocks[-1].ls1.gamma == 0.1).all()
    assert not (model.blocks[0].ls1.gamma == 0.1).any()


@pytest.mark.parametrize("count", [0, DEPTH + 1, -1])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match=f"cannot re-initialise {count} blocks of a model with {DEPTH}"):
        reinitialise_blocks(build("class token"), count, seed=0)


def test_an_unknown_layer_is_refused_before_anything_changes():
    model = FAMILIES["class token"]()
    model.blocks[-1].mlp.norm = nn.PReLU()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="weight of PReLU"):
        reinitialise_blocks(model, 1, seed=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fresh_class_token_has_the_given_shape_and_size():
    token = fresh_class_token(2000, 0, torch.zeros(1, dtype=torch.float64))
    assert token.shape == (1, 1, 2000)
    assert token.dtype == torch.float64
    assert abs(token.std().item() / 0.02 - 1) < 0.05

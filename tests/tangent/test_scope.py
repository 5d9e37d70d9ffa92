from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from dptaft.tangent.scope import Scope, first_block, tangent_parameter_names
from tests.tangent.families import DEPTH, build


@pytest.mark.parametrize("text", ["head", "all", "last:1", "last:12", "attention:2"])
def test_text_round_trips(text):
    scope = Scope.parse(text)
    assert str(scope) == text
    assert Scope.parse(str(scope)) == scope
    assert hash(scope) == hash(Scope.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "last",
        "last:",
        "last:0",
        "last:-1",
        "last:1.5",
        "head:1",
        "all:2",
        "attention",
        "Last:1",
        "last:1 ",
        "x",
    ],
)
def test_other_text_is_refused(text):
    with pytest.raises(ValueError, match="scope"):
        Scope.parse(text)


@pytest.mark.parametrize(("kind", "depth"), [("blocks", 1), ("last", None), ("last", True), ("head", 1)])
def test_construction_is_validated(kind, depth):
    with pytest.raises(ValueError, match="scope"):
        Scope(kind, depth)


def test_parse_refuses_what_is_not_text():
    with pytest.raises(ValueError, match="3"):
        Scope.parse(3)


def names(family, scope):
    return tangent_parameter_names(build(family), Scope.parse(scope))


def test_head_is_weight_and_bias():
    assert names("class token", "head") == ("head.weight", "head.bias")


def test_distilled_head_is_both_heads():
    assert names("distilled", "head") == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")


def test_last_block_of_a_class_token_model():
    block = f"blocks.{DEPTH - 1}"
    assert names("class token", "last:1") == (
        *(f"{block}.{part}" for part in ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias")),
        *(f"{block}.{part}" for part in ("attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias")),
        *(f"{block}.mlp.{part}" for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")),
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
    )


def test_everything_above_the_blocks_is_in_scope_last():
    assert {n.split(".")[0] for n in names("siglip", "last:1")} == {"blocks", "norm", "attn_pool", "head"}
    assert {n.split(".")[0] for n in names("average pool", "last:1")} == {"blocks", "fc_norm", "head"}


def test_attention_scope_is_projections_and_head():
    assert names("qk-norm", "attention:1") == (
        *(f"blocks.{DEPTH - 1}.attn.{part}" for part in ("qkv.weight", "proj.weight", "proj.bias")),
        *("head.weight", "head.bias"),
    )


def test_attention_scope_knows_separate_biases_and_projections():
    assert f"blocks.{DEPTH - 1}.attn.q_bias" in names("beit", "attention:1")
    assert not any("relative_position" in n or "norm" in n for n in names("beit", "attention:1"))
    assert f"blocks.{DEPTH - 1}.attn.k_proj.weight" in names("eva02", "attention:1")


def test_scopes_are_nested_and_ordered_as_in_the_model():
    model = build("registers, no embed class")
    order = [name for name, _ in model.named_parameters()]
    chain = [
        names("registers, no embed class", s) for s in ("head", "last:1", "last:2", f"last:{DEPTH}", "all")
    ]
    for smaller, larger in pairwise(chain):
        assert set(smaller) < set(larger)
    for chosen in chain:
        assert list(chosen) == [name for name in order if name in set(chosen)]
    assert list(chain[-1]) == order


def test_first_block_counts_from_the_end():
    assert first_block(build("class token"), Scope("last", 1)) == DEPTH - 1
    assert first_block(build("class token"), Scope("attention", DEPTH)) == 0
    with pytest.raises(ValueError, match="does not count"):
        first_block(build("class token"), Scope("all"))


def test_a_scope_deeper_than_the_model_is_refused():
    with pytest.raises(ValueError, match=f"deeper than the model, which has {DEPTH} blocks"):
        names("class token", f"last:{DEPTH + 1}")


def test_a_model_without_blocks_is_refused_but_has_a_head():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=3)
    with pytest.raises(ValueError, match="no blocks"):
        tangent_parameter_names(model, Scope("last", 1))
    assert tangent_parameter_names(model, Scope("head")) == ("fc.weight", "fc.bias")
    assert len(tangent_parameter_names(model, Scope("all"))) == len(list(model.parameters()))


def test_blocks_without_attention_are_refused():
    model = nn.Module()
    model.blocks = nn.Sequential(nn.Linear(2, 2))
    model.head = nn.Linear(2, 2)
    assert tangent_parameter_names(model, Scope("last", 1))[0] == "blocks.0.weight"
    with pytest.raises(ValueError, match="no attention projections"):
        tangent_parameter_names(model, Scope("attention", 1))


def test_a_model_without_head_is_refused():
    model = build("class token")
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="no classification head"):
        tangent_parameter_names(model, Scope("head"))

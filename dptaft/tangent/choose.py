"""Choice of the fastest tangent operator that is exact for a tangent model."""

from __future__ import annotations

from torch import nn

from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.factored import FactoredLastBlock
from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import TangentOperator

_MEMORY_FOR_SPEED = 2


def tangent_operator(model: TangentModel) -> TangentOperator:
    """The head operator, the compiled last block, or the dual operator; ``kind`` of the result says which.

    The boundary that the operator extracts from is always ``model.boundary(images)``. The last block is
    compiled to factors per class where they take at most twice the memory of its tokens (few classes),
    and kept as tokens otherwise.

    >>> import timm
    >>> base = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
    >>> [tangent_operator(TangentModel(base, scope)).kind for scope in ("head", "last:1", "last:2")]
    ['head', 'compiled', 'dual']
    """
    faster = {"features": HeadOperator, "tokens": _compiled}.get(model.cut.kind)
    if faster is not None:
        try:
            operator = faster(model.base)
        except ValueError:
            return DualOperator(model)
        if set(operator.parameter_shapes) == set(model.theta_names):
            return operator
    return DualOperator(model)


def _compiled(base: nn.Module) -> CompiledLastBlock | FactoredLastBlock:
    tokens, classes = CompiledLastBlock(base), FactoredLastBlock(base)
    count = base.patch_embed.num_patches + base.num_prefix_tokens
    cheap = classes.scalars_per_example <= _MEMORY_FOR_SPEED * tokens.scalars_per_example(count)
    return classes if cheap else tokens

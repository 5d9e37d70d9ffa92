"""Choice of the fastest tangent operator that is exact for a tangent model."""

from __future__ import annotations

from dptaft.tangent.compiled import CompiledLastBlock
from dptaft.tangent.dual_operator import DualOperator
from dptaft.tangent.head_operator import HeadOperator
from dptaft.tangent.model import TangentModel
from dptaft.tangent.operator import TangentOperator


def tangent_operator(model: TangentModel) -> TangentOperator:
    """The head operator, the compiled last block, or the dual operator; ``kind`` of the result says which.

    The boundary that the operator extracts from is always ``model.boundary(images)``.

    >>> import timm
    >>> base = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=3)
    >>> [tangent_operator(TangentModel(base, scope)).kind for scope in ("head", "last:1", "last:2")]
    ['head', 'compiled', 'dual']
    """
    faster = {"features": HeadOperator, "tokens": CompiledLastBlock}.get(model.cut.kind)
    if faster is not None and model.fresh_token is None:
        try:
            operator = faster(model.base)
        except ValueError:
            return DualOperator(model)
        if set(operator.parameter_shapes) == set(model.theta_names):
            return operator
    return DualOperator(model)

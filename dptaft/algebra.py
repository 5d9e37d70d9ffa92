"""Arithmetic of tangent weights in files: a weighted sum of tangent models is a tangent model.

    f_lin(x; sum_s a_s theta_s) = sum_s a_s f_lin(x; theta_s)

holds for every a_s where the model is centred (f_lin = J theta), and for sum_s a_s = 1 where it keeps the
offset f(x; w0). Weights are summed in float64 and rounded once; no model is built and torch is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

TRAINED, HEAD = "trained/", "head/"
HOW = ("average", "weighted", "add")

Tensors = Mapping[str, np.ndarray]


class AlgebraError(ValueError):
    """Weights that cannot be added; the message says which and why."""


@dataclass(frozen=True)
class TangentWeights:
    """Content of a weights file.

    Attributes:
        trained: tangent weights theta by name.
        fixed: everything else, which defines the Jacobian (the head).
    """

    trained: Tensors
    fixed: Tensors

    @property
    def num_classes(self) -> int:
        """Number of rows of the head."""
        return len(self.fixed[f"{HEAD}weight"])

    def content(self) -> bytes:
        """The file's bytes."""
        named = {f"{TRAINED}{name}": value for name, value in self.trained.items()} | dict(self.fixed)
        return save({name: np.ascontiguousarray(value) for name, value in named.items()})


def read_weights(path: Path) -> TangentWeights:
    """Read a weights file.

    Raises:
        AlgebraError: the file cannot be read, or holds no tangent weights or no head.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise AlgebraError(f"cannot read {path}: {error}; the run is incomplete or damaged") from None
    trained = {k.removeprefix(TRAINED): v for k, v in tensors.items() if k.startswith(TRAINED)}
    fixed = {k: v for k, v in tensors.items() if not k.startswith(TRAINED)}
    if not trained or f"{HEAD}weight" not in fixed or f"{HEAD}bias" not in fixed:
        raise AlgebraError(f"{path} holds no tangent weights with a head; give the folder of a tangent run")
    return TangentWeights(trained, fixed)


def coefficients(
    how: str, count: int, weights: Sequence[float] | None, *, centered: bool
) -> tuple[float, ...]:
    """One factor per model.

    Args:
        how: ``average`` (1/count each), ``weighted`` (as given) or ``add`` (1 each).
        count: number of models.
        weights: for ``weighted`` only.
        centered: whether the models have no offset; with one, the factors must add up to 1.

    Raises:
        AlgebraError: another number of weights than models, weights that are not finite, or a sum that would
            count the offset f(x; w0) more or less than once.

    >>> coefficients("average", 4, None, centered=False)
    (0.25, 0.25, 0.25, 0.25)
    """
    if how not in HOW:
        raise AlgebraError(f"unknown composition {how!r}; use {', '.join(HOW)}")
    if (how == "weighted") != (weights is not None):
        raise AlgebraError("give weights with the composition 'weighted', and only with it")
    if how == "average":
        return (1.0 / count,) * count
    given = (1.0,) * count if weights is None else tuple(float(weight) for weight in weights)
    if len(given) != count:
        raise AlgebraError(f"there are {len(given)} weights for {count} runs; give one each")
    if not all(math.isfinite(weight) and weight != 0 for weight in given):
        raise AlgebraError(f"weights must be finite and not zero, got {list(given)}; leave such a run out")
    total = math.fsum(given)
    if not centered and not math.isclose(total, 1.0, rel_tol=1e-9):
        raise AlgebraError(
            f"these models keep the offset f(x; w0), so the weights must add up to 1, not {total:g}; "
            "use average, or train with --centered"
        )
    return given


def weighted_sum(parts: Iterable[tuple[float, TangentWeights]]) -> TangentWeights:
    """Sum of a_s theta_s; models with fewer classes count as having zero weights for the others.

    Args:
        parts: factor and weights; read one after the other, the one with most classes first.

    Raises:
        AlgebraError: models with another head or other shapes, or a sum that float32 cannot hold.

    >>> fixed = {"head/weight": np.ones((2, 3)), "head/bias": np.zeros(2)}
    >>> one = TangentWeights({"a": np.full(3, 2.0, np.float32)}, fixed)
    >>> weighted_sum([(0.5, one), (0.25, one)]).trained["a"].tolist()
    [1.5, 1.5, 1.5]
    """
    total: dict[str, np.ndarray] = {}
    first: TangentWeights | None = None
    for factor, part in parts:
        if first is None:
            first = part
            total = {name: np.zeros(value.shape, np.float64) for name, value in part.trained.items()}
        check_same_map(first, part)
        for name, value in part.trained.items():
            rows = total[name] if value.shape == total[name].shape else total[name][: len(value)]
            rows += factor * value.astype(np.float64)
    if first is None:
        raise AlgebraError("there is no run to compose; give at least one")
    with np.errstate(over="ignore"):
        rounded = {name: value.astype(first.trained[name].dtype) for name, value in total.items()}
    if not all(np.isfinite(value).all() for value in rounded.values()):
        raise AlgebraError("the composed weights are not finite; give smaller weights")
    return TangentWeights(rounded, first.fixed)


def check_same_map(whole: TangentWeights, part: TangentWeights) -> None:
    """Refuse weights that multiply another Jacobian.

    A model with C' of the C classes has the first C' rows of the head. Its logits do not change when rows are
    added: row c of the Jacobian depends on row c of the head alone.

    Raises:
        AlgebraError: with the tensor that differs.
    """
    few, many = part.num_classes, whole.num_classes
    if few > many or set(part.fixed) != set(whole.fixed):
        raise AlgebraError("the runs hold different fixed weights; compose runs of one base model")
    for name, value in part.fixed.items():
        rows = whole.fixed[name][:few] if name.startswith(HEAD) else whole.fixed[name]
        if value.shape != rows.shape or not np.array_equal(value, rows):
            raise AlgebraError(
                f"the runs have different {name.replace('/', ' ')}, so their tangent weights multiply "
                "different Jacobians; train them with one head (the same --seed or --head)"
            )
    if set(part.trained) != set(whole.trained):
        raise AlgebraError("the runs train different weights; compose runs of one scope")
    for name, value in part.trained.items():
        own, full = value.shape, whole.trained[name].shape
        is_class_row = few < many and own == (few, *full[1:]) and full[:1] == (many,)
        if own != full and not is_class_row:
            raise AlgebraError(
                f"the runs have {name} with shapes {own} and {full}; compose runs of one model"
            )

"""Class names: declared ones matched to those of a source, and what numbers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dptaft.data.pixels import DataError

_SHOWN = 5


def by_name(labels: Tensor, found: Sequence[str], classes: Sequence[str], source: str) -> Tensor:
    """Labels that number `classes`, from labels (n,) that number the names `found` in the source.

    Raises:
        DataError: other names than those of the source, or labels that have no name.

    >>> by_name(torch.tensor([0, 0, 1]), ["cat", "dog"], ["dog", "cat"], "pets").tolist()
    [1, 1, 0]
    """
    require_same_names(found, classes, source)
    return renumbered(labels, found, classes, source)


def require_same_names(found: Sequence[str], classes: Sequence[str], source: str) -> None:
    """Refuse declared classes that are not the names of the source, in whatever order.

    Raises:
        DataError: with the names that are missing or too many.
    """
    missing = [name for name in found if name not in classes]
    strange = [name for name in classes if name not in found]
    if missing or strange:
        parts = [f"{what} {listed(names)}" for what, names in (("lack", missing), ("add", strange)) if names]
        raise DataError(
            f"{source} names its classes {listed(found)}, and the declared classes {' and '.join(parts)}; "
            "declare the same names, in any order"
        )


def renumbered(labels: Tensor, found: Sequence[str], classes: Sequence[str], source: str) -> Tensor:
    """As `by_name`, but some classes may have no name in the source.

    Raises:
        DataError: a name that is none of the classes, or that is there twice, or a label without a name.
    """
    if len(set(found)) < len(found):
        raise DataError(f"{source} has the class names {listed(found)}, which must differ")
    unknown = [name for name in found if name not in classes]
    if unknown:
        raise DataError(
            f"{source} has the class {unknown[0]!r}, which is none of the classes {listed(classes)}"
        )
    check_numbers(labels, len(found), source)
    if tuple(found) == tuple(classes):
        return labels
    place = {name: number for number, name in enumerate(classes)}
    return torch.tensor([place[name] for name in found], dtype=torch.int64)[labels]


def check_numbers(labels: Tensor, count: int, source: str) -> None:
    """Refuse a label that is no number of `count` classes.

    Raises:
        DataError: with the first such row.
    """
    wrong = torch.nonzero((labels < 0) | (labels >= count)).flatten()
    if len(wrong):
        row = int(wrong[0])
        more = f" ({len(wrong)} of {len(labels)} rows have such labels)" if len(wrong) > 1 else ""
        raise DataError(
            f"row {row} of {source} has the label {int(labels[row])}{more}; expected 0 to {count - 1}"
        )


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

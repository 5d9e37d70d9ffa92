"""Labelled images: a training split to protect, an evaluation split, and the public rule that parts them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dptaft.data.identity import copies_between, copies_within
from dptaft.data.names import by_name
from dptaft.data.pixels import CheckedPixels, DataError, ItemPixels, Pixels, Subset, digests_of, name_of

HOLD_OUT_EVERY = 5
_COMPARED = 1 << 24


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Attributes:
        pixels: the images.
        labels: (n,) int64 class numbers.
        columns: further facts by name, one text per image, such as the site that it comes from.
    """

    pixels: Pixels
    labels: Tensor
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.labels.ndim != 1:
            raise DataError(f"labels have shape {tuple(self.labels.shape)}; expected one number per image")
        if len(self.pixels) != len(self.labels):
            raise DataError(f"there are {len(self.pixels)} images but {len(self.labels)} labels")
        for name, values in self.columns.items():
            if len(values) != len(self.labels):
                raise DataError(f"column {name!r} has {len(values)} values for {len(self.labels)} images")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def unreadable(self) -> dict[int, str]:
        """Number -> why, for images that were skipped; private, for the owner of the data."""
        return dict(getattr(self.pixels, "unreadable", {}))

    def take(self, indices: Sequence[int]) -> Split:
        """The images of these numbers."""
        numbers = torch.as_tensor(indices, dtype=torch.int64)
        columns = {name: tuple(values[i] for i in indices) for name, values in self.columns.items()}
        return Split(Subset(self.pixels, indices), self.labels[numbers], columns)

    def batches(self, size: int, prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Prepared images, stacked in order to batches of at most `size`."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield torch.stack([prepare(self.pixels[i]) for i in range(start, stop)])


@dataclass(frozen=True)
class ImageData:
    """A training split to protect, and an evaluation split.

    Attributes:
        name: for records.
        classes: names, in the order of the class numbers.
        train: records that the privacy claim covers.
        evaluation: records that are never trained on; None where there are none.
        classes_are_public: whether the class list comes from outside the private records.
        is_public: public benchmark images (the claim is computed all the same).
        unstable_under: adjacencies under which one record would move others between the two splits.
        skips_corrupt: an image that cannot be read counts as an empty record.
        held_out: the evaluation images were held out of the given records by the public rule.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    evaluation: Split | None
    classes_are_public: bool
    is_public: bool = False
    unstable_under: tuple[str, ...] = ()
    skips_corrupt: bool = False
    held_out: bool = False

    def __post_init__(self) -> None:
        if len(self.train) == 0:
            raise DataError(f"{self.name} holds no training image")
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class; classification needs at least two")
        if "" in self.classes or len(set(self.classes)) < len(self.classes):
            raise DataError(f"the class names {', '.join(self.classes)} must differ and not be empty")
        for name in self.classes:
            if name != name.encode(errors="replace").decode():
                raise DataError(f"the class name {name!a} is no UTF-8 text; rename the class")
        for split in (self.train, self.evaluation):
            for part in () if split is None else _written(split.labels).split(_COMPARED):
                self._check_labels(part)

    def _check_labels(self, labels: Tensor) -> None:
        if len(labels) and int(labels.min()) < 0:
            raise DataError(f"{self.name} has the label {int(labels.min())}; labels start at 0")
        if len(labels) and int(labels.max()) >= len(self.classes):
            raise DataError(
                f"{self.name} has the label {int(labels.max())} but {len(self.classes)} classes; "
                "declare all classes"
            )

    @classmethod
    def from_torch(
        cls,
        train: Any,
        evaluation: Any = None,
        *,
        classes: Sequence[str],
        name: str = "data",
        is_public: bool = False,
        skip_corrupt: bool = False,
    ) -> ImageData:
        """Images of a map-style PyTorch dataset, whose items are (image, class number).

        An image is a PIL image, a tensor (1 or 3, h, w) or an array (h, w[, 1 or 3]), in uint8 or in [0, 1]
        (see `dptaft.data.as_pixels`). One record is one item, so an item must depend on nothing but its
        own record: no random augmentation, no normalisation by statistics of the data set. Class numbers come
        from the attribute ``targets`` or ``labels`` where the dataset has one, else from reading all items.

        Args:
            train: dataset to protect.
            evaluation: dataset that is never trained on.
            classes: declared names, in the order of the class numbers; matched by name where a dataset names
                its classes in an attribute ``classes``.
            name: for records.
            is_public: a public benchmark.
            skip_corrupt: an item whose image cannot be read counts as an empty record.

        Raises:
            DataError: an item that changes from call to call, images or labels that cannot be used, classes
                with other names than those of the dataset.

        >>> items = [(torch.zeros(1, 8, 8), 0), (torch.ones(1, 8, 8), 1)]
        >>> len(ImageData.from_torch(items, classes=["dark", "bright"]).train)
        2
        """
        held, names = None, tuple(classes)
        if evaluation is not None:
            held = _torch_split(evaluation, f"{name} (evaluation)", skip_corrupt, names)
        split = _torch_split(train, name, skip_corrupt, names)
        return cls(name, names, split, held, True, is_public, skips_corrupt=skip_corrupt)

    def check_adjacency(self, adjacency: str) -> None:
        """Refuse an adjacency under which one record decides on which side of the hold-out others are.

        Raises:
            DataError: the claim would hold for a fixed training split only, not for the data set.
        """
        if adjacency in self.unstable_under:
            raise DataError(
                f"under {adjacency} one record of {self.name} would move others between training and "
                "evaluation (every fifth is held out); give evaluation images of their own, or use zero-out"
            )

    def warn_copies(self) -> None:
        """Tell the owner of pixels that are there twice among the images read so far; never part of a run.

        Copies are neither refused nor moved: on which side of the hold-out a record is must not depend on
        other records, and exact copies are common in public benchmarks. Images that were not read, and those
        of other processes, are not compared.
        """
        own = digests_of(self.train.pixels)
        found = copies_within(own)
        if found is not None:
            names = " and ".join(name_of(self.train.pixels, i) for i in found.first)
            _tell(
                f"{found.count} training images of {self.name} have the pixels of another (first {names}; "
                f"the most frequent is there {found.most} times): the claim is per record, so that an image "
                "that is there k times is protected at the group level k only; keep one of each"
            )
        if self.evaluation is None:
            return
        shared = copies_between(own, digests_of(self.evaluation.pixels))
        if shared is not None:
            first, held = shared.first
            names = f"{name_of(self.train.pixels, first)} and {name_of(self.evaluation.pixels, held)}"
            _tell(
                f"{shared.count} evaluation images of {self.name} have the pixels of a training image (first "
                f"{names}): the accuracy counts images that were trained on; keep one of each"
            )

    def warn_unreadable(self, counts: tuple[int, int] | None = None) -> None:
        """Tell the owner how many images were skipped; a private number, never part of a run.

        Args:
            counts: of training and evaluation images, where other processes have read some of them.
        """
        train, held = counts or (
            len(self.train.unreadable),
            0 if self.evaluation is None else len(self.evaluation.unreadable),
        )
        if train or held:
            _tell(
                f"{train} of {len(self.train)} training images and {held} evaluation images of {self.name} "
                "cannot be read; the former count as empty records, the latter are left out"
            )


def _tell(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _written(labels: Tensor) -> Tensor:
    """The labels, or the one that stands for all where they are a view of one."""
    return labels[:1] if labels.stride(0) == 0 else labels


def _torch_split(dataset: Any, name: str, skip: bool, classes: tuple[str, ...]) -> Split:
    pixels = CheckedPixels(ItemPixels(len(dataset), lambda i: dataset[i][0], name), skip=skip)
    if len(pixels) and not skip and not torch.equal(pixels[0], pixels[0]):
        raise DataError(f"image 0 of {name} differs from call to call; leave random augmentation out")
    labels, found = _torch_labels(dataset, name), getattr(dataset, "classes", None)
    if isinstance(found, list | tuple) and all(isinstance(own, str) for own in found):
        labels = by_name(labels, found, classes, name)
    return Split(pixels, labels)


def _torch_labels(dataset: Any, name: str) -> Tensor:
    for attribute in ("targets", "labels"):
        found = getattr(dataset, attribute, None)
        if found is not None and len(found) == len(dataset):
            return whole_labels(found, name)
    try:
        return whole_labels([int(dataset[i][1]) for i in range(len(dataset))], name)
    except DataError:
        raise
    except Exception as error:  # a foreign dataset may raise errors of any kind
        raise DataError(
            f"cannot read the labels of {name}: {error}; give the dataset an attribute targets"
        ) from error


def whole_labels(values: Any, name: str) -> Tensor:
    """Class numbers as (n,) int64.

    Raises:
        DataError: values that are no whole numbers of that shape.
    """
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch raises errors of any of these kinds
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, int)), 0)
        raise DataError(
            f"row {wrong} of {name} has the label {values[wrong]!r}; expected whole numbers from 0"
        ) from None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if len(labels) == 0:
        return torch.zeros(0, dtype=torch.int64)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DataError(
            f"labels in {name} are {labels.dtype} of shape {tuple(labels.shape)}; expected whole numbers (n,)"
        )
    return labels.to(torch.int64)


def part_evaluation(data: ImageData, *, by_class: bool) -> ImageData:
    """Hold out every fifth image in the order of the source, or of each class: a rule blind to the images."""
    held = _every_fifth(data.train.labels if by_class else None, len(data.train))
    kept = sorted(set(range(len(data.train))) - set(held))
    moved = ("add-remove", "replace-one") if by_class else ("add-remove",)
    return ImageData(
        data.name,
        data.classes,
        data.train.take(kept),
        data.train.take(held),
        data.classes_are_public,
        data.is_public,
        () if data.is_public else moved,
        data.skips_corrupt,
        held_out=True,
    )


def _every_fifth(labels: Tensor | None, count: int) -> list[int]:
    """Numbers 0, 5, 10, ... of the source, or of each class where files are sorted by class."""
    if labels is None:
        return list(range(0, count, HOLD_OUT_EVERY))
    seen: dict[int, int] = {}
    held = []
    for index, label in enumerate(labels.tolist()):
        if seen.setdefault(label, 0) % HOLD_OUT_EVERY == 0:
            held.append(index)
        seen[label] += 1
    return held

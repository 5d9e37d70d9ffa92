"""One process's share of a divided run: its records, their features, and its part of every sum.

Every process has a `Share` and calls the same methods in the same order. The first one decides which
(`dptaft.distributed.team`), and gets the results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dptaft.data import ImageData, Split
from dptaft.distributed.blocks import own_part, own_range
from dptaft.distributed.ranks import Ranks, flattened, unflattened
from dptaft.features import tensors_digest
from dptaft.identity import Identity, content_of, digest_of_record, held_out_marks, record_pairs
from dptaft.learner import Cached, Learner, Progress, digest_of_blocks
from dptaft.training.checkpoint import data_fingerprint
from dptaft.training.clipping import Adjacency, ClippedSum
from dptaft.training.plan import PlanError, Request, Sampling
from dptaft.training.preparation import build_learner
from dptaft.training.sampling import CyclicPartition, GivenParts, Sampler
from dptaft.training.sums import RecordSums, make_sampler, sources

_DIGEST_BYTES = 32
_UNREAD = bytes(_DIGEST_BYTES)


class Share:
    """What one process does for a run that several share.

    Args:
        ranks: the processes.
        data: all records; images of others are never read.
        request: what the run was asked for, with the device of this process.

    Formal guarantees:
        Every record belongs to one process: `own_range` deals numbers, and `features` refuses data in which
        two processes read the same record under different numbers. So the sums of all processes together
        have one vector per drawn record: zeroing, adding, removing or replacing one changes the sum of one
        process alone, by at most the sensitivity of that sum, which is therefore that of the total.
        In Poisson sampling each process draws for its own records, with randomness from its own operating
        system: inclusions are independent at the accounted rate, as in a draw over all records, and the size
        of the whole batch has the binomial distribution from which a certificate pays for batches above its
        largest one; no process has a limit of its own. A cyclic partition is drawn once, over all records, by
        the first process. No process but the first adds noise: once, after the sums have met.
    """

    def __init__(self, ranks: Ranks, data: ImageData, request: Request) -> None:
        self._ranks, self._data, self._request = ranks, data, request
        self._train = own_part(data.train, ranks.rank, ranks.world_size)
        self._held_out: Split | None = None
        if data.evaluation is not None:
            self._held_out = own_part(data.evaluation, ranks.rank, ranks.world_size)
        self._digests: dict[int, bytes] = {}
        self._features: Cached | None = None
        self._held_features: Cached | None = None
        self._sums: RecordSums | None = None

    def build(self) -> Learner:
        """The model, on every process, with the same weights and for the same records.

        Raises:
            PlanError: the processes were given different data or different models.
        """
        self.learner = self._ranks.agree(lambda: build_learner(self._data, self._request))
        weights = self.learner.backbone.model.state_dict()
        mine = {
            "model and head": [tensors_digest(weights), repr(self._request.model)],
            "labels": data_fingerprint([self._data.train.labels]),
            "classes": list(self._data.classes),
            "privacy settings": repr(self._request.privacy),
            "evaluation labels": data_fingerprint(
                [] if self._data.evaluation is None else [self._data.evaluation.labels]
            ),
        }
        first = self._ranks.broadcast(mine)
        self._ranks.agree(lambda: _require_equal(first, mine, self._ranks.rank))
        return self.learner

    def content(self, progress: Progress | None = None) -> Identity:
        """What the ledger knows all records by (empty on other processes than the first)."""
        own = self._ranks.agree(lambda: list(record_pairs(self._train, progress)))
        self._digests = dict(enumerate(digest for digest, _ in own))
        held = self._ranks.agree(lambda: held_out_marks(self._data, self._held_out))
        digests = _bytes(self._ranks.collect(_rows([digest for digest, _ in own])))
        marks = [mark for _, mark in own if mark is not None]
        records = _bytes(self._ranks.collect(_rows([*marks, *held])))
        return Identity(content_of(digests) if self._ranks.is_first else "", tuple(records))

    def features(self, progress: Progress | None = None) -> tuple[Cached | None, Cached | None]:
        """Read the images of this process, training and evaluation; None where it has none.

        On the first process, which always has records, the digest is that of all of them.

        Raises:
            PlanError: no image of any process has finite features, or the processes see the records in
                different orders.
        """
        self._features, self._held_features = self._ranks.agree(lambda: self._read(progress))
        own = self._features
        finite = torch.tensor([0 if own is None else int(own.features["finite"].sum())])
        self._ranks.sum_to_first(finite)
        self._ranks.agree(lambda: self._require_some(int(finite)))
        digests = self._ranks.collect(_rows([self._digests[i] for i in range(len(self._train))]))
        self._ranks.agree(lambda: self._require_once(_bytes(digests)))
        blocks = _bytes(self._ranks.collect(_rows(() if own is None else own.blocks)))
        if own is None:
            return None, self._held_features
        return Cached(own.features, digest_of_blocks(blocks)), self._held_features

    def _read(self, progress: Progress | None) -> tuple[Cached | None, Cached | None]:
        watched = Split(_Watched(self._train, self._digests), self._train.labels)
        own = _features(self.learner, watched, progress, "reading images")
        if self._held_out is None:
            return own, None
        return own, _features(self.learner, self._held_out, progress, "reading evaluation")

    def _require_some(self, finite: int) -> None:
        if self._ranks.is_first and not finite:
            raise PlanError("no image has finite features; check the images and the backbone's weights")

    def _require_once(self, digests: Sequence[bytes]) -> None:
        """Refuse records of several processes that the first one does not have as often itself.

        Digests in the order of the numbers: `own_range` deals ascending runs. Each record that was read once
        is in one sum. For one that several processes read, the first process looks at its own records of the
        same numbers: equal copies in the data may be in several sums, a record in another place may not.
        Records that could not be read are in no sum.
        """
        if not self._ranks.is_first:
            return
        places: dict[bytes, list[int]] = defaultdict(list)
        for number, digest in enumerate(digests):
            places[digest].append(number)
        places.pop(_UNREAD, None)
        mine = len(self._train)
        for digest, numbers in places.items():
            for number in numbers if len(numbers) > 1 and numbers[-1] >= mine else ():
                label, pixels = int(self._data.train.labels[number]), self._data.train.pixels[number]
                if digest_of_record(label, pixels) != digest:
                    raise PlanError(
                        "the processes see the records in different orders, so that some would count twice; "
                        "give all processes the same files in the same order"
                    )

    def begin(
        self, sampling: Sampling, l2_clip_norm: float, adjacency: Adjacency, whole: Sampler | None = None
    ) -> None:
        """Get ready for steps.

        Args:
            sampling: of the plan.
            l2_clip_norm: of one record's gradient.
            adjacency: of the claim.
            whole: on the first process the sampler over all records, whose partition it deals.
        """
        sampler = self._sampler(sampling, whole)

        def make() -> None:
            if sampler is not None and self._features is not None:
                self._sums = RecordSums(
                    self.learner,
                    self._features.features,
                    self._train.labels,
                    sampler,
                    loss=self._request.model.loss,
                    l2_clip_norm=l2_clip_norm,
                    adjacency=adjacency,
                )

        self._ranks.agree(make)
        self._clip, self._adjacency = l2_clip_norm, adjacency

    def _sampler(self, sampling: Sampling, whole: Sampler | None) -> Sampler | None:
        """Draws among the records of this process; None where it has none."""
        if sampling.kind != "cyclic-partition":
            _, choice = sources(self._request, self._ranks.rank)
            return make_sampler(sampling, len(self._train), choice) if len(self._train) else None
        mine, parts = torch.empty(len(self._train), dtype=torch.int64), None
        if isinstance(whole, CyclicPartition):
            numbers, size = whole.part_numbers(), self._ranks.world_size
            owned = [own_range(len(numbers), rank, size) for rank in range(size)]
            parts = [numbers[own.start : own.stop] for own in owned]
        self._ranks.deal(parts, mine)
        return GivenParts(mine, sampling.parts) if len(mine) else None

    def step(self) -> tuple[ClippedSum, int]:
        """The clipped sum at the first process's weights, and the batch size; on others their own part."""
        parameters = self.learner.parameters
        self._share_weights(parameters)
        clipped, size = self._ranks.agree(self._own_sum)
        names = list(parameters)
        counts = torch.tensor([size, clipped.num_nonfinite], device=self.learner.device)
        flat = flattened([*(clipped.value[name] for name in names), counts], torch.float64)
        self._ranks.sum_to_first(flat)
        total = dict(zip(names, unflattened(flat, [parameters[name].shape for name in names]), strict=True))
        size, bad = (int(count) for count in flat[-2:])
        return ClippedSum(total, self._clip, self._adjacency, num_nonfinite=bad), size

    def _own_sum(self) -> tuple[ClippedSum, int]:
        if self._sums is not None:
            return self._sums.next_sum(self.learner.parameters)
        zeros = {
            name: torch.zeros_like(p, dtype=torch.float64) for name, p in self.learner.parameters.items()
        }
        return ClippedSum(zeros, self._clip, self._adjacency), 0

    @torch.no_grad()
    def _share_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Overwrite weights with those of the first process."""
        flat = flattened(list(weights.values()))
        self._ranks.broadcast_tensor(flat)
        if not self._ranks.is_first:
            parts = unflattened(flat, [weight.shape for weight in weights.values()])
            for weight, part in zip(weights.values(), parts, strict=True):
                weight.copy_(part)

    def logits(self, dtype: str, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Logits of all evaluation images at the first process's weights, and which images are finite.

        Args:
            dtype: of the weights.
            weights: on the first process.
        """
        if weights is None:
            kind = getattr(torch, dtype)
            weights = {name: torch.empty_like(p, dtype=kind) for name, p in self.learner.parameters.items()}
        self._share_weights(weights)
        logits, finite = self._ranks.agree(lambda: self._own_logits(weights))
        return self._ranks.collect(logits), self._ranks.collect(finite).bool()

    def _own_logits(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        held, classes = self._held_features, len(self._data.classes)
        if held is None:
            return torch.empty(0, classes), torch.empty(0, dtype=torch.uint8)
        return self.learner.logits(held.features, weights), held.features["finite"].to(torch.uint8)

    def unreadable(self) -> tuple[int, int]:
        """How many images could not be read: of the records, and of the evaluation images (private)."""
        held = 0 if self._held_out is None else len(self._held_out.unreadable)
        counts = torch.tensor([len(self._train.unreadable), held])
        self._ranks.sum_to_first(counts)
        return int(counts[0]), int(counts[1])


class _Watched:
    """Images of which every one that is read leaves its digest; nothing is read or hashed a second time."""

    def __init__(self, split: Split, digests: dict[int, bytes]) -> None:
        self._split, self._digests = split, digests

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> Tensor:
        pixels = self._split.pixels[index]
        if not bool(torch.isfinite(pixels).all()):
            self._digests[index] = _UNREAD
        elif index not in self._digests:
            self._digests[index] = digest_of_record(int(self._split.labels[index]), pixels)
        return pixels


def _features(learner: Learner, split: Split, progress: Progress | None, label: str) -> Cached | None:
    return learner.features(split, progress, label) if len(split) else None


def _rows(digests: Sequence[bytes]) -> Tensor:
    """Digests as rows (n, 32) of bytes."""
    if not digests:
        return torch.empty(0, _DIGEST_BYTES, dtype=torch.uint8)
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, _DIGEST_BYTES)


def _bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.numpy()]


def _require_equal(first: Mapping[str, object], own: Mapping[str, object], rank: int) -> None:
    for name, value in first.items():
        if own[name] != value:
            raise PlanError(
                f"process {rank} has other {name} than the first one; give all processes the same command "
                "and the same files"
            )

"""Training of disjoint shards of one data set: one run each, every record's features computed once.

Which shard a record is in depends on its position and on random numbers, or on a column of its own row, never
on other records or their pixels. Neighbouring data sets (zero-out) therefore differ within one shard, and the
shards compose in parallel. Public are the names of the shards and the number of records of each.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dptaft.backends import BackendConfig
from dptaft.budgeting import default_ledger, open_account
from dptaft.data import ImageData
from dptaft.identity import content_digest
from dptaft.learner import Cached, Learner, Progress
from dptaft.runs import OutputLostError, Run, check_output
from dptaft.shards.assignment import Assignment, assign, folder_name, named_assignment
from dptaft.shards.collection import Collection, Shard, ShardError, load_collection
from dptaft.shards.records import Record, Records, load_records, write_trail
from dptaft.shards.requests import Source, described, make_request, stored_request, with_delta
from dptaft.training.account import Account
from dptaft.training.finish import rehearse, require_writable_names
from dptaft.training.plan import Request
from dptaft.training.preparation import Prepared, build_learner, prepare
from dptaft.training.steps import TrainingInterruptedError
from dptaft.training.trainer import check_folders, partial_folder, train_prepared

if TYPE_CHECKING:
    from torch import Tensor


def train_shards(
    data: str | ImageData = "digits",
    shards: int | str | Sequence[str] = 10,
    *,
    epsilon: float,
    output: str | Path,
    public_seed: int | None = None,
    optimizer: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    public_data: bool = False,
    skip_corrupt: bool = False,
    ledger: str | Path | None = "auto",
    resume: bool = False,
    backend: BackendConfig = BackendConfig(),  # noqa: B008 - frozen
    progress: Progress | None = None,
    **options: Any,
) -> Collection:
    """Train one run per shard, below one parent folder.

    Args:
        data: as for `dptaft.train`.
        shards: a number of random shards, the name of a column of the data (site, owner), or one name per
            record.
        epsilon: of every shard; since shards are disjoint, also of all of them together.
        output: the parent folder, which must not exist.
        public_seed: draw random shards from this public number; None draws them secretly.
        optimizer: as for `dptaft.train`.
        classes: declared class names.
        public_data: as for `dptaft.train`.
        skip_corrupt: as for `dptaft.train`.
        ledger: budget ledger that is charged: ``auto`` for ``ledger.sqlite`` beside the parent folder, a
            path, or None for none.
        resume: continue an interrupted call with the same arguments; finished shards are kept.
        backend: where shards are trained; this process, one after the other, unless said otherwise.
        progress: called with (stage, done, total).
        options: further arguments of `dptaft.train`; the delta of all shards defaults to that of the whole
            data.

    Raises:
        ValueError: a request that cannot be met; one line that names the value and the remedy.
        TrainingInterruptedError: a signal asked for a stop.

    Formal guarantees:
        Every shard's run is (epsilon, delta)-differentially private for the records of that shard, and all
        runs together for every record of the data, under zero-out adjacency: one record's pixels and label,
        its place and shard staying what they are. Names and sizes of shards are public.
    """
    source = Source.of(data, classes, public_data, skip_corrupt)
    images = source.images
    request = make_request(source.name, epsilon, optimizer, options)
    images.check_adjacency(request.privacy.adjacency)
    request = with_delta(request, len(images.train))
    parent = Path(output)
    if resume:
        collection, records = _continued(parent, images, request)
        if isinstance(shards, int) and shards != len(collection.shards):
            raise ShardError(f"{parent} was begun with {len(collection.shards)} shards, not {shards}")
    else:
        check_output(parent)
        require_writable_names(images, request)
        assignment = assign(images, shards, public_seed)
        collection, records = _begin(parent, source, request, assignment)
    train_missing(collection, ShardTrainer(collection, images, request, records, ledger, progress), backend)
    return collection


def add_shard(
    parent: str | Path,
    data: str | ImageData,
    *,
    name: str | None = None,
    classes: Sequence[str] | None = None,
    public_data: bool = False,
    skip_corrupt: bool = False,
    ledger: str | Path | None = "auto",
    resume: bool = False,
    backend: BackendConfig = BackendConfig(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> Collection:
    """Train one more shard from new data, with the options of the shards that are there.

    Args:
        parent: folder of the shards.
        data: records, none of which is in another shard. Their classes begin with those of the shards; new
            classes come after them.
        name: of the shard; None takes the next number.
        classes: declared class names.
        public_data: as for `dptaft.train`.
        skip_corrupt: as for `dptaft.train`.
        ledger: as for `train_shards`.
        resume: continue where an interrupted call stopped.
        backend: as for `train_shards`.
        progress: called with (stage, done, total).

    Raises:
        ValueError: a name in use, other classes, or a record that another shard holds.
        TrainingInterruptedError: a signal asked for a stop.
    """
    folder = Path(parent)
    collection, records = load_collection(folder), load_records(folder)
    source = Source.of(data, classes, public_data, skip_corrupt)
    images = source.images
    request = stored_request(collection, source.name)
    if resume:
        missing = [shard for shard in collection.shards if not (folder / shard.folder).exists()]
        if not missing:
            raise ShardError(f"no shard of {folder} is unfinished; leave --resume out")
        _check_numbers(records, missing[0].name, records.digests(images.train))
    else:
        require_writable_names(images, request)
        collection = _grown(collection, records, source, _next_name(records) if name is None else name)
    train_missing(collection, ShardTrainer(collection, images, request, records, ledger, progress), backend)
    return collection


def _next_name(records: Records) -> str:
    """The first number that no shard has or had."""
    return str(max((int(name) for name in records.shards if name.isdecimal()), default=0) + 1)


def _grown(collection: Collection, records: Records, source: Source, name: str) -> Collection:
    """The collection with one more shard, written to disk."""
    data, parent = source.images, collection.path
    if name in records.shards:
        raise ShardError(f"{parent} has or had a shard {name!r}; choose another name")
    named_assignment([*records.shards, name], "")
    few, many = sorted((collection.classes, data.classes), key=len)
    if many[: len(few)] != few:
        raise ShardError(
            f"the classes {', '.join(data.classes)} do not continue {', '.join(collection.classes)}; "
            "declare the old classes first, then the new ones"
        )
    if few != many and collection.request["model"].get("unit_jacobian"):
        raise ShardError(
            "the shards divide every Jacobian by its norm over all classes, which new classes change; train "
            "all shards again with the longer list of classes"
        )
    digests = records.digests(data.train)
    records.check_apart(name, digests)
    records.shards[name] = [Record(i, digest) for i, digest in enumerate(digests)]
    records.contents[name] = content_digest(data.train)
    shard = Shard(name, folder_name(name), len(digests), "added later", source.arguments)
    grown = dataclasses.replace(collection, shards=(*collection.shards, shard), classes=many)
    records.save(parent)
    grown.save()
    return grown


def _begin(
    parent: Path, source: Source, request: Request, assignment: Assignment
) -> tuple[Collection, Records]:
    """Write the public list of shards and the private list of records, before anything is trained."""
    records, data = Records(), source.images
    digests, content = records.digests(data.train), content_digest(data.train)
    for name in assignment.shards:
        numbers = [i for i, own in enumerate(assignment.names) if own == name]
        if assignment.by_column:
            records.check_apart(name, [digests[i] for i in numbers])
        records.shards[name] = [Record(i, digests[i]) for i in numbers]
        records.contents[name] = content
    data.warn_copies()
    shards = tuple(
        Shard(name, folder_name(name), len(records.shards[name]), assignment.rule, source.arguments)
        for name in assignment.shards
    )
    collection = Collection(parent, secrets.token_hex(8), shards, described(request), data.classes)
    parent.mkdir(parents=True)
    records.save(parent)
    collection.save()
    return collection, records


def _continued(parent: Path, data: ImageData, request: Request) -> tuple[Collection, Records]:
    collection, records = load_collection(parent), load_records(parent)
    if described(request) != dict(collection.request):
        raise ShardError(f"{parent} was begun with other options; continue it with the same ones")
    digests = records.digests(data.train)
    for shard in collection.shards:
        _check_numbers(records, shard.name, digests)
    return collection, records


def _check_numbers(records: Records, name: str, digests: Sequence[str]) -> None:
    for record in records.shards[name]:
        if record.number >= len(digests) or digests[record.number] != record.digest:
            raise ShardError(f"the data is not what shard {name} was made from; restore it")


def train_missing(collection: Collection, trainer: ShardTrainer, backend: BackendConfig) -> None:
    """Train every shard without a run, in this process or through a backend."""
    from dptaft.shards.parallel import PRIVATE, Place

    if backend.in_this_process and not (collection.path / PRIVATE).exists():
        for shard in collection.shards:
            if not (collection.path / shard.folder).exists():
                trainer.train(shard)
    else:
        Place(trainer, backend).train_missing()
    trainer.data.warn_unreadable()


class ShardTrainer:
    """Trains shards of one data set with one model; a record is read when the plan of its shard is reserved.

    Args:
        collection: the parent folder.
        data: the whole data.
        request: of every shard.
        records: which record is in which shard.
        ledger: path of the budget ledger; None charges none.
        progress: called with (stage, done, total).
    """

    def __init__(
        self,
        collection: Collection,
        data: ImageData,
        request: Request,
        records: Records,
        ledger: str | Path | None,
        progress: Progress | None,
    ) -> None:
        self.collection, self.data, self.request, self.records = collection, data, request, records
        self.progress, self._ledger = progress, ledger
        self._learner: Learner | None = None
        self._start: dict[str, Tensor] = {}
        self._held_out: Cached | None = None

    def train(self, shard: Shard, numbers: Sequence[int] | None = None) -> Run:
        """Train one shard, or go on with it where it was interrupted.

        Args:
            shard: which.
            numbers: of its records in the data; None takes those that it was made from.
        """
        output = self.collection.path / shard.folder
        resume = partial_folder(output).is_dir()
        check_folders(output, resume)
        try:
            run = self.fit(shard, output, self.account(shard, output, resume), numbers)
        except OutputLostError as error:
            raise OutputLostError(f"shard {shard.name}: {error}") from error
        except TrainingInterruptedError:
            raise TrainingInterruptedError(
                f"stopped in shard {shard.name}; give the same command again to go on (dptaft train with "
                "--resume)"
            ) from None
        self.note(shard, run)
        return run

    def fit(self, shard: Shard, output: Path, account: Account, numbers: Sequence[int] | None = None) -> Run:
        """Train one shard into a folder, on an account; an unfinished run beside it is continued.

        Raises:
            TrainingInterruptedError: a signal asked for a stop.
        """
        own = self.numbers(shard) if numbers is None else list(numbers)
        part, prepared = self._part(own), self.plan(shard, own)

        def features() -> tuple[Cached, Cached | None]:
            cached = prepared.learner.features(part.train, self.progress, "reading images")
            if self.data.evaluation is not None and self._held_out is None:
                self._held_out = prepared.learner.features(
                    self.data.evaluation, self.progress, "reading evaluation"
                )
            return cached, self._held_out

        return train_prepared(
            prepared,
            part,
            self.request,
            output,
            partial_folder(output),
            features,
            account=account,
            progress=self._staged(shard),
            sections={"shard": self._section(shard, len(own))},
        )

    def plan(self, shard: Shard, numbers: Sequence[int] | None = None) -> Prepared:
        """Every public decision about a shard; no private image is read."""
        own = self.numbers(shard) if numbers is None else numbers
        return prepare(self._part(own), self.request, self._untrained())

    def rehearse(self, shard: Shard, output: Path, prepared: Prepared) -> None:
        """Write the run of a shard with blank weights and remove it, before anything is charged."""
        count = len(self.numbers(shard))
        rehearse(output, self.data, self.request, prepared, {"shard": self._section(shard, count)})

    def numbers(self, shard: Shard) -> list[int]:
        """Of the records that a shard was made from."""
        return [record.number for record in self.records.shards[shard.name]]

    def note(self, shard: Shard, run: Run) -> None:
        """Write a finished shard into the trail."""
        count = run.config["shard"]["records"]
        write_trail(self.collection.path, "train", shard=shard.name, run=run.id, records=count)

    def account(self, shard: Shard, output: Path, resume: bool) -> Account:
        """Where a shard is charged: as one part of its partition, to the data set that it was made from.

        One that was paid for when other processes were to train it is not charged again.
        """
        from dptaft.shards.parallel import paid_before

        payment = paid_before(self, shard, output)
        if payment is not None:
            return payment.account(output.name, partial_folder(output))
        return open_account(
            self.data,
            self.request,
            output,
            ledger=self.ledger,
            part=(self.collection.partition, shard.name),
            content=self.records.contents[shard.name],
            resume=resume,
            progress=self.progress,
        )

    @property
    def ledger(self) -> Path | None:
        """The budget ledger; None for none."""
        auto = self._ledger is not None and str(self._ledger) == "auto"
        found = default_ledger(self.collection.path) if auto else self._ledger
        return None if found is None else Path(found)

    def _part(self, numbers: Sequence[int]) -> ImageData:
        return dataclasses.replace(self.data, train=self.data.train.take(numbers))

    def _untrained(self) -> Learner:
        """The shared model, with its weights back where training starts."""
        if self._learner is None:
            self._learner = build_learner(self.data, self.request)
            self._start = {k: p.detach().clone() for k, p in self._learner.parameters.items()}
        with torch.no_grad():
            for name, parameter in self._learner.parameters.items():
                parameter.copy_(self._start[name])
        return self._learner

    def _staged(self, shard: Shard) -> Progress | None:
        report = self.progress
        if report is None:
            return None
        return lambda stage, done, total: report(f"shard {shard.name}: {stage}", done, total)

    def _section(self, shard: Shard, records: int) -> dict[str, Any]:
        return {
            "partition": self.collection.partition,
            "name": shard.name,
            "assignment": shard.assignment,
            "records": records,
        }

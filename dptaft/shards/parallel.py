"""Shards that other processes or machines train at the same time: paid by the parent, one execution each.

``.parallel`` in the parent folder (mode 0700) holds ``attempts`` (`dptaft.backends.attempts`), ``jobs`` (what
the backend writes), ``paid`` (the ledger entry of every shard) and ``finished`` (which shards were begun and
trained). A part of a partition costs the same whoever trains it, so the composition of shards is unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from pathlib import Path

import torch

from dptaft.backends import BackendConfig
from dptaft.backends.attempts import Attempt, Attempts, StopRequestedError
from dptaft.backends.driver import Work, run_work
from dptaft.backends.holding import hold
from dptaft.budgeting import open_account
from dptaft.identity import record_marks
from dptaft.prepaid import Bill, Payment, charge
from dptaft.runs import load_run
from dptaft.shards.collection import Shard, ShardError, load_collection
from dptaft.shards.records import load_records, read_trail
from dptaft.shards.requests import Source
from dptaft.shards.training import ShardTrainer
from dptaft.training.plan import Request
from dptaft.training.steps import TrainingInterruptedError
from dptaft.training.trainer import partial_folder

PRIVATE = ".parallel"
_PAID, _FINISHED = "paid", "finished"


class Place:
    """The parent's side: pays for shards, hands them out, takes them in.

    Args:
        trainer: knows the shards, their plans and their ledger.
        backend: where they are trained.
    """

    def __init__(self, trainer: ShardTrainer, backend: BackendConfig) -> None:
        self._trainer, self._config = trainer, backend
        self._home = trainer.collection.path
        self._root = self._home / PRIVATE
        self._noted: set[str] = set()

    def train_missing(self) -> None:
        """Train every shard that has no run.

        Raises:
            ShardError: shards that could not be trained, or whose data other processes cannot load.
            HeldError: another process works on these shards.
            LedgerError: the budget does not permit a shard; nothing is trained then.
            TrainingInterruptedError: a signal asked for a stop.

        Formal guarantees:
            This process alone opens the ledger; every shard is charged for its whole plan, as its part of the
            partition, before any of them is handed out. What holds when executions are lost is said by
            `Attempts` and `PrepaidAccount`.
        """
        self._root.mkdir(mode=0o700, exist_ok=True)
        with hold(self._root), contextlib.ExitStack() as stack:
            backend = None
            if not self._config.in_this_process:
                backend = self._config.open((self._root / "jobs").absolute())
                stack.callback(backend.close)
            attempts = Attempts(self._root / "attempts", self._home)
            failed = attempts.recover((lambda job: False) if backend is None else backend.has_ended)
            self._complete_trail()
            missing = self._missing(failed)
            if backend is not None:
                work = self._paid_work(missing)
                total = len(work)
                for outcomes in run_work(work, backend, attempts, self._config):
                    self._complete_trail()
                    failed |= {name: error for name, error in outcomes.items() if error is not None}
                    if self._trainer.progress is not None:
                        left = len(self._missing(failed))
                        self._trainer.progress("training shards", total - left, total)
            for shard in self._missing(failed):
                self._trainer.train(shard)
            attempts.close()
        if failed:
            name, error = next(iter(failed.items()))
            raise ShardError(
                f"{len(failed)} of the shards were not trained ({name}: {error}); the same command with "
                "--resume tries again"
            )
        shutil.rmtree(self._root / "jobs", ignore_errors=True)

    def _missing(self, failed: dict[str, str]) -> list[Shard]:
        return [
            shard
            for shard in self._trainer.collection.shards
            if not (self._home / shard.folder).exists() and shard.folder not in failed
        ]

    def _paid_work(self, missing: list[Shard]) -> list[Work]:
        """One piece of work per shard, all of them paid for; what this process began alone stays its own."""
        mine = [shard for shard in missing if (self._partial(shard) / "ledger.json").exists()]
        for shard in mine:
            self._trainer.train(shard)
        others = [shard for shard in missing if shard not in mine]
        for shard in others:
            if "spec" not in shard.source:
                raise ShardError(
                    "other processes cannot load images that were given in memory; give the data as a path "
                    "or name, or train in one process"
                )
        payments = {shard.name: pay(self._trainer, shard, self._home / shard.folder) for shard in others}
        config = self._config
        here = config.most_jobs if config.kind == "local" else 1
        threads = config.threads or max(1, (os.cpu_count() or 1) // here)
        return [
            Work(
                (shard.folder,),
                train_one,
                (self._home.absolute(), shard.name, self._trainer.request, payments[shard.name], threads),
            )
            for shard in others
        ]

    def _partial(self, shard: Shard) -> Path:
        return partial_folder(self._home / shard.folder)

    def _complete_trail(self) -> None:
        """Note the runs that appeared: also those that an earlier parent did not live to note."""
        known: set[str] | None = None
        for shard in self._trainer.collection.shards:
            if shard.folder in self._noted or not (self._home / shard.folder).is_dir():
                continue
            if known is None:
                known = {str(line.get("run")) for line in read_trail(self._home)}
            run = load_run(self._home / shard.folder)
            if run.id not in known:
                self._trainer.note(shard, run)
            self._noted.add(shard.folder)


def train_one(
    attempt: Attempt, parent: Path, name: str, request: Request, payment: Payment, threads: int
) -> dict[str, str]:
    """One shard, in whatever process a backend chose; it reads its records itself.

    Raises:
        StopRequestedError: a signal asked for a stop.
    """
    torch.set_num_threads(threads)
    trainer = _trainer(parent, name, request)
    shard = trainer.collection.shard(name)
    for record in trainer.records.shards[name]:  # the same path may hold other data on another machine
        pixels = trainer.data.train.pixels
        if record.number >= len(pixels) or trainer.records.digest(pixels[record.number]) != record.digest:
            raise ShardError(f"the data on this machine is not what shard {name} was made from")
    output = attempt.work / shard.folder
    leased = dataclasses.replace(payment, lease=attempt.lease)
    try:
        trainer.fit(shard, output, leased.account(shard.folder, partial_folder(output)))
    except TrainingInterruptedError:
        raise StopRequestedError from None
    return {}


_KEPT: dict[tuple[Path, str], ShardTrainer] = {}


def _trainer(parent: Path, name: str, request: Request) -> ShardTrainer:
    """The trainer of this process: shards that follow each other share the model and evaluation images."""
    collection = load_collection(parent)
    shard = collection.shard(name)
    key = (parent, repr((collection.partition, dict(shard.source), request)))
    if key not in _KEPT:
        _KEPT.clear()
        images = Source.again(shard, None).images
        _KEPT[key] = ShardTrainer(collection, images, request, load_records(parent), None, None)
    return _KEPT[key]


def pay(trainer: ShardTrainer, shard: Shard, output: Path) -> Payment:
    """Charge one shard for its whole plan, or find that it was charged; without a ledger, say why not.

    Raises:
        LedgerError: the budget does not permit it.
        PaymentError: it was charged for something else.
    """
    root, plan = trainer.collection.path / PRIVATE, trainer.plan(shard)
    if trainer.ledger is None or not trainer.request.privacy.is_private:
        account = open_account(
            trainer.data,
            trainer.request,
            output,
            ledger=trainer.ledger,
            content=trainer.records.contents[shard.name],
        )
        return Payment(account.commit(plan.spending()), {})
    bill = Bill(
        plan.spending(),
        trainer.records.contents[shard.name],
        trainer.data.name,
        output.name,
        (trainer.collection.partition, shard.name),
        lambda: record_marks(trainer.data),
    )
    pointer = root / _PAID / f"{output.name}.json"
    if not pointer.exists():
        trainer.rehearse(shard, output, plan)
    pointer.parent.mkdir(mode=0o700, exist_ok=True)
    fields = charge(bill, trainer.ledger, pointer)
    return Payment(fields, {output.name: plan.spending()}, (root / _FINISHED).absolute())


def paid_before(trainer: ShardTrainer, shard: Shard, output: Path) -> Payment | None:
    """What an earlier call paid for a shard that other processes were to train; None where it did not.

    Raises:
        ShardError: it did, and no ledger is given now.
    """
    if not (trainer.collection.path / PRIVATE / _PAID / f"{output.name}.json").exists():
        return None
    if trainer.ledger is None:
        raise ShardError(f"shard {shard.name} was charged to a ledger; leave --no-ledger out")
    return pay(trainer, shard, output)

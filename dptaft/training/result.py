"""A result on its way from training to its run folder: what was paid for can be written until it is written.

Before the charge is made final, weights, executed steps and metrics are durable in the private folder of the
unfinished run. Whatever fails afterwards, a resumed run writes them; of the records it only sees whether they
are the same.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dptaft.data import Split
from dptaft.learner import PixelDigest
from dptaft.runs import OutputLostError, Run, load_run, new_run
from dptaft.training.account import Account, Spending
from dptaft.training.checkpoint import (
    GracefulStop,
    ResumeError,
    data_fingerprint,
    require_same,
    write_atomically,
)
from dptaft.training.marks import RESULT
from dptaft.training.plan import Request, plain
from dptaft.training.preparation import Prepared, PreparedOneShot
from dptaft.training.steps import Trained
from dptaft_accounting.ledger import LedgerError

_HEADER, _FORMAT = "dptaft_result", 1
_SPARE = "room"

Metrics = list[dict[str, Any]]


def identity(prepared: Prepared | PreparedOneShot, request: Request, labels: Tensor) -> dict[str, Any]:
    """What must be the same when a kept result is written: all of the request, the model, the labels."""
    found = {
        "privacy": plain(request.privacy),
        "model": plain(request.model),
        "optimizer": dict(request.optimizer),
        "plan": plain(prepared.plan),
        "backbone": prepared.learner.backbone.digest,
        "data": request.data,
        "labels": data_fingerprint([labels]),
    }
    return dict(json.loads(json.dumps(found, default=str)))


@contextlib.contextmanager
def spare_room(partial: Path, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold as much room in a private folder as the result needs: for a result that cannot be had again.

    Raises:
        OSError: there is none.
    """
    partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    size = sum(value.numel() * value.element_size() for value in weights.values())
    write_atomically(partial / _SPARE, bytes(size + (1 << 16)))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (partial / _SPARE).unlink()


def keep_result(
    partial: Path, same: Mapping[str, Any], trained: Trained, metrics: Sequence[Mapping[str, Any]] | None
) -> None:
    """Write a result durably where that is possible; `metrics` is None before the evaluation.

    A disk that takes it no more is no reason to stop: the run itself may still be written.
    """
    with contextlib.suppress(OSError):
        _keep(partial, same, trained, metrics)


def _keep(
    partial: Path, same: Mapping[str, Any], trained: Trained, metrics: Sequence[Mapping[str, Any]] | None
) -> None:
    partial.mkdir(mode=0o700, parents=True, exist_ok=True)
    header = {
        "format": _FORMAT,
        "identity": dict(same),
        "l2_clip_norm": trained.l2_clip_norm,
        "executed": trained.executed,
        "completed": trained.completed,
        "processes": trained.processes,
        "images": trained.images,
        "metrics": metrics,
    }
    own = {name: value.detach().cpu().clone().contiguous() for name, value in trained.weights.items()}
    content = save(own, {_HEADER: json.dumps(header)})
    try:
        write_atomically(partial / RESULT, content)
    except OSError:
        (partial / _SPARE).unlink()
        write_atomically(partial / RESULT, content)


def read_result(
    partial: Path, same: Mapping[str, Any], records: Split, device: torch.device
) -> tuple[Trained, Metrics | None] | None:
    """The result that an earlier attempt kept, with its metrics where it was evaluated; None for none.

    Raises:
        ResumeError: it is damaged, of another request, or made from other images: those would be charged.
    """
    path = partial / RESULT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            weights = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        known = header["format"] == _FORMAT
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ResumeError(f"{path} is damaged ({error}); start a new run") from error
    if not known:
        raise ResumeError(f"{path} has format {header['format']}, this version reads {_FORMAT}")
    require_same(header["identity"], same)
    images = str(header.get("images", ""))
    if images:
        require_same({"images": images}, {"images": _digest_of(records)})
    executed = tuple(int(number) for number in header["executed"])
    trained = Trained(
        weights, header["l2_clip_norm"], executed, int(header["completed"]), int(header["processes"]), images
    )
    return trained, header["metrics"]


def _digest_of(records: Split) -> str:
    seen = PixelDigest()
    for i in range(len(records)):
        seen.add(records.pixels[i])
    return seen.value()


def discard_blank(partial: Path) -> bool:
    """Remove what a killed run without steps left where that is no more than held room; says whether it did.

    A folder with a result, or with the entry of a ledger, stays.
    """
    names = {p.name for p in partial.iterdir()} if partial.is_dir() else set()
    if _SPARE not in names or any(name != _SPARE and not name.startswith(".") for name in names):
        return False
    shutil.rmtree(partial, ignore_errors=True)
    return True


def settle(
    output: Path,
    partial: Path,
    account: Account,
    spending: Spending,
    write: Callable[[Path, Mapping[str, Any]], object],
    *,
    resumable: bool,
) -> Run:
    """Make the charge final and write the run; signals wait until that is done.

    Args:
        output: folder of the run.
        partial: private folder of the unfinished run, which is removed at the end.
        account: where the privacy is charged.
        spending: what was executed.
        write: fills a folder, given what the account says.
        resumable: whether the checkpoint that the private folder holds leads to the same result.

    Raises:
        OutputLostError: the charge could not be made final, or the run not be written.
    """
    with GracefulStop((signal.SIGTERM, signal.SIGINT)):
        try:
            charged = account.commit(spending)
        except (LedgerError, OSError) as error:
            raise _lost(output, partial, error, resumable) from error
        try:
            with new_run(output) as folder:
                write(folder, charged)
            run = load_run(output)
        except Exception as error:
            raise _lost(output, partial, error, resumable) from error
        shutil.rmtree(partial, ignore_errors=True)
        return run


def _lost(output: Path, partial: Path, error: Exception, resumable: bool) -> OutputLostError:
    known = isinstance(error, ValueError | OSError)
    reason = " ".join(str(error).split()) if known else f"internal error, {type(error).__name__}"
    if resumable or (partial / RESULT).exists():
        rest = (
            f"it is kept in {partial}: remove the cause, then give the same command again (dptaft train: "
            f"with --output {output} and --resume), which writes it at no cost"
        )
    else:
        rest = "its result could not be kept either and is lost; what it spent stays charged"
    return OutputLostError(
        f"the run was trained and its privacy is spent, but not written ({reason}); {rest}"
    )

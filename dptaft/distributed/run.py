"""`dptaft.train` in several processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dptaft.distributed.launch import Launch, LaunchError
from dptaft.distributed.process_group import ProcessGroup, joined, local_device
from dptaft.distributed.ranks import RunEndedError
from dptaft.distributed.share import Share
from dptaft.distributed.team import Team, serve
from dptaft.identity import Identity
from dptaft.runs import Run, load_run
from dptaft.training.plan import Request
from dptaft.training.trainer import run_training

if TYPE_CHECKING:
    from dptaft.data import ImageData
    from dptaft.learner import Progress
    from dptaft.training.account import Account

Charge = Callable[["ImageData", Path, Callable[[], Identity]], "Account"]


def train_together(
    launch: Launch,
    load: Callable[[], ImageData],
    request: Request,
    output: Callable[[ImageData], Path],
    charge: Charge,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train one run with all processes of a launcher; each of them calls this with the same arguments.

    Args:
        launch: place of this process.
        load: makes the data.
        request: what the run is asked for.
        output: names the folder of the run; asked on the first process.
        charge: opens the account from the data, the folder, and what finds the digest of all records; called
            on the first process.
        resume: continue the interrupted run of that folder.
        progress: called with (stage, done, total) on the first process.

    Raises:
        LaunchError: a method without steps.
        ValueError: on the first process, what is wrong on any (see `dptaft.train`).
        RunEndedError: on the others, when the run ended without a result, or its folder is not to be seen.
        RankLostError: a process of the run is gone.

    Formal guarantees:
        See `dptaft.distributed.share.Share`.
    """
    if request.model.is_one_shot:
        raise LaunchError(
            f"{request.model.method} runs in one process, not in {launch.world_size}: it takes no steps to "
            "divide; start it without the launcher"
        )
    with joined(launch) as ranks:
        images, share = ranks.agree(lambda: _prepare(ranks, launch, load, request))
        ranks.use_device(torch.device(local_device(request.performance.device, launch)))
        if not ranks.is_first:
            return _result(serve(ranks, share))
        with Team(ranks, share) as team:
            target = output(images)
            account = charge(images, target, lambda: team.content(progress))
            run = run_training(
                images, request, target, account=account, resume=resume, progress=progress, team=team
            )
            images.warn_unreadable(team.unreadable())
            team.finish(str(run.path.absolute()))
        return run


def _prepare(
    ranks: ProcessGroup, launch: Launch, load: Callable[[], ImageData], request: Request
) -> tuple[ImageData, Share]:
    device = local_device(request.performance.device, launch)
    local = replace(request, performance=replace(request.performance, device=device))
    images = load()
    return images, Share(ranks, images, local)


def _result(path: str) -> Run:
    if not Path(path).is_dir():
        raise RunEndedError(f"the run is complete in {path} on the machine of the first process")
    return load_run(path)

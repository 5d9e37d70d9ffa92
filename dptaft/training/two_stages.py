"""The first of two stages: a private run of the head, kept beside the run that starts from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from dptaft.budgeting import open_account
from dptaft.data import ImageData
from dptaft.learner import Progress
from dptaft.training.account import Account
from dptaft.training.plan import PlanError, PrivacyConfig, Request, default_delta
from dptaft.training.preparation import prepare
from dptaft.training.trainer import partial_folder, run_training
from dptaft.training.warm_start import share


def head_folder(output: Path) -> Path:
    """Where the first stage of a run is kept.

    >>> print(head_folder(Path("runs/first")))
    runs/first.head
    """
    return output.with_name(output.name + ".head")


def head_request(request: Request, records: int, fraction: float) -> Request:
    """What the first stage is asked for: the head of the same backbone, a fraction of mu^2, public defaults.

    Raises:
        PlanError: a fraction outside (0, 1), a head that was given, or nothing to linearise around it.
    """
    privacy, model = request.privacy, request.model
    if model.head != "random":
        raise PlanError(f"a warm start trains the head itself; leave out either it or --head {model.head}")
    if model.method != "tangent":
        raise PlanError(
            f"a warm start linearises around the head, which {model.method} does not; use tangent"
        )
    if model.scope == "head":
        raise PlanError("a warm start needs a scope with blocks; scope head has nothing to linearise")
    delta = privacy.delta if privacy.delta is not None else default_delta(privacy.public_size or records)
    epsilon = share(1.0 if math.isinf(privacy.epsilon) else privacy.epsilon, delta, fraction)
    return Request(
        PrivacyConfig(
            epsilon=math.inf if math.isinf(privacy.epsilon) else epsilon,
            delta=delta,
            adjacency=privacy.adjacency,
            public_size=privacy.public_size,
            insecure_seed=privacy.insecure_seed,
        ),
        replace(model, scope="head", method="tangent", unit_jacobian=False, centered=True),
        {},
        replace(request.performance, engine="auto"),
        request.data,
    )


def train_head(
    data: ImageData,
    request: Request,
    output: Path,
    fraction: float,
    *,
    ledger: str | Path | Account | None,
    resume: bool,
    progress: Progress | None = None,
) -> Path:
    """Train the first stage of the run at `output`, or find it finished; returns its folder.

    Raises:
        PlanError: as for `head_request`, what the second stage cannot meet, or an account of the caller's
            own, which charges one run.
        ValueError: as for `run_training`.
    """
    asked, folder = head_request(request, len(data.train), fraction), head_folder(output)
    if not (ledger is None or isinstance(ledger, str | Path)):
        raise PlanError("a warm start is two runs, which one account cannot charge; give a ledger")
    if output.exists():
        raise PlanError(f"the output folder {output} exists; choose another one or remove it")
    if resume and folder.is_dir():
        return folder
    prepare(data, request)  # refuses what cannot be met before the first stage spends anything
    unfinished = partial_folder(folder).is_dir()
    account = open_account(
        data, asked, folder, ledger=ledger, resume=resume and unfinished, progress=progress
    )
    run_training(data, asked, folder, account=account, resume=resume, progress=progress)
    return folder

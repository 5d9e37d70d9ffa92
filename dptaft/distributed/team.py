"""The first process leads: it says what all do next. The others serve until it says stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, cast

from torch import Tensor, nn

from dptaft.distributed.process_group import ProcessGroup
from dptaft.distributed.ranks import RankLostError, RunEndedError
from dptaft.distributed.share import Share
from dptaft.identity import Identity
from dptaft.learner import Cached, Learner, Progress
from dptaft.training.checkpoint import GracefulStop
from dptaft.training.clipping import Adjacency, ClippedSum
from dptaft.training.plan import Sampling
from dptaft.training.preparation import Prepared
from dptaft.training.sampling import Sampler


class Team:
    """All processes of a run, seen from the first one, for as long as the context is open.

    Args:
        ranks: the processes.
        share: that of the first process.

    Example:
        The first process works inside ``with Team(ranks, share) as team``, the others call
        ``serve(share)`` of their own.
    """

    def __init__(self, ranks: ProcessGroup, share: Share) -> None:
        self._ranks, self._share = ranks, share
        self._result: str | None = None

    def __enter__(self) -> Team:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the others go, unless they have gone already."""
        if not self._ranks.over and (error is None or isinstance(error, Exception)):
            try:
                self._tell("stop", result=self._result)
            except RankLostError:
                if error is None:
                    raise
            self._ranks.over = True

    @property
    def size(self) -> int:
        """Number of processes."""
        return self._ranks.world_size

    def finish(self, result: str) -> None:
        """What the other processes are told at the end: where the run is."""
        self._result = result

    def _tell(self, what: str, **arguments: Any) -> None:
        self._ranks.broadcast({"do": what, **arguments})

    def build(self) -> Learner:
        """The model, the same on all processes."""
        self._tell("build")
        return self._share.build()

    def content(self, progress: Progress | None = None) -> Identity:
        """What the ledger knows all records by."""
        self._tell("content")
        return self._share.content(progress)

    def features(self, progress: Progress | None = None) -> tuple[Cached, Cached | None]:
        """Features of the first process's own images, with the digest of all records."""
        self._tell("features")
        cached, held_out = self._share.features(progress)
        if cached is None:
            raise ValueError("the first process has no records; there is nothing to train on")
        return cached, held_out

    def divide(self, prepared: Prepared, sampler: Sampler) -> Team:
        """Get ready for steps over the records of all processes (see `dptaft.training.steps.Divide`)."""
        plan = prepared.plan
        facts = {"clip": prepared.l2_clip_norm, "adjacency": plan.adjacency}
        self._tell("begin", sampling=asdict(plan.sampling), **facts)
        self._share.begin(plan.sampling, prepared.l2_clip_norm, cast(Adjacency, plan.adjacency), sampler)
        return self

    def next_sum(self, parameters: Mapping[str, nn.Parameter]) -> tuple[ClippedSum, int]:
        """One step over the records of all processes (see `dptaft.training.sums.StepSums`)."""
        self._tell("step")
        return self._share.step()

    def logits(self, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of all evaluation images, and which of the images are finite."""
        dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
        self._tell("logits", dtype=dtype)
        return self._share.logits(dtype, weights)

    def unreadable(self) -> tuple[int, int]:
        """How many images of all processes could not be read."""
        self._tell("unreadable")
        return self._share.unreadable()


def serve(ranks: ProcessGroup, share: Share) -> str:
    """Do what the first process says until it stops; returns where it has put the run.

    While steps are taken, a request to stop is left to the first process, which has it too: it ends the step
    for all and writes a checkpoint.

    Raises:
        RunEndedError: the first process stopped without a result.
        RankLostError: it is gone.
    """
    orders: dict[str, Callable[..., object]] = {
        "build": share.build,
        "content": share.content,
        "features": share.features,
        "step": share.step,
        "logits": share.logits,
        "unreadable": share.unreadable,
    }
    with ExitStack() as stepping:
        while True:
            order = ranks.broadcast(None)
            what = order.pop("do")
            if what == "stop":
                ranks.over = True
                if order["result"] is None:
                    raise RunEndedError("the first process ended the run and says why")
                return str(order["result"])
            if what == "begin":
                stepping.enter_context(GracefulStop((signal.SIGTERM, signal.SIGINT)))
                adjacency: Adjacency = order["adjacency"]
                share.begin(Sampling(**order["sampling"]), order["clip"], adjacency)
            else:
                if what == "logits":
                    stepping.close()
                orders[what](**order)

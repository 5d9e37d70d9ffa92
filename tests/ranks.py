"""Real processes that work together, forked from a server that has imported everything once."""

import io
import multiprocessing
import os
import socket
import traceback

import torch

_PRELOAD = ["dptaft.distributed.run", "dptaft.budgeting", "dptaft.backbones", "builders", "rank_tasks"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def variables(rank, size, port):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _work(task, rank, size, port, arguments, pipe):
    torch.set_num_threads(1)
    os.environ.update(variables(rank, size, port))
    try:
        result = task(*arguments)
    except BaseException as error:  # the test looks at it
        result = Failed(
            type(error).__name__, str(error), traceback.format_exc(), isinstance(error, ValueError)
        )
    packed = io.BytesIO()
    torch.save(result, packed)  # a tensor that is sent as it is would need its sender to stay alive
    pipe.send_bytes(packed.getvalue())
    pipe.close()


class Failed:
    """An error of a process, without what cannot travel."""

    def __init__(self, kind, text, trace, for_users):
        self.kind, self.text, self.trace, self.for_users = kind, text, trace, for_users

    def __repr__(self):
        return self.trace


DIED = "died"
PATIENCE = 1200
"""Seconds until a hung process ends the test; nothing else depends on time: a lost one is noticed at once."""


def together(size, task, *arguments, patience=PATIENCE):
    """Results of ``task(*arguments)`` in `size` processes in their order; `DIED` for one that was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = free_port()
    started = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(task, rank, size, port, arguments, theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    try:
        return [_result(process, pipe, patience) for process, pipe in started]
    finally:
        for process, pipe in started:
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _result(process, pipe, patience):
    if not pipe.poll(patience):
        raise AssertionError(f"process {process.pid} has not finished after {patience} s")
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return DIED


def succeeded(results):
    for result in results:
        assert not isinstance(result, Failed), result
    return results

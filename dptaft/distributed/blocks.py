"""Which records are whose: whole blocks, in contiguous runs."""

from __future__ import annotations

from dptaft.data import Split
from dptaft.learner import FEATURE_BATCH


def own_range(count: int, rank: int, world_size: int) -> range:
    """Numbers of the records of one process.

    Blocks of `FEATURE_BATCH` records are dealt in contiguous runs, one more to the first processes where they
    do not come out even; a process may have none.

    Args:
        count: number of records.
        rank: of the process.
        world_size: number of processes.

    Formal guarantees:
        The ranges of all processes are disjoint and cover ``range(count)``: every record is in the sums of
        exactly one process.

    >>> [own_range(300, rank, 2) for rank in range(2)], own_range(300, 3, 4)
    ([range(0, 256), range(256, 300)], range(300, 300))
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    blocks = -(-count // FEATURE_BATCH)
    each, more = divmod(blocks, world_size)
    first = rank * each + min(rank, more)
    last = first + each + (rank < more)
    return range(min(first * FEATURE_BATCH, count), min(last * FEATURE_BATCH, count))


def own_part(split: Split, rank: int, world_size: int) -> Split:
    """The records of one process; the split itself where there is one process."""
    return split if world_size == 1 else split.take(own_range(len(split), rank, world_size))

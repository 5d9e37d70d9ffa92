"""What a launcher (torchrun, or anything that sets the same variables) says of this process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(ValueError):
    """The environment does not describe a process of a group, or the command needs one process alone."""


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that were started together.

    Attributes:
        rank: its number; number 0 leads.
        world_size: how many processes there are.
        local_rank: its number among those on this machine.
        local_world_size: how many are on this machine.

    Raises:
        LaunchError: numbers that contradict each other.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise LaunchError(
                f"process {self.rank} of {self.world_size} (on this machine {self.local_rank} of "
                f"{self.local_world_size}) cannot be; start all processes with torchrun"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process leads: it alone prints, writes and charges."""
        return self.rank == 0


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """The place of this process, or None where it runs alone (also as the only process of a launcher).

    Args:
        environment: variables; None takes those of the process.

    Raises:
        LaunchError: several processes were announced and a variable is missing or no number.

    >>> launched({}) is None, launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    (True, True)
    """
    values = os.environ if environment is None else environment
    if "RANK" not in values or values.get("WORLD_SIZE") in (None, "1"):
        return None
    missing = [name for name in _VARIABLES if name not in values]
    if missing:
        raise LaunchError(f"RANK and WORLD_SIZE are set, {', '.join(missing)} not; start with torchrun")
    try:
        rank, size = int(values["RANK"]), int(values["WORLD_SIZE"])
        local = int(values.get("LOCAL_RANK", rank))
        return Launch(rank, size, local, int(values.get("LOCAL_WORLD_SIZE", size)))
    except ValueError as error:
        if isinstance(error, LaunchError):
            raise
        raise LaunchError(
            f"RANK {values['RANK']!r} and WORLD_SIZE {values['WORLD_SIZE']!r} must be whole numbers; start "
            "with torchrun"
        ) from None


def require_one_process(what: str) -> None:
    """Refuse work that several processes would only repeat.

    Raises:
        LaunchError: a launcher started several.
    """
    place = launched()
    if place is not None:
        raise LaunchError(
            f"{what} runs in one process, not in {place.world_size}; start it without the launcher (only "
            "`dptaft train` with steps is divided)"
        )

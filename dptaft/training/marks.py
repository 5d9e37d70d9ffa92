"""The steps that a run was authorised for, kept in two files: neither of them alone can hide one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

PROGRESS, COPY = "progress.json", "authorised.json"
RESULT = "result.safetensors"
Range = tuple[int, int]


def parse_ranges(listed: Any) -> list[Range]:
    """Half-open ranges of steps, each of which begins where steps were authorised before.

    Raises:
        ValueError: anything else.

    >>> parse_ranges([[0, 50], [40, 90]])
    [(0, 50), (40, 90)]
    """
    found: list[Range] = []
    if not isinstance(listed, list):
        raise ValueError("the authorised steps are no list")
    for item in listed:
        numbers = item if isinstance(item, list) else []
        if len(numbers) != 2 or not all(type(number) is int for number in numbers):
            raise ValueError(f"{item!r} is no range of steps")
        start, stop = numbers
        if not 0 <= start <= max((end for _, end in found), default=0) or start >= stop:
            raise ValueError(f"steps {start} to {stop} cannot follow the ones before")
        found.append((start, stop))
    return found


def merged(one: list[Range], two: list[Range]) -> list[Range]:
    """All steps that either list has; the files are written one after the other, so one may be ahead.

    Raises:
        ValueError: lists of different runs of steps.

    >>> merged([(0, 50)], [(0, 40), (40, 90)])
    [(0, 50), (40, 90)]
    """
    found = []
    for first, second in itertools.zip_longest(one, two):
        a, b = first or second, second or first
        if a[0] != b[0]:
            raise ValueError(f"{PROGRESS} and {COPY} list different steps")
        found.append((a[0], max(a[1], b[1])))
    return found


def read_ranges(folder: Path, listed: Any) -> list[Range]:
    """The ranges that ``progress.json`` lists, with those of the copy beside it (older runs have none).

    Raises:
        ValueError: damaged, or not of one run.
        OSError: the copy cannot be read.
    """
    ranges, copy = parse_ranges(listed), folder / COPY
    return merged(ranges, parse_ranges(json.loads(copy.read_text()))) if copy.exists() else ranges

"""docs/guarantees.md: its example runs, its commands parse, and the files it names exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import click

from dptaft.cli import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def test_the_gate_runs_and_finds_what_is_wrong():
    block = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(block) == 1
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block[0], "guarantees.md", "exec"), names)  # noqa: S102
    assert names["publish"] is False
    assert "require_ledger: " in out.getvalue()
    assert names["statement"].id in out.getvalue()


def test_commands_parse():
    commands = re.findall(r"`(dptaft [a-z]+ [^`]*)`", PAGE) + re.findall(r"^(dptaft .*)$", PAGE, flags=re.M)
    assert len(commands) >= 5
    for line in commands:
        words = shlex.split(line.replace("RUN...", "RUN"))[1:]
        command = main.get_command(click.Context(main), words[0])
        command.make_context(words[0], words[1:], parent=click.Context(main))


def test_named_files_exist():
    names = set(re.findall(r"`((?:dptaft|accounting)/[\w/]+\.py)`", PAGE))
    names |= {
        f"accounting/dptaft_accounting/{n}"
        for n in re.findall(r"`((?:accountants/)\w+\.py|convexity\.py)`", PAGE)
    }
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).is_file(), name

"""The README's Python blocks run, and its commands name options that exist."""

import re
import shlex
from pathlib import Path

import click
import pytest

from dptaft.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
COMMANDS = re.findall(r"^dptaft .*$", README, flags=re.M)


@pytest.mark.parametrize("block", BLOCKS)
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(line.split(" #")[0])[1:]
    context = click.Context(main)
    command = main.get_command(context, words[0])
    command.make_context(words[0], words[1:], parent=context)


def test_there_is_something_to_check():
    assert len(BLOCKS) == 2
    assert len(COMMANDS) > 10

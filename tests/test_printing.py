"""Whatever a downloaded run, a ledger or a recipe says, it cannot steer the terminal or a page."""

import ast
import hashlib
import json
from pathlib import Path

import pytest
import torch
from builders import small_data
from click.testing import CliRunner
from PIL import Image
from run_folders import make_run

import dptaft
from dptaft import cli
from dptaft.report.text import printable
from dptaft.runs import read_config, write_config
from dptaft_accounting.canonical import content_id, dumps
from dptaft_accounting.ledger import Ledger

EVIL = "\x1b[2J\x1b]0;x\x07\x9b31m\u202etac\u2066\u200b\r<b>|`x`"
STEERING = ("\x1b", "\x9b", "\x07", "\r", "\u202e", "\u2066", "\u200b")


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def steers(text):
    return [sign for sign in STEERING if sign in text]


def foreign(run, change):
    """A run whose configuration somebody else wrote, sealed."""
    config = read_config(run)
    change(config)
    write_config(run, config)
    document = json.loads((run / "privacy.json").read_text())
    document["admin"]["files"]["run.toml"] = hashlib.sha256((run / "run.toml").read_bytes()).hexdigest()
    document["admin"]["id"] = content_id(document)
    (run / "privacy.json").write_text(dumps(document))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    made = dptaft.train(
        small_data(), epsilon=8.0, steps=1, scope="head", ledger=None, output=tmp_path_factory.mktemp("r") / "run"
    )  # fmt: skip

    def change(config):
        config["data"] |= {"classes": [f"{EVIL}{i}" for i in range(3)], "name": EVIL}
        config["backbone"]["source"] = EVIL

    foreign(made.path, change)
    return made.path


def test_names_of_classes_are_printed_harmlessly(evil, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray((255 * torch.rand(28, 28)).byte().numpy()).save(image)
    for options in ((), ("--json",)):
        result = invoke("predict", evil, image, *options)
        assert result.exit_code == 0, result.output
        assert not steers(result.output)
        assert "<b>" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "--format", "html"),
        ("report", "--format", "md"),
        ("report", "--format", "model-card"),
        ("report", "--format", "json"),
        ("report", "--format", "registry"),
        ("verify",),
        ("verify", "--json"),
        ("compare",),
    ],
)
def test_every_view_of_a_run_is_harmless(evil, arguments, tmp_path):
    command, *options = arguments
    result = invoke(command, evil, *options)
    assert result.exit_code in (0, 1), result.output
    assert not steers(result.output)
    if "html" in options:
        assert "<b>" not in result.output
    if command == "report":
        invoke(command, evil, *options, "--output", tmp_path / "file")
        assert not steers((tmp_path / "file").read_text())


def test_errors_and_ledgers_are_harmless(tmp_path):
    assert not steers(invoke("verify", tmp_path / f"no{EVIL.replace('/', '')}").output)
    assert not steers(invoke("predict", tmp_path, "--bad", EVIL).output)
    ledger = Ledger.create(tmp_path / "ledger.sqlite")
    with pytest.raises(ValueError, match="printable name"):
        ledger.register("content", EVIL)
    for command in ("list", "verify"):
        assert not steers(invoke("ledger", command, "--ledger", ledger.path).output)
    run = make_run(tmp_path / "run", unit=EVIL)
    assert not steers(invoke("compare", run.path, run.path).output)


def test_a_sweep_page_escapes_every_name():
    from dptaft.sweep.page import markdown, page

    content = {
        "title": EVIL, "shows": EVIL, "privacy": EVIL, "failed": {EVIL: EVIL}, "versions": {EVIL: "1"}, "seeds": [0], "recipe": EVIL
    }  # fmt: skip
    for text in (page(content, [], None), markdown(content, [], None)):
        assert not steers(text)
    assert "<b>" not in page(content, [], None)


def test_line_breaks_and_tabs_stay():
    assert printable("a\tb\nc  d ") == "a\tb\nc  d "
    assert printable("caf\u00e9 \u732b") == "caf\u00e9 \u732b"


def test_commands_print_through_one_function():
    """So that no command can forget to make text harmless."""
    for file in sorted(Path(cli.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if file.name == "echo.py" or not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("print", "click.echo", "click.secho", "sys.stdout.write"), file.name

"""The example in the documentation runs."""

from pathlib import Path


def test_the_python_example_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "auditing.md").read_text(encoding="utf-8")
    block = text.split("```python\n", 1)[1].split("```", 1)[0]
    exec(compile(block, "docs/auditing.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.split()[0] in ("consistent", "violation")

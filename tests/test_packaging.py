import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "source", ignore=ignore)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "out"]
    subprocess.run([*build, tmp_path / "source"], check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dptaft", "dptaft_accounting"}
    for needed in (
        "dptaft/starter/starter.safetensors",
        "dptaft/starter/starter.json",
        "dptaft/starter/MODEL_CARD.md",
        "dptaft_accounting/statement_schema.json",
        "dptaft_accounting/py.typed",
    ):
        assert needed in names
    assert any(name.endswith("LICENSE") for name in names)
    assert any(name.endswith("data/share/dptaft/recipes/digits.toml") for name in names)

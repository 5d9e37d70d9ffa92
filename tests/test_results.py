"""RESULTS.md says what the committed result files say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The generator, loaded by its path: benchmarks are no package."""
    spec = importlib.util.spec_from_file_location("results_tables", ROOT / "benchmarks" / "results_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_page_is_what_the_generator_makes(tables: ModuleType) -> None:
    assert (ROOT / "RESULTS.md").read_text() == tables.render()


def test_every_sweep_row_is_on_the_page(tables: ModuleType) -> None:
    page = (ROOT / "RESULTS.md").read_text()
    names = [path.parent.name for path in tables.SWEEPS.glob("results_*/summary.json")]
    assert names
    for name in names:
        for row in json.loads((tables.SWEEPS / name / "summary.json").read_text())["rows"]:
            shown = int(1000 * (sum(row["accuracies"]) / len(row["accuracies"])) + 1e-6) / 10
            lines = [line for line in page.splitlines() if f"`dptaft sweep {name}`" in line]
            column = {1.0: 2, 3.0: 3, 8.0: 4}[row["epsilon"]]
            assert any(
                line.split("|")[1].strip().startswith(row["method"])
                and line.split("|")[column].strip().startswith(f"{shown:.1f}")
                for line in lines
            ), (name, row["method"], row["epsilon"])


def test_no_row_claims_more_than_its_column(tables: ModuleType) -> None:
    for path in tables.SWEEPS.glob("results_*/summary.json"):
        for row in json.loads(path.read_text())["rows"]:
            assert row["claimed_epsilon"] <= row["epsilon"]
            assert row["delta"] == 1e-5
    scatter = tables.read(tables.BENCHMARKS / "scatternet.json")
    for part in [] if scatter is None else scatter["data"].values():
        for row in part["rows"]:
            assert row["claimed_epsilon"] <= row["epsilon"]
            assert row["delta"] == 1e-5


def test_recipes_of_the_tables_exist(tables: ModuleType) -> None:
    for path in tables.SWEEPS.glob("results_*"):
        assert (ROOT / "recipes" / f"{path.name}.toml").is_file()


def test_ours_are_rounded_down_and_baselines_up(tables: ModuleType) -> None:
    ours = tables.Result("digits", "m", 1.0, (0.98777, 0.98777), "c")
    other = tables.Result("digits", "m", 1.0, (0.98771,), "c", ours=False)
    assert ours.text == "98.7 ± 0.0"
    assert other.text == "98.8"


def test_a_missing_result_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "SWEEPS", tmp_path / "recipes")
    monkeypatch.setattr(tables, "BENCHMARKS", tmp_path / "benchmarks")
    assert "scatternet.json" in tables.missing()
    assert tables.results() == []
    assert tables.MISSING in tables.goal_table([])

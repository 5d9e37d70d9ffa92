"""Shared oracles of the accounting tests."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def oracles():
    return json.loads((Path(__file__).parents[1] / "oracles" / "accounting.json").read_text())

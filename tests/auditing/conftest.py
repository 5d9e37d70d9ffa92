import pytest
from builders import small_data

import dptaft


@pytest.fixture(scope="session")
def data():
    return small_data(48)


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """Finished small runs by their options; each is trained once."""
    made = {}

    def run(**options):
        options = {"epsilon": 3.0, "scope": "head", "steps": 8} | options
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("runs")
            made[key] = dptaft.train(data, output=folder / "run", **options)
        return made[key]

    return run

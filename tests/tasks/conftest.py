"""What the tests of tasks share: options over small generated data, and the real essays."""

from pathlib import Path

import pytest

from harness.models.assets import asset_folder
from tests.task_data import Options, small_options


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options over small generated essays and question files."""
    return small_options(tmp_path_factory.mktemp("data"))


@pytest.fixture
def options(small: Options) -> Options:
    """Those of `small`, where a file has none of its own."""
    return small


@pytest.fixture(scope="session")
def essays_folder() -> Path:
    """The 49 essays; skips when they were never fetched."""
    folder = asset_folder("essays")
    if not folder.is_dir():
        pytest.skip("essays is not in the cache; run `harness fetch essays`")
    return folder

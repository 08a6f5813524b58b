"""What the tests of tasks share: options over small generated data, and the real essays."""

from pathlib import Path

import pytest

from harness.models.assets import asset_folder
from tasks.base import TaskOptions
from tests.task_data import Options, Words, small_options, write_pool, write_prose


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Options over small generated essays and question files."""
    return small_options(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def longer(small: Options, tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Those of `small` over five longer essays: a continuation is of one."""
    folder = tmp_path_factory.mktemp("prose")
    write_prose(folder / "PaulGrahamEssays")
    return lambda **changes: small(**{"fetch": {"essays": folder}.__getitem__, **changes})


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


@pytest.fixture(scope="session")
def small_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the assets of a small pool."""
    return write_pool(tmp_path_factory.mktemp("pool"))


@pytest.fixture(scope="session")
def drawn(small_pool: Path) -> TaskOptions:
    """Options over it."""
    return TaskOptions(
        tokenizer=Words(), max_tokens=9000, lengths=(512,), limit=5, seed=3, fetch=small_pool.__truediv__
    )

"""What the tests of tasks share: options over small generated data, and the real essays."""

import gzip
import json
import random
from pathlib import Path

import pytest

from harness.models.assets import asset_folder
from tasks.base import TaskOptions
from tests.task_data import Options, Words, small_options, write_prose


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
def drawn(tmp_path_factory: pytest.TempPathFactory) -> TaskOptions:
    """Options over a pool of some 110,000 words in 17 sections of documentation and 12 essays, a quarter apart."""
    folder = tmp_path_factory.mktemp("pool")
    words = [f"word{number}" for number in range(3000)]
    draw = random.Random(5)

    def sentences(count: int) -> list[str]:
        return [f"The {' '.join(draw.choices(words, k=draw.randint(6, 18)))} end." for _ in range(count)]

    for name in ("awsdocs", "essays"):
        (folder / name).mkdir()
    said = [{"documentation": f"<p>{' '.join(sentences(3))}</p>"} for _ in range(3300)]
    (folder / "awsdocs" / "ec2-2016-11-15-service-2.json.gz").write_bytes(gzip.compress(json.dumps(said).encode()))
    for number in range(12):
        (folder / "essays" / f"essay{number}.txt").write_text(" ".join(sentences(150)))
    return TaskOptions(tokenizer=Words(), max_tokens=9000, lengths=(512,), limit=5, seed=3, fetch=folder.__truediv__)

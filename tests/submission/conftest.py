"""The archive of a true run."""

from pathlib import Path

import pytest

from harness.submission.archive import pack_run
from tests.submitted import stored


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    pack_run(stored(tmp_path / "results"), tmp_path / "pack.zip")
    return tmp_path / "pack.zip"

"""Fixtures of models: the tiny one as files."""

import shutil
from pathlib import Path

import pytest

from harness.models.load import LoadedModel


@pytest.fixture(scope="session")
def plain(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder. Shared: only read it; see `folder`."""
    into = tmp_path_factory.mktemp("plain") / "m"
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(into)
    return into


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(plain, tmp_path / "base"))

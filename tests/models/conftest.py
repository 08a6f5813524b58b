"""What the tests of models share."""

from pathlib import Path

import pytest

from harness.models.load import LoadedModel


@pytest.fixture
def folder(tiny: LoadedModel, tmp_path: Path) -> Path:
    """The tiny model as a local folder."""
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"

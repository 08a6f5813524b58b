"""The Python of the README runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.models.assets import asset_folder

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.model
@pytest.mark.skipif(not asset_folder("smollm2-135m").is_dir(), reason="run `harness fetch smollm2-135m`")
def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 1
    exec(compile(snippets[0], "README.md", "exec"), {})
    *said, kept, full = capsys.readouterr().out.split()
    assert "71432" in " ".join(said)
    assert 0 < int(kept) < int(full)

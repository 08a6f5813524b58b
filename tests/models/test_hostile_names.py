"""Names that stand for no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from harness.models.source import SHAPES, check_model
from harness.records.spec import SHAPE
from tests.hostile import tried, tried_command

pytestmark = pytest.mark.hostile


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            ".",
            "..",
            "/",
            "a/b/c",
            "./nope",
            "/nope",
            "models/nope",
            "nope/nope",
            "~/nope",
            "~nobody-at-all/x",
        ),
        *(
            "nope.gguf",
            "org/nope.gguf",
            "tinny",
            "Tiny",
            "smollm2",
            "\x00",
            "a\x00/b",
            "a" * 300,
            "a" * 5000,
            "a/" * 3000,
        ),
        *(
            "\x1b[31mred",
            "a\nb",
            "org/\u202ename",
            "\udcff",
            "org/na me",
            "-x",
            "--model",
            "$HOME",
            "https://x.y/z",
            "a//b",
        ),
        *("shape:", "shape:nope", "shape:a/b", "shape:/dev/null", "shape:shape:llama-3-8b", "shape:~nobody-at-all/x"),
        *("/dev/null", "/proc", "/etc/passwd", "org/", "/org", "org/name/", "\u00e9/\u00e9"),
    ],
)
def test_names_of_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tried("model name", lambda: check_model(name))


@given(st.text(max_size=40), st.sampled_from(["", SHAPE]))
def test_any_text_as_a_name(name: str, before: str) -> None:
    assume(name.strip("./ ") not in ("tiny", "smollm2-135m", *SHAPES))
    assume(not Path(name.replace("\x00", "")).exists())
    tried("model name", lambda: check_model(before + name))


def test_a_missing_folder_is_told_by_its_name_and_soon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("models/nope", "nope/x"):
        words = ("run", "--model", name, "--methods", "fullkv", "--tasks", "niah/passkey")
        assert f"there is no folder '{name}' here" in tried_command("model name", *words)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", _no_network)
    line = tried("model name", lambda: check_model("models/nope"))
    assert "there is no folder 'models/nope' here, and the hub cannot be reached (no route)" in line


def _no_network(*args: Any, **options: Any) -> None:
    raise ConnectionError("no route")

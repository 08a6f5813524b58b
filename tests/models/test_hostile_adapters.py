"""Adapters of nothing, of themselves, or cut off."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.models.source import check_model, resolve_model
from tests.hostile import tried

pytestmark = pytest.mark.hostile


@pytest.mark.parametrize("base", [None, 5, [], "", "nope/nope", "./nope", ".", "\x00", "a" * 5000])
def test_adapters_of_nothing(tmp_path: Path, base: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    tried("model adapter", lambda: check_model(str(tmp_path)))


def test_an_adapter_of_itself_or_cut_off(plain: Path, tmp_path: Path) -> None:
    edit = tmp_path / "adapter_config.json"
    edit.write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    assert "another adapter" in tried("model adapter", lambda: check_model(str(tmp_path)))
    edit.write_text(json.dumps({"base_model_name_or_path": str(plain)}))
    assert check_model(str(tmp_path)).base == resolve_model(str(plain))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08")
    assert "adapter_model.safetensors" in tried("model adapter", lambda: check_model(str(tmp_path)))

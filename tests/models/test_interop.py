"""Models as others leave them: peft adapters, quantised folders, weights spread over devices."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from harness.errors import HarnessError
from harness.models.load import LoadedModel, describe_model, load_model

without_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
without_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate")
IDS = torch.arange(5, 40)[None]


@pytest.fixture
def adapter(folder: Path) -> Path:
    """A folder as peft writes it, without its weights."""
    into = folder.parent / "adapter"
    into.mkdir()
    (into / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)}))
    return into


@pytest.fixture
def _absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is there, whatever is installed."""
    monkeypatch.setattr("harness.models.readers.find_spec", lambda name: None)


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_absent")
def test_an_adapter_without_peft_is_one_line(adapter: Path) -> None:
    line = r"is a peft adapter of .*base, and peft is not installed; `pip install peft`, or merge it"
    with pytest.raises(HarnessError, match=line):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_an_adapter_without_a_base_is_one_line(adapter: Path, text: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(HarnessError, match="that names no base model"):
        load_model(str(adapter), device="cpu")


def test_an_adapter_beside_a_whole_model_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    with pytest.raises(HarnessError, match="and a config.json of a whole model; keep the one"):
        load_model(str(folder), device="cpu")


@without_peft
def test_an_adapter_is_merged(folder: Path, tmp_path: Path, tiny: LoadedModel) -> None:
    from peft import LoraConfig, get_peft_model

    own = load_model(str(folder), dtype="float32", device="cpu").model
    wrapped = get_peft_model(own, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    into = tmp_path / "lora"
    wrapped.save_pretrained(str(into))
    loaded = load_model(str(into), dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = wrapped(IDS).logits
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(loaded), logits(tiny), atol=1e-2)
    assert loaded.spec.loaded_as == (f"peft adapter merged into {folder}",)
    assert type(loaded.model) is type(tiny.model)
    described = describe_model(str(into), dtype="float32", device="cpu")
    assert described.spec == loaded.spec
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "merged")
    plain = load_model(str(tmp_path / "merged"), dtype="float32", device="cpu")
    assert torch.equal(logits(plain), logits(loaded)) and plain.spec.loaded_as == ()


@pytest.mark.usefixtures("_absent")
def test_a_quantised_folder_without_its_library_is_one_line(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    line = r"quantised with bitsandbytes, and bitsandbytes is not installed; `pip install bitsandbytes`, or give one"
    with pytest.raises(HarnessError, match=line):
        load_model(str(folder), device="cpu")


@without_accelerate
def test_a_device_map_is_passed_on_and_recorded(folder: Path, tiny: LoadedModel) -> None:
    loaded = load_model(str(folder), dtype="float32", device="auto-map")
    torch.testing.assert_close(logits(loaded).cpu(), logits(tiny))
    assert loaded.spec.loaded_as[0].startswith(f"device_map auto: {loaded.spec.device}")
    assert loaded.spec.device in ("cpu", "cuda")


@pytest.mark.usefixtures("_absent")
def test_a_device_map_without_accelerate_is_one_line(folder: Path) -> None:
    with pytest.raises(HarnessError, match="device_map=auto spreads a model, and accelerate is not installed"):
        load_model(str(folder), device="auto-map")


def test_tiny_takes_a_device_map_too() -> None:
    assert load_model("tiny", device="auto-map").spec.loaded_as == ()

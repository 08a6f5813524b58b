"""Models as others leave them: peft adapters, quantised folders, weights spread over devices."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import harness.models.readers
from harness.errors import HarnessError
from harness.models.load import LoadedModel, describe_model, load_model

without_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
without_accelerate = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate")
IDS = torch.arange(5, 40)[None]


@pytest.fixture
def base(tiny: LoadedModel, tmp_path: Path) -> Path:
    """The tiny model as a local folder."""
    into = tmp_path / "base"
    tiny.model.save_pretrained(into)
    tiny.tokenizer.save_pretrained(into)
    return into


@pytest.fixture
def adapter(base: Path) -> Path:
    """A folder as peft writes it, without its weights."""
    into = base.parent / "adapter"
    into.mkdir()
    (into / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    return into


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Packages that are not there, whatever is installed."""
    missing: set[str] = set()
    found = harness.models.readers.find_spec
    monkeypatch.setattr(harness.models.readers, "find_spec", lambda name: None if name in missing else found(name))
    return missing


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = loaded.model(IDS).logits
    return out


def test_plain_models_say_nothing(tiny: LoadedModel, base: Path) -> None:
    assert tiny.spec.loaded_as == load_model(str(base), device="cpu").spec.loaded_as == ()


def test_an_adapter_without_peft_is_one_line(adapter: Path, absent: set[str]) -> None:
    absent.add("peft")
    line = r"is a peft adapter of .*base, and peft is not installed; `pip install peft`, or merge it"
    with pytest.raises(HarnessError, match=line):
        load_model(str(adapter), device="cpu")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{}", "that names no base model"), ("[]", "that names no base model"), ("{", "that names no base model")],
)
def test_an_adapter_without_a_base_is_one_line(adapter: Path, text: str, complaint: str) -> None:
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(HarnessError, match=complaint):
        load_model(str(adapter), device="cpu")


def test_an_adapter_beside_a_whole_model_is_refused(base: Path) -> None:
    (base / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))
    with pytest.raises(HarnessError, match="and a config.json of a whole model; keep the one"):
        load_model(str(base), device="cpu")


@without_peft
def test_an_adapter_is_merged(base: Path, tmp_path: Path, tiny: LoadedModel) -> None:
    from peft import LoraConfig, get_peft_model

    own = load_model(str(base), dtype="float32", device="cpu").model
    wrapped = get_peft_model(own, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    into = tmp_path / "lora"
    wrapped.save_pretrained(str(into))
    loaded = load_model(str(into), dtype="float32", device="cpu")
    with torch.inference_mode():
        expected = wrapped(IDS).logits
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(loaded), logits(tiny), atol=1e-2)
    assert loaded.spec.loaded_as == (f"peft adapter merged into {base}",)
    assert type(loaded.model) is type(tiny.model)
    described = describe_model(str(into), dtype="float32", device="cpu")
    assert described.spec == loaded.spec
    merged = tmp_path / "merged"
    loaded.model.save_pretrained(merged)
    loaded.tokenizer.save_pretrained(merged)
    plain = load_model(str(merged), dtype="float32", device="cpu")
    assert torch.equal(logits(plain), logits(loaded)) and plain.spec.loaded_as == ()


def test_a_quantised_folder_without_its_library_is_one_line(base: Path, absent: set[str]) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    absent.add("bitsandbytes")
    line = r"quantised with bitsandbytes, and bitsandbytes is not installed; `pip install bitsandbytes`, or give one"
    with pytest.raises(HarnessError, match=line):
        load_model(str(base), device="cpu")


@without_accelerate
def test_a_device_map_is_passed_on_and_recorded(base: Path, tiny: LoadedModel) -> None:
    loaded = load_model(str(base), dtype="float32", device="auto-map")
    torch.testing.assert_close(logits(loaded).cpu(), logits(tiny))
    assert loaded.spec.loaded_as[0].startswith(f"device_map auto: {loaded.spec.device}")
    assert loaded.spec.device in ("cpu", "cuda")


def test_a_device_map_without_accelerate_is_one_line(base: Path, absent: set[str]) -> None:
    absent.add("accelerate")
    with pytest.raises(HarnessError, match="device_map=auto spreads a model, and accelerate is not installed"):
        load_model(str(base), device="auto-map")


def test_tiny_takes_a_device_map_too() -> None:
    assert load_model("tiny", device="auto-map").spec.loaded_as == ()

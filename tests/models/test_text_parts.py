"""Models that read images too: the text part runs where transformers loads it alone, the others are refused."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from harness.errors import HarnessError
from harness.models.load import LoadedModel, load_model
from tests.architectures.shapes import small


def test_the_text_part_of_a_llama_4_is_taken_out_of_its_files(tmp_path: Path, tiny: LoadedModel) -> None:
    whole = AutoModelForImageTextToText.from_config(small(CONFIG_MAPPING["llama4"]()))
    whole.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="float32", device="cpu").model
    assert type(model).__name__ == "Llama4ForCausalLM"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], whole.state_dict()[f"language_model.{name}"])


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mistral3"])
def test_a_type_without_a_text_model_is_refused(tmp_path: Path, tiny: LoadedModel, kind: str) -> None:
    CONFIG_MAPPING[kind]().save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(HarnessError, match=f"transformers has no causal language model of type '{kind}'; give another"):
        load_model(str(tmp_path), dtype="float32", device="cpu")

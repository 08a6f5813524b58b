"""Folders of models whose files are no files, or whose configs say what no model is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.engine.transformers_seam import AttachedModel
from harness.models.load import load_model
from harness.models.source import check_model
from tests.hostile import socket_at, tried

pytestmark = pytest.mark.hostile
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
ANY_FILE = (*JSON_FILES, "model.safetensors", "chat_template.jinja", "modeling.py")


def edited(name: str, **fields: Any) -> Callable[[Path], None]:
    """Change fields of a JSON file; `...` takes one out."""

    def change(folder: Path) -> None:
        held = {**json.loads((folder / name).read_text()), **fields}
        (folder / name).write_text(json.dumps({k: v for k, v in held.items() if v is not ...}))

    return change


def _pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [_pipe, socket_at, Path.mkdir, lambda path: path.symlink_to("nowhere")])
@pytest.mark.parametrize("name", ANY_FILE)
def test_what_is_no_file(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    tried("model file", lambda: check_model(str(folder)))


def test_a_pipe_or_another_file_as_a_model(tmp_path: Path) -> None:
    for name in ("x.gguf", "pipe"):
        os.mkfifo(tmp_path / name)
        assert "neither a file nor a folder" in tried("model file", lambda name=name: check_model(str(tmp_path / name)))
    (tmp_path / "weights.bin").touch()
    assert "not a .gguf" in tried("model file", lambda: check_model(str(tmp_path / "weights.bin")))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
NO_SIZE = st.one_of(
    st.integers(max_value=0), st.integers(min_value=2**50), st.floats(), st.text(max_size=5), st.booleans(), st.just({})
)


@given(st.binary(max_size=60) | JSON.filter(lambda v: not isinstance(v, dict)).map(lambda v: json.dumps(v).encode()))
def test_a_config_that_is_no_object(plain: Path, tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    own = tmp_path_factory.mktemp("config")
    (own / "config.json").write_bytes(data)
    tried("model config", lambda: check_model(str(own)))


@given(st.sampled_from(SIZES), NO_SIZE, st.booleans())
def test_sizes_that_are_none(tmp_path_factory: pytest.TempPathFactory, name: str, value: Any, inner: bool) -> None:
    own = tmp_path_factory.mktemp("sizes")
    part = {name: value}
    (own / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": part} if inner else part))
    tried("model config", lambda: check_model(str(own)))


@pytest.mark.parametrize(
    "text", ['{"a":' * 50000 + "1" + "}" * 50000, "[" * 50000, '{"a":1' + "0" * 5000 + "}", '{"a":NaN}']
)
def test_configs_that_are_deep_or_long(folder: Path, text: str) -> None:
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        own = folder / name
        kept = own.read_text()
        own.write_text(text)
        tried("model config", lambda: check_model(str(folder)))
        own.write_text(kept)


CONFIGS: dict[str, list[tuple[str, Any]]] = {
    "config.json": [
        *[("num_hidden_layers", value) for value in (0, -1, "x", 1.5, True, 5, 3, 513, 10**30, None)],
        *[("hidden_size", 128), ("vocab_size", 300), ("vocab_size", 10), ("head_dim", 7), ("num_key_value_heads", 3)],
        *[
            ("num_attention_heads", 1000),
            ("intermediate_size", 64),
            ("attention_bias", True),
            ("max_position_embeddings", "x"),
        ],
        *[("tie_word_embeddings", True), ("tie_word_embeddings", "x"), ("rms_norm_eps", "x"), ("hidden_act", "nope")],
        *[("rope_parameters", {"rope_type": "nope"}), ("rope_parameters", []), ("layer_types", ["full_attention"])],
        *[("model_type", value) for value in (5, None, [], "nope", "t5")],
        *[("architectures", ["BertForMaskedLM"]), ("architectures", [5]), ("architectures", "x")],
        *[("quantization_config", value) for value in (5, {}, {"quant_method": "nope"}, {"quant_method": "gptq"})],
        *[("auto_map", 5), ("eos_token_id", "x"), ("eos_token_id", -1), ("pad_token_id", 10**9), ("text_config", 5)],
    ],
    "generation_config.json": [
        *[("eos_token_id", "x"), ("eos_token_id", [2, "x"]), ("cache_implementation", "nope"), ("compile_config", 5)],
        ("watermarking_config", 5),
    ],
    "tokenizer_config.json": [
        *[
            ("tokenizer_class", 5),
            ("eos_token", 5),
            ("added_tokens_decoder", 5),
            ("padding_side", "x"),
            ("auto_map", 5),
        ],
        *[("model_max_length", "x"), ("extra_special_tokens", 5)],
    ],
    "tokenizer.json": [
        *[
            ("version", "9.0"),
            ("model", {"type": "Nope"}),
            ("model", 5),
            ("normalizer", {"type": "Nope"}),
            ("future", 5),
        ],
        *[
            ("pre_tokenizer", {"type": "Nope"}),
            ("post_processor", {"type": "Nope"}),
            ("decoder", 5),
            ("added_tokens", 5),
        ],
    ],
}


@pytest.mark.parametrize(("name", "fields"), CONFIGS.items(), ids=CONFIGS)
def test_configs_of_something_else(folder: Path, name: str, fields: list[tuple[str, Any]]) -> None:
    kept = (folder / name).read_text()
    for field in fields:
        edited(name, **dict([field]))(folder)
        tried("model config", lambda: load_model(str(folder), dtype="float32", device="cpu"))
        (folder / name).write_text(kept)


ODD: tuple[dict[str, Any], ...] = (
    *({"model_type": "nope"}, {"model_type": 7}, {"model_type": "bert"}, {"model_type": "mamba"}, {"vocab_size": 0}),
    *({"hidden_size": 63}, {"num_attention_heads": "four"}, {"num_key_value_heads": 3}, {"rope_scaling": "yarn"}),
    *(
        {"hidden_act": "nope"},
        {"max_position_embeddings": None},
        {"pad_token_id": 10**6},
        {"auto_map": 1},
        {"dtype": "x"},
    ),
    *({"initializer_range": "wide"}, {"initializer_range": -1.0}, {"num_hidden_layers": True}, {"architectures": 5}),
)


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_config_that_no_random_weights_can_be_made_of(plain: Path, tmp_path: Path, odd: dict[str, Any]) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(json.loads((plain / "config.json").read_text()) | odd))
    tried("model shape", lambda: AttachedModel(load_model(f"shape:{path}", device="cpu").model), may_pass=True)

"""Weights that are cut off, lack something, or are those of another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from harness.models.load import LoadedModel, load_model
from harness.models.source import check_model
from tests.hostile import tried

pytestmark = pytest.mark.hostile
Change = Callable[[Path], object]
WHOLE = "model.safetensors"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files of one example after the other."""
    return tmp_path_factory.mktemp("scratch")


def weighed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        held = {name: tensor.clone() for name, tensor in load_file(folder / WHOLE).items()}
        save_file(change(held), folder / WHOLE, metadata={"format": "pt"})

    return rewrite


def _without(part: str) -> Change:
    return weighed(lambda held: {name: tensor for name, tensor in held.items() if part not in name})


def _with(name: str, make: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Change:
    return weighed(lambda held: {**held, name: make(held).contiguous()})


UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS: dict[str, Change] = {
    **{
        f"no {part}": _without(part)
        for part in (".layers.2.", "model.norm", "lm_head", "embed", "up_proj", "1.self_attn")
    },
    "nothing": weighed(lambda held: {}),
    "a head more": _with("v_head.weight", lambda held: torch.ones(3)),
    "a layer more": _with("model.layers.4.mlp.up_proj.weight", lambda held: held[UP].clone()),
    "transposed": _with(UP, lambda held: held[UP].T),
    "short": _with("model.norm.weight", lambda held: torch.ones(3)),
    "of another class": weighed(lambda held: {f"transformer.{name}": tensor for name, tensor in held.items()}),
    "absent": lambda folder: (folder / WHOLE).unlink(),
    "empty": lambda folder: (folder / WHOLE).write_bytes(b""),
    "a pickle": lambda folder: (folder / WHOLE).rename(folder / "pytorch_model.bin"),
    "an index of nothing": lambda folder: (folder / WHOLE).rename(folder / f"{WHOLE}.index.json"),
}


@pytest.mark.parametrize("change", WEIGHTS.values(), ids=WEIGHTS)
def test_weights_of_something_else(folder: Path, change: Change) -> None:
    change(folder)
    line = tried("model weights", lambda: load_model(str(folder), dtype="float32", device="cpu"))
    assert str(folder) in line or folder.name in line


def test_an_index_without_all_its_files(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "model-00001-of-00002.safetensors")
    index = folder / f"{WHOLE}.index.json"
    for held in (
        {},
        {"weight_map": 5},
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": "model-00002-of-00002.safetensors"}},
    ):
        index.write_text(json.dumps(held))
        tried("model weights", lambda: check_model(str(folder)))


@given(st.data())
def test_weights_that_are_cut_off_or_longer(plain: Path, scratch: Path, data: st.DataObject) -> None:
    own, whole = scratch, (plain / WHOLE).read_bytes()
    shutil.copy(plain / "config.json", own)
    cut = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 64))
    (own / WHOLE).write_bytes(whole[:cut] if data.draw(st.booleans()) else whole + whole[: cut + 1])
    tried("model weights", lambda: check_model(str(own)))


@given(st.integers(0, 2**64 - 1), st.binary(max_size=80))
def test_a_header_of_safetensors_that_is_none(scratch: Path, length: int, text: bytes) -> None:
    own = scratch
    (own / "config.json").write_text("{}")
    (own / WHOLE).write_bytes(length.to_bytes(8, "little") + text)
    tried("model weights", lambda: check_model(str(own)))


@given(st.none() | st.integers() | st.text(max_size=5) | st.lists(st.floats() | st.integers(), max_size=3))
def test_a_header_of_safetensors_that_says_anything(scratch: Path, value: Any) -> None:
    own, text = scratch, json.dumps({"w": value, "x": {"data_offsets": value}}).encode()
    (own / "config.json").write_text("{}")
    (own / WHOLE).write_bytes(len(text).to_bytes(8, "little") + text)
    tried("model weights", lambda: check_model(str(own)))


def test_what_old_checkpoints_stored_besides_is_no_trouble(folder: Path, tiny: LoadedModel) -> None:
    _with("model.layers.0.self_attn.rotary_emb.inv_freq", lambda held: torch.ones(8))(folder)
    _with("model.layers.0.attn.masked_bias", lambda held: torch.ones(1))(folder)
    loaded = load_model(str(folder), dtype="float32", device="cpu")
    pairs = zip(loaded.model.parameters(), tiny.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)

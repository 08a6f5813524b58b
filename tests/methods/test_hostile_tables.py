"""Compiled tables and tuned parameters from strangers: damaged, edited, or no files at all."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.contract import GROUP, HEADS, LAYERS
from methods.compilerkv.policy import CompilerKV, folder_of
from methods.compilerkv.tables import load_tables
from methods.registry import make_policy
from methods.tuned.artefact import CHOSEN
from tests.hostile import tried, tried_command
from tests.methods.compiled import saved
from tests.methods.loops import sizes

pytestmark = pytest.mark.hostile

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**400, 1e308, "", "x\x1b[31m", "x" * 200_000, [], [[]], {}, {"a": 1}),
    *([1e999], "nan"),
)
SIZES = replace(sizes(40, LAYERS), query_heads=HEADS * GROUP, kv_heads=HEADS)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
VALUES = st.sampled_from(ODD) | SCALARS | st.lists(SCALARS, max_size=3)
FIELDS = (
    *("shapes", "budgets", "kind", "source", "model", "model_revision", "form", "neutral", "prompts"),
    *("report", "seed", "corpus"),
)
FIELDS = (
    *FIELDS,
    "schema_version",
    "head_range",
    "gate_range",
    "tensors_sha256",
    "created",
    "command",
    "made_on",
    "git_commit",
)
INSIDE = (
    *(("shapes", name) for name in ("layers", "query_heads", "kv_heads")),
    *(("form", name) for name in ("window", "kernel", "whole", "gate", "basis")),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    saved(folder)
    used(folder)
    return folder


def used(folder: Path) -> None:
    """Read the tables and look everything up in them, as a run does."""
    policy = CompilerKV(tables=str(folder)).for_model("r1")
    assert policy.needs and policy.shares(SIZES, 32) and policy.notes(16, SIZES) is not None


def copied(sound: Path, folder: Path) -> Path:
    for name in ("manifest.json", "tables.safetensors"):
        (folder / name).write_bytes((sound / name).read_bytes())
    return folder


def give(folder: Path, data: bytes) -> None:
    """Write these bytes as the tensors that the manifest means."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "tables.safetensors").write_bytes(data)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "tensors_sha256": hashlib.sha256(data).hexdigest()}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*((name,) for name in FIELDS), *INSIDE]), VALUES)
def test_a_manifest_with_any_value_anywhere_is_sound_or_refused(
    sound: Path, tmp_path: Path, where: Any, value: Any
) -> None:
    manifest = json.loads((sound / "manifest.json").read_text())
    copied(sound, tmp_path)
    inner = manifest
    for name in where[:-1]:
        inner = inner[name] = dict(inner[name] or {})
    inner[where[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    tried("manifests of tables", lambda: used(tmp_path), may_pass=True)


TEXTS = (
    *(b"", b"{", b"[]", b"null", b"\xff", b"{}" * 9, b'{"a":' * 50_000, b"[" * 200_000),
    *(b'{"schema_version": NaN}', b"\0" * 99),
)


def tensors_of(sound: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load((sound / "tables.safetensors").read_bytes())


def with_header(header: object, rest: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def one_tensor(name: str = "head", **changed: object) -> bytes:
    return with_header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}, b"0000")


BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a number": lambda data: data[:8],
    "cut": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "more": lambda data: data + b"\0",
    "a header of 2^63": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "a header that is no JSON": lambda data: with_header(b"nope"),
    "a deep header": lambda data: with_header(b"[" * 50_000),
    "an odd dtype": lambda data: one_tensor(dtype="X9"),
    "a small dtype": lambda data: one_tensor(dtype="F4"),
    "a negative size": lambda data: one_tensor(shape=[-1]),
    "a size too large": lambda data: one_tensor(shape=[2**62, 2**62]),
    "offsets elsewhere": lambda data: one_tensor(data_offsets=[4, 0]),
    "a name of control codes": lambda data: one_tensor("\x1b[31m" * 500),
    "none": lambda data: with_header({}),
}
TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "doubles": lambda x: x.double(),
    "halves": lambda x: x.half(),
    "whole numbers": lambda x: x.int(),
    "one more dimension": lambda x: x.unsqueeze(0),
    "fewer": lambda x: x[..., :-1].contiguous(),
    "no rows": lambda x: x[:0].contiguous(),
    "not a number": lambda x: torch.full_like(x, float("nan")),
    "infinite": lambda x: torch.full_like(x, float("inf")),
    "negative": lambda x: -x - 5,
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:8]))
def test_a_manifest_that_is_none_is_refused(text: bytes, sound: Path, tmp_path: Path) -> None:
    (copied(sound, tmp_path) / "manifest.json").write_bytes(text)
    tried("manifests of tables", lambda: used(tmp_path))


@pytest.mark.parametrize("what", BYTES)
def test_tensors_that_are_no_tensors_are_refused(what: str, sound: Path, tmp_path: Path) -> None:
    give(copied(sound, tmp_path), BYTES[what]((sound / "tables.safetensors").read_bytes()))
    tried("tensors of tables", lambda: used(tmp_path))


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_of_another_kind_are_refused(what: str, sound: Path, tmp_path: Path) -> None:
    tensors = tensors_of(sound)
    for name in ("budget", "head", "gate", "importance", "pool", "entropy_edges"):
        give(copied(sound, tmp_path), safetensors.torch.save({**tensors, name: TENSORS[what](tensors[name])}))
        tried("tensors of tables", lambda: used(tmp_path))
    for left in (tensors.keys() - {"risk"}, {*tensors, "more"}):
        give(tmp_path, safetensors.torch.save({name: tensors.get(name, torch.ones(1)) for name in left}))
        tried("tensors of tables", lambda: used(tmp_path))


PLACES = (
    *("", " ", "a\0b", "x" * 256, "x/" * 3000, "~nobody-here", "\udcff", "/dev/null", "/", "\x1b[31m"),
    *("nowhere", "é" * 200),
)


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_holds_nothing_is_refused(place: str) -> None:
    tried("places of tables", lambda: load_tables(folder_of(place)))
    tried("places of tables", lambda: make_policy("compilerkv", {"tables": place}).provenance())
    tried("places of tuned parameters", lambda: make_policy("snapkv@tuned", {"artefact": place}).for_model("x"))


@pytest.mark.parametrize("name", ["manifest.json", "tables.safetensors", "snapkv.json"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(name: str, sound: Path, tmp_path: Path) -> None:
    copied(sound, tmp_path)
    for make in (os.mkfifo, os.mkdir):
        path = tmp_path / name
        path.unlink(missing_ok=True) if not path.is_dir() else path.rmdir()
        make(path)
        tuned = partial(make_policy("snapkv@tuned", {"artefact": str(path)}).for_model, "x")
        tried("pipes and folders", tuned if name == "snapkv.json" else partial(used, tmp_path))


def test_a_home_is_filled_in(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(sound.parent))
    assert load_tables(folder_of(f"~/{sound.name}")) is load_tables(sound)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), VALUES)
def test_tuned_parameters_with_any_value_anywhere_are_sound_or_refused(tmp_path: Path, data: Any, value: Any) -> None:
    packaged = sorted(CHOSEN.glob("*/snapkv.json"))[0]
    tuning = json.loads(packaged.read_text())
    revision = tuning["model_revision"]
    inner = tuning["chosen"] if data.draw(st.booleans()) else tuning
    inner[data.draw(st.sampled_from(sorted(inner)))] = value
    (tmp_path / "snapkv.json").write_text(json.dumps(tuning))
    policy = make_policy("snapkv@tuned", {"artefact": str(tmp_path)})
    tried("tuned parameters", lambda: policy.for_model(revision).provenance(), may_pass=True)


def test_the_command_line_says_so_in_a_line(sound: Path, tmp_path: Path) -> None:
    (copied(sound, tmp_path) / "tables.safetensors").write_bytes(b"")
    for words in (("show", tmp_path), ("compare", tmp_path, tmp_path), ("show", "\x1b[31m"), ("show", "x" * 300)):
        tried_command("tables on the command line", "tables", *words)

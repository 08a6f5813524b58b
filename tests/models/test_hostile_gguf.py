"""GGUF files that are cut off, damaged, or a part of a model."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.models.source import check_model
from tests.hostile import tried

pytestmark = pytest.mark.hostile


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the files of one example after the other."""
    return tmp_path_factory.mktemp("scratch")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(fields: dict[str, int], *, version: int = 3, tensors: int = 1) -> bytes:
    """A file of some number fields and one-dimensional tensors of 8 float32 each."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields))
    head += b"".join(_text(name) + struct.pack("<II", 4, value) for name, value in fields.items())
    head += b"".join(_text(f"t{i}") + struct.pack("<IQIQ", 1, 8, 0, 32 * i) for i in range(tensors))
    return head + bytes(-len(head) % 32) + bytes(32 * tensors)


GOOD = gguf({"llama.block_count": 2, "split.count": 1}, tensors=3)


def _written(folder: Path, data: bytes, name: str = "m.gguf") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def test_a_whole_gguf_file_passes_a_look(tmp_path: Path) -> None:
    assert check_model(_written(tmp_path, GOOD)).kind == "gguf"


@given(st.integers(0, len(GOOD) - 1))
def test_gguf_files_that_are_cut_off(scratch: Path, cut: int) -> None:
    name = _written(scratch, GOOD[:cut])
    tried("model gguf", lambda: check_model(name))


@given(st.integers(0, len(GOOD) - 97), st.integers(0, 255))
def test_gguf_files_with_another_byte(scratch: Path, at: int, byte: int) -> None:
    name = _written(scratch, GOOD[:at] + bytes([byte]) + GOOD[at + 1 :])
    tried("model gguf", lambda: check_model(name), may_pass=True)


@given(st.binary(max_size=200))
def test_gguf_files_of_anything(scratch: Path, data: bytes) -> None:
    name = _written(scratch, b"GGUF" + data)
    tried("model gguf", lambda: check_model(name))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gguf({"split.count": 2, "split.no": 0}), "is part 1 of 2 of a split model"),
        (gguf({"split.count": 2, "split.no": 1}), "is part 2 of 2 of a split model"),
        (gguf({"split.no": 0, "split.count": 300}), "of 300"),
        (gguf({}, tensors=0), "holds no tensors"),
        (gguf({}, version=1), "version 1"),
        (gguf({}, version=99), "version 99"),
        (b"ggml" + GOOD[4:], "does not begin with GGUF"),
        (b"", "does not begin with GGUF"),
        (GOOD[:-1], "its header tells of"),
    ],
)
def test_gguf_files_that_are_a_part_or_another_kind(tmp_path: Path, data: bytes, says: str) -> None:
    assert says in tried("model gguf", lambda: check_model(_written(tmp_path, data, "m-00001-of-00002.gguf")))

"""Files that people hand in: plain, bounded, JSON or TOML, or one line."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from harness.records.plain_files import DEPTH, of_json, parse_json, parse_toml, read_plain
from tests.hostile import socket_at, tried

pytestmark = pytest.mark.hostile
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


class Two(BaseModel):
    name: str = Field(max_length=9)
    count: int = Field(ge=0, lt=2**63)


def test_what_is_no_plain_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    socket_at(tmp_path / "socket")
    (tmp_path / "large").write_bytes(b"x" * 11)
    odd = [tmp_path / name for name in ("pipe", "socket", "large", "none", "a" * 300, "a\0b", "\x1b[31m")]
    for path in [*odd, tmp_path, Path("/dev/zero")]:
        tried("no plain file", lambda path=path: read_plain(path, most=10))


@given(st.binary(max_size=60))
def test_bytes_are_json_or_refused(data: bytes) -> None:
    tried("bytes as JSON", lambda: parse_json(data, where="x.json"), may_pass=True)
    tried("bytes as TOML", lambda: parse_toml(data, where="x.toml"), may_pass=True)
    tried("bytes as a model", lambda: of_json(Two, data, where="x.json"))


@given(JSON)
def test_a_model_takes_nothing_that_is_not_it(value: object) -> None:
    tried("other JSON as a model", lambda: of_json(Two, json.dumps(value).encode(), where="x.json"))


@pytest.mark.parametrize("depth", [DEPTH + 1, 900, 100_000])
@pytest.mark.parametrize(("open_", "close"), [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded(depth: int, open_: str, close: str) -> None:
    text = open_ * depth + "0" + close * depth
    tried("deep JSON", lambda: parse_json(text, where="x.json"))
    tried("deep JSON", lambda: of_json(Two, text.encode(), where="x.json"))
    if open_ == "[":
        tried("deep TOML", lambda: parse_toml(b"a=" + text.encode(), where="x.toml"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1" * 5000])
def test_numbers_are_finite_and_short(number: str) -> None:
    tried("numbers of JSON", lambda: parse_json(f'{{"a": {number}}}', where="x.json"))


def test_what_is_as_asked_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"name": "a", "count": 3}')
    assert of_json(Two, read_plain(path), where="x") == Two(name="a", count=3)
    assert parse_json("[" * DEPTH + "]" * DEPTH, where="x") is not None
    assert parse_toml(b"a = 1", where="x") == {"a": 1}

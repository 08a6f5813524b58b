"""Stored nights that are damaged, forged or odd: refused in one line that names the file, or compared as they stand."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leaderboards.nights.compare import NightlyOptions
from leaderboards.nights.files import Night, night_of, read_nights, write_night
from leaderboards.nights.report import judge, to_markdown, to_terminal
from tests.hostile import tried
from tests.pretend import cell, manifest

pytestmark = pytest.mark.hostile

WHEN = "2026-01-01T00:00:00+00:00"
OPTIONS = NightlyOptions(version=1, baseline="published", speed_percent=10)
TIMES = ("", "yesterday", "2026-01-01", 5, None, "\0", "9999999999")
HEAD = "task,sample_id,prompt,group,method,budget,status,score,nll,kv_bytes\n"
GOOD = "niah,0,,g,a,64,ok,50.0,1.0,100\n"
TABLES = {
    "nothing": b"",
    "no line": HEAD.encode(),
    "not UTF-8": b"\xff\xfe",
    "NUL": (HEAD + GOOD.replace("niah", "ni\0ah")).encode(),
    "a missing column": HEAD.replace(",group", "").encode() + b"niah,0,,a,64,ok,50.0,1.0,100\n",
    "one column more": HEAD.encode() + b"niah,0,,g,a,64,ok,50.0,1.0,100,7\n",
    "one cell less": HEAD.encode() + b"niah,0,,g,a,64,ok,50.0,1.0\n",
    "an open quote": HEAD.encode() + b'"niah,0',
    "a line twice": (HEAD + GOOD + GOOD).encode(),
    "a huge cell": (HEAD + GOOD.replace("niah", "x" * 200_000)).encode(),
    **{
        f"{name} of {value}": (HEAD + GOOD.replace(old, f",{value},")).encode()
        for name, old, many in (
            ("score", ",50.0,", ("nan", "inf", "-1", "1e300", "text", "101", "0x10")),
            ("nll", ",1.0,", ("nan", "-inf", "1e300", "-5", "one")),
            ("status", ",ok,", ("", "done", "OK")),
            ("prompt", ",0,,", ("0,zz", "0,../..")),
        )
        for value in many
    },
    **{
        f"bytes of {value}": (HEAD + GOOD.replace(",100", f",{value}")).encode()
        for value in ("-1", 2**63, 10**400, "", "1.5", "nan")
    },
}


def night(**changes: Any) -> Night:
    run = manifest(started=WHEN, finished=WHEN).model_copy(update={"run_id": "run1"})
    return night_of(cell(changes.pop("method", "a"), "64", [0.5] * 8, **changes), run, board="b", version=1)


def kept(folder: Path, table: bytes | None = None, **about: object) -> Path:
    """A stored night with other samples, or other fields, and the checksum that fits."""
    csv, path = write_night(night(), folder)
    told = json.loads(path.read_bytes()) | about
    if table is not None:
        csv.write_bytes(table)
        told["table_sha256"] = hashlib.sha256(table).hexdigest()
    path.write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_a_table_of_samples_that_is_none_is_refused(table: bytes, tmp_path: Path) -> None:
    path = kept(tmp_path, table)
    assert path.stem in tried("samples of nights", lambda: read_nights(tmp_path, "b"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in ("started", "finished")
        for value in ("", "yesterday", "2026-01-01", 5, None, "\0", "9999999999")
    ]
    + [
        ("seconds", value)
        for value in (None, {}, {"prefill": -1, "decode": 0}, {"prefill": 1e300, "decode": 0}, [1, 2])
    ]
    + [("settings", value) for value in (5, {"model": 5}, [], {"x" * 5000: "y"})]
    + [
        ("samples", -1),
        ("samples", 10**30),
        ("version", 10**30),
        ("version", 1.5),
        ("board", 5),
        ("format", 2),
        ("x", 1),
    ]
    + [("machine_class", "x" * 5000), ("commit", 5), ("table_sha256", "0"), ("run_id", {})],
    ids=ascii,
)
def test_a_night_whose_fields_are_out_of_range_is_refused(name: str, value: object, tmp_path: Path) -> None:
    path = kept(tmp_path, **{name: value})
    assert path.stem in tried("nights", lambda: read_nights(tmp_path, "b"))


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\xff", b"[]", b"{", b"[" * 100_000, b"null", b'{"format": 1}', b'{"board": "\\ud800"}']
)
def test_a_file_that_is_no_night_is_refused(data: bytes, tmp_path: Path) -> None:
    kept(tmp_path).write_bytes(data)
    tried("nights", lambda: read_nights(tmp_path, "b"))


@pytest.mark.parametrize(
    "kind", ["pipe.json", "folder.json", "pipe.samples.csv", "file", "NUL", "overlong", "below a file"]
)
def test_places_of_nights_that_are_none_are_refused(kind: str, tmp_path: Path) -> None:
    path, folder = kept(tmp_path), tmp_path
    table = path.with_name(path.name.replace(".json", ".samples.csv"))
    if kind == "pipe.json":
        os.mkfifo(tmp_path / kind)
    elif kind == "folder.json":
        (tmp_path / kind).mkdir()
    elif kind == "pipe.samples.csv":
        table.unlink()
        os.mkfifo(table)
    else:
        more = {"file": path, "NUL": tmp_path / "a\0b", "overlong": tmp_path / ("x" * 300), "below a file": path / "x"}
        folder = more[kind]
    tried("nights", lambda: read_nights(folder, "b"))


@given(
    st.text(max_size=12),
    st.text(max_size=12),
    st.text(max_size=8),
    st.sampled_from(["-1+1", "=x", "a|b", "<b>", "\x00"]),
)
def test_odd_labels_come_back_and_make_a_report(method: str, task: str, group: str, error: str) -> None:
    def attempt() -> None:
        own = night(method=method, task=task + error, meta={"group": group})
        with tempfile.TemporaryDirectory() as folder:
            write_night(own, Path(folder))
            (back,) = read_nights(Path(folder), "b")
        assert back.about == own.about
        assert back.table.equals(own.table.astype(back.table.dtypes.to_dict()))
        verdict = judge(own, [back], OPTIONS)
        assert not verdict.regressions
        for text in (to_markdown(verdict), to_terminal(verdict)):
            text.encode()
            assert not any(ord(letter) < 32 and letter != "\n" for letter in text)

    tried("labels of nights", attempt, may_pass=True)


def test_a_clock_that_was_set_back_takes_no_time(tmp_path: Path) -> None:
    run = manifest(started=WHEN, finished="2025-12-31T23:00:00+00:00").model_copy(update={"run_id": "run1"})
    own = night_of(cell("a", "64", [0.5] * 8), run, board="b", version=1)
    assert "0 min 0 s" in to_markdown(judge(own, [], OPTIONS))

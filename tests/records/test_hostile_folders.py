"""What may stand in a folder of records in the place of its files, and damage of any kind to those that are there."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.records import atomic_files as disk
from tests.hostile import socket_at, tried
from tests.records.test_log_folder import KINDS, Kind, files

pytestmark = pytest.mark.hostile


STANDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "socket": socket_at,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/full"),
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "pipe behind a link": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "circle of links": lambda path: path.symlink_to(path.name),
}


@pytest.fixture(params=KINDS, ids=lambda kind: kind.layout.kind)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.mark.parametrize("stands", STANDS)
@pytest.mark.parametrize("place", ["manifest", "records", "lock", "earlier"])
def test_what_is_no_file_is_refused_and_never_waited_for(kind: Kind, tmp_path: Path, place: str, stands: str) -> None:
    folder, layout = kind.three(tmp_path).parent, kind.layout
    stem = layout.manifest_file.removesuffix(".json")
    names = {"manifest": layout.manifest_file, "records": layout.records_file, "lock": ".lock"}
    path = folder / names.get(place, f"{stem}.1.json")
    path.unlink(missing_ok=True)
    STANDS[stands](path)
    tried(f"{stands} in a folder", partial(kind.open, tmp_path))
    tried(f"{stands} in a folder", partial(layout.load, folder), may_pass=place in ("lock", "earlier"))
    with pytest.raises(Exception, match=r"."):
        kind.open(tmp_path)


def damaged(path: Path, data: bytes, kind: Kind, what: str) -> None:
    """Read and open the folder with `data` in the place of a file of its; a refusal changes nothing there."""
    whole = files(path.parent)
    path.write_bytes(data)
    before = files(path.parent)
    try:
        told = tried(what, partial(kind.layout.load, path.parent), may_pass=True)
        opened = tried(what, lambda: kind.open(path.parents[0 if kind is KINDS[2] else 1]).close(), may_pass=True)
        assert opened or not told
        assert not opened or files(path.parent) == before
    finally:
        for file in path.parent.iterdir():
            file.unlink()
        for name, content in whole.items():
            (path.parent / name).write_bytes(content)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.layout.kind)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    """A folder with three records, mended after each damage."""
    return request.param, request.param.three(tmp_path_factory.mktemp("damaged")).parent


@given(data=st.binary(max_size=60), at=st.floats(0, 1))
def test_any_bytes_within_the_files(folder: tuple[Kind, Path], data: bytes, at: float) -> None:
    kind, place = folder
    for name in (kind.layout.manifest_file, kind.layout.records_file):
        whole = (place / name).read_bytes()
        cut = int(at * len(whole))
        damaged(place / name, whole[:cut] + data + whole[cut + len(data) :], kind, "bytes within a file")


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
)


@given(value=ODD, which=st.integers(0, 200))
def test_any_value_in_any_field(folder: tuple[Kind, Path], value: Any, which: int) -> None:
    kind, place = folder
    for name in (kind.layout.manifest_file, kind.layout.records_file):
        raw = json.loads(
            (place / name).read_bytes().splitlines()[0] if name.endswith("l") else (place / name).read_bytes()
        )
        field = sorted(raw)[which % len(raw)]
        if isinstance(raw[field], dict) and raw[field] and which % 2:
            raw[field][sorted(raw[field])[which % len(raw[field])]] = value
        else:
            raw[field] = value
        damaged(place / name, json.dumps(raw).encode() + b"\n", kind, "another value in a file")


LINES = [
    b"\0" * 5000,
    b"{}",
    b"null",
    b"[]",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"schema_version":2,"meta":' + b"[" * 90_000,
]
LINES += [
    b"9" * 5000,
    b"\xff\xfe",
    b"\xef\xbb\xbf{}",
    b'{"schema_version":1e999}',
    b'"' + b"x" * 10**6 + b'"',
    b"",
    b" \r",
]


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_a_damaged_line_is_named(folder: tuple[Kind, Path], line: bytes) -> None:
    kind, place = folder
    path = place / kind.layout.records_file
    whole = path.read_bytes().splitlines(keepends=True)
    damaged(path, b"".join([whole[0], line + b"\n", *whole[1:]]), kind, "a damaged line")
    damaged(path, b"".join([*whole, line]), kind, "a torn last line")
    damaged(place / kind.layout.manifest_file, line, kind, "a damaged manifest")


def test_lines_of_another_system_are_read(folder: tuple[Kind, Path]) -> None:
    kind, place = folder
    path = place / kind.layout.records_file
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\n", b"\r\n"))
    assert kind.names(place) == ["a", "b", "c"]
    path.write_bytes(whole)


def test_a_line_without_end_is_not_read_into_memory(folder: tuple[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, place = folder
    monkeypatch.setattr(disk, "LONGEST", 4096)
    path = place / kind.layout.records_file
    damaged(path, path.read_bytes() + b"x" * 10_000, kind, "a line without end")
    told = tried("a line without end", lambda: list(disk.whole_lines(Path("/dev/zero"))))
    assert "not a plain file" in told


PLACES: list[Callable[[Path], Path]] = [
    lambda top: top / "file",
    lambda top: top / "file" / "below",
    lambda top: top / ("n" * 256),
    lambda top: top / ("n" * 5000),
    lambda top: top / "/".join(["deep" * 30] * 50),
    lambda top: top / "nul\0name",
    lambda top: top / "circle",
    lambda top: top / "pipe",
    lambda top: Path("/proc/self"),
    lambda top: Path("/dev/null"),
    lambda top: Path("/sys/kernel/nothing"),
]


@pytest.mark.parametrize("place", PLACES, ids=range(len(PLACES)))
def test_a_place_where_no_folder_can_be(kind: Kind, tmp_path: Path, place: Callable[[Path], Path]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    root = place(tmp_path)
    tried("no place for a folder", partial(kind.open, root))
    tried("no place for a folder", partial(disk.check_place, root), may_pass=True)
    tried("no place for a folder", partial(kind.layout.find, root))
    tried("no place for a folder", partial(kind.layout.load, root))

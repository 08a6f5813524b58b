"""Boards of folders, archives, files of options and names that are none: each is refused in one line that names it."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.boards.compiled_tables import table_maps_of
from harness.boards.sources import board_options, collect, load_pack, read_config
from harness.cli.nightly import nightly_options
from harness.errors import HarnessError
from harness.records.spec import MethodSpec
from harness.submission.archive import MANIFEST, pack_run
from leaderboards.tables.files import checked_place, write_files
from tests.hostile import tried, tried_command
from tests.pretend import manifest as pretended
from tests.submitted import members_of, repacked, stored

pytestmark = pytest.mark.hostile

NAMES = (
    *("", ".", "..", "../x", "a/b", "/etc/x", "a\0b", "a\nb", "\x1b[31m", "-x", "x" * 121, "é" * 61, "a b", "a\\b"),
    *("~", "$HOME"),
)
TOML = (
    *(b"\xff\xfe", b"a =", b"[a\n", b"a = 1\na = 2", b"\0", b"a = " + b"[" * 3000, b"\xef\xbb\xbfa=1"),
    b"a = " + b"[" * 100 + b"]" * 100,
)
OPTIONS = ("version", "baseline", "alpha", "score_points", "bytes_percent", "speed_percent", "x")
TABLES = ("a\0b", "x" * 300, "x/" * 3000, "", "../..", "/dev/null", "~", "$HOME", 5, [], {}, None)


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_name_that_no_file_has_is_refused(name: str, tmp_path: Path) -> None:
    assert "board name" in tried("names of boards", lambda: write_files(tmp_path, name, {"md": ""}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "pipe", "below a file", "overlong", "NUL", "dangling link"])
def test_a_folder_that_none_can_be_is_refused_before_the_board_is_made(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    if kind in ("file", "below a file"):
        place.write_text("")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "dangling link":
        place.symlink_to(tmp_path / "absent" / "more")
    more = {"below a file": place / "x", "overlong": tmp_path / ("x" * 300), "NUL": tmp_path / "a\0b"}
    assert "cannot create" in tried("folders of boards", lambda: checked_place(more.get(kind, place), "board"))


@pytest.mark.parametrize("data", TOML, ids=range(len(TOML)))
def test_options_that_are_no_toml_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    path.write_bytes(data)
    assert str(path) in tried("TOML of boards", lambda: read_config(str(path)))
    assert str(path) in tried_command("TOML of boards", "nightly", path)


@pytest.mark.parametrize("name", ["absent", "x" * 300, "a\0b", "/dev/zero", "/dev", "", "a/" * 3000])
def test_options_that_cannot_be_read_are_refused(name: str) -> None:
    tried("TOML of boards", lambda: read_config(name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(OPTIONS), json_values)
def test_odd_options_of_a_night_are_refused_or_are_in_range(name: str, value: object) -> None:
    table = {"version": 1, "baseline": "b", name: value}
    line = tried("options of nights", lambda: nightly_options(table, "b.toml"), may_pass=True)
    assert not line or "nightly" in line or name in line
    tried("options of boards", lambda: board_options({"subject": value}), may_pass=True)
    tried("options of boards", lambda: board_options(value), may_pass=True)


@pytest.mark.parametrize("change", ["seed", "run_id", "index"])
def test_an_archive_whose_manifest_was_edited_makes_no_board(change: str, tmp_path: Path) -> None:
    pack_run(stored(tmp_path / "results"), tmp_path / "pack.zip")
    members = members_of(tmp_path / "pack.zip")
    told = json.loads(members[MANIFEST])
    if change == "seed":
        told["spec"]["seed"] += 1
    elif change == "run_id":
        told["run_id"] = "0" * 12
    more = {"run_id": "0" * 12} if change == "index" else {}
    pack = repacked(tmp_path / "pack.zip", {**members, MANIFEST: json.dumps(told).encode()}, **more)
    assert "pack.zip" in tried("edited archives", lambda: load_pack(pack))
    tried("edited archives", lambda: collect([tmp_path]))


def test_one_broken_run_among_good_ones_is_named(tmp_path: Path) -> None:
    folder = stored(tmp_path / "good")
    for i, data in enumerate((b"", b"{", b"[]", b"{}", b"\xff", b'{"schema_version": 99}')):
        broken = tmp_path / "good" / f"broken{i}"
        broken.mkdir()
        (broken / "run.json").write_bytes(data)
        assert f"broken{i}" in tried("broken runs", lambda: collect([tmp_path / "good"]))
        (broken / "run.json").unlink()
        broken.rmdir()
    assert folder.is_dir()


@pytest.mark.parametrize("tables", TABLES)
def test_tables_that_a_run_could_not_have_used_leave_the_page_whole(tables: object) -> None:
    params = {"form": "compiled", "budgets": "compiled", "tables": tables, "tables_sha256": "0" * 64}
    run = pretended(methods=(MethodSpec(label="compilerkv", name="compilerkv", params=params),))

    def attempt() -> None:
        maps, remarks = table_maps_of([run])
        assert maps == [] and (not tables or len(remarks) == 1)

    tried("names of tables", attempt, may_pass=True)


def test_a_board_that_cannot_be_written_is_refused_whatever_stands_there(tmp_path: Path) -> None:
    folder = stored(tmp_path / "results")
    (tmp_path / "out" / "b.csv").mkdir(parents=True)
    line = tried_command("folders of boards", "board", folder, "--out", tmp_path / "out", "--name", "b")
    assert "b.csv" in line
    with pytest.raises(HarnessError, match="no runs|no run in"):
        collect([tmp_path / "out"])

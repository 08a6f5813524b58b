"""Records, manifests and archives with any value anywhere: what cannot be is refused in one line, never a traceback."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import load_run
from harness.submission.archive import INDEX, MANIFEST, RECORDS, open_pack, pack_run, zipped
from harness.submission.verify import REFUSALS, verify_pack
from tests.hostile import TALLY, socket_at, tried, tried_command
from tests.submitted import manifest, members_of, records, repacked, stored

pytestmark = pytest.mark.hostile
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

NUMBERS = [-1, -(2**63), 2**63, 10**400, 1e308, -1e-300, float("nan"), float("inf"), True, False]
TEXTS = ["", "\x00", "\x1b[2J", "\ud800", "$\\frac$", "=1+1", "\u202e", "../../etc", "a" * 2_000_000, "\u0430"]
DEEP: Any = 0
for _ in range(40):
    DEEP = {"a": DEEP}
NESTED = [None, [], {}, [[]], [None] * 20_000, {"a": {"b": []}}, DEEP, {"needles": 5}, {"\ud800": 1}]
values = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, *NESTED]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    ),
)
parts = st.floats(0, 1, exclude_max=True)


def verified(pack: Path) -> None:
    """Raise what an archive is refused with."""
    verdict = verify_pack(pack)
    assert verdict.lines <= REFUSALS + 15
    assert all(reason.isascii() and "\n" not in reason and len(reason) <= 1000 for reason in verdict.reasons)
    if not verdict.ok:
        raise HarnessError(verdict.reasons[0])


@same_folder
@given(name=st.sampled_from(sorted(Record.model_fields)), value=values)
def test_any_field_of_a_record(pack: Path, tmp_path: Path, name: str, value: object) -> None:
    members = members_of(pack)
    lines = members[RECORDS].splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {name: value}).encode()
    members[RECORDS] = b"\n".join(lines) + b"\n"
    other = tmp_path / "other.zip"
    other.write_bytes(pack.read_bytes())
    tried("record", lambda: verified(repacked(other, members)), may_pass=True)


@same_folder
@given(
    name=st.sampled_from([*RunManifest.model_fields, *("spec." + n for n in manifest().spec.model_dump())]),
    value=values,
)
def test_any_field_of_a_manifest(pack: Path, tmp_path: Path, name: str, value: object) -> None:
    members, other = members_of(pack), tmp_path / "other.zip"
    changed = json.loads(members[MANIFEST])
    *above, last = name.split(".")
    (changed["spec"] if above else changed)[last] = value
    members[MANIFEST] = json.dumps(changed).encode()
    other.write_bytes(pack.read_bytes())
    tried("manifest", lambda: verified(repacked(other, members)), may_pass=True)


@same_folder
@given(
    name=st.sampled_from(["kind", "schema_version", "harness", "run_id", "partial", "references", "files"]),
    value=values,
)
def test_any_field_of_an_index(pack: Path, tmp_path: Path, name: str, value: object) -> None:
    members, other = members_of(pack), tmp_path / "other.zip"
    index = json.loads(members[INDEX]) | {name: value}
    other.write_bytes(zipped(members | {INDEX: json.dumps(index).encode()}))
    tried("index", lambda: verified(other), may_pass=True)


@same_folder
@given(
    name=st.sampled_from([INDEX, MANIFEST, RECORDS]), at=st.floats(0, 1, exclude_max=True), byte=st.binary(max_size=3)
)
def test_any_bytes_in_a_member(pack: Path, tmp_path: Path, name: str, at: float, byte: bytes) -> None:
    members, other = members_of(pack), tmp_path / "other.zip"
    place = int(at * len(members[name]))
    members[name] = members[name][:place] + byte + members[name][place + 1 :]
    other.write_bytes(zipped(members))
    tried("member", lambda: verified(other if name == INDEX else repacked(other, members)), may_pass=True)


@same_folder
@given(at=parts, byte=st.binary(max_size=4), cut=st.integers(0, 4))
def test_any_bytes_in_an_archive(pack: Path, tmp_path: Path, at: float, byte: bytes, cut: int) -> None:
    data, other = pack.read_bytes(), tmp_path / "other.zip"
    place = int(at * len(data))
    other.write_bytes(data[:place] + byte + data[place + cut :])
    tried("archive", lambda: verified(other), may_pass=True)


@same_folder
@given(name=st.sampled_from(sorted(Record.model_fields)), value=values)
def test_a_run_folder_with_any_field_is_read_and_packed_or_refused(tmp_path: Path, name: str, value: object) -> None:
    folder = tmp_path / "results" / manifest().run_id
    if not folder.is_dir():
        stored(tmp_path / "results")
    lines = [json.loads(r.model_dump_json()) for r in records()]
    lines[3][name] = value
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tried("folder", lambda: load_run(folder), may_pass=True)
    tried("submit", lambda: pack_run(folder, tmp_path / "out.zip"), may_pass=True)


@pytest.mark.parametrize("kept", ["run.1.json", "run.99999.json", "run.x.json"])
@pytest.mark.parametrize(
    "text", ["", "{}", "[", "\x00", '{"a":' * 5000, '{"schema_version": 10000000000000000000000000}']
)
def test_submit_of_a_folder_with_odd_manifests(tmp_path: Path, kept: str, text: str) -> None:
    folder = stored(tmp_path / "results")
    (folder / kept).write_text(text)
    tried_command("submit", "submit", folder, "--out", tmp_path / "pack.zip", may_pass=kept != "run.1.json")


@pytest.mark.parametrize("place", ["", ".", "missing", "a" * 300, "a\x00b", "/dev/null", "/proc/self/mem"])
def test_no_archive_and_no_folder(tmp_path: Path, place: str) -> None:
    tried_command("verify", "verify", place)
    tried_command("submit", "submit", tmp_path / place if place in ("", ".", "missing") else place)


def test_many_bad_lines_and_many_cells_end_soon(pack: Path, tmp_path: Path) -> None:
    """What took minutes: each line refused alone, and a grid of cells without a record."""
    members = members_of(pack)
    members[RECORDS] = b"{}\n" * 300_000
    verdict = verify_pack(repacked(pack, members))
    assert verdict.lines == REFUSALS and f"stopped after {REFUSALS} refusals" in "\n".join(verdict.told())
    TALLY["many lines", "refused"] += 1
    budgets = tuple(map(str, range(1, 900)))
    large = manifest(budgets=budgets, methods=manifest().spec.methods * 9)
    tried("many cells", lambda: verified(repacked(pack, members | {MANIFEST: large.model_dump_json().encode()})))


@pytest.mark.parametrize("said", ["a " * 30_000, "a. " * 9000, "x" * 60_000, "\u4e2d" * 30_000, "a" * 450_000])
def test_a_prediction_that_is_slow_to_score_is_not_scored(pack: Path, said: str) -> None:
    members = members_of(pack)
    first, *others = [json.loads(line) for line in members[RECORDS].splitlines()]
    first |= {"prediction": said, "answers": [said[:60_000]], "meta": {**first["meta"], "needles": [said[:9000]]}}
    members[RECORDS] = "".join(json.dumps(line) + "\n" for line in (first, *others)).encode()
    tried("long prediction", lambda: verified(repacked(pack, members)))


@pytest.mark.parametrize("what", ["pipe", "folder", "socket"])
def test_an_archive_that_is_no_plain_file_is_not_waited_for(tmp_path: Path, what: str) -> None:
    path = tmp_path / "p"
    {"pipe": os.mkfifo, "folder": Path.mkdir, "socket": socket_at}[what](path)
    tried("no plain file", lambda: open_pack(path).__enter__())

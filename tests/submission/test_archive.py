"""The archive of a submission: equal runs give equal bytes, and whatever is not such an archive is refused unread."""

import pickle
import stat
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZipFile, ZipInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.submission import archive
from harness.submission.archive import INDEX, MANIFEST, RECORDS, open_pack, pack_run, zipped
from tests.submitted import manifest, members_of, records, repacked, stored


def refused(pack: Path, reason: str) -> None:
    with pytest.raises(HarnessError, match=reason) as caught, open_pack(pack):
        pass
    assert "\n" not in str(caught.value)


def test_equal_runs_give_equal_bytes(tmp_path: Path) -> None:
    first, twice = stored(tmp_path / "a"), stored(tmp_path / "b", own=[records()[0], *records()])
    pack_run(first, tmp_path / "a.zip")
    pack_run(twice, tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert list(members_of(tmp_path / "a.zip")) == [INDEX, MANIFEST, RECORDS]


def test_kept_manifests_go_along_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder = stored(tmp_path / "results")
    for number in (10, 2):
        (folder / f"run.{number}.json").write_text(manifest(git_commit=f"c{number}").model_dump_json())
    (folder / "board.md").write_text("a page")
    pack_run(folder, tmp_path / "pack.zip")
    with open_pack(tmp_path / "pack.zip") as pack:
        assert pack.manifests == ["run.2.json", "run.10.json"]
        assert len(list(pack.lines())) == 15
    (folder / "run.3.json").write_text(manifest(seed=1).model_dump_json())
    with pytest.raises(HarnessError, match=r"run\.3\.json is of run"):
        pack_run(folder, tmp_path / "other.zip")


BOMB = b"{" + b" " * (6 << 20)
Members = dict[str, bytes]
CHANGED: list[tuple[Callable[[Members], Members], str]] = [
    *(
        (lambda members, name=name: {**members, name: b"{}"}, "leaves the archive's folder")
        for name in ("../run.json", "/etc/passwd", "a/../../run.json", "C:run.json", "..\\run.json")
    ),
    *(
        (lambda members, name=name: {**members, name: b"{}"}, "is no file of a run")
        for name in ("model.pkl", "run.0.json", "sub/run.json", "run.json\n", "inner.zip", "RUN.JSON")
    ),
    *(
        (lambda members, name=name: {**members, name: BOMB}, "at most 4194304 are allowed")
        for name in (INDEX, MANIFEST)
    ),
    (lambda members: {**members, **{f"run.{n}.json": b"{}" for n in range(1, 70)}}, "72 members|at most 64"),
    (lambda members: {**members, "run.1.json": members[MANIFEST]}, "index.json lists"),
    (lambda members: {name: data for name, data in members.items() if name != RECORDS}, "lacks records.jsonl"),
    (
        lambda members: {**members, RECORDS: members[RECORDS].replace(b"7001", b"7002")},
        "records.jsonl was changed after it was packed",
    ),
]


@pytest.mark.parametrize(("change", "reason"), CHANGED)
def test_other_members_than_packed_are_refused(pack: Path, change: Callable[[Members], Members], reason: str) -> None:
    pack.write_bytes(zipped(change(members_of(pack))))
    assert pack.stat().st_size < 1 << 20
    refused(pack, reason)


@pytest.mark.parametrize(
    ("mode", "packing", "reason"),
    [
        (stat.S_IFLNK, ZIP_DEFLATED, "a symbolic link"),
        (stat.S_IFDIR, ZIP_DEFLATED, "no plain file"),
        (stat.S_IFIFO, ZIP_DEFLATED, "no plain file"),
        (stat.S_IFREG, ZIP_BZIP2, "unusual way"),
    ],
)
def test_a_link_a_device_or_an_unusual_packing_is_refused(pack: Path, mode: int, packing: int, reason: str) -> None:
    members = members_of(pack)
    with ZipFile(pack, "w", packing) as archive:
        for name, data in members.items():
            info = ZipInfo(name)
            info.create_system, info.external_attr = 3, ((mode if name == MANIFEST else stat.S_IFREG) | 0o644) << 16
            archive.writestr(info, data, compress_type=packing)
    refused(pack, reason)


NO_JSON = [pickle.dumps({"a": 1}), pickle.dumps([1], 0), zipped({"run.json": b"{}"}), b"\x1f\x8b\x08", b"[1]"]


@pytest.mark.parametrize("data", NO_JSON)
@pytest.mark.parametrize("name", [MANIFEST, RECORDS])
def test_a_pickle_or_an_archive_under_a_known_name_is_refused(pack: Path, name: str, data: bytes) -> None:
    refused(repacked(pack, members_of(pack) | {name: data}), f"{name} is not JSON")


def test_a_bomb_that_declares_little_is_refused_while_it_is_read(pack: Path) -> None:
    """The sizes in both of its headers lie; what is read ends at the lie, and the checksum does not fit."""
    data = bytearray(zipped({**members_of(pack), MANIFEST: BOMB}))
    told = struct.pack("<L", len(BOMB))
    assert data.count(told) == 2
    pack.write_bytes(data.replace(told, struct.pack("<L", 100)))
    refused(pack, "no sound zip")


def test_all_members_together_are_bounded(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(map(len, members_of(pack).values()))
    monkeypatch.setattr(archive, "LARGE", total - 1)
    refused(pack, "unpacks to more than")


def test_a_line_is_bounded(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "LINE", 100)
    with open_pack(pack) as opened, pytest.raises(HarnessError, match="a line of records"):
        list(opened.lines())


def test_a_name_that_is_there_twice_is_refused(pack: Path) -> None:
    members = members_of(pack)
    with warnings.catch_warnings(), ZipFile(pack, "a", ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")
        archive.writestr(RECORDS, members[RECORDS])
    refused(pack, "is there twice")


def test_something_before_or_behind_the_zip_is_refused(pack: Path) -> None:
    data = pack.read_bytes()
    pack.write_bytes(b"#!/bin/sh\n" + data)
    refused(pack, "before or behind")
    pack.write_bytes(data + b"tail")
    refused(pack, "does not end as a zip")


def test_no_zip_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"")
    refused(tmp_path / "a", "does not end as a zip")
    refused(tmp_path / "b", "cannot read")
    refused(tmp_path, "is a folder, not a plain file")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_never_ends_in_another_error(pack: Path, at: float, flip: int) -> None:
    whole = pack.read_bytes()
    data, other = bytearray(whole), pack.with_name("other.zip")
    data[int(at * len(whole))] ^= flip
    other.write_bytes(data)
    told = ""
    try:
        with open_pack(other) as opened, open_pack(pack) as own:  # a byte that no reader looks at, such as a time
            assert (opened.read(MANIFEST), list(opened.lines())) == (own.read(MANIFEST), list(own.lines()))
    except HarnessError as error:
        told = str(error)
    assert "\n" not in told

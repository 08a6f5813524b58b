"""What the stores of runs, benches and boundaries share: crash, resume, two writers, full disk, damaged files."""

import errno
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from harness.errors import HarnessError
from harness.records.bench_folder import BENCHES, BenchManifest, BenchSpec, BenchStore
from harness.records.boundary_folder import BOUNDARIES, BoundaryStore
from harness.records.log_folder import Resume
from harness.records.log_layout import LogLayout
from harness.records.run_folder import RUNS, RunStore
from tests.leaderboards.tables import test_boundary, test_speed
from tests.records import test_run_folder

ROOT = Path(__file__).parents[2]
SPEC = BenchSpec(
    **{"kind": "bench", "model": "m", "model_revision": "r", "dtype": "float32", "device": "cpu", "kernel": "sdpa"},
    **{"methods": (), "budgets": (), "lengths": (8,), "batch": 1, "new_tokens": 2, "chunk": None, "rounds": 1},
    **{"warm_up": True, "limit_bytes": None, "threads": 1},  # type: ignore[arg-type]
)
BENCH = BenchManifest(
    bench_id=SPEC.bench_id({}), status="started", command=(), spec=SPEC, started="2026-01-01", model_bytes=1
)


@dataclass(frozen=True)
class Kind:
    """One of the stores. record: by a name that is the key."""

    layout: LogLayout[Any, Any]
    start: Callable[..., Any]
    manifest: Any
    record: Callable[[str], Any]

    def add(self, store: Any, record: Any) -> None:
        store.put(record) if isinstance(store, BoundaryStore) else store.append([record])

    def open(self, root: Path, **changes: Any) -> Any:
        return self.start(root, self.manifest.model_copy(update=changes))

    def resume(self, root: Path, how: Resume[Any], **changes: Any) -> Any:
        return self.start(root, self.manifest.model_copy(update=changes), how)

    def three(self, root: Path) -> Path:
        """The log of a folder with three records."""
        with self.open(root) as store:
            for name in ("a", "b", "c"):
                self.add(store, self.record(name))
        return Path(store.folder) / self.layout.records_file

    def names(self, folder: Path) -> list[str]:
        keys = [record.key for record in self.layout.load(folder)[1]]
        return [next(name for name in key if name in ("a", "b", "c")) for key in keys]


KINDS = (
    Kind(RUNS, RunStore, test_run_folder.manifest(), test_run_folder.record),
    Kind(BENCHES, BenchStore, BENCH, partial(test_speed.record, bench_id=BENCH.bench_id)),
    Kind(BOUNDARIES, BoundaryStore, test_boundary.MANIFEST, partial(test_boundary.record, budget="128", answer=1024)),
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.layout.kind)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_stored_is_what_is_loaded(kind: Kind, tmp_path: Path) -> None:
    path = kind.three(tmp_path / "here")
    manifest, records = kind.layout.load(path.parent)
    assert manifest.model_dump_json() == kind.manifest.model_dump_json()
    assert records == [kind.record(name) for name in ("a", "b", "c")]
    assert kind.layout.find(path.parent) == [path.parent] == kind.layout.find(path.parent.parent)
    before = files(path.parent)
    with kind.open(tmp_path / "here") as store:
        assert files(path.parent) == before | {".lock": str(os.getpid()).encode()}
        kind.add(store, kind.record("a"))
    assert kind.names(path.parent) == ["a", "b", "c"]


@pytest.mark.parametrize("keep", [1, 20, -1])
def test_unfinished_last_line(kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture, keep: int) -> None:
    path = kind.three(tmp_path)
    *first, last = path.read_bytes().splitlines(keepends=True)
    torn = b"".join(first) + last[:keep]
    path.write_bytes(torn)
    with caplog.at_level(logging.WARNING, logger="harness"):
        assert kind.names(path.parent) == ["a", "b"]
        assert "ignored an unfinished last line" in caplog.messages[0]
        assert path.read_bytes() == torn  # a reader changes nothing
        caplog.clear()
        with kind.open(tmp_path) as store:
            assert "cut off an unfinished last line" in caplog.messages[0] and len(caplog.messages) == 1
            assert path.read_bytes() == b"".join(first)
            kind.add(store, kind.record("c"))
    assert path.read_bytes() == b"".join([*first, last])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: json.dumps(raw)[:-5], "not JSON"),
        (lambda raw: "", "not JSON"),
        (lambda raw: json.dumps({**raw, "schema_version": 99}), "schema_version 99"),
        (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "schema_version"}), "schema_version None"),
        (lambda raw: "[1]", "schema_version None"),
        (lambda raw: json.dumps({**raw, "surprise": 1}), "surprise"),
    ],
)
@pytest.mark.parametrize("part", ["log", "manifest"])
def test_damage_is_named_and_nothing_is_changed(
    kind: Kind, tmp_path: Path, part: str, change: Callable[[dict[str, Any]], str], says: str
) -> None:
    path = kind.three(tmp_path)
    if part == "log":
        lines, where = path.read_text().splitlines(), f"{path}:2 "
        lines[1] = change(json.loads(lines[1]))
        path.write_text("\n".join([*lines, "torn"]))
    else:
        where = str(path.parent / kind.layout.manifest_file)
        Path(where).write_text(change(json.loads(Path(where).read_text())))
    before = files(path.parent)
    for action in (lambda: kind.layout.load(path.parent), lambda: kind.open(tmp_path, git_commit="another")):
        with pytest.raises(HarnessError) as error:
            action()
        assert where in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert files(path.parent) == before


def test_records_without_manifest_are_refused(kind: Kind, tmp_path: Path) -> None:
    path = kind.three(tmp_path)
    (path.parent / kind.layout.manifest_file).unlink()
    with pytest.raises(HarnessError, match=r"jsonl has records but .*\.json is missing"):
        kind.open(tmp_path)
    with pytest.raises(HarnessError, match=f"is this a {kind.layout.kind} folder"):
        kind.layout.load(path.parent)
    with pytest.raises(HarnessError, match=f"run `harness {kind.layout.kind}` first"):
        kind.layout.find(path.parent)


def test_a_changed_environment_keeps_every_earlier_manifest(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for commit in ("aaa", "aaa", "bbb", "ccc"):
        with kind.resume(tmp_path, Resume(anyway=True), git_commit=commit) as store:
            pass
    stem = kind.layout.manifest_file.removesuffix(".json")
    kept = sorted(store.folder.glob(f"{stem}.*.json"))
    assert [json.loads(path.read_text())["git_commit"] for path in kept] == ["aaa", "bbb"]
    kept[0].unlink()
    kind.resume(tmp_path, Resume(anyway=True), git_commit="ddd").close()
    commits = {json.loads(path.read_text())["git_commit"] for path in store.folder.glob(f"{stem}.*.json")}
    assert commits == {"bbb", "ccc"} and kind.layout.load(store.folder)[0].git_commit == "ddd"
    assert sum("another commit" in message and "git_commit" in message for message in caplog.messages) == 3


def test_a_second_writer_is_refused_until_the_first_ends(kind: Kind, tmp_path: Path) -> None:
    folder = kind.three(tmp_path).parent
    with test_run_folder.held_by_another(folder) as other:
        with pytest.raises(HarnessError, match=f"^{folder} is being written by process {other.pid}; wait"):
            kind.open(tmp_path)
        other.kill()
    with kind.open(tmp_path) as store, pytest.raises(HarnessError, match=f"process {os.getpid()}"):
        kind.open(tmp_path)
    store.close()
    with FileLock(folder / ".lock"), pytest.raises(HarnessError, match="by another process"):  # which tells no number
        kind.open(tmp_path)
    kind.open(tmp_path).close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_write_that_fails_half_way_leaves_the_log_as_it_was(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, real, calls = kind.three(tmp_path), os.write, list[int]()

    def half_then_fail(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data[: len(data) // 2])

    before = path.read_bytes()
    with kind.open(tmp_path) as store:
        monkeypatch.setattr(os, "write", half_then_fail)
        with pytest.raises(HarnessError, match="repeat the command") as error:
            kind.add(store, kind.record("a"))
        monkeypatch.undo()
        assert path.read_bytes() == before and not list(path.parent.glob("*.part"))
        kind.add(store, kind.record("b"))
    assert kind.names(path.parent) == ["a", "b", "c"]
    assert ("disk full" in str(error.value)) == (number != errno.EIO) and "\n" not in str(error.value)

"""The store of runs: resume, batches, full disk, damaged lines. What all stores share is in test_journal."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import RunStore, find_runs, load_run
from harness.records.spec import MethodSpec, ModelSpec, RunSpec, TaskSpec

ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> RunManifest:
    spec = RunSpec(
        model=ModelSpec(name="tiny", revision="r0", dtype="float32", device="cpu"),
        tasks=(TaskSpec(name="niah", protocol="official", provenance={"sizes": (1, 2)}),),
        methods=(MethodSpec(label="snapkv", name="snapkv", params={"window": 32}),),
        budgets=("128",),
        lengths=(1024,),
        limit=None,
        seed=changes.pop("seed", 42),
        max_tokens=2048,
        max_new_tokens=None,
        first_token="compressed",
        query="aware",
        nll_tokens=64,
    )
    values = {"run_id": spec.run_id, "status": "started", "command": ("harness", "run"), "spec": spec}
    return RunManifest(**{**values, "started": "2025-01-01T00:00:00Z", "samples": 2, "cells": 1, **changes})


def record(sample: str = "0", **changes: Any) -> Record:
    values: dict[str, Any] = {
        "run_id": manifest().run_id,
        "model": "tiny",
        "dtype": "float32",
        "task": "niah",
        "sample_id": sample,
        "method": "snapkv",
        "budget": "128",
        "query": "aware",
        "first_token": "compressed",
        "seed": 42,
        "status": "ok",
        "metrics": {"score": 0.1},
    }
    return Record(**{**values, **changes})


def records_file(root: Path) -> Path:
    return root / manifest().run_id / "records.jsonl"


def test_what_was_stored_is_what_is_loaded(tmp_path: Path) -> None:
    written = [
        record("0", prediction="a\nb | ü \u2028", nll=1 / 3, meta={"depth": 0.5}),
        record("1", kept_slots=(1, 2)),
    ]
    with RunStore.open(tmp_path, manifest()) as store:
        assert store.done == frozenset()
        store.append(written)
        store.finish("finished", finished="2025-01-01T01:00:00Z")
    assert find_runs(tmp_path) == [store.folder] == find_runs(store.folder)
    loaded, records = load_run(store.folder)
    assert records == written
    assert loaded.model_dump_json() == store.manifest.model_dump_json()
    assert loaded.status == "finished"
    assert json.loads(records_file(tmp_path).read_text().splitlines()[0])["prediction"] == written[0].prediction


@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(allow_nan=False, allow_infinity=False))
def test_any_text_and_number_survive_a_line(tmp_path_factory: pytest.TempPathFactory, text: str, number: float) -> None:
    root = tmp_path_factory.mktemp("store")
    written = record(prediction=text, error=text, metrics={"score": number}, meta={text: number})
    with RunStore.open(root, manifest()) as store:
        store.append([written])
    assert load_run(store.folder)[1] == [written]


def test_manifest_is_there_before_the_first_record(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, manifest()) as store:
        assert RunManifest.model_validate_json((store.folder / "run.json").read_text()).status == "started"
        assert load_run(store.folder)[1] == []


def test_resume_runs_failed_and_oom_again_and_the_later_line_wins(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, manifest()) as store:
        statuses = ("ok", "skipped", "failed", "oom")
        store.append([record(s, status=s, error=None if s == "ok" else "why") for s in statuses])
    with RunStore.open(tmp_path, manifest()) as store:
        assert {key[1] for key in store.done} == {"ok", "skipped"}
        store.append([record("failed", prediction="second")])
        assert {key[1] for key in store.done} == {"ok", "skipped", "failed"}
    records = load_run(store.folder)[1]
    assert [r.sample_id for r in records] == ["ok", "skipped", "failed", "oom"]
    assert records[2].status == "ok" and records[2].prediction == "second"
    assert len(records_file(tmp_path).read_text().splitlines()) == 5


def test_another_spec_is_another_folder(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, manifest()) as one, RunStore.open(tmp_path, manifest(seed=7)) as two:
        assert one.folder != two.folder
    assert find_runs(tmp_path) == sorted([one.folder, two.folder])
    (one.folder / "run.json").write_bytes((two.folder / "run.json").read_bytes())
    with pytest.raises(HarnessError, match="holds a run of another spec"):
        RunStore.open(tmp_path, manifest())


def damage_json(line: dict[str, Any]) -> str:
    return json.dumps(line)[:-5]


def damage_version(line: dict[str, Any]) -> str:
    return json.dumps({**line, "schema_version": 99})


def damage_no_version(line: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in line.items() if k != "schema_version"})


def damage_extra(line: dict[str, Any]) -> str:
    return json.dumps({**line, "surprise": 1})


def damage_run(line: dict[str, Any]) -> str:
    return json.dumps({**line, "run_id": "elsewhere"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (damage_json, "not JSON"),
        (damage_version, "schema_version 99"),
        (damage_no_version, "schema_version None"),
        (damage_extra, "surprise"),
        (damage_run, "elsewhere"),
        (lambda line: "[1]", "schema_version"),
        (lambda line: "", "not JSON"),
    ],
)
def test_damaged_line_is_named_and_nothing_is_changed(
    tmp_path: Path, damage: Callable[[dict[str, Any]], str], says: str
) -> None:
    with RunStore.open(tmp_path, manifest()) as store:
        store.append([record("0"), record("1"), record("2")])
    path = records_file(tmp_path)
    lines = path.read_text().splitlines()
    lines[1] = damage(json.loads(lines[1]))
    path.write_text("\n".join(lines) + "\n")
    before = {p.name: p.read_bytes() for p in store.folder.iterdir()}
    for action in (lambda: load_run(store.folder), lambda: RunStore.open(tmp_path, manifest())):
        with pytest.raises(HarnessError) as error:
            action()
        assert f"{path}:2" in str(error.value)
        assert says in str(error.value)
        assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in store.folder.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: {**raw, "schema_version": 1}, "schema_version 1"),
        (lambda raw: {**raw, "spec": {**raw["spec"], "seed": 1}}, "edited"),
        (lambda raw: {**raw, "more": 1}, "more"),
    ],
)
def test_damaged_manifest(tmp_path: Path, change: Callable[[dict[str, Any]], Any], says: str) -> None:
    with RunStore.open(tmp_path, manifest()) as store:
        pass
    path = store.folder / "run.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(HarnessError, match=says):
        load_run(store.folder)
    with pytest.raises(HarnessError, match=says):
        RunStore.open(tmp_path, manifest())


def test_a_batch_of_many_samples_is_one_write_and_one_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, flushed = list[int](), list[int]()
    write, fsync = os.write, os.fsync
    with RunStore.open(tmp_path, manifest()) as store:
        monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
        monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(fd) or fsync(fd))
        store.append([record(str(i)) for i in range(500)])
        monkeypatch.undo()
        assert len(store.done) == 500
    assert sizes == [records_file(tmp_path).stat().st_size] and len(flushed) == 1


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    with RunStore.open(tmp_path, manifest()) as store:
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        store.append([record("0"), record("1")])
        monkeypatch.undo()
    assert [r.sample_id for r in load_run(store.folder)[1]] == ["0", "1"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    real = os.write
    calls = 0

    def half_then_fail(descriptor: int, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(number, os.strerror(number))
        return real(descriptor, data[: len(data) // 2])

    with RunStore.open(tmp_path, manifest()) as store:
        store.append([record("0"), record("1")])
        before = records_file(tmp_path).read_bytes()
        monkeypatch.setattr(os, "write", half_then_fail)
        with pytest.raises(HarnessError) as error:
            store.append([record("2"), record("3")])
        monkeypatch.undo()
        assert records_file(tmp_path).read_bytes() == before
        assert {key[1] for key in store.done} == {"0", "1"}
    message = str(error.value)
    assert "2 records are intact" in message
    assert "repeat the command" in message
    assert "\n" not in message
    assert ("disk full" in message) == (number != errno.EIO)


def test_interrupt_during_a_write_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def interrupted(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:10])
        raise KeyboardInterrupt

    with RunStore.open(tmp_path, manifest()) as store:
        store.append([record("0")])
        before = records_file(tmp_path).read_bytes()
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append([record("1")])
        monkeypatch.undo()
    assert records_file(tmp_path).read_bytes() == before


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """The kernel, not a patched function, refuses the write half-way."""
    with RunStore.open(tmp_path, manifest()) as store:
        store.append([record("0")])
    limit = records_file(tmp_path).stat().st_size * 5 // 2
    assert limit > (store.folder / "run.json").stat().st_size
    code = (
        "import sys, resource; from pathlib import Path; from harness.records.run_folder import RunStore\n"
        "from harness.errors import HarnessError\n"
        "from harness.records.record import Record, RunManifest\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))\n"
        "store = RunStore.open(Path(sys.argv[1]), RunManifest.model_validate_json(sys.argv[2]))\n"
        "record = Record.model_validate_json(sys.argv[3])\n"
        "try:\n"
        "    for i in range(1, 9): store.append([record.model_copy(update={'sample_id': str(i)})])\n"
        "except HarnessError as error: print(error)\n"
    )
    arguments = [str(tmp_path), manifest().model_dump_json(), record().model_dump_json(), str(limit)]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("disk full")
    assert "2 records are intact" in done.stdout
    assert [r.sample_id for r in load_run(store.folder)[1]] == ["0", "1"]
    assert records_file(tmp_path).read_bytes().endswith(b"\n")


def test_unusable_records_are_refused(tmp_path: Path) -> None:
    with RunStore.open(tmp_path, manifest()) as store:
        with pytest.raises(HarnessError, match="niah"):
            store.append([record("1"), record(run_id="other")])
        store.append([])
    assert records_file(tmp_path).read_bytes() == b""


def test_unusable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match="cannot write"):
        RunStore.open(tmp_path / "file", manifest())
    with pytest.raises(HarnessError, match="no run in"):
        find_runs(tmp_path / "absent")
    with pytest.raises(HarnessError, match="not the id of its spec"):
        RunStore.open(tmp_path, manifest(run_id="x"))

"""The store of runs: resume, batches, full disk, damaged lines. What all stores share is in test_log_folder."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import HarnessError
from harness.records.record import Record, RunManifest
from harness.records.run_folder import RunStore, find_runs, load_run
from harness.records.spec import MethodSpec, TaskSpec
from tests import pretend

ROOT = Path(__file__).parents[2]


def manifest(**changes: Any) -> RunManifest:
    task = TaskSpec(name="niah", protocol="official", provenance={"sizes": (1, 2)})
    spec = {"tasks": (task,), "methods": (MethodSpec(label="snapkv", name="snapkv", params={"window": 32}),)}
    run = {"status": "started", "command": ("harness", "run"), "started": "2025-01-01T00:00:00Z", "samples": 2}
    return pretend.manifest(**{"budgets": ("128",), **spec, **run, **changes})


def record(sample: str = "0", method: str = "snapkv", **changes: Any) -> Record:
    return pretend.record(method, "128", sample, 0.1, **{"run_id": manifest().run_id, **changes})


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds a folder for as long as it is let."""
    code = "import sys; from pathlib import Path; from harness.records.atomic_files import lock_folder\n"
    code += "lock_folder(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command, pipe = [sys.executable, "-c", code, str(folder)], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        yield other


def records_file(root: Path) -> Path:
    return root / manifest().run_id / "records.jsonl"


def test_the_manifest_is_there_before_the_first_record_and_says_how_the_run_ended(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        assert RunManifest.model_validate_json((store.folder / "run.json").read_text()).status == "started"
        assert store.done == frozenset() and load_run(store.folder)[1] == []
        store.append([record("0", prediction="a\nb | ü \u2028"), record("1", kept_slots=(1, 2))])
        store.finish("finished", finished="2025-01-01T01:00:00Z")
    loaded = load_run(store.folder)[0]
    assert loaded.model_dump_json() == store.manifest.model_dump_json() and loaded.status == "finished"
    assert json.loads(records_file(tmp_path).read_text().splitlines()[0])["prediction"] == "a\nb | ü \u2028"


@settings(deadline=None, max_examples=40)  # a flush of a busy disk takes what it takes
@given(text=st.text(st.characters(exclude_categories=["Cs"])), number=st.floats(0, 1))
def test_any_text_and_number_survive_a_line(tmp_path_factory: pytest.TempPathFactory, text: str, number: float) -> None:
    root = tmp_path_factory.mktemp("store")
    written = record(prediction=text, error=text, metrics={"score": number}, meta={text: number})
    with RunStore(root, manifest()) as store:
        store.append([written])
    assert load_run(store.folder)[1] == [written]


def test_resume_runs_failed_and_oom_again_and_the_later_line_wins(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        statuses = ("ok", "skipped", "failed", "oom")
        store.append([record(s, status=s, error=None if s == "ok" else "why") for s in statuses])
    with RunStore(tmp_path, manifest()) as store:
        assert {key[1] for key in store.done} == {"ok", "skipped"}
        store.append([record("failed", prediction="second")])
        assert {key[1] for key in store.done} == {"ok", "skipped", "failed"}
    records = load_run(store.folder)[1]
    assert [r.sample_id for r in records] == ["ok", "skipped", "failed", "oom"]
    assert records[2].status == "ok" and records[2].prediction == "second"
    assert len(records_file(tmp_path).read_text().splitlines()) == 5


def test_another_spec_is_another_folder(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as one, RunStore(tmp_path, manifest(seed=7)) as two:
        assert one.folder != two.folder
    assert find_runs(tmp_path) == sorted([one.folder, two.folder])
    (one.folder / "run.json").write_bytes((two.folder / "run.json").read_bytes())
    with pytest.raises(HarnessError, match="holds a run of another spec"):
        RunStore(tmp_path, manifest())


def test_a_record_of_another_run_and_an_edited_manifest_are_named(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        store.append([record("0"), record("1")])
    path, about = records_file(tmp_path), store.folder / "run.json"
    lines, raw = path.read_text().splitlines(), json.loads(about.read_text())

    def refused(says: str) -> None:
        for action in (lambda: load_run(store.folder), lambda: RunStore(tmp_path, manifest())):
            with pytest.raises(HarnessError, match=says):
                action()

    path.write_text(lines[0] + "\n" + json.dumps({**json.loads(lines[1]), "run_id": "elsewhere"}) + "\n")
    refused(f"{path}:2 belongs to run elsewhere")
    about.write_text(json.dumps({**raw, "spec": {**raw["spec"], "seed": 1}}))
    refused("was edited")


def test_a_batch_of_many_samples_is_one_write_and_one_flush(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        with patch("os.write", wraps=os.write) as write, patch("os.fsync", wraps=os.fsync) as fsync:
            store.append([record(str(i)) for i in range(500)])
        assert len(store.done) == 500 and write.call_count == fsync.call_count == 1
    assert len(load_run(store.folder)[1]) == 500


def test_short_writes_are_continued_and_interrupted_ones_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def interrupted(descriptor: int, data: bytes) -> int:
        real(descriptor, data[:10])
        raise KeyboardInterrupt

    with RunStore(tmp_path, manifest()) as store:
        monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:7]))
        store.append([record("0"), record("1")])
        before = records_file(tmp_path).read_bytes()
        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append([record("2")])
        monkeypatch.undo()
        assert {key[1] for key in store.done} == {"0", "1"}
    assert records_file(tmp_path).read_bytes() == before
    assert [r.sample_id for r in load_run(store.folder)[1]] == ["0", "1"]


def test_file_size_limit_of_the_system(tmp_path: Path) -> None:
    """The kernel, not a patched function, refuses the write half-way."""
    with RunStore(tmp_path, manifest()) as store:
        store.append([record("0")])
    limit = records_file(tmp_path).stat().st_size * 5 // 2
    assert limit > (store.folder / "run.json").stat().st_size
    code = (
        "import sys, resource; from pathlib import Path; from harness.errors import HarnessError\n"
        "from tests.records.test_run_folder import RunStore, manifest, record\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "store = RunStore(Path(sys.argv[1]), manifest())\n"
        "try:\n"
        "    for i in range(1, 9): store.append([record(str(i))])\n"
        "except HarnessError as error: print(error)\n"
    )
    told = subprocess.check_output([sys.executable, "-c", code, tmp_path, str(limit)], cwd=ROOT, text=True)
    assert told.startswith("disk full") and "2 records are intact" in told
    assert [r.sample_id for r in load_run(store.folder)[1]] == ["0", "1"]
    assert records_file(tmp_path).read_bytes().endswith(b"\n")


def test_unusable_records_and_places_are_refused(tmp_path: Path) -> None:
    with RunStore(tmp_path, manifest()) as store:
        with pytest.raises(HarnessError, match="niah"):
            store.append([record("1"), record(run_id="other")])
        store.append([])
    assert records_file(tmp_path).read_bytes() == b""
    with pytest.raises(HarnessError, match="cannot write"):
        RunStore(records_file(tmp_path), manifest())
    with pytest.raises(HarnessError, match="no run in"):
        find_runs(tmp_path / "absent")
    with pytest.raises(HarnessError, match="not the id of its spec"):
        RunStore(tmp_path, manifest(run_id="x"))

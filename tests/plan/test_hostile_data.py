"""Data that is not there, damaged or oddly named: told in one line, before torch is imported or a model read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.plan.datasets import DATA, fetch_data, find_asset
from tests.hostile import tried, tried_command
from tests.json_parts import HALF, damages
from tests.task_data import write_rows
from tests.tiny_run import TINY

pytestmark = pytest.mark.hostile
RUN = ("run", *TINY, "--methods", "fullkv", "--budgets", "8")
LOCK = {
    **{"name": "longbench", "repo": "THUDM/LongBench", "revision": "main", "commit": "0" * 40, "sha256": "0" * 64},
    "files": {"trec.jsonl": {"sha256": "0" * 64, "rows": 2}},
}
FAMILIES = ("longbench", "longbench_e", "longbench/kvpress", "ruler/qa_1", "ruler", "multiquery", "longbench/trec,niah")


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def loaded(*args: object, **options: object) -> None:
        raise AssertionError("a model is loaded")

    for name in ("load_model", "describe_model"):
        monkeypatch.setattr(f"harness.models.load.{name}", loaded)
    monkeypatch.setenv("KVH_CACHE", str(tmp_path / "cache"))


def data_dir(kind: str, folder: Path) -> str:
    """A path that is no folder with data."""
    (folder / "file").write_text("x")
    write_rows(folder / "some", "trec", [])
    paths = {"file": folder / "file", "some": folder / "some", "none": folder / "none", "long": folder / ("a" * 300)}
    return str(paths.get(kind, kind))


@pytest.mark.parametrize("tasks", FAMILIES)
@pytest.mark.parametrize("kind", ["", "file", "some", "none", "long", "\x1b[31m", "~nobody/x", "/dev/null"])
def test_data_that_is_not_there(tasks: str, kind: str, tmp_path: Path) -> None:
    given_ = ["--data-dir", data_dir(kind, tmp_path)] if kind else []
    query = "agnostic" if tasks in ("longbench/kvpress", "multiquery") else "aware"
    words = [*RUN, "--tasks", tasks, "--query", query, *given_, "--out", tmp_path / "out"]
    line = tried_command("data that is not there", *words)
    assert not (tmp_path / "out").exists() and (kind or "harness data fetch" in line)


@pytest.mark.parametrize("graded", ["none", "a" * 300, "\x1b[31m", "/dev/zero", "..", "", "smollm2-135"])
def test_calibrations_that_are_not_there(graded: str, tmp_path: Path) -> None:
    words = [*RUN, "--tasks", "graded", "--graded", graded, "--out", tmp_path / "out"]
    tried_command("a calibration that is not there", *words)


def test_torch_is_not_imported_to_say_so(tmp_path: Path) -> None:
    """One process of its own: here torch is imported already."""
    (tmp_path / "hotpotqa.jsonl").write_text(json.dumps({"input": HALF}) + "\n")
    told = [["--tasks", "longbench"], ["--tasks", "longbench/hotpotqa", "--data-dir", str(tmp_path)]]
    told += [["--tasks", "ruler/qa_1"], ["--tasks", "graded", "--graded", "nowhere"]]
    code = f"""
import sys
from harness.cli import main
for words in {told!r}:
    assert main([*{RUN!r}, *words]) == 2
main(["lm-eval-import", {str(tmp_path)!r}])
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert ran.returncode == 0, ran.stderr
    assert len(ran.stderr.splitlines()) == len(told) + 1


@pytest.mark.parametrize(
    "words",
    [
        *(["longbnech"], [""], ["\x1b[31m"], ["x" * 5000], ["squad", "hotpotqa", "--revision", "main"]),
        *(["squad", "--sha256", "x"], ["squad", "--sha256", "A" * 64], ["squad", "--sha256", "\x1b[31m"]),
        *(["squad", "--to", "a" * 300], ["squad", "--to", "/dev/null"], ["squad", "--to", "/proc/none"]),
        *(["squad", "--revision", revision] for revision in ("", "..", "\x1b[31m", "x" * 5000, "a b")),
        *(["longbench"], ["squad"], ["hotpotqa"]),
    ],
)
def test_fetching_what_is_not_there(words: list[str]) -> None:
    tried_command("fetching data", "data", "fetch", *words)


def test_a_fetched_folder_that_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "longbench"
    write_rows(folder, "trec", [{}])
    values = (..., None, 3, "", "x" * 500, HALF, [], {"../trec.jsonl": {}}, {"trec.jsonl": {"sha256": "0" * 64}})
    for _, damaged in damages(LOCK, values):
        (folder / "fetched.json").write_text(json.dumps(damaged))
        tried("a damaged lock", lambda: fetch_data("longbench", to=tmp_path, revision="main"))
    (folder / "trec.jsonl").unlink()
    os.mkfifo(folder / "trec.jsonl")
    (folder / "fetched.json").write_text(json.dumps(LOCK))
    tried("a damaged lock", lambda: fetch_data("longbench", to=tmp_path, revision="main"))


@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_as_a_lock(tmp_path: Path, data: bytes) -> None:
    write_rows(tmp_path / "longbench", "trec", [{}])
    (tmp_path / "longbench" / "fetched.json").write_bytes(data)
    tried("bytes as a lock", lambda: fetch_data("longbench", to=tmp_path, revision="main"))


def test_assets_that_were_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache in ("/nowhere", "/dev/null", f"/{'a' * 300}", "~nobody/x"):
        monkeypatch.setenv("KVH_CACHE", cache)
        for name in DATA:
            tried("a cache that is none", lambda name=name: find_asset(name))

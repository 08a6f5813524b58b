"""A folder that other code, packages or another machine go on with: refused, or said in every new record."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import HarnessError
from harness.records.changes import changes
from harness.records.log_folder import Resume
from tests.records.test_log_folder import KINDS, Kind, files

MACHINE = {"processor": "X", "torch_threads": 1, "accelerators": ["A"], "cuda": "12", "memory_gib": 8.0}
FIRST: dict[str, Any] = {"git_commit": "a" * 40, "versions": {"torch": "1"}, "machine": MACHINE, "sources": {"m": "1"}}
DIFFERENT = [
    ({"git_commit": "b" * 40}, ["commit aaaaaaaaaaaa -> bbbbbbbbbbbb"]),
    ({"git_commit": "a" * 40 + "-dirty"}, ["commit aaaaaaaaaaaa -> aaaaaaaaaaaa-dirty"]),
    ({"git_commit": None}, ["commit aaaaaaaaaaaa -> none"]),
    ({"versions": {"torch": "2", "numpy": "3"}}, ["numpy none -> 3", "torch 1 -> 2"]),
    ({"machine": MACHINE | {"torch_threads": 2}}, ["torch_threads 1 -> 2"]),
    ({"machine": MACHINE | {"processor": "Y\x1b[2J"}}, ["processor X -> Y\\x1b[2J"]),
    ({"sources": {"m": "2", "n": "1"}}, ["code of m changed"]),
    ({"versions": {}, "machine": {}, "sources": {}}, []),  # what an old manifest does not tell
    ({"versions": {"torch": "1", "ray": "3"}, "machine": MACHINE | {"memory_gib": 4.0, "accelerators": []}}, []),
]


@pytest.mark.parametrize(("other", "says"), DIFFERENT)
def test_what_decides_numbers_on_a_processor_is_compared(other: dict[str, Any], says: list[str]) -> None:
    first, now = SimpleNamespace(**FIRST), SimpleNamespace(**FIRST | other)
    assert list(changes(first, now, device="cpu")) == says


def test_a_gpu_and_workers_elsewhere_are_compared_by_what_decides_there() -> None:
    first = SimpleNamespace(**FIRST)
    moved = {"processor": "Y", "torch_threads": 2, "accelerators": ["B", "B"], "cuda": "13"}
    now = SimpleNamespace(**FIRST | {"machine": MACHINE | moved})
    assert changes(first, now, device="cuda:0") == ("accelerators A -> B, B", "cuda 12 -> 13")
    assert changes(first, now, device="cpu", elsewhere=True) == ("torch_threads 1 -> 2",)
    assert changes(first, now, device="cuda", elsewhere=True) == ()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.layout.kind)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


@pytest.mark.parametrize("change", [{"git_commit": "b"}, {"versions": {"torch": "2"}}, {"sources": {"m": "2"}}])
def test_another_environment_is_refused_in_one_line_and_nothing_changes(
    kind: Kind, tmp_path: Path, change: dict[str, Any]
) -> None:
    before = {"git_commit": "a", "versions": {"torch": "1"}, "sources": {"m": "1"}}
    with kind.open(tmp_path, **before) as store:
        kind.add(store, kind.record("a"))
    stored = files(store.folder)
    with pytest.raises(HarnessError, match=r"since it was begun: .*; add --resume-anyway .* another --out$"):
        kind.open(tmp_path, **{**before, **change})
    assert files(store.folder) == stored
    kind.open(tmp_path, **before).close()


def test_records_say_what_changed_since_the_first_session(kind: Kind, tmp_path: Path) -> None:
    for commit, name in (("aaa", "a"), ("bbb", "b"), ("aaa", "c")):
        with kind.resume(tmp_path, Resume(anyway=True), git_commit=commit) as store:
            kind.add(store, kind.record(name))
    found = [record.environment_changes for record in kind.layout.load(store.folder)[1]]
    assert found == [(), ("commit aaa -> bbb",), ()]
    with pytest.raises(HarnessError, match="commit aaa -> ccc"):
        kind.open(tmp_path, git_commit="ccc")


def test_a_folder_with_nothing_left_is_shown_as_it_is_and_says_so(
    kind: Kind, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind.three(tmp_path)
    nothing = Resume[Any](left=lambda store: False)
    with kind.resume(tmp_path, nothing, git_commit="a") as store:
        if "status" in type(store.manifest).model_fields:
            with store.ending():
                pass
            assert store.manifest.status == "finished" and store.manifest.git_commit == kind.manifest.git_commit
    stored = files(store.folder)
    with pytest.raises(KeyboardInterrupt), kind.resume(tmp_path, nothing, git_commit="bbb") as store, store.ending():
        raise KeyboardInterrupt
    assert files(store.folder) == stored
    assert "nothing left to do and stays as it is, although since it was begun: commit none -> bbb" in caplog.text
